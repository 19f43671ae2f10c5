"""Where weights of few bits are clipped: each output of a layer where its error is least."""

import functools

import jax
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.quant.codec import quantize_weights

WEIGHT_CLIP_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# With three or seven levels large weights count less.
_OF_FEW_LEVELS = (0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25)


def clip_candidates(bits: int) -> tuple[float, ...]:
    """Shares of an output's largest weight that may get the largest code, the widest first."""
    return WEIGHT_CLIP_CANDIDATES + _OF_FEW_LEVELS * (bits <= 3)


def search_weight_clip(
    rows: Array,
    weights: Array,
    exact: Array,
    bits: int,
    input_step: Array | float = 1.0,
    *,
    mean_counts: bool = False,
) -> Array:
    """The share of each output's largest weight at which the output's error is least, `[O]`.

    With weights of 4 bits it is worth 2.6 dB of a layer's output (layers of the small model, on
    rows the search did not see), with 6 bits 0.3 dB, which its videos do not show, with 8 nothing.

    Args:
      rows: what the weights multiply, sampled, `[R, K]`: codes of a quantized input, which the
        values are `input_step` times, or a float input.
      weights: `[K, O]`.
      exact: the float layer's output `[R, O]`, up to a constant unless the mean counts.
      bits: of the weights' codes.
      input_step: D of the input's codes, 1 of a float input.
      mean_counts: as in `error_of_codes`.
    """
    candidates = clip_candidates(bits)
    errors = [
        output_error(rows, weights, exact, bits, input_step, clip, mean_counts=mean_counts)
        for clip in candidates
    ]
    # The first of equals: the widest.
    return jnp.asarray(candidates)[jnp.stack(errors).argmin(0)]


@functools.partial(jax.jit, static_argnames=("bits", "mean_counts"))
def output_error(
    rows: Array,
    weights: Array,
    exact: Array,
    bits: int,
    input_step: Array | float = 1.0,
    clip: Array | float = 1.0,
    *,
    mean_counts: bool = False,
) -> Array:
    """Error of each output when a layer's weights are quantized, `[O]`.

    Args:
      rows: as in `search_weight_clip`.
      weights: `[K, O]`.
      exact: the float layer's output `[R, O]`.
      bits: of the weights' codes.
      input_step: D of the input's codes, 1 of a float input.
      clip: share of each output's largest weight that gets the largest code.
      mean_counts: as in `error_of_codes`.
    """
    codes, scale = quantize_weights(weights, bits, input_step, clip)
    return error_of_codes(rows, codes, scale, exact, mean_counts=mean_counts)


def error_of_codes(
    rows: Array, codes: Array, scale: Array, exact: Array, *, mean_counts: bool = False
) -> Array:
    """Error of each output of a product with codes of weights, `[O]`.

    Args:
      rows: as in `search_weight_clip`.
      codes: `[K, O]`.
      scale: of the product, `[O]`.
      exact: the float layer's output `[R, O]`.
      mean_counts: whether the error is the mean square; else it is the variance, for the bias of a
        layer with quantized inputs takes the error's mean.
    """
    product = jnp.matmul(rows, codes.astype(jnp.float32), precision="highest")
    error = product * scale[None] - exact
    return jnp.square(error).mean(0) if mean_counts else error.var(0)
