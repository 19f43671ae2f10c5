"""The video UNet: one module whose families differ by the data of `UNet3DConfig`."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array, NormScope
from qvd_jax.models.attention import (
    SpatialTransformer,
    SpatioTemporalTransformer,
    TemporalTransformer,
)
from qvd_jax.models.blocks import (
    Downsample,
    ResnetBlock,
    SpatioTemporalResnet,
    TemporalConv,
    Upsample,
)
from qvd_jax.models.layers import FLOAT, LayerSet, TimestepEmbedding, sinusoidal_embedding


@dataclass(frozen=True)
class UNet3DConfig:
    """Every axis on which the families of video UNets differ.

    Levels count from the highest resolution down, in the up path too: entry i of a per-level
    tuple belongs to `down_blocks_i` and to `up_blocks_{n-1-i}`.

    Attributes:
      in_channels: C of the latents, conditioning channels included.
      out_channels: C of the prediction.
      block_channels: C of each level.
      layers_per_block: layers of a down stage; an up stage has one more.
      attention_levels: which levels have spatial transformers; the mid block always has.
      num_heads: heads of the spatial transformers of each level (their number, not their width).
      context_dim: C of the text embedding.
      norm_groups: groups of every GroupNorm.
      down_eps: epsilon of the resnet norms in each down stage.
      mid_eps: epsilon of the resnet norms in the mid block.
      up_eps: epsilon of the resnet norms of each level on the way up.
      resnet_norm_scope: scope of the resnet norms and of `conv_norm_out`.
      temporal_op: what mixes the frames. "motion_module": a temporal transformer behind each
        layer (AnimateDiff, MagicAnimate). "conv_transformer": a temporal convolution behind each
        resnet, a temporal transformer behind each spatial one (ModelScope). "spatio_temporal": a
        temporal branch inside each resnet and transformer, blended with the spatial one (SVD).
        None: nothing does, as in an image model.
      temporal_norm_scope: scope of the temporal operator's norms; SVD's are always joint.
      temporal_heads: heads of the temporal attention of each level.
      max_frames: length of the positional table of the frames; None where there is none, and
        any number of frames may run at once.
      temporal_mid_block: whether the mid block has a motion module.
      input_transformer_channels: C of the tokens of a temporal transformer behind `conv_in`
        (ModelScope); None leaves it out.
      added_ids: how many numbers beside the timestep enter the time embedding (SVD: 3).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    norm_groups: int = 32
    down_eps: tuple[float, ...] = (1e-5, 1e-5, 1e-5, 1e-5)
    mid_eps: float = 1e-5
    up_eps: tuple[float, ...] = (1e-5, 1e-5, 1e-5, 1e-5)
    resnet_norm_scope: NormScope = "frame"
    temporal_op: Literal["motion_module", "conv_transformer", "spatio_temporal"] | None = (
        "motion_module"
    )
    temporal_norm_scope: NormScope = "joint"
    temporal_heads: tuple[int, ...] = (8, 8, 8, 8)
    max_frames: int | None = 32
    temporal_mid_block: bool = False
    input_transformer_channels: int | None = None
    added_ids: int = 0

    def __post_init__(self) -> None:
        levels = len(self.block_channels)
        if not levels or self.layers_per_block < 1:
            raise ValueError("UNet3DConfig needs at least one level and one layer per block")
        for name in ("attention_levels", "num_heads", "down_eps", "up_eps", "temporal_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"UNet3DConfig.{name} has {len(getattr(self, name))} entries, one for each "
                    f"of the {levels} levels of block_channels is needed"
                )
        for level, channels in enumerate(self.block_channels):
            for name, divisor in (
                ("norm_groups", self.norm_groups),
                ("num_heads", self.num_heads[level]),
                ("temporal_heads", self.temporal_heads[level]),
            ):
                if divisor < 1 or channels % divisor:
                    raise ValueError(
                        f"UNet3DConfig.{name} = {divisor} does not divide the {channels} "
                        f"channels of level {level}"
                    )

    @property
    def stride(self) -> int:
        """By how much H and W of the latents must be divisible."""
        return 2 ** (len(self.block_channels) - 1)


