"""Products of int8 codes with int32 accumulation, exact on every backend.

Operands and results are the same everywhere; how a product is formed is chosen here, by platform:

    CPU with VNNI   codes become unsigned, u8 x s8, 128 times the weight sums taken off;
                    convolutions as products over patches, or over rows of them in large images;
                    of an upsampled image as one over its codes before that
    other CPUs      the same with s8 x s8
    GPU             s8 x s8 with weights `[O, K]`; convolutions as one product over patches
    TPU             s8 x s8; convolutions XLA's own

Weights are `[O, K]` and `[O, *kernel, C]`: XLA wants both operands of an int8 product K-minor on
the GPU, and the CPU does not care.
"""

import functools
import math
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

_ROWS_FROM = 256
"""Positions of an image from which on the CPU multiplies row by row of a kernel."""

_UPSAMPLED_FROM = 64
"""Positions of an image from which on the CPU multiplies before it is upsampled."""

_ZERO = 128
"""What unsigned codes have for zero."""


def dot(codes: Array, weights: Array, sums: Array, implementation: str | None = None) -> Array:
    """Contracts the last axes, `[..., K] x [O, K] -> [..., O]`.

    Args:
      codes: int8.
      weights: int8, int4 or int2.
      sums: int32 `[O]`, of the weights over K; recomputing them would read all weights once more.
      implementation: one of `runnable_dots()`; None chooses by platform.

    Returns:
      int32; it cannot overflow while K is below 65,536.

    Raises:
      InputError: this machine cannot run the implementation.
    """
    if implementation is not None:
        _check_runnable(implementation, runnable_dots())
        return _multiply(codes, weights, sums, implementation)
    on_cpu = "unsigned" if _has_vnni() else "signed"
    return _multiply(codes, weights, sums, "signed", (("cpu", on_cpu),))


def conv(
    codes: Array,
    weights: Array,
    sums: Array,
    strides: Sequence[int],
    padding: Padding,
    implementation: str | None = None,
    dilation: Sequence[int] | None = None,
) -> Array:
    """Correlates channels-last codes with a kernel; what is padded has code 0.

    Args:
      codes: int8 `[B, *spatial, C]`.
      weights: int8, int4 or int2 `[O, *kernel, C]`.
      sums: int32 `[O]`, of the weights over kernel and C.
      strides: one for each spatial axis.
      padding: (low, high) for each spatial axis.
      implementation: one of `runnable_convs()`; None chooses by platform.
      dilation: distance of the kernel's elements along each spatial axis; None is 1.

    Returns:
      int32 `[B, *out, O]`.

    Raises:
      InputError: this machine cannot run the implementation.
    """
    dilation = tuple(dilation or (1,) * len(strides))
    where = (tuple(strides), tuple(tuple(amounts) for amounts in padding), dilation)
    if implementation is not None:
        _check_runnable(implementation, runnable_convs())
        return _multiply(codes, weights, sums, implementation, (), where)
    platforms = (
        ("cpu", _cpu_conv(codes.shape[1:-1], weights.shape[1:-1], strides)),
        ("cuda", "signed patches"),
        ("rocm", "signed patches"),
    )
    return _multiply(codes, weights, sums, "convolution", platforms, where)


def upsampled_conv(
    codes: Array, weights: Array, sums: Array, implementation: str | None = None
) -> Array:
    """Correlates what nearest-neighbour upsampling makes of codes with a 3x3 kernel, padded by 1.

    Args:
      codes: int8 `[B, H, W, C]`, each of which stands for 2x2 positions.
      weights: int8, int4 or int2 `[O, 3, 3, C]`.
      sums: int32 `[O]`, of the weights over kernel and C.
      implementation: one of `runnable_upsampled_convs()`; None chooses by platform.

    Returns:
      int32 `[B, 2H, 2W, O]`.

    Raises:
      InputError: this machine cannot run the implementation.
    """
    weights = weights.astype(jnp.int8)
    behind = _UPSAMPLED_CONVS["behind upsampling"]
    with jax.named_scope(SCOPE):
        if implementation is not None:
            _check_runnable(implementation, runnable_upsampled_convs())
            return _UPSAMPLED_CONVS[implementation](codes, weights, sums)
        if math.prod(codes.shape[1:-1]) < _UPSAMPLED_FROM:
            return behind(codes, weights, sums)
        signedness = "unsigned" if _has_vnni() else "signed"
        on_cpu = _UPSAMPLED_CONVS[f"{signedness} before upsampling"]
        return lax.platform_dependent(codes, weights, sums, cpu=on_cpu, default=behind)


def runnable_dots() -> list[str]:
    """Implementations of `dot` that this machine can run."""
    return [name for name in _DOTS if _is_runnable(name)]


