"""Uniform symmetric quantization: codes, scales, and back."""

import jax.numpy as jnp

from qvd_jax.axes import Array


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


def quantize_weights(weights: Array, bits: int) -> tuple[Array, Array]:
    """Codes of a weight matrix, symmetric for each output channel.

    Args:
      weights: `[K, O]`.
      bits: of a code.

    Returns:
      Codes `[K, O]` and scales `[O]`.
    """
    scale = scale_for(jnp.abs(weights).max(0), bits)
    return quantize(weights, scale[None], bits), scale
