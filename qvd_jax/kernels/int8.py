"""Products of int8 codes with int32 accumulation, exact on every backend.

Operands and results are the same everywhere; how a product is formed is chosen here, by platform:

    CPU with VNNI   codes become unsigned, one u8 x s8 product, 128 times the weight sums taken off
    other CPUs      s8 x s8
    GPU             s8 x s8 with weights `[O, K]`; convolutions as one product over patches
    TPU             s8 x s8; convolutions XLA's own

Weights are `[O, K]` and `[O, *kernel, C]`: XLA wants both operands of an int8 product K-minor on
the GPU, and the CPU does not care.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir

from qvd_jax.axes import Array
from qvd_jax.kernels.patches import Padding, taps

_ZERO = 128
"""What unsigned codes have for zero."""


def dot(codes: Array, weights: Array, sums: Array) -> Array:
    """Contracts the last axes, `[..., K] x [O, K] -> [..., O]`.

    Args:
      codes: int8.
      weights: int8 or int4.
      sums: int32 `[O]`, of the weights over K; recomputing them would read all weights once more.

    Returns:
      int32; it cannot overflow while K is below 65,536.
    """
    return lax.platform_dependent(
        codes, weights.astype(jnp.int8), sums, cpu=_dot_on_cpu, default=_dot_elsewhere
    )


def conv(
    codes: Array, weights: Array, sums: Array, strides: Sequence[int], padding: Padding
) -> Array:
    """Correlates channels-last codes with a kernel; what is padded has code 0.

    Args:
      codes: int8 `[B, *spatial, C]`.
      weights: int8 or int4 `[O, *kernel, C]`.
      sums: int32 `[O]`, of the weights over kernel and C.
      strides: one for each spatial axis.
      padding: (low, high) for each spatial axis.

    Returns:
      int32 `[B, *out, O]`.
    """

    def on_cpu(codes: Array, weights: Array, sums: Array) -> Array:
        if not _has_vnni():
            return signed_dot(patches(codes), matrix(weights))
        return _mixed_dot(patches(_unsigned(codes), fill=_ZERO), matrix(weights), sums)

    def on_cuda(codes: Array, weights: Array, sums: Array) -> Array:
        del sums
        return signed_dot(patches(codes), matrix(weights))

    def elsewhere(codes: Array, weights: Array, sums: Array) -> Array:
        del sums
        return xla_conv(codes, weights, strides, padding)

    def patches(codes: Array, fill: int = 0) -> Array:
        return jnp.concatenate(taps(codes, weights.shape[1:-1], strides, padding, fill), axis=-1)

    def matrix(weights: Array) -> Array:
        return weights.reshape(len(weights), -1)

    return lax.platform_dependent(
        codes, weights.astype(jnp.int8), sums, cpu=on_cpu, cuda=on_cuda, default=elsewhere
    )


def signed_dot(codes: Array, weights: Array) -> Array:
    """`dot` as XLA's own product of two int8 operands."""
    return lax.dot_general(
        codes,
        weights,
        (((codes.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )


def _dot_elsewhere(codes: Array, weights: Array, sums: Array) -> Array:
    del sums
    return signed_dot(codes, weights)


def _dot_on_cpu(codes: Array, weights: Array, sums: Array) -> Array:
    if not _has_vnni():
        return signed_dot(codes, weights)
    return _mixed_dot(_unsigned(codes), weights, sums)


def _unsigned(codes: Array) -> Array:
    """Codes moved up by `_ZERO`."""
    return lax.bitcast_convert_type(codes, jnp.uint8) ^ np.uint8(_ZERO)


def _mixed_dot(unsigned: Array, weights: Array, sums: Array) -> Array:
    product = _mixed_dot_p.bind(unsigned.reshape(-1, unsigned.shape[-1]), weights)
    return (product - _ZERO * sums[None]).reshape(*unsigned.shape[:-1], -1)


@functools.cache
def _has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8; without it XLA's product of them is scalar code."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text(encoding="utf-8", errors="replace")


def xla_conv(codes: Array, weights: Array, strides: Sequence[int], padding: Padding) -> Array:
    """`conv` as XLA's own convolution; on the GPU it does not compile for int32 results."""
    spatial = "DHW"[-(codes.ndim - 2) :]
    return lax.conv_general_dilated(
        codes,
        weights,
        strides,
        padding,
        dimension_numbers=(f"N{spatial}C", f"O{spatial}I", f"N{spatial}C"),
        preferred_element_type=jnp.int32,
    )


# `lax.dot_general` converts operands of different types to int32 first, which is slow; the
# primitive hands XLA the mixed product itself.
_mixed_dot_p = jex.core.Primitive("mixed_int8_dot")


@_mixed_dot_p.def_abstract_eval
def _mixed_dot_shape(codes: Any, weights: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray((codes.shape[0], weights.shape[0]), jnp.int32)


@_mixed_dot_p.def_impl
def _mixed_dot_impl(codes: Array, weights: Array) -> Array:
    return jax.jit(_mixed_dot_p.bind)(codes, weights)


def _mixed_dot_on_cpu(context: Any, codes: Any, weights: Any) -> list[Any]:
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[1],
        rhs_contracting_dimensions=[1],
    )
    (result,) = context.avals_out
    kind = ir.RankedTensorType.get(result.shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(kind, codes, weights, numbers)]


def _mixed_dot_elsewhere(codes: Array, weights: Array) -> Array:
    signed = lax.bitcast_convert_type(codes ^ np.uint8(_ZERO), jnp.int8)
    return signed_dot(signed, weights) + _ZERO * weights.sum(1, dtype=jnp.int32)[None]


def _batch_mixed_dot(arguments: Any, axes: Any) -> tuple[Array, int]:
    codes, weights = arguments
    if axes[1] is not None:
        rows = (
            jnp.broadcast_to(codes, (weights.shape[axes[1]], *codes.shape))
            if axes[0] is None
            else jnp.moveaxis(codes, axes[0], 0)
        )
        pairs = rows, jnp.moveaxis(weights, axes[1], 0)
        return lax.map(lambda pair: _mixed_dot_p.bind(*pair), pairs), 0
    codes = jnp.moveaxis(codes, axes[0], 0)
    product = _mixed_dot_p.bind(codes.reshape(-1, codes.shape[-1]), weights)
    return product.reshape(*codes.shape[:-1], -1), 0


mlir.register_lowering(_mixed_dot_p, _mixed_dot_on_cpu, platform="cpu")
mlir.register_lowering(_mixed_dot_p, mlir.lower_fun(_mixed_dot_elsewhere, multiple_results=False))
batching.primitive_batchers[_mixed_dot_p] = _batch_mixed_dot
