"""Float products: float32 accumulation, and on the CPU convolutions as matrix products.

Both functions have the signatures of those of `jax.lax`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array
from qvd_jax.kernels.patches import Padding, output_sizes, taps

SCOPE = "float_product"
"""In the names of the operations of kernels that multiply so."""


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None) -> Array:
    """`lax.dot_general` that accumulates in float32 and returns the operands' dtype.

    XLA's CPU products of two bfloat16 operands are several times slower when the result is
    bfloat16 as well.
    """
    out = lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(lhs.dtype)


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Padding,
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated` for channels-last input, as products where that is faster.

    Args:
      lhs: `[B, *spatial, C]`.
      rhs: `[*kernel, C, O]`.
      window_strides: one stride for each spatial axis.
      padding: explicit (low, high) pairs; with a string the convolution is XLA's own.
      **options: of `lax.conv_general_dilated`; with dilations or groups it is XLA's own, too.
    """

    def direct(lhs: Array, rhs: Array) -> Array:
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    grouped = options.get("feature_group_count", 1) > 1 or options.get("batch_group_count", 1) > 1
    if isinstance(padding, str) or grouped or any(dilation > 1 for dilation in dilations):
        return direct(lhs, rhs)
    formulation = _cpu_formulation(lhs, rhs, window_strides, padding)
    if formulation == "direct":
        return direct(lhs, rhs)

    def as_products(lhs: Array, rhs: Array) -> Array:
        return _conv_as_products(lhs, rhs, window_strides, padding, formulation)

    return lax.platform_dependent(lhs, rhs, cpu=as_products, default=direct)


def _cpu_formulation(
    lhs: Array, rhs: Array, strides: Sequence[int], padding: Padding
) -> Literal["direct", "patches", "rows"]:
    """Fastest CPU formulation, from medians on two Zen 4 cores with jax 0.10.2.

    XLA's direct convolution collapses on small images (2 GFLOP/s at 2x2, 47 at 4x4, 150 from
    8x8 up) and runs bfloat16 at float32's speed. Few channels make products thin, so those stay
    direct.
    """
    kernel, channels = rhs.shape[:-2], rhs.shape[-2]
    positions = math.prod(output_sizes(lhs.shape[1:-1], kernel, strides, padding))
    if math.prod(kernel) == 1:
        return "patches"
    if channels < 128 and positions > 64:
        return "direct"
    if lhs.dtype == jnp.bfloat16:
        if positions <= 64:
            return "patches"
        return "rows" if positions <= 1024 else "direct"
    return "patches" if positions <= 16 else "direct"


def _conv_as_products(
    lhs: Array,
    rhs: Array,
    strides: Sequence[int],
    padding: Padding,
    formulation: Literal["patches", "rows"],
) -> Array:
    """A convolution as one product over whole patches, or as one product per kernel row.

    Rows need a third of the gathered memory of a 3x3 kernel's patches and pay with three
    accumulations.
    """
    kernel, channels = rhs.shape[:-2], rhs.shape[-2:]
    seen = taps(lhs, kernel, strides, padding)
    parts = 1 if formulation == "patches" else kernel[0]
    count = len(seen) // parts
    out: Array | None = None
    for part, weights in enumerate(rhs.reshape(parts, count * channels[0], channels[1])):
        patches = jnp.concatenate(seen[part * count : (part + 1) * count], axis=-1)
        product = jax.lax.dot_general(
            patches,
            weights,
            (((patches.ndim - 1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        out = product if out is None else out + product
    assert out is not None
    return out.astype(lhs.dtype)
