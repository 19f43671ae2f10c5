"""Resnet and samplers, shared by the UNet and the VAE."""

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array, NormScope
from qvd_jax.models.layers import LayerSet


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions around an optional temporal feature.

    Attributes:
      in_channels: C of the input.
      out_channels: C of the output; a 1x1 shortcut joins different widths.
      norm_groups: groups of both norms.
      epsilon: epsilon of both norms.
      norm_scope: scope of both norms.
      layers: the layer classes.
      has_temporal_feature: whether the block takes a projection of the time embedding.
    """

    in_channels: int
    out_channels: int
    norm_groups: int
    epsilon: float
    norm_scope: NormScope
    layers: LayerSet
    has_temporal_feature: bool = True

    def setup(self) -> None:
        self.norm1 = self.layers.group_norm(self.norm_groups, self.epsilon, self.norm_scope)
        self.conv1 = self.layers.conv(self.out_channels, (3, 3))
        if self.has_temporal_feature:
            self.time_emb_proj = self.layers.dense(self.out_channels)
        self.norm2 = self.layers.group_norm(self.norm_groups, self.epsilon, self.norm_scope)
        self.conv2 = self.layers.conv(self.out_channels, (3, 3))
        if self.in_channels != self.out_channels:
            self.conv_shortcut = self.layers.dense(self.out_channels)

    def temporal_features(self, activated_embedding: Array) -> Array:
        """Projects the time embedding after its SiLU, `[N, C] -> [N, out_channels]`."""
        return self.time_emb_proj(activated_embedding)

    def __call__(self, x: Array, temporal_feature: Array | None = None) -> Array:
        """Maps `[B, F, H, W, in_channels]` to `[B, F, H, W, out_channels]`."""
        h = self.conv1(nn.silu(self.norm1(x)))
        if temporal_feature is not None:
            h = h + temporal_feature[:, None, None, None, :]
        h = self.conv2(nn.silu(self.norm2(h)))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x)
        return x + h


class Downsample(nn.Module):
    """3x3 convolution of stride 2.

    Attributes:
      channels: C.
      layers: the layer classes.
      padding: (low, high) of H and of W. PyTorch's UNet pads both sides by one, the VAE only the
        far side.
    """

    channels: int
    layers: LayerSet
    padding: tuple[int, int] = (1, 1)

    def setup(self) -> None:
        self.conv = self.layers.conv(
            self.channels, (3, 3), strides=(2, 2), padding=(self.padding, self.padding)
        )

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H/2, W/2, C]`."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution.

    Attributes:
      channels: C.
      layers: the layer classes.
    """

    channels: int
    layers: LayerSet

    def setup(self) -> None:
        self.conv = self.layers.conv(self.channels, (3, 3))

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, 2H, 2W, C]`."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))
