"""What every network is made of: the injected layers, embeddings, feed-forward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from qvd_jax.axes import Array, NormScope, Transposes
from qvd_jax.kernels import conv_tpu, floating, layers_tpu
from qvd_jax.kernels.activations import gelu
from qvd_jax.kernels.tpu import on_tpu
from qvd_jax.models.geometry import (
    PADDED_3X3,
    copies_edges,
    extend,
    geometry,
    is_plain,
    kernel_size,
)
from qvd_jax.models.norms import (
    GroupNorm,
    LayerInput,
    LayerNorm,
    Normalized,
    as_images,
    is_activated_group_norm,
    tpu_input,
    value_of,
)


class Dense(nn.Dense):
    """`nn.Dense` with what stands before and behind it in a transformer.

    Attributes:
      gated: whether the first half of the outputs is a value, the second half its gate, and the
        result value GELU(gate) (GEGLU: Shazeer, arXiv 2002.05202).
      transposes: for kernels that can write or read so; nothing but the time depends on it.
    """

    gated: bool = False
    transposes: Transposes = None

    @nn.compact
    def __call__(self, x: Array | Normalized, residual: Array | None = None) -> Array:
        """Maps `[..., C]` to `[..., O]`, gated to `[..., O/2]`, and adds the residual."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)

        def in_passes(
            x: Array | Normalized, kernel: Array, bias: Array | None, residual: Array | None
        ) -> Array:
            values, kernel, bias = promote_dtype(value_of(x), kernel, bias, dtype=self.dtype)
            by_output = (kernel,) if bias is None else (kernel, bias)

            def product(x: Array, kernel: Array, *bias: Array) -> Array:
                contracted = (((x.ndim - 1,), (0,)), ((), ()))
                y = floating.dot_general(x, kernel, contracted)
                return _plus_bias(y, *bias)

            if self.gated:
                y = gated_product(product, values, by_output, axis=-1).astype(values.dtype)
            else:
                y = product(values, *by_output)
            return y if residual is None else residual + y

        def fused(
            x: Array | Normalized, kernel: Array, bias: Array | None, residual: Array | None
        ) -> Array:
            ones, zeros = jnp.ones(shape[0]), jnp.zeros(shape[0])
            bias = jnp.zeros(self.features) if bias is None else bias.astype(jnp.float32)
            added = None if residual is None else as_images(residual)
            output = layers_tpu.Output(jnp.ones(self.features), bias, self.dtype, self.gated, added)
            weights = kernel.astype(self.dtype).T
            y = layers_tpu.dense(tpu_input(x, ones, zeros), weights, output, self.transposes)
            return y.reshape(*x.shape[:-1], y.shape[-1])

        operands = x, kernel, bias, residual
        activated = isinstance(x, Normalized) and x.activated
        # In float32 the kernel's product would round its operands.
        fits = layers_tpu.can_use(x.shape, kernel.shape[-1])
        if self.dtype != jnp.bfloat16 or activated or not fits:
            return in_passes(*operands)
        return on_tpu(fused, in_passes, *operands)


def _plus_bias(y: Array, bias: Array | None = None) -> Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def gated_product(
    product: Callable[..., Array], x: Any, by_output: tuple[Array, ...], axis: int
) -> Array:
    """Value GELU(gate), of a product whose outputs are the value and the gate; float32.

    On the CPU it is one product, elsewhere two, behind each of which XLA can fuse what is done
    with its result alone: modelled for a v5e, 3.2 ms instead of 6.3 at 131,072 tokens.

    Args:
      product: of `x` and the arrays of `by_output`.
      x: the input.
      by_output: value and gate have a half of each.
      axis: of the outputs in each of `by_output`.
    """

    def together(x: Any, *by_output: Array) -> Array:
        value, gate = jnp.split(product(x, *by_output), 2, axis=-1)
        return value * gelu(gate)

    def apart(x: Any, *by_output: Array) -> Array:
        halves = zip(*(jnp.split(values, 2, axis=axis) for values in by_output), strict=True)
        value, gate = (product(x, *half) for half in halves)
        return value * gelu(gate)

    return lax.platform_dependent(x, *by_output, cpu=together, default=apart)


