"""Text to video: tokenizer, text encoder, sampling loop, VAE decoder."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qvd_jax import checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.config import from_dict, to_dict
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.diffusion.solvers import Schedule, make_schedule
from qvd_jax.errors import InputError, first_line
from qvd_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from qvd_jax.models.layers import FLOAT
from qvd_jax.models.unet3d import UNet3D, UNet3DConfig
from qvd_jax.models.vae import AutoencoderKL, VAEConfig
from qvd_jax.quant.calibration import LayerReport
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import Quantization

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

FAMILIES = ("animatediff", "modelscope")
"""Of the checkpoints this pipeline samples."""

GAINS = "unet_gains"

StepCallback = Callable[[int, Array], None]

# The decoder's largest activations grow with the pixels it handles at once: eight frames of
# 512x512, or all frames of a small video.
_DECODE_PIXELS = 8 * 512 * 512


@dataclass(frozen=True)
class VideoDefaults:
    """What a video is like when nobody asks otherwise.

    Attributes:
      frames: F.
      height: H in pixels.
      width: W in pixels.
      steps: S.
      guidance_scale: of classifier-free guidance; 1 or less turns it off.
      fps: frames per second of the written file.
      prompts: examples.
    """

    frames: int = 16
    height: int = 512
    width: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    fps: int = 8
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComponentConfigs:
    """The configs of a text-to-video checkpoint's components.

    Attributes:
      unet: of the `UNet3D`.
      vae: of the `AutoencoderKL`.
      text_encoder: of the `CLIPTextEncoder`.
    """

    unet: UNet3DConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig

    def modules(
        self, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> dict[str, nn.Module]:
        """The components as modules that compute and store in `dtype`, by name."""
        layers = replace(FLOAT, dtype=dtype, param_dtype=dtype)
        unet_layers = layers if quantization is None else layer_set(quantization.specs, dtype)
        return {
            "unet": UNet3D(self.unet, unet_layers),
            "vae": AutoencoderKL(self.vae, layers),
            "text_encoder": CLIPTextEncoder(self.text_encoder, layers),
        }

    def example_inputs(self) -> dict[str, tuple[Array, ...]]:
        """The smallest inputs that initialize the components, by name."""
        side, pixels = self.unet.stride, self.vae.stride
        latents = jnp.zeros((1, 1, side, side, self.unet.in_channels))
        text = jnp.zeros((1, 1, self.unet.context_dim))
        video = jnp.zeros((1, 1, pixels, pixels, self.vae.channels))
        return {
            "unet": (latents, jnp.zeros(1), text),
            "vae": (video,),
            "text_encoder": (jnp.zeros((1, self.text_encoder.max_length), jnp.int32),),
        }

    def param_shapes(
        self, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> dict[str, Params]:
        """Trees of `jax.ShapeDtypeStruct` of all components' parameters, by name."""
        inputs = self.example_inputs()
        shapes = {}
        for name, module in self.modules(dtype, quantization).items():
            variables = jax.eval_shape(module.init, jax.random.key(0), *inputs[name])
            shapes[name] = variables["params"]
            if "quant" in variables and quantization is not None:
                steps = quantization.steps
                shapes[GAINS] = jax.tree.map(
                    lambda leaf, steps=steps: jax.ShapeDtypeStruct((steps,), leaf.dtype),
                    variables["quant"],
                )
        return shapes


