"""The VAE between pixels and latents.

As diffusers' `AutoencoderKL` it takes every frame alone; Stable Video Diffusion's, diffusers'
`AutoencoderKLTemporalDecoder`, decodes them together.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array
from qvd_jax.meshes import to_frames, to_positions
from qvd_jax.models.attention import SelfAttention
from qvd_jax.models.blocks import Downsample, ResnetBlock, SpatioTemporalResnet, Upsample
from qvd_jax.models.layers import FLOAT, LayerSet

_EPSILON = 1e-6
_TEMPORAL_EPSILON = 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the VAE; the defaults are Stable Diffusion's.

    Attributes:
      channels: C of the pixels.
      latent_channels: C of the latents.
      block_channels: C of each level, highest resolution first.
      layers_per_block: resnets of an encoder level; a decoder level has one more.
      norm_groups: groups of every GroupNorm.
      scaling_factor: latents are multiplied by it after encoding, divided before decoding.
      temporal_decoder: whether the decoder mixes the frames it is given together (SVD).
    """

    channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    temporal_decoder: bool = False

    def __post_init__(self) -> None:
        if not self.block_channels:
            raise ValueError("VAEConfig needs at least one level")
        for level, channels in enumerate(self.block_channels):
            if self.norm_groups < 1 or channels % self.norm_groups:
                raise ValueError(
                    f"VAEConfig.norm_groups = {self.norm_groups} does not divide the {channels} "
                    f"channels of level {level}"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent position, along H and along W."""
        return 2 ** (len(self.block_channels) - 1)


def _resnet(
    config: VAEConfig, in_channels: int, out_channels: int, layers: LayerSet, *, temporal: bool
) -> ResnetBlock | SpatioTemporalResnet:
    shape = (in_channels, out_channels, config.norm_groups, _EPSILON, "frame", layers)
    if not temporal:
        return ResnetBlock(*shape, has_temporal_feature=False)
    return SpatioTemporalResnet(
        *shape,
        temporal_epsilon=_TEMPORAL_EPSILON,
        has_temporal_feature=False,
        switched_blend=True,
    )


class VAEAttention(nn.Module):
    """Single-head attention over the positions of a frame.

    Attributes:
      channels: C.
      norm_groups: groups of the norm.
      layers: the layer classes.
    """

    channels: int
    norm_groups: int
    layers: LayerSet

    def setup(self) -> None:
        self.group_norm = self.layers.group_norm(self.norm_groups, _EPSILON)
        self.attn = SelfAttention(self.channels, 1, self.layers, use_bias=True)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        batch, frames, height, width, channels = x.shape
        tokens = self.group_norm(x).value().reshape(batch, frames, height * width, channels)
        return self.attn(tokens, x.reshape(tokens.shape)).reshape(x.shape)


class VAEStage(nn.Module):
    """Resnets of one level and the sampler behind them.

    Attributes:
      config: the VAE's.
      in_channels: C of the input.
      channels: C of the level.
      depth: number of resnets.
      sampler: "down", "up", or None at the last level.
      layers: the layer classes.
      temporal: whether the resnets mix the frames.
    """

    config: VAEConfig
    in_channels: int
    channels: int
    depth: int
    sampler: str | None
    layers: LayerSet
    temporal: bool

    def setup(self) -> None:
        widths = [self.in_channels] + [self.channels] * self.depth
        self.resnets = [
            _resnet(self.config, width, self.channels, self.layers, temporal=self.temporal)
            for width in widths[:-1]
        ]
        if self.sampler == "down":
            self.downsample = Downsample(self.channels, self.layers, padding=(0, 1))
        elif self.sampler == "up":
            self.upsample = Upsample(self.channels, self.layers)

    def __call__(self, x: Array) -> Array:
        """Runs the stage on `[B, F, H, W, in_channels]`."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.sampler == "down":
            return self.downsample(x)
        return self.upsample(x) if self.sampler == "up" else x


class VAEMid(nn.Module):
    """Resnet, attention, resnet at the lowest resolution.

    Attributes:
      config: the VAE's.
      layers: the layer classes.
      temporal: whether the resnets mix the frames.
    """

    config: VAEConfig
    layers: LayerSet
    temporal: bool

    def setup(self) -> None:
        channels = self.config.block_channels[-1]
        self.resnets = [
            _resnet(self.config, channels, channels, self.layers, temporal=self.temporal)
            for _ in range(2)
        ]
        self.attention = VAEAttention(channels, self.config.norm_groups, self.layers)

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` to `[B, F, H, W, C]`."""
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels to the moments of the posterior, before `quant_conv`.

    Attributes:
      config: the VAE's.
      layers: the layer classes.
    """

    config: VAEConfig
    layers: LayerSet

    def setup(self) -> None:
        config, layers = self.config, self.layers
        widths = config.block_channels
        self.conv_in = layers.conv(widths[0], (3, 3))
        self.down_blocks = [
            VAEStage(
                config,
                widths[max(level - 1, 0)],
                width,
                config.layers_per_block,
                "down" if level < len(widths) - 1 else None,
                layers,
                temporal=False,
            )
            for level, width in enumerate(widths)
        ]
        self.mid_block = VAEMid(config, layers, temporal=False)
        self.conv_norm_out = layers.group_norm(config.norm_groups, _EPSILON)
        self.conv_out = layers.conv(2 * config.latent_channels, (3, 3))

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, H, W, C]` pixels to `[B, F, h, w, 2 latent_channels]`."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)).silu())


class Decoder(nn.Module):
    """Latents to pixels, after `post_quant_conv`.

    Attributes:
      config: the VAE's.
      layers: the layer classes.
    """

    config: VAEConfig
    layers: LayerSet

    def setup(self) -> None:
        config, layers = self.config, self.layers
        widths, temporal = config.block_channels[::-1], config.temporal_decoder
        self.conv_in = layers.conv(widths[0], (3, 3))
        self.mid_block = VAEMid(config, layers, temporal)
        self.up_blocks = [
            VAEStage(
                config,
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                "up" if i < len(widths) - 1 else None,
                layers,
                temporal,
            )
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = layers.group_norm(config.norm_groups, _EPSILON)
        self.conv_out = layers.conv(config.channels, (3, 3))
        if temporal:
            self.time_conv_out = layers.conv(config.channels, (3, 1, 1))

    def __call__(self, x: Array) -> Array:
        """Maps `[B, F, h, w, latent_channels]` to `[B, F, H, W, C]` pixels."""
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        x = self.conv_out(self.conv_norm_out(x).silu())
        if not self.config.temporal_decoder:
            return x
        axis = self.layers.frame_axis
        return to_frames(self.time_conv_out(to_positions(x, axis)), axis, x.shape)


class AutoencoderKL(nn.Module):
    """Variational autoencoder (Kingma and Welling, arXiv 1312.6114) of videos.

    Attributes:
      config: its shape.
      layers: the layer classes and dtypes.
    """

    config: VAEConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.layers)
        self.quant_conv = self.layers.dense(2 * self.config.latent_channels)
        if not self.config.temporal_decoder:
            self.post_quant_conv = self.layers.dense(self.config.latent_channels)
        self.decoder = Decoder(self.config, self.layers)

    def encode(self, video: Array) -> tuple[Array, Array]:
        """Posterior of the latents.

        Args:
          video: `[B, F, H, W, C]` pixels in [-1, 1].

        Returns:
          Mean and log-variance, each `[B, F, h, w, latent_channels]`, float32, not yet multiplied
          by the scaling factor.
        """
        moments = self.quant_conv(self.encoder(video.astype(self.layers.dtype)))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Array) -> Array:
        """Pixels of latents from which the scaling factor has been divided out.

        Args:
          latents: `[B, F, h, w, latent_channels]`; with a temporal decoder, frames that are
            decoded together see each other.

        Returns:
          `[B, F, H, W, C]` in about [-1, 1], float32.
        """
        latents = latents.astype(self.layers.dtype)
        if not self.config.temporal_decoder:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, video: Array) -> Array:
        """Reconstructs a video from the mean of its posterior."""
        return self.decode(self.encode(video)[0])


def to_unit_range(pixels: Array | np.ndarray) -> Array:
    """Bytes to what an autoencoder reads, floats in [-1, 1]."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def to_bytes(decoded: Array) -> Array:
    """What an autoencoder decodes to bytes."""
    return jnp.round(jnp.clip(decoded / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