def animatediff(
    version: Literal["v1", "v2", "v3"], norms: Literal["diffusers", "original"] = "diffusers"
) -> UNet3DConfig:
    """AnimateDiff on Stable Diffusion 1.5.

    The published implementations normalize over different scopes with the same weights:
    diffusers joins the frames in the motion modules; the original code never does, but joins
    them in the resnets of v1.

    Args:
      version: generation of the motion module; v2 alone has one in the mid block.
      norms: whose GroupNorm scopes to follow.
    """
    return UNet3DConfig(
        max_frames=24 if version == "v1" else 32,
        temporal_mid_block=version == "v2",
        temporal_norm_scope="joint" if norms == "diffusers" else "frame",
        resnet_norm_scope="joint" if (version, norms) == ("v1", "original") else "frame",
    )


MODELSCOPE = UNet3DConfig(
    num_heads=(5, 10, 20, 20),
    context_dim=1024,
    temporal_op="conv_transformer",
    temporal_heads=(5, 10, 20, 20),
    max_frames=None,
    input_transformer_channels=512,
)
"""ModelScope's and ZeroScope's UNet."""

STABLE_VIDEO_DIFFUSION = UNet3DConfig(
    in_channels=8,
    num_heads=(5, 10, 20, 20),
    context_dim=1024,
    down_eps=(1e-6, 1e-6, 1e-6, 1e-5),
    up_eps=(1e-6, 1e-6, 1e-6, 1e-6),
    temporal_op="spatio_temporal",
    temporal_heads=(5, 10, 20, 20),
    max_frames=None,
    added_ids=3,
)
"""Stable Video Diffusion's UNet, with the epsilons of diffusers."""

_INPUT_TRANSFORMER_HEADS = 8
_ADDED_ID_WIDTH = 256


def _up_inputs(config: UNet3DConfig) -> list[list[tuple[int, int]]]:
    """C from below and C of the skip, of each layer of each up stage, in the stages' order."""
    widths = config.block_channels
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (config.layers_per_block + (level < len(widths) - 1))
    stages = []
    below = widths[-1]
    for width in reversed(widths):
        pairs = []
        for _ in range(config.layers_per_block + 1):
            pairs.append((below, skips.pop()))
            below = width
        stages.append(pairs)
    return stages


def shortcut_splits(config: UNet3DConfig) -> dict[str, int]:
    """How many channels come before the skip's, for each layer that reads a concatenation."""
    return {
        f"up_blocks_{i}/blocks_{j}/resnet/{name}": below
        for i, pairs in enumerate(_up_inputs(config))
        for j, (below, _) in enumerate(pairs)
        for name in ("conv1", "conv_shortcut")
    }


class Features(NamedTuple):
    """What the layers need and the latents do not change, computed before the sampling loop.

    Each field is nested as the stages are: a tuple over stages of a tuple over layers.

    Attributes:
      down: of `down_blocks`.
      mid: of `mid_block`, one stage.
      up: of `up_blocks`.
    """

    down: Any
    mid: Any
    up: Any


class Layer(nn.Module):
    """A resnet and its spatial transformer, with the temporal operators of the family.

    Attributes:
      config: the UNet's.
      level: the level whose widths and heads apply.
      in_channels: C of the input, skip included.
      epsilon: epsilon of the resnet's norms.
      has_attention: whether there is a spatial transformer.
      has_motion: whether there is a motion module.
      layers: the layer classes.
    """

    config: UNet3DConfig
    level: int
    in_channels: int
    epsilon: float
    has_attention: bool
    has_motion: bool
    layers: LayerSet

    def setup(self) -> None:
        config, layers = self.config, self.layers
        channels, groups = config.block_channels[self.level], config.norm_groups
        blended = config.temporal_op == "spatio_temporal"

        def temporal_transformer() -> TemporalTransformer:
            return TemporalTransformer(
                channels,
                channels,
                config.temporal_heads[self.level],
                config.max_frames,
                groups,
                config.temporal_norm_scope,
                layers,
            )

        self.resnet = (SpatioTemporalResnet if blended else ResnetBlock)(
            self.in_channels, channels, groups, self.epsilon, config.resnet_norm_scope, layers
        )
        if config.temporal_op == "conv_transformer":
            self.temporal_conv = TemporalConv(channels, groups, config.temporal_norm_scope, layers)
        if self.has_attention:
            self.attention = (SpatioTemporalTransformer if blended else SpatialTransformer)(
                channels, config.num_heads[self.level], groups, layers
            )
            if config.temporal_op == "conv_transformer":
                self.temporal_attention = temporal_transformer()
        if self.has_motion:
            self.motion_module = temporal_transformer()

    def temporal_features(self, activated_embedding: Array) -> Any:
        """The resnet's projections of the time embedding."""
        return self.resnet.temporal_features(activated_embedding)

    def context_features(self, context: Array) -> Any:
        """What the transformer needs of the context, or None without one."""
        return self.attention.context_features(context) if self.has_attention else None

    def __call__(self, x: Array, temporal: Any, context: Any) -> Array:
        """Maps `[B, F, H, W, in_channels]` to `[B, F, H, W, C]`."""
        conv_transformer = self.config.temporal_op == "conv_transformer"
        x = self.resnet(x, temporal)
        if conv_transformer:
            x = self.temporal_conv(x)
        if self.has_attention:
            x = self.attention(x, context)
            if conv_transformer:
                x = self.temporal_attention(x)
        if self.has_motion:
            x = self.motion_module(x)
        return x


