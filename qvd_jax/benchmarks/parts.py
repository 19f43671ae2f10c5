"""What is compiled: the whole UNet, what decodes one video, or parts of the UNet, by name.

    unet           one forward of the UNet
    vae            the VAE's decoder, with one video
    LEVEL.KIND     a part of the UNet, as it stands in it

LEVEL counts from the highest resolution: 0, 1, ... are those of the way down, up0, up1, ... of the
way up, between them mid. KIND is one of `KINDS`; its layer is the last of the level, in the middle
the one with the transformer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from qvd_jax.benchmarks.unet import Case
from qvd_jax.errors import InputError
from qvd_jax.meshes import AXES, DATA, FRAME, GUIDANCE
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.models.stages import Layer, Stage, down_stages, mid_stage, up_stages
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL, VAEConfig, to_bytes

UNET = "unet"
VAE = "vae"


@dataclass(frozen=True)
class Part:
    """A network, or a part of one, that a program is compiled of.

    Attributes:
      network: makes the network of layers.
      method: called with the network, and with `inputs`.
      inputs: shapes, of the dtype that is asked for.
      placed: how each input lies on a mesh; the result lies as the first.
    """

    network: Callable[[LayerSet], nn.Module]
    method: Callable[..., Any]
    inputs: tuple[Any, ...]
    placed: tuple[PartitionSpec, ...]


_ROWS = (DATA, GUIDANCE)
_VIDEOS, _FRAMES = PartitionSpec(_ROWS), PartitionSpec(_ROWS, FRAME)
_PLACES = {
    "x": _FRAMES,
    "wide": _FRAMES,
    "tokens": _FRAMES,
    # All frames of positions.
    "moved": PartitionSpec(_ROWS, None, FRAME),
    "temporal": PartitionSpec(),
    "context": _VIDEOS,
}
"""How inputs lie on a mesh, by their names."""


class Kind(NamedTuple):
    """A kind of part.

    Attributes:
      exists: whether a stage has one in its layer of a number.
      inputs: names of what it is called with, as in `_inputs`.
      call: of the stage, its layer, and the inputs.
    """

    exists: Callable[[Stage, int], bool]
    inputs: tuple[str, ...]
    call: Callable[..., Any]


def _always(stage: Stage, number: int) -> bool:
    return True


def _has_attention(stage: Stage, number: int) -> bool:
    return stage.has_attention[number]


def _blends(stage: Stage) -> bool:
    return stage.config.temporal_op == "spatio_temporal"


def _is_spatial(stage: Stage, number: int) -> bool:
    return stage.has_attention[number] and not _blends(stage)


def _is_spatio_temporal(stage: Stage, number: int) -> bool:
    return stage.has_attention[number] and _blends(stage)


def _has_motion(stage: Stage, number: int) -> bool:
    return stage.has_motion[number]


def _has_sampler(stage: Stage, number: int) -> bool:
    return stage.sampler is not None


def _sample(stage: Stage, layer: Layer, x: Any) -> Any:
    return stage.downsample(x) if stage.sampler == "down" else stage.upsample(x)


def _self_attention(stage: Stage, layer: Layer, x: Any) -> Any:
    block = layer.attention.block
    return block.attn1(block.norm1(x), x)


def _cross_attention(stage: Stage, layer: Layer, x: Any, context: Any) -> Any:
    block = layer.attention.block
    return block.attn2(block.norm2(x), x, context)


def _feed_forward(stage: Stage, layer: Layer, x: Any) -> Any:
    block = layer.attention.block
    return block.ff(block.norm3(x), x)


def _temporal_attention(stage: Stage, layer: Layer, x: Any) -> Any:
    block = layer.motion_module.block
    return block.attn1(block.norm1(x), x)


KINDS = {
    # A resnet with all that follows it up to the next.
    "layer": Kind(
        _always,
        ("wide", "temporal", "context"),
        lambda stage, layer, *inputs: layer(*inputs),
    ),
    "resnet": Kind(
        _always, ("wide", "temporal"), lambda stage, layer, *inputs: layer.resnet(*inputs)
    ),
    "spatial": Kind(
        _is_spatial, ("x", "context"), lambda stage, layer, *inputs: layer.attention(*inputs)
    ),
    # SVD's transformer, whose temporal block is blended with the spatial one.
    "spatio_temporal": Kind(
        _is_spatio_temporal,
        ("x", "context"),
        lambda stage, layer, *inputs: layer.attention(*inputs),
    ),
    "motion": Kind(_has_motion, ("x",), lambda stage, layer, x: layer.motion_module(x)),
    # Each with the norm before it and the addition behind it.
    "self_attention": Kind(_has_attention, ("tokens",), _self_attention),
    "cross_attention": Kind(_is_spatial, ("tokens", "context"), _cross_attention),
    "feed_forward": Kind(_has_attention, ("tokens",), _feed_forward),
    "temporal_attention": Kind(_has_motion, ("moved",), _temporal_attention),
    # The convolution that halves or doubles the resolution.
    "sampler": Kind(_has_sampler, ("x",), _sample),
}


def names(config: UNet3DConfig) -> list[str]:
    """The names of all that can be compiled of a UNet, and of the VAE."""
    return [
        UNET,
        VAE,
        *(
            f"{level}.{name}"
            for level, (stage, number, _) in _levels(config).items()
            for name, kind in KINDS.items()
            if kind.exists(stage, number)
        ),
    ]


def check(name: str, config: UNet3DConfig) -> None:
    """Raises `InputError` if a name is none of `names`."""
    known = names(config)
    if name not in known:
        raise InputError(f"unknown part {name!r}; known are {', '.join(known)}")


def count(name: str, config: UNet3DConfig) -> int:
    """In how many layers of its level a part of LEVEL.KIND stands."""
    level, _, kind = name.partition(".")
    stage = _levels(config)[level].stage
    return sum(KINDS[kind].exists(stage, number) for number in range(len(stage.in_channels)))


def find(name: str, case: Case, dtype: DTypeLike) -> Part:
    """The part of a name.

    Args:
      name: one of `names`.
      case: the UNet, and how large its inputs are.
      dtype: of the inputs, timesteps excepted.
    """
    latents, timesteps, context, *ids = case.shapes()
    if name == VAE:
        # The pipelines decode one video after the other. Frames that see each other divide as the
        # UNet's, others among all.
        together = case.config.temporal_op == "spatio_temporal"
        vae = VAEConfig(temporal_decoder=together)
        return Part(
            lambda layers: AutoencoderKL(vae, layers),
            lambda vae, latents: to_bytes(vae.decode(latents / vae.config.scaling_factor)),
            (jax.ShapeDtypeStruct((1, *latents.shape[1:-1], vae.latent_channels), dtype),),
            (PartitionSpec(None, FRAME if together else AXES),),
        )

    def network(layers: LayerSet) -> nn.Module:
        return UNet3D(case.config, layers)

    if name == UNET:
        latents, context = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (latents, context))
        placed = _FRAMES, PartitionSpec(), _VIDEOS, *(PartitionSpec() for _ in ids)
        return Part(network, UNet3D.__call__, (latents, timesteps, context, *ids), placed)
    level, _, kind = name.partition(".")
    place = _levels(case.config)[level]

    def call(unet: UNet3D, *inputs: Any) -> Any:
        stage = place.bound(unet)
        return KINDS[kind].call(stage, stage.blocks[place.number], *inputs)

    shapes = _inputs(case, place.stage, place.number, dtype)
    names = KINDS[kind].inputs
    inputs = tuple(shapes[given] for given in names)
    return Part(network, call, inputs, tuple(_PLACES[given] for given in names))


class _Place(NamedTuple):
    """The layer of a level that is taken: that of a number in a stage of the UNet."""

    stage: Stage
    number: int
    bound: Callable[[UNet3D], Stage]


def _levels(config: UNet3DConfig) -> dict[str, _Place]:
    depth, last = len(config.block_channels), config.layers_per_block
    down, up = down_stages(config, FLOAT), up_stages(config, FLOAT)

    def on_the_way(direction: str, number: int) -> Callable[[UNet3D], Stage]:
        return lambda unet: getattr(unet, direction)[number]

    places = {
        str(level): _Place(down[level], last - 1, on_the_way("down_blocks", level))
        for level in range(depth)
    }
    places["mid"] = _Place(mid_stage(config, FLOAT), 0, lambda unet: unet.mid_block)
    for level in range(depth):
        number = depth - 1 - level
        places[f"up{level}"] = _Place(up[number], last, on_the_way("up_blocks", number))
    return places


def _inputs(case: Case, stage: Stage, number: int, dtype: DTypeLike) -> dict[str, Any]:
    """What the kinds of parts are called with, by name."""
    config, level = case.config, stage.level
    channels = config.block_channels[level]
    height, width = config.sizes(case.height, case.width)[level]
    positions = height * width

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def features(method: Callable[..., Any], x: jax.ShapeDtypeStruct) -> Any:
        """What the layer is given of what the stage makes of time embedding or context."""
        compute = functools.partial(stage.init_with_output, method=method)
        found, _ = jax.eval_shape(compute, jax.random.key(0), x)
        return jax.tree.map(lambda leaf: shape(*leaf.shape), found[number])

    return {
        "x": shape(case.batch, case.frames, height, width, channels),
        # With the skip's channels.
        "wide": shape(case.batch, case.frames, height, width, stage.in_channels[number]),
        "tokens": shape(case.batch, case.frames, positions, channels),
        "moved": shape(case.batch, case.frames, positions, channels),
        "temporal": features(Stage.temporal_features, shape(1, 4 * config.block_channels[0])),
        "context": features(
            Stage.context_features, shape(case.batch, case.context_length, config.context_dim)
        ),
    }
