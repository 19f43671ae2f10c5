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
from collections.abc import Callable, Sequence
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
from qvd_jax.errors import InputError
from qvd_jax.kernels.patches import Padding, taps

SCOPE = "int8_product"
"""In the names of all operations made here."""

_ZERO = 128
"""What unsigned codes have for zero."""


def dot(codes: Array, weights: Array, sums: Array, implementation: str | None = None) -> Array:
    """Contracts the last axes, `[..., K] x [O, K] -> [..., O]`.

    Args:
      codes: int8.
      weights: int8 or int4.
      sums: int32 `[O]`, of the weights over K; recomputing them would read all weights once more.
      implementation: one of `runnable_dots()`; None chooses by platform.

    Returns:
      int32; it cannot overflow while K is below 65,536.

    Raises:
      InputError: this machine cannot run the implementation.
    """
    weights = weights.astype(jnp.int8)
    with jax.named_scope(SCOPE):
        if implementation is not None:
            _check_runnable(implementation, runnable_dots())
            return _DOTS[implementation](codes, weights, sums)
        on_cpu = _DOTS["unsigned" if _has_vnni() else "signed"]
        return lax.platform_dependent(codes, weights, sums, cpu=on_cpu, default=_DOTS["signed"])


def conv(
    codes: Array,
    weights: Array,
    sums: Array,
    strides: Sequence[int],
    padding: Padding,
    implementation: str | None = None,
) -> Array:
    """Correlates channels-last codes with a kernel; what is padded has code 0.

    Args:
      codes: int8 `[B, *spatial, C]`.
      weights: int8 or int4 `[O, *kernel, C]`.
      sums: int32 `[O]`, of the weights over kernel and C.
      strides: one for each spatial axis.
      padding: (low, high) for each spatial axis.
      implementation: one of `runnable_convs()`; None chooses by platform.

    Returns:
      int32 `[B, *out, O]`.

    Raises:
      InputError: this machine cannot run the implementation.
    """
    weights = weights.astype(jnp.int8)
    convs = {name: functools.partial(f, strides, padding) for name, f in _CONVS.items()}
    with jax.named_scope(SCOPE):
        if implementation is not None:
            _check_runnable(implementation, runnable_convs())
            return convs[implementation](codes, weights, sums)
        return lax.platform_dependent(
            codes,
            weights,
            sums,
            cpu=convs["unsigned patches" if _has_vnni() else "signed patches"],
            cuda=convs["signed patches"],
            default=convs["convolution"],
        )


def runnable_dots() -> list[str]:
    """Implementations of `dot` that this machine can run."""
    return [name for name in _DOTS if _is_runnable(name)]


def runnable_convs() -> list[str]:
    """Implementations of `conv` that this machine can run."""
    return [name for name in _CONVS if _is_runnable(name)]


def _is_runnable(name: str) -> bool:
    if name.startswith("unsigned"):
        return jax.default_backend() == "cpu" and _has_vnni()
    # XLA's GPU convolutions of int8 have no int32 results.
    return name != "convolution" or jax.default_backend() != "gpu"


def _check_runnable(name: str, known: list[str]) -> None:
    if name not in known:
        raise InputError(
            f"int8 implementation {name!r} cannot run on this {jax.default_backend()}; "
            f"{', '.join(map(repr, known))} can"
        )


def _signed_dot(codes: Array, weights: Array, sums: Array) -> Array:
    del sums
    return lax.dot_general(
        codes,
        weights,
        (((codes.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )


def _unsigned_dot(codes: Array, weights: Array, sums: Array) -> Array:
    return _take_off_zeros(_mixed_dot(_unsigned(codes), weights), sums)


def _xla_conv(
    strides: Sequence[int], padding: Padding, codes: Array, weights: Array, sums: Array
) -> Array:
    del sums
    spatial = "DHW"[-(codes.ndim - 2) :]
    return lax.conv_general_dilated(
        codes,
        weights,
        strides,
        padding,
        dimension_numbers=(f"N{spatial}C", f"O{spatial}I", f"N{spatial}C"),
        preferred_element_type=jnp.int32,
    )


def _signed_conv(
    by_rows: bool,
    strides: Sequence[int],
    padding: Padding,
    codes: Array,
    weights: Array,
    sums: Array,
) -> Array:
    seen = taps(codes, weights.shape[1:-1], strides, padding)
    return _summed(functools.partial(_signed_dot, sums=sums), seen, weights, by_rows)


def _unsigned_conv(
    by_rows: bool,
    strides: Sequence[int],
    padding: Padding,
    codes: Array,
    weights: Array,
    sums: Array,
) -> Array:
    seen = taps(_unsigned(codes), weights.shape[1:-1], strides, padding, fill=_ZERO)
    return _take_off_zeros(_summed(_mixed_dot, seen, weights, by_rows), sums)


def _take_off_zeros(product: Array, sums: Array) -> Array:
    """From a product of unsigned codes what their zeros added to it."""
    return product - _ZERO * sums.reshape((1,) * (product.ndim - 1) + (-1,))


def _summed(
    product: Callable[[Array, Array], Array], seen: list[Array], weights: Array, by_rows: bool
) -> Array:
    """One product over whole patches, or the sum of one for each row of the kernel."""
    parts = weights.shape[1] if by_rows else 1
    count = len(seen) // parts
    rows = weights.reshape(len(weights), parts, -1)
    products = (
        product(jnp.concatenate(seen[i * count : (i + 1) * count], axis=-1), rows[:, i])
        for i in range(parts)
    )
    return functools.reduce(jnp.add, products)


def _unsigned(codes: Array) -> Array:
    """Codes moved up by `_ZERO`."""
    return lax.bitcast_convert_type(codes, jnp.uint8) ^ np.uint8(_ZERO)


def _mixed_dot(unsigned: Array, weights: Array) -> Array:
    product = _mixed_dot_p.bind(unsigned.reshape(-1, unsigned.shape[-1]), weights)
    return product.reshape(*unsigned.shape[:-1], -1)


@functools.cache
def _has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8; without it XLA's product of them is scalar code."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text(encoding="utf-8", errors="replace")


_DOTS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "unsigned": _unsigned_dot,
    "signed": _signed_dot,
}
_CONVS: dict[str, Callable[..., Array]] = {
    "unsigned patches": functools.partial(_unsigned_conv, False),
    "unsigned rows": functools.partial(_unsigned_conv, True),
    "signed patches": functools.partial(_signed_conv, False),
    "signed rows": functools.partial(_signed_conv, True),
    "convolution": _xla_conv,
}


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
    sums = weights.sum(1, dtype=jnp.int32)
    return _signed_dot(signed, weights, sums) + _ZERO * sums


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