@dataclass(frozen=True)
class TextToVideoPipeline:
    """A text-to-video model, ready to sample.

    Attributes:
      unet: predicts the noise.
      vae: maps latents to pixels.
      text_encoder: maps token ids to the text embedding.
      params: the three modules' parameters, by these names; with step-aware scales also theirs,
        "unet_gains", `[S]` for each layer.
      tokenizer: of transformers.
      scheduler: noise schedule and solver.
      defaults: what a call leaves open.
      family: which kind of model it is, such as "animatediff".
      description: one line on where the weights came from.
      quantization: how the UNet is quantized; None is float.
    """

    unet: UNet3D
    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    params: dict[str, Params] = field(repr=False)
    tokenizer: Any = field(repr=False)
    scheduler: SchedulerConfig
    defaults: VideoDefaults
    family: str
    description: str
    quantization: Quantization | None = None

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        latents: Array | np.ndarray | None = None,
        output_type: Literal["video", "latents"] = "video",
        callback_on_step_end: StepCallback | None = None,
    ) -> np.ndarray:
        """Samples one video for each prompt.

        A video depends on its prompt, the seed and its place among the prompts, not on how many
        there are. Another shape (videos, frames, size, steps, guidance on or off) compiles once;
        other prompts, seeds and guidance scales do not.

        Args:
          prompts: one or more.
          negative_prompts: none, one for all, or one for each prompt.
          frames: F; more than the motion modules' positions run in overlapping windows.
          height: H in pixels, divisible by the strides of VAE and UNet.
          width: W in pixels, likewise.
          steps: S.
          guidance_scale: 1 or less samples without guidance.
          seed: of the noise.
          latents: unit-normal noise `[B, F, h, w, C]` instead of the drawn one.
          output_type: "video" or "latents".
          callback_on_step_end: called after each step with the number of finished steps and the
            latents, which it must copy to keep. Without it all steps run as one scan, with it as
            one scan of length one each.

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          InputError: an argument does not fit, before anything is computed; or a step produced
            values that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _negative_prompts(negative_prompts, len(prompts))
        asked: dict[str, Any] = {
            "frames": frames,
            "height": height,
            "width": width,
            "steps": steps,
            "guidance_scale": guidance_scale,
        }
        want = replace(self.defaults, **{k: v for k, v in asked.items() if v is not None})
        shape = self.latents_shape(want.frames, want.height, want.width)
        schedule = make_schedule(self.scheduler, want.steps)
        known = self.quantization.steps if self.quantization else None
        if known not in (None, want.steps):
            raise InputError(
                f"steps = {want.steps}: the checkpoint's scales are of {known} steps, one for each"
            )
        _check_choice("output_type", output_type, ("video", "latents"))
        if latents is None:
            noise = sampler.initial_noise(seed, len(prompts), shape)
        else:
            noise = jnp.asarray(latents, jnp.float32)
            if noise.shape != (len(prompts), *shape):
                raise InputError(
                    f"latents of shape {noise.shape}: {(len(prompts), *shape)} is needed for "
                    f"{len(prompts)} videos of {want.frames} frames, {want.height}x{want.width}"
                )
        guided = want.guidance_scale > 1
        context = self.encode_text(negatives + prompts if guided else prompts)
        result = self._sample(
            noise * schedule.initial_scale,
            schedule,
            context,
            want,
            seed,
            guided,
            callback_on_step_end,
        )
        return np.asarray(result) if output_type == "latents" else self.decode(result)

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape `[F, h, w, C]` of one video's latents.

        Raises:
          InputError: there are no frames, or a side does not fit the strides.
        """
        if frames < 1:
            raise InputError(f"frames = {frames}: at least one is needed")
        pixels = self.vae.config.stride
        divisor = pixels * self.unet.config.stride
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % divisor:
                below = max(size // divisor, 1) * divisor
                raise InputError(
                    f"{name} = {size}: it must be a positive multiple of {divisor} (the VAE's "
                    f"{pixels} pixels per position times the UNet's stride "
                    f"{self.unet.config.stride}), such as {below} or {below + divisor}"
                )
        return frames, height // pixels, width // pixels, self.vae.config.latent_channels

    def encode_text(self, prompts: Sequence[str]) -> Array:
        """Text embedding `[B, L, C]` of the prompts, padded and cut to the tower's length.

        Raises:
          InputError: there is no prompt.
        """
        if not prompts:
            raise InputError("there are no prompts; at least one is needed")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_length,
            return_tensors="np",
        )
        ids = jnp.asarray(tokens["input_ids"], jnp.int32)
        return _encode_text(self.text_encoder, self.params["text_encoder"], ids)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words the tokenizer can only replace by its unknown token, as they are written."""
        tokenizer = self.tokenizer
        tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        return [
            prompt[start:end]
            for token, (start, end) in zip(
                tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
            if token == tokenizer.unk_token_id
        ]

    def decode(self, latents: Array | np.ndarray) -> np.ndarray:
        """Pixels of latents, in chunks of frames so that memory does not grow with their number.

        Args:
          latents: `[B, F, h, w, C]`.

        Returns:
          uint8 `[B, F, H, W, 3]`.
        """
        videos, frames, height, width, _ = latents.shape
        pixels = height * width * self.vae.config.stride**2
        chunks = math.ceil(frames / max(1, _DECODE_PIXELS // pixels))
        size = math.ceil(frames / chunks)
        decoded = []
        for video in latents:
            for start in range(0, frames, size):
                # The last chunk is moved back to be as long as the others: one compilation.
                first = min(start, frames - size)
                part = _decode(self.vae, self.params["vae"], video[None, first : first + size])
                decoded.append(np.asarray(part[0, start - first :]))
        result = np.concatenate(decoded)
        return result.reshape(videos, frames, *result.shape[1:])

    def _sample(
        self,
        latents: Array,
        schedule: Schedule,
        context: Array,
        want: VideoDefaults,
        seed: int,
        guided: bool,
        callback: StepCallback | None,
    ) -> Array:
        limit = self.unet.config.max_frames
        window = want.frames
        if limit is not None and want.frames > limit:
            window = min(self.defaults.frames, limit)
        unet, params = self.unet, self.params["unet"]
        table = jax.tree.map(jnp.asarray, schedule.table)
        steps = len(table.timestep)
        count = steps if callback is None else 1
        # Placed like the text embedding, so that the first call compiles for what later ones see.
        latents = jax.device_put(latents, context.sharding)
        state = sampler.SamplerState(latents, jnp.zeros_like(latents))
        keys = sampler.video_keys(seed, latents.shape[0])
        gains = self.params.get(GAINS)
        conditioning = sampler.prepare(unet, params, table.timestep, context, gains)
        for start in range(0, steps, count):
            state, finite = sampler.sample_steps(
                unet,
                params,
                state,
                table,
                conditioning,
                jnp.float32(want.guidance_scale),
                keys,
                jnp.int32(start),
                count=count,
                window=window,
                guided=guided,
                # A batch saves no time on the CPU, and its rounding would depend on its size.
                one_by_one=jax.default_backend() == "cpu",
                noisy=bool(schedule.table.to_noise.any()),
                clip=schedule.clip,
            )
            finite = np.asarray(finite)
            if not finite.all():
                step = start + int(np.argmin(finite))
                raise InputError(
                    f"step {step + 1} of {steps} (timestep {schedule.table.timestep[step]:g}) "
                    f"gave latents that are not finite; try float32, or a lower guidance scale "
                    f"than {want.guidance_scale:g}"
                )
            if callback is not None:
                callback(start + count, state.latents)
        return state.latents


@functools.partial(jax.jit, static_argnames="encoder")
def _encode_text(encoder: CLIPTextEncoder, params: Params, ids: Array) -> Array:
    # Prompt by prompt: what one is embedded as must not depend on the others, even in rounding.
    return jax.lax.map(lambda row: encoder.apply({"params": params}, row[None])[0], ids)


@functools.partial(jax.jit, static_argnames="vae")
def _decode(vae: AutoencoderKL, params: Params, latents: Array) -> Array:
    latents = latents / vae.config.scaling_factor
    pixels = vae.apply({"params": params}, latents, method="decode")
    return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _negative_prompts(given: str | Sequence[str] | None, count: int) -> list[str]:
    negatives = [given or ""] if given is None or isinstance(given, str) else list(given)
    if len(negatives) == 1:
        negatives *= count
    if len(negatives) != count:
        raise InputError(
            f"{len(negatives)} negative prompts for {count} prompts: none, one, or one for each "
            f"is needed"
        )
    return negatives


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r}: it must be one of {', '.join(choices)}")


def load(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> TextToVideoPipeline:
    """Loads a checkpoint.

    Args:
      path: its folder, or the name of a model of the package ("shapes").
      dtype: float32 or bfloat16, for parameters and computation; None keeps the stored one.
      sharding: where parameters are put; None is the default device.

    Raises:
      InputError: the folder is no checkpoint, damaged, or does not fit its own configs.
    """
    path = checkpoint.find(path)
    manifest = checkpoint.read_manifest(path)
    if manifest.family not in FAMILIES:
        raise InputError(
            f"{path}: unknown family {manifest.family!r}; known: {', '.join(FAMILIES)}"
        )
    where = path / checkpoint.MANIFEST
    configs = from_dict(ComponentConfigs, manifest.components, f"{where}: components")
    scheduler = from_dict(SchedulerConfig, manifest.scheduler, f"{where}: scheduler")
    defaults = from_dict(VideoDefaults, manifest.defaults, f"{where}: defaults")
    quantization = None
    if manifest.quantization is not None:
        quantization = from_dict(Quantization, manifest.quantization, f"{where}: quantization")
    tokenizer = _load_tokenizer(path / checkpoint.TOKENIZER)
    # The VAE is float in every checkpoint.
    dtype = jnp.dtype(dtype or checkpoint.stored_dtype(path, "vae"))
    _check_choice("dtype", dtype.name, tuple(DTYPES))
    params = {
        name: checkpoint.restore_params(path, name, expected, sharding)
        for name, expected in configs.param_shapes(dtype, quantization).items()
    }
    return TextToVideoPipeline(
        **configs.modules(dtype, quantization),
        params=params,
        tokenizer=tokenizer,
        scheduler=scheduler,
        defaults=defaults,
        family=manifest.family,
        description=manifest.description,
        quantization=quantization,
    )


def save(
    pipe: TextToVideoPipeline,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    reports: Sequence[LayerReport] = (),
) -> None:
    """Writes a pipeline as a checkpoint.

    Args:
      pipe: the pipeline.
      path: the folder to make.
      overwrite: whether a checkpoint already there is replaced.
      reports: of the layers of a quantized pipeline.

    Raises:
      InputError: the folder exists, or its parent does not.
    """
    configs = ComponentConfigs(pipe.unet.config, pipe.vae.config, pipe.text_encoder.config)
    manifest = make_manifest(
        configs,
        pipe.scheduler,
        pipe.defaults,
        family=pipe.family,
        description=pipe.description,
        quantization=pipe.quantization,
    )
    with checkpoint.write_directory(Path(path), overwrite=overwrite) as folder:
        for name, params in pipe.params.items():
            checkpoint.save_params(folder, name, params)
        pipe.tokenizer.save_pretrained(folder / checkpoint.TOKENIZER)
        if reports:
            checkpoint.write_layer_reports(folder, [report.figures() for report in reports])
        checkpoint.write_manifest(folder, manifest)


def make_manifest(
    configs: ComponentConfigs,
    scheduler: SchedulerConfig,
    defaults: VideoDefaults,
    *,
    family: str,
    description: str,
    quantization: Quantization | None = None,
) -> checkpoint.Manifest:
    """The manifest of a text-to-video checkpoint."""
    return checkpoint.Manifest(
        family=family,
        components=to_dict(configs),
        scheduler=to_dict(scheduler),
        defaults=to_dict(defaults),
        description=description,
        versions=checkpoint.package_versions(),
        quantization=None if quantization is None else to_dict(quantization),
    )


def _load_tokenizer(folder: Path) -> Any:
    checkpoint.check_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no tokenizer: {first_line(error)}") from error