def runnable_convs() -> list[str]:
    """Implementations of `conv` that this machine can run."""
    return [name for name in _CONVS if _is_runnable(name)]


def runnable_upsampled_convs() -> list[str]:
    """Implementations of `upsampled_conv` that this machine can run."""
    return [name for name in _UPSAMPLED_CONVS if _is_runnable(name)]


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


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _multiply(
    codes: Array,
    weights: Array,
    sums: Array,
    default: str,
    platforms: tuple[tuple[str, str], ...] = (),
    where: tuple[Any, ...] = (),
) -> Array:
    """A product by the implementation of each platform, `default`'s on all others.

    All of them are traced, whichever is compiled: by way of jit once for each shape, not for each
    layer. `where` is strides, padding and dilation of a convolution.
    """
    weights = weights.astype(jnp.int8)

    def named(name: str) -> Callable[..., Array]:
        product = _CONVS[name] if where else _DOTS[name]
        return lambda *arrays: product(*arrays, *where)

    with jax.named_scope(SCOPE):
        if not platforms:
            return named(default)(codes, weights, sums)
        return lax.platform_dependent(
            codes,
            weights,
            sums,
            default=named(default),
            **{platform: named(name) for platform, name in platforms},
        )


def xla_conv(
    codes: Array,
    weights: Array,
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int] | None = None,
) -> Array:
    """`conv` as XLA's own; on the GPU it exists only with a conversion to float32 behind it."""
    spatial = "DHW"[-(codes.ndim - 2) :]
    return lax.conv_general_dilated(
        codes,
        weights,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"O{spatial}I", f"N{spatial}C"),
        preferred_element_type=jnp.int32,
    )


