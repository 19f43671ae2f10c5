"""Products of quantized layers: inputs in steps, int8 products of them, and what derivatives see.

Derivatives pass straight through the rounding (Bengio et al., arXiv 1308.3432): an input has the
gradient of the float layer with the weights that the codes stand for, where the quantizer does not
clip it, and none where it does. The codes of the weights are integers and have none.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array
from qvd_jax.kernels import floating
from qvd_jax.quant.codec import channel_codes, max_code, token_steps, two_range_codes
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.record import QuantizedParams

QUANTIZING = "quantizing"
"""The scope of what makes codes of inputs, in the names of a compiled program's operations."""


def input_steps(x: Array, record: QuantizedParams, spec: LayerSpec) -> tuple[Array, Array | None]:
    """An input in steps of its quantizer, and of each token the step that its values have.

    Args:
      x: `[..., C]`.
      record: of the layer.
      spec: of the layer.

    Returns:
      The steps, clipped and not rounded, and where ranges are those of tokens, the tokens' steps.
    """
    with jax.named_scope(QUANTIZING):
        if spec.ranges == "token":
            return token_steps(record.values(x, spec), max_code(spec.activation_bits))
        return record.steps(x, spec), None


def low_rank_branch(
    multiply: Callable[[Array, Array], Array], x: Array, record: QuantizedParams, spec: LayerSpec
) -> Array | None:
    """The low-rank branch up to its last product: `[..., rank]`, where a layer has one.

    Args:
      multiply: the layer's own product, in float.
      x: what the layer multiplies: an input in steps, or a float one.
      record: of the layer.
      spec: of the layer.
    """
    if record.down is None:
        return None
    if spec.activation_bits < 16:
        x = _rounded(x, record, spec.activation_bits)
    return multiply(x, record.down)


def _rounded(steps: Array, record: QuantizedParams, bits: int) -> Array:
    """The codes of clipped steps as float32, through which derivatives pass."""
    with jax.named_scope(QUANTIZING):
        if record.coarse is None:
            codes = channel_codes(steps).astype(jnp.float32)
        else:
            fine, coarse = two_range_codes(steps, record.coarse, bits)
            codes = fine + record.coarse * coarse
        return steps + lax.stop_gradient(codes - steps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def straight_through(
    multiply: Callable[..., Array],
    differentiate: Callable[[Array, Array], Array],
    steps: Array,
    kernel: Array,
    *others: Array,
) -> Array:
    """The product of rounded steps with a kernel's codes, float32.

    A rule for tangents serves gradients too, and forward mode, which a rule for cotangents forbids.

    Args:
      multiply: rounds and multiplies all the arrays.
      differentiate: the same product of `steps` and `kernel` alone, in float and not rounded.
      steps: of the input.
      kernel: codes of the weights.
      *others: what else the product takes.
    """
    del differentiate
    return multiply(steps, kernel, *others).astype(jnp.float32)


@straight_through.defjvp
def _straight_through_jvp(
    multiply: Callable[..., Array],
    differentiate: Callable[[Array, Array], Array],
    primals: tuple[Array, ...],
    tangents: tuple[Array, ...],
) -> tuple[Array, Array]:
    product = straight_through(multiply, differentiate, *primals)
    return product, differentiate(tangents[0], primals[1])


def product_of_codes(
    multiply: Callable[[Array, Array, Array], Array],
    bits: int,
    steps: Array,
    kernel: Array,
    sums: Array,
    ratio: Array | None = None,
) -> Array:
    """An int8 product of clipped steps, rounded.

    Args:
      multiply: of int8 codes, kernel and sums.
      bits: of the codes.
      steps: of the input.
      kernel: codes of the weights.
      sums: of the kernel.
      ratio: of the steps of two ranges, where the input has two.
    """
    if ratio is None:
        with jax.named_scope(QUANTIZING):
            codes = channel_codes(steps)
        return multiply(codes, kernel, sums)
    with jax.named_scope(QUANTIZING):
        fine, coarse = two_range_codes(steps, ratio, bits)
    return multiply(fine, kernel, sums) + ratio * multiply(coarse, kernel, sums)


def float_dot(x: Array, kernel: Array) -> Array:
    """Contracts the last axes in float, `[..., K] x [O, K] -> [..., O]`; float32."""
    return lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def float_conv(
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    x: Array,
    kernel: Array,
) -> Array:
    """Correlates `x` `[B, *spatial, C]` with a kernel `[O, *kernel, C]` in float."""
    weights = jnp.moveaxis(kernel, 0, -1).astype(x.dtype)
    numbers = _channels_last(kernel.ndim - 2)
    return floating.conv_general_dilated(
        x, weights, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers
    )


def float_conv_of_upsampled(
    convolve: Callable[[Array, Array], Array], x: Array, kernel: Array
) -> Array:
    """The same of what nearest-neighbour upsampling makes of `x` `[B, H, W, C]`."""
    return convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def to_output(
    product: Array,
    scale: Array,
    bias: Array,
    token: Array | None,
    branch: Array | None,
    up: Array | None,
) -> Array:
    """Scale product + branch . up, times each token's step, plus the bias; float32."""
    along = (1,) * (product.ndim - 1) + (-1,)
    y = product.astype(jnp.float32) * scale.reshape(along)
    if branch is not None:
        assert up is not None
        y = y + float_dot(branch.astype(jnp.float32), up)
    y = y if token is None else y * token
    return y + bias.reshape(along)


def _channels_last(rank: int) -> tuple[str, str, str]:
    spatial = "DHW"[-rank:]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
