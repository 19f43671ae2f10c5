"""What every network is made of: the injected layers, norms, embeddings, feed-forward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from qvd_jax.axes import Array, NormScope
from qvd_jax.kernels import floating


class Dense(nn.Dense):
    """`nn.Dense` whose outputs can come in parts of equal width.

    Attributes:
      parts: how many; with more than one the result is a tuple. On accelerators each part is a
        product of its own, behind which XLA can fuse what is done with this part alone.
    """

    parts: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Any:
        """Maps `[..., C]` to `[..., O]`, or to the parts of it."""
        if self.parts == 1:
            return super().__call__(x)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)

        def product(x: Array, kernel: Array, bias: Array) -> Array:
            contracted = (((x.ndim - 1,), (0,)), ((), ()))
            return floating.dot_general(x, kernel, contracted) + bias

        return in_parts(product, self.parts, x, (kernel, bias), axis=-1)


def in_parts(
    product: Callable[..., Array],
    parts: int,
    x: Any,
    by_output: tuple[Array, ...],
    axis: int,
) -> tuple[Array, ...]:
    """A product whose outputs are wanted in parts.

    Args:
      product: of `x` and the arrays of `by_output`.
      parts: their number.
      x: the input.
      by_output: each part is a product with its own slices of them.
      axis: of the outputs in each of `by_output`.

    Returns:
      The parts: on the CPU of one product, which is faster there, elsewhere of a product each.
    """

    def together(x: Any, *by_output: Array) -> tuple[Array, ...]:
        return tuple(jnp.split(product(x, *by_output), parts, axis=-1))

    def apart(x: Any, *by_output: Array) -> tuple[Array, ...]:
        slices = (jnp.split(values, parts, axis=axis) for values in by_output)
        return tuple(product(x, *own) for own in zip(*slices, strict=True))

    return lax.platform_dependent(x, *by_output, cpu=together, default=apart)


class Conv(nn.Conv):
    """`nn.Conv` that is told where its input comes from.

    Attributes:
      upsampled: whether the input is a nearest-neighbour upsampling, every position twice along
        H and W; quantized layers multiply each once.
    """

    upsampled: bool = False


@dataclass(frozen=True)
class Configured:
    """A layer class some of whose attributes are chosen, as `functools.partial` would choose them.

    Two of the same content are equal, which partials are not: a network is a static argument of
    jit, and one built again is to find what was compiled for its equal.

    Attributes:
      cls: the class.
      options: the attributes, all hashable.
    """

    cls: type[nn.Module]
    options: FrozenDict[str, Any]

    def __call__(self, *arguments: Any, **options: Any) -> nn.Module:
        """A layer of the class."""
        return self.cls(*arguments, **self.options, **options)


@dataclass(frozen=True)
class LayerSet:
    """The Dense and conv classes a network is built from, with their dtypes.

    Networks never name a layer class, so another set turns the same network into an observing or
    a quantized one with the same module paths. Sets of the same content are equal, as long as
    their callables are.

    Attributes:
      dense_cls: called like `Dense`.
      conv_cls: called like `Conv`.
      dtype: dtype of the computation.
      param_dtype: dtype in which parameters are stored.
    """

    dense_cls: Callable[..., nn.Module]
    conv_cls: Callable[..., nn.Module]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # One dtype has several names, whose hashes differ.
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    def dense(self, features: int, *, use_bias: bool = True, parts: int = 1) -> nn.Module:
        """A map of the last axis, `[..., K] -> [..., O]`, or to several `parts` of it."""
        return self.dense_cls(
            features,
            use_bias=use_bias,
            parts=parts,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def conv(
        self,
        features: int,
        kernel_size: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: tuple[tuple[int, int], ...] | None = None,
        use_bias: bool = True,
        upsampled: bool = False,
    ) -> nn.Module:
        """A convolution over the axes before the last; padding defaults to half the kernel."""
        return self.conv_cls(
            features,
            kernel_size,
            strides=strides or (1,) * len(kernel_size),
            padding=padding or tuple((k // 2, k // 2) for k in kernel_size),
            use_bias=use_bias,
            upsampled=upsampled,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def layer_norm(self) -> nn.Module:
        """LayerNorm over the last axis; float32, for what follows rounds or quantizes."""
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, param_dtype=self.param_dtype)

    def group_norm(self, groups: int, epsilon: float, scope: NormScope = "frame") -> "GroupNorm":
        """GroupNorm of `[B, F, H, W, C]`, per frame or jointly over the frames."""
        return GroupNorm(groups, epsilon, scope, param_dtype=self.param_dtype)


FLOAT = LayerSet(
    dense_cls=Configured(Dense, FrozenDict(dot_general=floating.dot_general)),
    conv_cls=Configured(Conv, FrozenDict(conv_general_dilated=floating.conv_general_dilated)),
)
"""Flax's own layers in float32; `dataclasses.replace` gives other dtypes."""


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He, arXiv 1803.08494) written as one scale and shift per channel.

    The form lets XLA fuse the normalization with the activation behind it. Statistics are
    float32, the variance centred; so is the result, for what follows rounds or quantizes.

    Attributes:
      groups: number of groups; divides C.
      epsilon: added to the variance.
      norm_scope: "frame" normalizes every frame alone, "joint" all frames of a video together.
      param_dtype: dtype of `scale` and `bias`.
    """

    groups: int
    epsilon: float
    norm_scope: NormScope = "frame"
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalizes `x`, `[B, F, H, W, C]`."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        axes = (1, 2, 3) if self.norm_scope == "joint" else (2, 3)
        x = x.astype(jnp.float32)

        # By a product, for XLA would fuse `repeat` into what follows, a division for each element.
        eye = np.eye(self.groups, dtype=np.float32)
        members = np.repeat(eye, channels // self.groups, axis=1)

        def group_mean(values: Array) -> Array:
            # Channels are averaged after positions: XLA vectorizes that order on the CPU.
            means = values.mean(axes, keepdims=True)
            grouped = means.reshape(*means.shape[:-1], self.groups, channels // self.groups)
            return jnp.matmul(grouped.mean(-1), members, precision="highest")

        mean = group_mean(x)
        variance = group_mean(jnp.square(x - mean))
        scale, bias = (p.astype(jnp.float32).reshape(1, 1, 1, 1, channels) for p in (scale, bias))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        shift = bias - mean * factor
        return x * factor + shift


def sinusoidal_embedding(timesteps: Array, width: int) -> Array:
    """Embedding of timesteps, cosines before sines: `[N] -> [N, width]`, float32.

    Frequency i is exp(-ln(10000) i / (width/2)) (Ho et al., arXiv 2006.11239, as in diffusers
    with `flip_sin_to_cos=True, freq_shift=0`).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sinusoidal_positions(length: int, width: int) -> Array:
    """Positional table `[length, width]` with sines and cosines interleaved, float32.

    Entry (p, 2i) is sin(p w_i), entry (p, 2i+1) is cos(p w_i), w_i = exp(-ln(10000) 2i / width)
    (Vaswani et al., arXiv 1706.03762, section 3.5).
    """
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, width)


