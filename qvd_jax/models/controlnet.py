"""ControlNet and SparseCtrl: an encoder whose results are added to a UNet's skips."""

from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array, exportable
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.layers import LayerSet, TimestepEmbedding, silu, sinusoidal_embedding
from qvd_jax.models.stages import (
    Features,
    down_stages,
    map_stages,
    mid_stage,
    run_down,
    skip_widths,
)


@exportable
class Residuals(NamedTuple):
    """What a ControlNet adds.

    Attributes:
      down: to each skip, oldest first.
      mid: behind the mid block.
    """

    down: tuple[Array, ...]
    mid: Array


class ConditionEmbedding(nn.Module):
    """Convolutions from a condition's pixels to the size and width of the UNet's first layer.

    Attributes:
      channels: C of the result.
      widths: C of each resolution, the condition's own first.
      layers: the layer classes.
    """

    channels: int
    widths: tuple[int, ...]
    layers: LayerSet

    def setup(self) -> None:
        layers = self.layers
        self.conv_in = layers.conv(self.widths[0], (3, 3))
        blocks = []
        for before, after in zip(self.widths[:-1], self.widths[1:], strict=True):
            blocks.append(layers.conv(before, (3, 3)))
            blocks.append(layers.conv(after, (3, 3), strides=(2, 2)))
        self.blocks = blocks
        self.conv_out = layers.conv(self.channels, (3, 3))

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, h, w, channels]`."""
        x = silu(self.conv_in(x))
        for block in self.blocks:
            x = silu(block(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The encoder half of a UNet, told of a condition.

    With motion modules of one attention and blind for the latents it is SparseCtrl (Guo et al.,
    arXiv 2311.16933), without motion modules a ControlNet of images, applied frame by frame.

    Attributes:
      unet: config of the UNet it stands beside.
      config: what differs from the UNet's encoder.
      layers: the layer classes.
    """

    unet: UNet3DConfig
    config: ControlNetConfig
    layers: LayerSet

    def setup(self) -> None:
        layers, config = self.layers, self.config
        shape = replace(
            self.unet,
            temporal_op="motion_module" if config.motion_attentions else None,
            motion_attentions=config.motion_attentions,
            temporal_norm_scope=config.temporal_norm_scope,
            positions=config.positions,
            temporal_mid_block=False,
            resnet_norm_scope="frame",
            controlnet=None,
        )
        first = shape.block_channels[0]
        self.time_embedding = TimestepEmbedding(4 * first, 4 * first, layers)
        self.conv_in = layers.conv(first, (3, 3))
        if config.embedding_channels:
            self.controlnet_cond_embedding = ConditionEmbedding(
                first, config.embedding_channels, layers
            )
        else:
            self.controlnet_cond_embedding = layers.conv(first, (3, 3))
        self.down_blocks = down_stages(shape, layers)
        self.mid_block = mid_stage(shape, layers)
        self.controlnet_down_blocks = [layers.dense(width) for width in skip_widths(shape)]
        self.controlnet_mid_block = layers.dense(shape.block_channels[-1])

    def temporal_features(self, timesteps: Array) -> Features:
        """Projections of the time embedding, as in `UNet3D`."""
        sinusoid = sinusoidal_embedding(timesteps, self.unet.block_channels[0])
        embedding = silu(self.time_embedding(sinusoid.astype(self.layers.dtype)))
        return map_stages(
            lambda stage: stage.temporal_features(embedding), self.down_blocks, self.mid_block
        )

    def context_features(self, context: Array) -> Features:
        """Keys and values of the text, as in `UNet3D`."""
        return map_stages(
            lambda stage: stage.context_features(context), self.down_blocks, self.mid_block
        )

    def control_features(self, control: Array) -> Array:
        """The embedded condition `[B, F, h, w, C]`."""
        return self.controlnet_cond_embedding(control.astype(self.layers.dtype))

    def __call__(self, latents: Array, temporal: Any, context: Any, control: Array) -> Residuals:
        """The residuals of one step.

        Args:
          latents: `[B, F, h, w, C]`.
          temporal: of `temporal_features`.
          context: of `context_features`.
          control: of `control_features`, for B videos or one for all.
        """
        latents = jnp.zeros_like(latents) if self.config.ignores_latents else latents
        x = self.conv_in(latents.astype(self.layers.dtype))
        x = x + jnp.broadcast_to(control, x.shape)
        x, skips = run_down(self.down_blocks, x, temporal, context)
        x, _ = self.mid_block(x, temporal.mid, context.mid)
        down = zip(self.controlnet_down_blocks, skips, strict=True)
        return Residuals(
            tuple(block(skip) for block, skip in down),
            self.controlnet_mid_block(x),
        )
