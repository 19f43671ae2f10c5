"""Norms, and what layers are handed that they compute themselves."""

import functools
import math
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qvd_jax.axes import Array, NormScope
from qvd_jax.kernels import layers_tpu
from qvd_jax.kernels.tpu import on_tpu


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "scale", "offset"),
    meta_fields=("epsilon", "activated"),
)
@dataclass(frozen=True)
class Normalized:
    """What a norm makes of its input, computed by the layer that reads it.

    A kernel can then do it in passing. Its value is x scale + offset, float32, of a LayerNorm of x
    where there is an epsilon, behind a SiLU where it is activated.

    Attributes:
      x: the norm's input, `[..., C]`.
      scale: broadcasts against `x`, float32.
      offset: broadcasts against `x`, float32.
      epsilon: added to the variance over C; None where `x` is not normalized over it.
      activated: whether a SiLU comes last.
    """

    x: Array
    scale: Array
    offset: Array
    epsilon: float | None = None
    activated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.x.shape

    def silu(self) -> "Normalized":
        """Behind a SiLU."""
        return replace(self, activated=True)

    def plus(self, values: Array) -> "Normalized":
        """With something added to the value."""
        return replace(self, offset=self.offset + values)

    def value(self) -> Array:
        """The float32 array it stands for."""
        x, scale = self.x.astype(jnp.float32), self.scale
        if self.epsilon is not None:
            mean = x.mean(-1, keepdims=True)
            variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
            x, scale = x - mean, scale * jax.lax.rsqrt(variance + self.epsilon)
        x = x * scale + self.offset
        return nn.silu(x) if self.activated else x

    def by_image(self, values: Array) -> Array:
        """Of its scale or offset what belongs to each image, `[M, C]` as in `layers_tpu.Input`."""
        if len(values) > 1:
            # Of videos; images of a video follow each other.
            values = jnp.broadcast_to(values, (*self.shape[:2], *values.shape[2:]))
        return as_images(values)[:, 0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("x",), meta_fields=("size",))
@dataclass(frozen=True)
class Upsampled:
    """What nearest-neighbour upsampling makes of images, computed by the layer that reads it.

    A quantized convolution multiplies every position once instead.

    Attributes:
      x: `[..., H, W, C]`.
      size: (H, W) of the value: every position twice, the last of an odd side once.
    """

    x: Array
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return (*self.x.shape[:-3], *self.size, self.x.shape[-1])

    @property
    def is_doubled(self) -> bool:
        """Whether every position stands twice along both sides."""
        return not any(side % 2 for side in self.size)

    def value(self) -> Array:
        """The array it stands for."""
        height, width = self.size
        return jnp.repeat(jnp.repeat(self.x, 2, axis=-3), 2, axis=-2)[..., :height, :width, :]


def as_images(x: Array) -> Array:
    """Positions of images, `[..., L, C]` or `[B, F, H, W, C]`, as `[N, L, C]`."""
    images = x.shape[:2] if x.ndim == 5 else x.shape[:-2]
    return x.reshape(math.prod(images), -1, x.shape[-1])


LayerInput = Array | Normalized | Upsampled
"""What a layer is handed."""


def value_of(x: LayerInput) -> Array:
    """An array as it is, or the one that something stands for."""
    return x.value() if isinstance(x, Normalized | Upsampled) else x


def is_activated_group_norm(x: LayerInput) -> bool:
    """Whether something is what a GroupNorm and a SiLU make, which kernels of convolutions take."""
    return isinstance(x, Normalized) and x.activated and x.epsilon is None


def tpu_input(
    x: Array | Normalized, scale: Array, offset: Array, limit: int | None = None
) -> layers_tpu.Input:
    """A kernel's input, into whose scale and offset goes what a norm multiplies and adds.

    Args:
      x: `[..., L, C]` or `[B, F, H, W, C]`.
      scale: of the value of `x`, `[C]`, float32.
      offset: behind it, `[C]`, float32.
      limit: as in `layers_tpu.Input`.
    """
    if not isinstance(x, Normalized):
        return layers_tpu.Input(as_images(x), scale[None], offset[None], limit)
    along = (1,) * (len(x.shape) - 1) + (-1,)
    scale, offset = scale.reshape(along), offset.reshape(along)
    scale, offset = x.by_image(x.scale * scale), x.by_image(x.offset * scale + offset)
    return layers_tpu.Input(as_images(x.x), scale, offset, limit, x.epsilon)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis (Ba et al., arXiv 1607.06450); float32.

    Attributes:
      param_dtype: dtype of `scale` and `bias`.
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Normalized:
        """Normalizes `x`, `[..., C]`."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        scale, bias = (
            p.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + shape) for p in (scale, bias)
        )
        return Normalized(x, scale, bias, epsilon=1e-5)


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He, arXiv 1803.08494) written as one scale and shift per channel.

    The form lets XLA or a kernel fuse the normalization with what is behind it. Statistics are
    float32; a group's variance is the mean of its channels' plus that of their means (Chan et al.,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
      groups: number of groups; divides C.
      epsilon: added to the variance.
      norm_scope: "frame" normalizes every frame alone, "joint" all frames of a video together.
      param_dtype: dtype of `scale` and `bias`.
      axis_name: of the mesh, along which equal parts of what is normalized are divided; None where
        a device has all of it.
    """

    groups: int
    epsilon: float
    norm_scope: NormScope = "frame"
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Normalized:
        """Normalizes `x`, `[B, F, H, W, C]`."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)

        # By a product, for XLA would fuse `repeat` into what follows, a division for each element.
        eye = np.eye(self.groups, dtype=np.float32)
        members = np.repeat(eye, channels // self.groups, axis=1)

        def group_mean(means: Array) -> Array:
            if self.norm_scope == "joint":
                means = means.mean(1, keepdims=True)
            grouped = means.reshape(*means.shape[:-1], self.groups, channels // self.groups)
            of_groups = grouped.mean(-1)
            if self.axis_name is not None:
                of_groups = jax.lax.pmean(of_groups, self.axis_name)
            return jnp.matmul(of_groups, members, precision="highest")

        def in_passes(x: Array) -> tuple[Array, Array]:
            from_first = x.astype(jnp.float32) - x[:, :, :1, :1].astype(jnp.float32)
            squares = jnp.square(from_first)
            return from_first.mean((2, 3), keepdims=True), squares.mean((2, 3), keepdims=True)

        def fused(x: Array) -> tuple[Array, Array]:
            first, second = layers_tpu.moments(as_images(x))
            shape = (*x.shape[:2], 1, 1, channels)
            return first.reshape(shape), second.reshape(shape)

        # Both moments of a frame's channel in one pass: about a value of it, whichever it is, they
        # do not cancel as those about zero would.
        about = x[:, :, :1, :1].astype(jnp.float32)
        if layers_tpu.can_use(as_images(x).shape):
            first, second = on_tpu(fused, in_passes, x)
        else:
            first, second = in_passes(x)
        mean = group_mean(about + first)
        within = second - jnp.square(first)
        variance = group_mean(within + jnp.square(about + first - mean))
        scale, bias = (p.astype(jnp.float32).reshape(1, 1, 1, 1, channels) for p in (scale, bias))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        shift = bias - mean * factor
        return Normalized(x, factor, shift)