class TimestepEmbedding(nn.Module):
    """Two Dense layers with a SiLU between them, after the sinusoid.

    Attributes:
      hidden: width between them.
      width: width of the result.
      layers: the layer classes.
    """

    hidden: int
    width: int
    layers: LayerSet

    def setup(self) -> None:
        self.linear_1 = self.layers.dense(self.hidden)
        self.linear_2 = self.layers.dense(self.width)

    def __call__(self, sinusoid: Array) -> Array:
        """Maps `[N, C]` to `[N, width]`."""
        return self.linear_2(silu(self.linear_1(sinusoid)))


class AlphaBlender(nn.Module):
    """Blend of a spatial and a temporal branch by one learned factor.

    Attributes:
      layers: for the dtypes.
      switched: whether sigmoid(mix_factor) weighs the temporal branch, as in SVD's VAE, and not
        the spatial one, as in its UNet.
    """

    layers: LayerSet
    switched: bool = False

    @nn.compact
    def __call__(self, spatial: Array, temporal: Array) -> Array:
        """One branch by sigmoid(mix_factor), the other by the rest."""
        factor = self.param(
            "mix_factor", nn.initializers.constant(0.5), (1,), self.layers.param_dtype
        )
        weight = nn.sigmoid(factor[0].astype(jnp.float32)).astype(spatial.dtype)
        first, second = (temporal, spatial) if self.switched else (spatial, temporal)
        return weight * first + (1 - weight) * second


class FeedForward(nn.Module):
    """GEGLU feed-forward (Shazeer, arXiv 2002.05202): the first half of `proj` is the value.

    Attributes:
      channels: C of input and output; the hidden width is four times that.
      layers: the layer classes.
    """

    channels: int
    layers: LayerSet

    def setup(self) -> None:
        self.proj = self.layers.dense(8 * self.channels, parts=2)
        self.out = self.layers.dense(self.channels)

    def __call__(self, x: Array) -> Array:
        """Maps `[..., C]` to `[..., C]`."""
        value, gate = self.proj(x)
        return self.out(value * _gelu(gate))


def silu(x: Array) -> Array:
    """SiLU, x sigmoid(x), in float32, for what follows rounds or quantizes.

    In bfloat16 `nn.silu` rounds after each of its steps, which takes a CPU twice the time.
    """
    return nn.silu(x.astype(jnp.float32))


def _gelu(x: Array) -> Array:
    """GELU, x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415), as PyTorch computes it; float32.

    `nn.gelu` takes erfc, which differs only where the result is next to zero, and costs a CPU
    several times as much.
    """
    half = 0.5 * x.astype(jnp.float32)
    return half + half * jax.lax.erf(half * math.sqrt(2))