class Conv(nn.Conv):
    """`nn.Conv` with what stands before and behind it."""

    @nn.compact
    def __call__(self, x: LayerInput, residual: Array | None = None) -> Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *out, O]` and adds the residual."""
        if not is_plain(self):
            y = super().__call__(value_of(x))
            return y if residual is None else residual + y
        channels, rank = x.shape[-1], len(kernel_size(self))
        shape = (*kernel_size(self), channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype)

        def in_passes(
            x: LayerInput, kernel: Array, bias: Array | None, residual: Array | None
        ) -> Array:
            values, kernel, bias = promote_dtype(value_of(x), kernel, bias, dtype=self.dtype)
            values = extend(self, values)
            batch = x.shape[: -rank - 1]
            strides, padding, dilation = geometry(self, values.shape[-rank - 1 : -1])
            spatial = "DHW"[-rank:]
            y = floating.conv_general_dilated(
                values.reshape(-1, *values.shape[-rank - 1 :]),
                kernel,
                strides,
                padding,
                rhs_dilation=dilation,
                dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            )
            y = _plus_bias(y, bias).reshape(*batch, *y.shape[1:])
            return y if residual is None else residual + y

        def fused(
            x: Normalized, kernel: Array, bias: Array | None, residual: Array | None
        ) -> Array:
            weights = jnp.swapaxes(kernel.astype(self.dtype), -1, -2)
            bias = jnp.zeros(self.features) if bias is None else bias.astype(jnp.float32)
            return self.in_kernel(x, None, weights, (jnp.ones_like(bias), bias), None, residual)

        operands = x, kernel, bias, residual
        # In float32 the kernel's product would round its operands.
        if self.dtype == jnp.bfloat16 and self.fits_kernel(x, self.dtype):
            return on_tpu(fused, in_passes, *operands)
        return in_passes(*operands)

    def fits_kernel(self, x: LayerInput, dtype: DTypeLike) -> bool:
        """Whether `in_kernel` is for an input and weights of a dtype."""
        return (
            is_activated_group_norm(x)
            and self.is_padded_3x3(x.shape[-3:-1])
            and conv_tpu.can_use(x.shape[-3:-1], x.shape[-1], self.features, dtype)
        )

    def in_kernel(
        self,
        x: Normalized,
        quantizer: tuple[Array, Array] | None,
        weights: Array,
        scale_and_bias: tuple[Array, Array],
        border: Array | None,
        residual: Array | None,
        limit: int = 0,
    ) -> Array:
        """The layer's result by the kernel for the TPU, whose words these are."""
        size, outputs = x.shape[-3:-1], self.features
        scale, bias = scale_and_bias
        bias = bias[None]
        if residual is not None and residual.shape[-3:-1] == (1, 1):
            # Of videos; images of a video follow each other.
            of_images = jnp.broadcast_to(residual, (*x.shape[:-3], 1, 1, outputs))
            bias, residual = bias + of_images.reshape(-1, outputs).astype(jnp.float32), None
        norm = x.by_image(x.scale), x.by_image(x.offset)
        y = conv_tpu.conv(
            conv_tpu.Input(as_images(x.x), *norm, quantizer),
            weights,
            conv_tpu.Output(
                scale,
                bias,
                None if border is None else border.reshape(-1, outputs),
                None if residual is None else as_images(residual),
            ),
            size=size,
            dtype=self.dtype,
            limit=limit,
        )
        return y.reshape(*x.shape[:-1], outputs)

    def is_padded_3x3(self, spatial: tuple[int, ...]) -> bool:
        """Whether the result has the input's size, by a kernel of 3x3 on zeros around it."""
        is_3x3 = kernel_size(self) == (3, 3) and not copies_edges(self)
        return is_3x3 and geometry(self, spatial) == PADDED_3X3


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
      frame_axis: of the mesh, along which the frames of a network are divided inside
        `jax.shard_map`; None where each device has all of them.
    """

    dense_cls: Callable[..., nn.Module]
    conv_cls: Callable[..., nn.Module]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    frame_axis: str | None = None

    def __post_init__(self) -> None:
        # One dtype has several names, whose hashes differ.
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    def dense(
        self,
        features: int,
        *,
        use_bias: bool = True,
        gated: bool = False,
        transposes: Transposes = None,
    ) -> nn.Module:
        """A map of the last axis, `[..., K] -> [..., O]`, as `Dense` describes it."""
        return self.dense_cls(
            features,
            use_bias=use_bias,
            gated=gated,
            transposes=transposes,
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
    ) -> nn.Module:
        """A convolution over the axes before the last; padding defaults to half the kernel."""
        return self.conv_cls(
            features,
            kernel_size,
            strides=strides or (1,) * len(kernel_size),
            padding=padding or tuple((k // 2, k // 2) for k in kernel_size),
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def layer_norm(self) -> nn.Module:
        """LayerNorm over the last axis, with epsilon 1e-5."""
        return LayerNorm(param_dtype=self.param_dtype)

    def group_norm(
        self,
        groups: int,
        epsilon: float,
        scope: NormScope = "frame",
        *,
        over_positions: bool = False,
    ) -> "GroupNorm":
        """GroupNorm of `[B, F, H, W, C]`, per frame or jointly over the frames.

        Args:
          groups: divides C.
          epsilon: added to the variance.
          scope: of the statistics.
          over_positions: whether of divided frames it is given `meshes.to_positions`.
        """
        axis = self.frame_axis if over_positions or scope == "joint" else None
        return GroupNorm(groups, epsilon, scope, self.param_dtype, axis)


FLOAT = LayerSet(
    dense_cls=Dense,
    conv_cls=Conv,
)
"""Flax's own layers in float32; `dataclasses.replace` gives other dtypes."""


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
    """GEGLU feed-forward (Shazeer, arXiv 2002.05202).

    Attributes:
      channels: C of input and output; the hidden width is four times that.
      layers: the layer classes.
    """

    channels: int
    layers: LayerSet

    def setup(self) -> None:
        self.proj = self.layers.dense(8 * self.channels, gated=True)
        self.out = self.layers.dense(self.channels)

    def __call__(self, x: Array | Normalized, residual: Array) -> Array:
        """Maps `[..., C]` to `[..., C]` and adds the residual."""
        return self.out(self.proj(x), residual)


def silu(x: Array) -> Array:
    """SiLU, x sigmoid(x), in float32, for what follows rounds or quantizes.

    In bfloat16 `nn.silu` rounds after each of its steps, which takes a CPU twice the time.
    """
    return nn.silu(x.astype(jnp.float32))
