"""The stages that UNet and ControlNet are made of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array, exportable
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
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import LayerSet


def skip_widths(config: UNet3DConfig) -> list[int]:
    """C of each skip, oldest first: of `conv_in`, then of each layer and downsampling."""
    widths = config.block_channels
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (config.layers_per_block + (level < len(widths) - 1))
    return skips


def _up_inputs(config: UNet3DConfig) -> list[list[tuple[int, int]]]:
    """C from below and C of the skip, of each layer of each up stage, in the stages' order."""
    widths = config.block_channels
    skips = skip_widths(config)
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
    resnet = "resnet/spatial" if config.temporal_op == "spatio_temporal" else "resnet"
    unets = ("", "appearance_encoder/") if config.appearance_encoder else ("",)
    return {
        f"{unet}up_blocks_{i}/blocks_{j}/{resnet}/{name}": below
        for unet in unets
        for i, pairs in enumerate(_up_inputs(config))
        for j, (below, _) in enumerate(pairs)
        for name in ("conv1", "conv_shortcut")
    }


@exportable
class Features(NamedTuple):
    """What the layers need and the latents do not change, computed before the sampling loop.

    Each field is nested as the stages are: a tuple over stages of a tuple over layers.

    Attributes:
      down: of `down_blocks`.
      mid: of `mid_block`, one stage.
      up: of `up_blocks`.
      controlnet: of the ControlNet, itself a `Features` without `up`; None where there is none.
      appearance: of the appearance encoder, itself a `Features`; None where there is none.
    """

    down: Any
    mid: Any
    up: Any = ()
    controlnet: Any = None
    appearance: Any = None


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
                config.motion_attentions,
                config.positions,
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
        for block, feature, text in zip(self.blocks, temporal, context, strict=True):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(x, feature, text)
            results.append(x)
        if self.sampler == "down":
            x = self.downsample(x)
        elif self.sampler == "up":
            x = self.upsample_to(x, skips or [])
        if self.sampler is not None:
            results.append(x)
        return x, results

    def upsample_to(self, x: Array, skips: list[Array]) -> Array:
        """Upsamples to the size of the skip that is read next, or doubles where there is none."""
        return self.upsample(x, skips[-1].shape[2:4] if skips else None)


def _stage(
    config: UNet3DConfig,
    layers: LayerSet,
    level: int,
    inputs: tuple[int, ...],
    epsilon: float,
    sampler: Literal["down", "up"] | None,
) -> Stage:
    attention = (config.attention_levels[level],) * len(inputs)
    motion = (config.temporal_op == "motion_module",) * len(inputs)
    return Stage(config, level, inputs, epsilon, attention, motion, sampler, layers)


def down_stages(config: UNet3DConfig, layers: LayerSet) -> list[Stage]:
    """The way down, from the highest resolution."""
    widths = config.block_channels
    stages = []
    for level, width in enumerate(widths):
        inputs = (widths[max(level - 1, 0)],) + (width,) * (config.layers_per_block - 1)
        sampler: Literal["down"] | None = "down" if level < len(widths) - 1 else None
        stages.append(_stage(config, layers, level, inputs, config.down_eps[level], sampler))
    return stages


def mid_stage(config: UNet3DConfig, layers: LayerSet) -> Stage:
    """The lowest resolution."""
    widths = config.block_channels
    motion = (config.temporal_mid_block, False)
    inputs, attention = (widths[-1],) * 2, (True, False)
    level = len(widths) - 1
    return Stage(config, level, inputs, config.mid_eps, attention, motion, None, layers)


def up_stages(config: UNet3DConfig, layers: LayerSet) -> list[Stage]:
    """The way up, from the lowest resolution."""
    levels = reversed(range(len(config.block_channels)))
    stages = []
    for level, pairs in zip(levels, _up_inputs(config), strict=True):
        inputs = tuple(map(sum, pairs))
        sampler: Literal["up"] | None = "up" if level > 0 else None
        stages.append(_stage(config, layers, level, inputs, config.up_eps[level], sampler))
    return stages


def map_stages(
    compute: Callable[[Stage], Any], down: Sequence[Stage], mid: Stage, up: Sequence[Stage] = ()
) -> Features:
    """What `compute` gives of each stage."""
    return Features(tuple(map(compute, down)), compute(mid), tuple(map(compute, up)))


def run_down(
    stages: Sequence[Stage], x: Array, temporal: Features, context: Features
) -> tuple[Array, list[Array]]:
    """Runs the way down.

    Args:
      stages: of `down_stages`.
      x: `[B, F, H, W, C]`, of `conv_in`.
      temporal: the stages' temporal features.
      context: the stages' context features.

    Returns:
      What the lowest resolution is given, and the skips in the order of `skip_widths`.
    """
    skips = [x]
    for stage, feature, text in zip(stages, temporal.down, context.down, strict=True):
        x, results = stage(x, feature, text)
        skips += results
    return x, skips
