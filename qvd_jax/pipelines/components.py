"""The networks of a checkpoint: their configs, their modules, the shapes of their parameters."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.meshes import GUIDANCE, Work
from qvd_jax.models.clip import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
)
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL, VAEConfig
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import Quantization
from qvd_jax.quant.record import layout, layouts, replace_layers

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

GAINS = "unet_gains"
"""The item that holds the scales of steps of a UNet which has them."""


@dataclass(frozen=True)
class ComponentConfigs:
    """The configs of a checkpoint's networks; None where a family has none.

    Attributes:
      unet: of the `UNet3D`.
      vae: of the `AutoencoderKL`.
      text_encoder: of the `CLIPTextEncoder`.
      image_encoder: of the `CLIPVisionEncoder`.
    """

    unet: UNet3DConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig | None = None
    image_encoder: CLIPVisionConfig | None = None

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks there are."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def items(self, quantization: Quantization | None = None) -> tuple[str, ...]:
        """The names of a checkpoint's trees of arrays."""
        specs = quantization.specs.values() if quantization else ()
        return (*self.networks, *([GAINS] if any(spec.ranges == "step" for spec in specs) else []))

    def modules(
        self, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> dict[str, nn.Module]:
        """The networks as modules that compute and store in `dtype`, by name."""
        layers = replace(FLOAT, dtype=dtype, param_dtype=dtype)
        unet_layers = layers if quantization is None else layer_set(quantization.specs, dtype)
        modules: dict[str, nn.Module] = {
            "unet": UNet3D(self.unet, unet_layers),
            "vae": AutoencoderKL(self.vae, layers),
        }
        if self.text_encoder is not None:
            modules["text_encoder"] = CLIPTextEncoder(self.text_encoder, layers)
        if self.image_encoder is not None:
            modules["image_encoder"] = CLIPVisionEncoder(self.image_encoder, layers)
        return modules

    def example_inputs(self) -> dict[str, tuple[Array | None, ...]]:
        """The smallest inputs that initialize the networks, by name."""
        side, pixels = self.unet.stride, self.vae.stride
        shapes = self.unet_shapes(1, side, side, 1)
        inputs: dict[str, tuple[Array | None, ...]] = {
            "unet": tuple(None if s is None else jnp.zeros(s.shape) for s in shapes),
            "vae": (jnp.zeros((1, 1, pixels, pixels, self.vae.channels)),),
        }
        if self.text_encoder is not None:
            inputs["text_encoder"] = (jnp.zeros((1, self.text_encoder.max_length), jnp.int32),)
        if self.image_encoder is not None:
            size = self.image_encoder.image_size
            inputs["image_encoder"] = (jnp.zeros((1, size, size, 3)),)
        return inputs

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape `[F, h, w, C]` of the latents of one video.

        Raises:
          InputError: there are no frames, or a side is no multiple of the VAE's stride.
        """
        if frames < 1:
            raise InputError(f"frames = {frames}: at least one is needed")
        return frames, *latents_size(height, width, self.vae.stride), self.vae.latent_channels

    def unet_shapes(
        self, frames: int, height: int, width: int, context_length: int
    ) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """What one video's latents `[1, F, h, w, C]` enter the UNet with, in its call's order."""
        config = self.unet
        shapes = (
            (1, frames, height, width, config.in_channels),
            (1,),
            (1, context_length, config.context_dim),
            (1, config.added_ids) if config.added_ids else None,
            self.control_shape(frames, height, width) if config.controlnet else None,
            (1, 1, height, width, config.in_channels) if config.appearance_encoder else None,
        )
        return tuple(None if s is None else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)

    def work(self, videos: int, window: int, height: int, width: int, *, guided: bool) -> Work:
        """What there is to divide of a batch.

        Args:
          videos: B.
          window: F the UNet sees at once.
          height: H in pixels.
          width: W in pixels.
          guided: whether there is guidance.

        Raises:
          InputError: as of `latents_shape`.
        """
        _, height, width, _ = self.latents_shape(window, height, width)
        whole = {}
        if not guided:
            whole[GUIDANCE] = "there is no guidance"
        elif self.unet.appearance_encoder:
            whole[GUIDANCE] = "the negatives see no reference image"
        return Work(
            videos,
            window,
            tuple(h * w for h, w in self.unet.sizes(height, width)),
            whole,
        )

    def control_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape `[1, F, H, W, C]` of the ControlNet's condition for latents of a size."""
        assert self.unet.controlnet is not None
        scale = 2 ** max(len(self.unet.controlnet.embedding_channels) - 1, 0)
        channels = self.unet.controlnet.condition_channels
        return 1, frames, height * scale, width * scale, channels

    def param_shapes(
        self, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> dict[str, Params]:
        """Trees of `jax.ShapeDtypeStruct` of all networks' parameters, by name."""
        shapes = dict(_float_shapes(self, jnp.dtype(dtype)))
        if quantization is None:
            return shapes
        records = layouts(shapes["unet"], quantization.specs)
        shapes["unet"], gains = replace_layers(shapes["unet"], records)
        if gains:
            steps = len(quantization.timesteps or ())
            shapes[GAINS] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape), leaf.dtype), gains
            )
        return shapes


def in_dtype(
    stored: Mapping[str, Params], dtype: DTypeLike, quantization: Quantization | None
) -> dict[str, Params]:
    """`ComponentConfigs.param_shapes` of arrays that are known to fit, without a trace.

    Args:
      stored: trees of `jax.ShapeDtypeStruct`, by name.
      dtype: of the float networks.
      quantization: of the UNet.
    """
    specs = quantization.specs if quantization else {}
    unet = flax.traverse_util.flatten_dict(stored["unet"], sep="/")
    dtypes: dict[str, DTypeLike] = {}
    for path, spec in specs.items():
        features, *kernel_size, channels = unet[f"{path}/kernel"].shape
        record = layout(spec, channels, features, kernel_size).params()
        dtypes |= {f"{path}/{name}": leaf.dtype for name, leaf in record.items()}
    shapes = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
        for name, tree in stored.items()
        if name not in ("unet", GAINS)
    }
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(name, dtype))
        for name, leaf in unet.items()
    }
    shapes["unet"] = flax.traverse_util.unflatten_dict(structs, sep="/")
    if GAINS in stored:
        shapes[GAINS] = stored[GAINS]
    return shapes


def latents_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Height and width of the latents of a frame.

    Args:
      height: H in pixels.
      width: W in pixels.
      stride: of the VAE, pixels for each latent position.

    Raises:
      InputError: a side is no multiple of the stride.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % stride:
            below = max(size // stride, 1) * stride
            raise InputError(
                f"{name} = {size}: it must be a positive multiple of {stride}, the VAE's pixels "
                f"per latent position, such as {below} or {below + stride}"
            )
    return height // stride, width // stride


@functools.lru_cache(maxsize=8)
def _float_shapes(configs: ComponentConfigs, dtype: np.dtype) -> Mapping[str, Params]:
    """Of the float networks. Tracing them takes most of a small load, and many have equal ones."""
    # Without the zeros themselves: a damaged config may ask for any number of them.
    inputs = jax.eval_shape(configs.example_inputs)
    return {
        name: jax.eval_shape(module.init, jax.random.key(0), *inputs[name])["params"]
        for name, module in configs.modules(dtype).items()
    }
