"""Resnets, temporal convolutions and samplers of UNet and VAE."""

import flax.linen as nn

from qvd_jax.axes import Array, NormScope
from qvd_jax.meshes import to_frames, to_positions
from qvd_jax.models.layers import AlphaBlender, LayerSet
from qvd_jax.models.norms import Upsampled


class ResnetBlock(nn.Module):
    """Two normalized convolutions around an optional temporal feature.

    Attributes:
      in_channels: C of the input.
      out_channels: C of the output; a 1x1 shortcut joins different widths.
      norm_groups: groups of both norms.
      epsilon: epsilon of both norms.
      norm_scope: scope of both norms.
      layers: the layer classes.
      kernel_size: of both convolutions, over H and W or over F, H and W.
      has_temporal_feature: whether the block takes a projection of the time embedding.
      over_positions: whether of divided frames it is given `meshes.to_positions`.
    """

    in_channels: int
    out_channels: int
    norm_groups: int
    epsilon: float
    norm_scope: NormScope
    layers: LayerSet
    kernel_size: tuple[int, ...] = (3, 3)
    has_temporal_feature: bool = True
    over_positions: bool = False

    def setup(self) -> None:
        def norm() -> nn.Module:
            return self.layers.group_norm(
                self.norm_groups,
                self.epsilon,
                self.norm_scope,
                over_positions=self.over_positions,
            )

        self.norm1 = norm()
        self.conv1 = self.layers.conv(self.out_channels, self.kernel_size)
        if self.has_temporal_feature:
            self.time_emb_proj = self.layers.dense(self.out_channels)
        self.norm2 = norm()
        self.conv2 = self.layers.conv(self.out_channels, self.kernel_size)
        if self.in_channels != self.out_channels:
            self.conv_shortcut = self.layers.dense(self.out_channels)

    def temporal_features(self, activated_embedding: Array) -> Array:
        """Projects the time embedding after its SiLU, `[N, C] -> [N, out_channels]`."""
        return self.time_emb_proj(activated_embedding)

    def __call__(self, x: Array, temporal_feature: Array | None = None) -> Array:
        """Maps `[B, F, H, W, in_channels]` to `[B, F, H, W, out_channels]`."""
        if temporal_feature is not None:
            temporal_feature = temporal_feature[:, None, None, None, :]
        h = self.conv1(self.norm1(x).silu(), temporal_feature)
        h = self.norm2(h).silu()
        if self.in_channels != self.out_channels:
            return self.conv_shortcut(x, self.conv2(h))
        return self.conv2(h, x)


class SpatioTemporalResnet(nn.Module):
    """A spatial resnet and a temporal one behind it, blended (Blattmann et al., 2311.15127).

    Attributes:
      in_channels: C of the input.
      out_channels: C of the output.
      norm_groups: groups of every norm.
      epsilon: epsilon of the spatial norms.
      norm_scope: scope of the spatial norms; the temporal ones take all frames jointly.
      layers: the layer classes.
      temporal_epsilon: epsilon of the temporal norms; None takes the spatial one's.
      has_temporal_feature: whether the resnets take projections of the time embedding.
      switched_blend: of the `AlphaBlender`.
    """

    in_channels: int
    out_channels: int
    norm_groups: int
    epsilon: float
    norm_scope: NormScope
    layers: LayerSet
    temporal_epsilon: float | None = None
    has_temporal_feature: bool = True
    switched_blend: bool = False

    def setup(self) -> None:
        groups, epsilon, layers = self.norm_groups, self.epsilon, self.layers
        out, feature = self.out_channels, self.has_temporal_feature
        self.spatial = ResnetBlock(
            self.in_channels,
            out,
            groups,
            epsilon,
            self.norm_scope,
            layers,
            has_temporal_feature=feature,
        )
        epsilon = self.temporal_epsilon or epsilon
        self.temporal = ResnetBlock(
            out, out, groups, epsilon, "joint", layers, (3, 1, 1), feature, over_positions=True
        )
        self.time_mixer = AlphaBlender(layers, self.switched_blend)

    def temporal_features(self, activated_embedding: Array) -> tuple[Array, Array]:
        """Projects the time embedding for both resnets."""
        return (
            self.spatial.temporal_features(activated_embedding),
            self.temporal.temporal_features(activated_embedding),
        )

    def __call__(
        self, x: Array, temporal_features: tuple[Array | None, Array | None] = (None, None)
    ) -> Array:
        """Maps `[B, F, H, W, in_channels]` to `[B, F, H, W, out_channels]`."""
        axis = self.layers.frame_axis
        spatial = self.spatial(x, temporal_features[0])
        temporal = self.temporal(to_positions(spatial, axis), temporal_features[1])
        return self.time_mixer(spatial, to_frames(temporal, axis, spatial.shape))


class TemporalConv(nn.Module):
    """Four normalized convolutions over time, added to their input (Wang et al., 2308.06571).

    Attributes:
      channels: C.
      norm_groups: groups of every norm, whose epsilon is 1e-5.
      norm_scope: scope of every norm.
      layers: the layer classes.
    """

    channels: int
    norm_groups: int
    norm_scope: NormScope
    layers: LayerSet

    def setup(self) -> None:
        self.norms = [
            self.layers.group_norm(self.norm_groups, 1e-5, self.norm_scope, over_positions=True)
            for _ in range(4)
        ]
        self.convs = [self.layers.conv(self.channels, (3, 1, 1)) for _ in range(4)]

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        h = to_positions(x, self.layers.frame_axis)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(norm(h).silu())
        return x + to_frames(h, self.layers.frame_axis, x.shape)


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
        """Maps `[B, F, H, W, C]` to `[B, F, H/2, W/2, C]`, rounded up if both sides are padded."""
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

    def __call__(self, x: Array, size: tuple[int, ...] | None = None) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, 2H, 2W, C]`.

        Args:
          x: the input.
          size: (H, W) of the result; None doubles. An odd side, whose half was rounded up, gets its
            last position once, as nearest neighbours of that size are.
        """
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(Upsampled(x, (height, width)))
