"""MagicAnimate's appearance encoder: a UNet of images that shows another one what it sees."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import LayerSet, TimestepEmbedding, silu, sinusoidal_embedding
from qvd_jax.models.stages import (
    Features,
    Stage,
    down_stages,
    map_stages,
    mid_stage,
    run_down,
    up_stages,
)


class AppearanceEncoder(nn.Module):
    """A UNet of images, up to what the last self-attention would see.

    Each spatial transformer in the middle and on the way up hands its normalized tokens to the one
    of the same name in the UNet beside it (Xu et al., arXiv 2311.16498, section 3.2).

    Attributes:
      unet: config of the UNet it stands beside.
      layers: the layer classes.
    """

    unet: UNet3DConfig
    layers: LayerSet

    def setup(self) -> None:
        shape = replace(
            self.unet,
            temporal_op=None,
            temporal_mid_block=False,
            resnet_norm_scope="frame",
            controlnet=None,
            appearance_encoder=False,
        )
        first = shape.block_channels[0]
        self.time_embedding = TimestepEmbedding(4 * first, 4 * first, self.layers)
        self.conv_in = self.layers.conv(first, (3, 3))
        self.down_blocks = down_stages(shape, self.layers)
        self.mid_block = mid_stage(shape, self.layers)
        self.up_blocks = up_stages(shape, self.layers)

    def temporal_features(self, timesteps: Array) -> Features:
        """Projections of the time embedding, as in `UNet3D`."""
        sinusoid = sinusoidal_embedding(timesteps, self.unet.block_channels[0])
        embedding = silu(self.time_embedding(sinusoid.astype(self.layers.dtype)))
        return map_stages(
            lambda stage: stage.temporal_features(embedding),
            self.down_blocks,
            self.mid_block,
            self.up_blocks,
        )

    def context_features(self, context: Array) -> Features:
        """Keys and values of the text, as in `UNet3D`; the last layer needs none."""
        *before, last = self.up_blocks
        features = map_stages(
            lambda stage: stage.context_features(context), self.down_blocks, self.mid_block, before
        )
        ending = (*(layer.context_features(context) for layer in last.blocks[:-1]), None)
        return features._replace(up=(*features.up, ending))

    def __call__(self, latents: Array, temporal: Features, context: Features) -> Features:
        """What the reference image looks like at each spatial transformer.

        Args:
          latents: of the image, without noise, `[B, 1, h, w, C]`.
          temporal: of `temporal_features`.
          context: of `context_features`.

        Returns:
          Tokens `[B, 1, L, C]` of `mid` and `up`; None where there is no spatial transformer.
        """
        x = self.conv_in(latents.astype(self.layers.dtype))
        x, skips = run_down(self.down_blocks, x, temporal, context)
        x, mid = _read(self.mid_block, x, temporal.mid, context.mid)
        up = []
        for stage, feature, text in zip(self.up_blocks, temporal.up, context.up, strict=True):
            x, tokens = _read(stage, x, feature, text, skips)
            up.append(tokens)
        return Features((), mid, tuple(up))


def _read(
    stage: Stage, x: Array, temporal: Any, context: Any, skips: list[Array] | None = None
) -> tuple[Array, tuple[Array | None, ...]]:
    """Runs a stage as `Stage.__call__` does; gives the tokens of its layers, too."""
    found: list[Array | None] = []
    for layer, feature, text in zip(stage.blocks, temporal, context, strict=True):
        if skips is not None:
            x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = layer.resnet(x, feature)
        if not layer.has_attention:
            found.append(None)
            continue
        tokens = layer.attention.tokens(x)
        found.append(layer.attention.reference_tokens(tokens))
        # Nothing sees what the last layer would make of its tokens.
        if text is not None:
            x = layer.attention.transform(x, tokens, text)
    return stage.upsample_to(x, skips or []) if stage.sampler == "up" else x, tuple(found)