class Stage(nn.Module):
    """The layers of one level and the sampler behind them.

    Attributes:
      config: the UNet's.
      level: the level.
      in_channels: C of the input of each layer, skip included.
      epsilon: epsilon of the resnet norms.
      has_attention: whether each layer has a spatial transformer.
      has_motion: whether each layer has a motion module.
      sampler: what follows the layers.
      layers: the layer classes.
    """

    config: UNet3DConfig
    level: int
    in_channels: tuple[int, ...]
    epsilon: float
    has_attention: tuple[bool, ...]
    has_motion: tuple[bool, ...]
    sampler: Literal["down", "up"] | None
    layers: LayerSet

    def setup(self) -> None:
        self.blocks = [
            Layer(self.config, self.level, width, self.epsilon, attention, motion, self.layers)
            for width, attention, motion in zip(
                self.in_channels, self.has_attention, self.has_motion, strict=True
            )
        ]
        channels = self.config.block_channels[self.level]
        if self.sampler == "down":
            self.downsample = Downsample(channels, self.layers)
        elif self.sampler == "up":
            self.upsample = Upsample(channels, self.layers)

    def temporal_features(self, activated_embedding: Array) -> tuple[Any, ...]:
        """Each layer's projections of the time embedding."""
        return tuple(block.temporal_features(activated_embedding) for block in self.blocks)

    def context_features(self, context: Array) -> tuple[Any, ...]:
        """What each layer needs of the context."""
        return tuple(block.context_features(context) for block in self.blocks)

    def __call__(
        self, x: Array, temporal: Any, context: Any, skips: list[Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """Runs the stage.

        Args:
          x: `[B, F, H, W, C]`.
          temporal: this stage's temporal features.
          context: this stage's context features.
          skips: on the way up, the stack from which each layer takes its skip.

        Returns:
          The result, and every intermediate result a skip may be taken from, oldest first.
        """
        results = []
        for block, feature, keys_values in zip(self.blocks, temporal, context, strict=True):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(x, feature, keys_values)
            results.append(x)
        if self.sampler is not None:
            x = self.downsample(x) if self.sampler == "down" else self.upsample(x)
            results.append(x)
        return x, results


class UNet3D(nn.Module):
    """Predicts the noise (or v) of video latents.

    Sampling calls `temporal_features` for all steps and `context_features` for the prompts once,
    then `denoise` at every step; `__call__` does all three.

    Attributes:
      config: the family's data.
      layers: the layer classes and dtypes.
    """

    config: UNet3DConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        config, layers = self.config, self.layers
        widths = config.block_channels
        last = len(widths) - 1

        def stage(
            level: int,
            inputs: tuple[int, ...],
            epsilon: float,
            sampler: Literal["down", "up"] | None,
        ) -> Stage:
            attention = (config.attention_levels[level],) * len(inputs)
            motion = (config.temporal_op == "motion_module",) * len(inputs)
            return Stage(config, level, inputs, epsilon, attention, motion, sampler, layers)

        embedding = 4 * widths[0]
        self.time_embedding = TimestepEmbedding(embedding, embedding, layers)
        if config.added_ids:
            self.add_embedding = TimestepEmbedding(embedding, embedding, layers)
        self.conv_in = layers.conv(widths[0], (3, 3))
        if config.input_transformer_channels is not None:
            self.transformer_in = TemporalTransformer(
                widths[0],
                config.input_transformer_channels,
                _INPUT_TRANSFORMER_HEADS,
                config.max_frames,
                config.norm_groups,
                config.temporal_norm_scope,
                layers,
            )

        down = []
        for level, width in enumerate(widths):
            inputs = (widths[max(level - 1, 0)],) + (width,) * (config.layers_per_block - 1)
            sampler: Literal["down"] | None = "down" if level < last else None
            down.append(stage(level, inputs, config.down_eps[level], sampler))
        self.down_blocks = down

        self.mid_block = Stage(
            config,
            last,
            (widths[-1],) * 2,
            config.mid_eps,
            (True, False),
            (config.temporal_mid_block, False),
            None,
            layers,
        )

        up = []
        for level, pairs in zip(reversed(range(len(widths))), _up_inputs(config), strict=True):
            inputs = tuple(map(sum, pairs))
            up.append(stage(level, inputs, config.up_eps[level], "up" if level > 0 else None))
        self.up_blocks = up

        self.conv_norm_out = layers.group_norm(config.norm_groups, 1e-5, config.resnet_norm_scope)
        self.conv_out = layers.conv(config.out_channels, (3, 3))

    def temporal_features(self, timesteps: Array, added_ids: Array | None = None) -> Features:
        """Projections of the time embedding for every resnet.

        They depend on nothing but the step, so a sampler computes those of all its steps at once.

        Args:
          timesteps: `[N]`, in units of training timesteps, fractions allowed.
          added_ids: `[N, added_ids]`, or `[1, added_ids]` for all; for a config that has them.

        Returns:
          `[N, C]` for each resnet.
        """
        sinusoid = sinusoidal_embedding(timesteps, self.config.block_channels[0])
        embedding = self.time_embedding(sinusoid.astype(self.layers.dtype))
        if (added_ids is not None) != bool(self.config.added_ids):
            raise ValueError(
                f"the time embedding takes {self.config.added_ids} added ids, "
                f"{'none were' if added_ids is None else 'some were'} given"
            )
        if added_ids is not None:
            ids = sinusoidal_embedding(added_ids.reshape(-1), _ADDED_ID_WIDTH)
            ids = ids.reshape(-1, self.config.added_ids * _ADDED_ID_WIDTH)
            embedding = embedding + self.add_embedding(ids.astype(self.layers.dtype))
        embedding = nn.silu(embedding)
        return Features(
            tuple(stage.temporal_features(embedding) for stage in self.down_blocks),
            self.mid_block.temporal_features(embedding),
            tuple(stage.temporal_features(embedding) for stage in self.up_blocks),
        )

    def context_features(self, context: Array) -> Features:
        """What every transformer needs of the context, which is the same at all steps.

        Args:
          context: text embedding `[B, L, C]`, or SVD's image embedding `[B, 1, C]`.

        Returns:
          For each layer the keys and values, `[B, L, heads, D]` each; in SVD what spatial and
          temporal block add, `[B, 1, C]` each; None where there is no transformer.
        """
        context = context.astype(self.layers.dtype)
        return Features(
            tuple(stage.context_features(context) for stage in self.down_blocks),
            self.mid_block.context_features(context),
            tuple(stage.context_features(context) for stage in self.up_blocks),
        )

    def denoise(self, latents: Array, temporal: Features, context: Features) -> Array:
        """Predicts the noise (or v), given the features of one step and of the prompts.

        Args:
          latents: `[B, F, H, W, C]`, H and W divisible by `config.stride`.
          temporal: of `temporal_features`, N = B or 1.
          context: of `context_features`.

        Returns:
          `[B, F, H, W, C]`, float32.

        Raises:
          ValueError: H or W is not divisible by the stride.
        """
        height, width = latents.shape[2:4]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"latents of {height}x{width} positions: the UNet halves them "
                f"{len(self.config.block_channels) - 1} times, so both sides must be divisible "
                f"by {self.config.stride}"
            )
        x = self.conv_in(latents.astype(self.layers.dtype))
        if self.config.input_transformer_channels is not None:
            x = self.transformer_in(x)
        skips = [x]
        for stage, feature, text in zip(self.down_blocks, temporal.down, context.down, strict=True):
            x, results = stage(x, feature, text)
            skips += results
        x, _ = self.mid_block(x, temporal.mid, context.mid)
        for stage, feature, text in zip(self.up_blocks, temporal.up, context.up, strict=True):
            x, _ = stage(x, feature, text, skips)
        x = nn.silu(self.conv_norm_out(x))
        return self.conv_out(x).astype(jnp.float32)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        added_ids: Array | None = None,
    ) -> Array:
        """Predicts the noise (or v) of `latents` at `timesteps`.

        Args:
          latents: `[B, F, H, W, C]`.
          timesteps: `[N]`, N = B or 1.
          context: as in `context_features`, one for each video (not for each frame).
          added_ids: as in `temporal_features`.

        Returns:
          `[B, F, H, W, C]`, float32.
        """
        return self.denoise(
            latents,
            self.temporal_features(timesteps, added_ids),
            self.context_features(context),
        )
