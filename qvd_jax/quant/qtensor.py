"""Uniform symmetric quantization: codes, scales, and back."""

import jax.numpy as jnp

from qvd_jax.axes import Array

# Of the scales in a checkpoint. They are rounded to it before the codes are made: nothing is lost.
SCALE_DTYPE = jnp.bfloat16


def max_code(bits: int) -> int:
    """Largest code of signed `bits`; the lowest is its negative, so that ranges are symmetric."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: codes have 2 to 8")
    return 2 ** (bits - 1) - 1


def scale_for(half_range: Array, bits: int) -> Array:
    """The step at which `half_range` gets the largest code; 1 where the range is empty."""
    return jnp.where(half_range > 0, half_range / max_code(bits), 1.0)


def quantize(x: Array, scale: Array, bits: int) -> Array:
    """int8 codes of `x`; `scale` broadcasts against it."""
    limit = max_code(bits)
    return jnp.clip(jnp.round(x / scale), -limit, limit).astype(jnp.int8)


def quantize_weights(
    weights: Array,
    bits: int,
    input_step: Array | float = 1.0,
    clip: Array | float = 1.0,
) -> tuple[Array, Array]:
    """Codes of a weight matrix, symmetric for each output channel.

    Args:
      weights: `[K, O]`.
      bits: of a code.
      input_step: D of the input's codes, 1 of a float input.
      clip: share of each output's largest weight that gets the largest code, `[O]` or a scalar.

    Returns:
      Codes `[K, O]`, and the scales `[O]` of a product of codes in SCALE_DTYPE.
    """
    scale = scale_for(clip * jnp.abs(weights).max(0), bits) * input_step
    scale = scale.astype(SCALE_DTYPE)
    return quantize(weights, scale.astype(jnp.float32)[None] / input_step, bits), scale