def _cpu_conv(spatial: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> str:
    """Fastest formulation of a convolution on the CPU, from medians on two Zen 4 cores.

    From 16x16 positions up the patches of a 3x3 kernel outgrow the caches, and rows are 1.0 to
    1.5 times as fast; below, with strides and over time whole patches are, 1.0 to 1.6 times.
    """
    by_rows = (
        math.prod(spatial) >= _ROWS_FROM and len(kernel) == 2 and max(strides) == 1 < kernel[0]
    )
    return f"{'unsigned' if _has_vnni() else 'signed'} {'rows' if by_rows else 'patches'}"


def _direct_conv(
    codes: Array,
    weights: Array,
    sums: Array,
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Array:
    del sums
    return xla_conv(codes, weights, strides, padding, dilation)


def _gathered_conv(
    codes: Array,
    weights: Array,
    sums: Array,
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    *,
    unsigned: bool,
    by_rows: bool,
) -> Array:
    """One product over whole patches, or the sum of one for each row of the kernel.

    Rows are gathered along the width once: each row of the kernel sees the same ones, but at
    another height.

    On the GPU whole patches move half the bytes of rows, whose int32 sums are written and read
    three times, and a quarter of those of a product for each tap (compiled for an H200, not run:
    `docs/results/formulations_h200.json`). A kernel that gathers on the chip could do with 0.6 of
    them. cuDNN's does, but returns float32: that these are the int32 sums, rounded once, is for
    `benchmark products` to see on a GPU. Pallas for Mosaic GPU copies into its tiles from
    multiples of eight positions, not from each tap's.
    """
    product, fill = (_mixed_dot, _ZERO) if unsigned else (_signed_dot, 0)
    codes = _unsigned(codes) if unsigned else codes
    kernel, step, parts, distance = weights.shape[1:-1], 1, 1, dilation[0]
    if by_rows:
        (parts, *width), (step, *steps) = kernel, strides
        kernel, strides = (1, *width), (1, *steps)
    patches = jnp.concatenate(taps(codes, kernel, strides, padding, fill, dilation), axis=-1)
    rows = weights.reshape(len(weights), parts, -1)
    places = patches.shape[1] - (parts - 1) * distance
    products = (
        product(patches[:, i * distance : i * distance + places : step], rows[:, i])
        for i in range(parts)
    )
    total = functools.reduce(jnp.add, products)
    return _take_off_zeros(total, sums) if unsigned else total


def _conv_behind_upsampling(codes: Array, weights: Array, sums: Array) -> Array:
    upsampled = jnp.repeat(jnp.repeat(codes, 2, axis=1), 2, axis=2)
    return conv(upsampled, weights, sums, (1, 1), ((1, 1), (1, 1)))


def _conv_before_upsampling(codes: Array, weights: Array, sums: Array, *, unsigned: bool) -> Array:
    """One product of all codes with all elements of the kernel, whose results are then placed.

    A code meets each element of the kernel once instead of at four positions: a quarter of the
    multiplications, 0.3 to 0.5 of the time on two cores of a Xeon from 8x8 codes up. In smaller
    images putting the weights in order, an element's after the other's, takes what that saves.
    """
    del sums
    features, *kernel, channels = weights.shape
    weights = jnp.moveaxis(weights, 0, -2).reshape(-1, channels)
    if unsigned:
        product = _mixed_dot(_unsigned(codes), weights)
        product -= _mixed_dot(jnp.full((1, 1, 1, channels), _ZERO, jnp.uint8), weights)
    else:
        product = _signed_dot(codes, weights)
    product = product.reshape(*codes.shape[:-1], *kernel, features)
    return _place_upsampled(_place_upsampled(product, axis=2), axis=1)


def _place_upsampled(products: Array, axis: int) -> Array:
    """Sums products with the elements of a kernel's last axis where upsampling puts them.

    Of the two positions of a code one sees the code before, itself and itself again, the other
    itself twice and the code behind.

    Args:
      products: `[B, H, W, *kernel, O]`, the last axis of `kernel` of size 3.
      axis: H or W, along which that axis of the kernel moves.

    Returns:
      The same without that axis of the kernel, twice as long along `axis`.
    """
    before, here, after = (products[..., element, :] for element in range(3))
    shape = before.shape
    edge = jnp.zeros_like(lax.slice_in_dim(before, 0, 1, axis=axis))
    from_before = jnp.concatenate([edge, lax.slice_in_dim(before, 0, -1, axis=axis)], axis)
    from_after = jnp.concatenate([lax.slice_in_dim(after, 1, None, axis=axis), edge], axis)
    first, second = from_before + here + after, before + here + from_after
    placed = jnp.stack([first, second], axis + 1)
    return placed.reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def _dot(codes: Array, weights: Array, sums: Array, *, unsigned: bool) -> Array:
    if unsigned:
        return _take_off_zeros(_mixed_dot(_unsigned(codes), weights), sums)
    return _signed_dot(codes, weights)


def _signed_dot(codes: Array, weights: Array) -> Array:
    return lax.dot_general(
        codes,
        weights,
        (((codes.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )


def _take_off_zeros(product: Array, sums: Array) -> Array:
    """From a product of unsigned codes what their zeros added to it."""
    return product - _ZERO * sums.reshape((1,) * (product.ndim - 1) + (-1,))


def _unsigned(codes: Array) -> Array:
    """Codes moved up by `_ZERO`."""
    return lax.bitcast_convert_type(codes, jnp.uint8) ^ np.uint8(_ZERO)


def _mixed_dot(unsigned: Array, weights: Array) -> Array:
    rows = unsigned.reshape(-1, unsigned.shape[-1])
    # One row alone XLA multiplies with weights converted to int32, two 35 times as fast.
    product = _mixed_dot_p.bind(jnp.repeat(rows, 2, 0) if len(rows) == 1 else rows, weights)
    return product[: len(rows)].reshape(*unsigned.shape[:-1], -1)


@functools.cache
def _has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8; without it XLA's product of them is scalar code."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text(encoding="utf-8", errors="replace")


_DOTS: dict[str, Callable[..., Array]] = {
    "unsigned": functools.partial(_dot, unsigned=True),
    "signed": functools.partial(_dot, unsigned=False),
}
_CONVS: dict[str, Callable[..., Array]] = {
    "unsigned patches": functools.partial(_gathered_conv, unsigned=True, by_rows=False),
    "unsigned rows": functools.partial(_gathered_conv, unsigned=True, by_rows=True),
    "signed patches": functools.partial(_gathered_conv, unsigned=False, by_rows=False),
    "signed rows": functools.partial(_gathered_conv, unsigned=False, by_rows=True),
    "convolution": _direct_conv,
}
_UPSAMPLED_CONVS: dict[str, Callable[..., Array]] = {
    "unsigned before upsampling": functools.partial(_conv_before_upsampling, unsigned=True),
    "signed before upsampling": functools.partial(_conv_before_upsampling, unsigned=False),
    "behind upsampling": _conv_behind_upsampling,
}


# `lax.dot_general` converts operands of different types to int32 first, which is slow; the
# primitive hands XLA the mixed product itself.
_mixed_dot_p = jex.core.Primitive("mixed_int8_dot")


@_mixed_dot_p.def_abstract_eval
def _mixed_dot_shape(codes: Any, weights: Any) -> jax.core.ShapedArray:
    # On a mesh of explicit axes rows and outputs lie as those of the operands.
    rows, outputs = (operand.sharding.spec[0] for operand in (codes, weights))
    sharding = codes.sharding.update(spec=jax.sharding.PartitionSpec(rows, outputs))
    return jax.core.ShapedArray((codes.shape[0], weights.shape[0]), jnp.int32, sharding=sharding)


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
    return _signed_dot(signed, weights) + _ZERO * weights.sum(1, dtype=jnp.int32)[None]


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
