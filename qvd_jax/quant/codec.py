"""From values to codes: of weights, of inputs by channel (SCRI) and of temporal features (HTDQ).

Codes are made here alone: calibration, layers and reports see the same ones. An input goes through
two functions, one that brings it to steps of its quantizer and clips, through which derivatives
pass, and one that rounds. `record.QuantizedParams` says what codes stand for.
"""

import functools
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from qvd_jax.axes import Array

# Of the scales in a checkpoint. They are rounded to it before the codes are made: nothing is lost.
SCALE_DTYPE = jnp.bfloat16

# Of the factors of a low-rank branch.
LOW_RANK_DTYPE = jnp.bfloat16

# Features of few steps are searched in float64, layers compute in float32.
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def max_code(bits: int) -> int:
    """Largest code of signed `bits`; the lowest is its negative, so that ranges are symmetric."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: codes have 2 to 8")
    return 2 ** (bits - 1) - 1


def scale_for(half_range: Array, bits: int) -> Array:
    """The step at which `half_range` gets the largest code; 1 where the range is empty."""
    return jnp.where(half_range > 0, half_range / max_code(bits), 1.0)


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
      int8 codes `[K, O]`, and the scales `[O]` of a product of codes in SCALE_DTYPE.
    """
    scale = scale_for(clip * jnp.abs(weights).max(0), bits) * input_step
    scale = scale.astype(SCALE_DTYPE)
    limit = max_code(bits)
    steps = weights / (scale.astype(jnp.float32)[None] / input_step)
    return jnp.clip(jnp.round(steps), -limit, limit).astype(jnp.int8), scale


def channel_values(x: Array, scale: Array, offset: Array, rotation: int = 1) -> Array:
    """An input in steps of its quantizer, neither clipped nor rounded.

    H(x scale + offset), which with SCRI's scale = 1 / (s D) and offset = -z / (s D) is
    H((x - z) / (s D)). H is `rotate`: what stands for the shift is code 0 with it, too.

    Args:
      x: `[..., C]`.
      scale: `[C]`, float32.
      offset: `[C]`, float32.
      rotation: channels of a group of H; 1 leaves all apart.
    """
    along = (1,) * (x.ndim - 1) + (-1,)
    return rotate(x.astype(jnp.float32) * scale.reshape(along) + offset.reshape(along), rotation)


def channel_steps(x: Array, scale: Array, offset: Array, limit: float, rotation: int = 1) -> Array:
    """`channel_values`, clipped: clip(H(x scale + offset), -limit, limit)."""
    return jnp.clip(channel_values(x, scale, offset, rotation), -limit, limit)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix, orthonormal and symmetric, `[size, size]`, a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def rotate(x: Array, rotation: int) -> Array:
    """Mixes the channels of each group: H of `x`, which is its own inverse.

    The wide channels of a group are shared out over all of it (QuaRot: Ashkboos et al., arXiv
    2404.00456; in groups of channels: arXiv 2512.03673).

    Args:
      x: `[..., C]`.
      rotation: G, of neighboring channels in a group.
    """
    if rotation == 1:
        return x
    groups = x.reshape(*x.shape[:-1], -1, rotation)
    # On a TPU three products in bfloat16, of 16 bits; codes have 8.
    mixed = jnp.matmul(groups, hadamard(rotation), precision="high")
    return mixed.reshape(x.shape)


def channel_codes(steps: Array) -> Array:
    """Rounds steps from -128 to 127 to int8, halves to even.

    Next to 1.5 * 2**23 a float32 has no bits for fractions, and its last eight are the integer's:
    on a CPU cheaper than to round and to convert.
    """
    shifted = steps + np.float32(1.5 * 2**23)
    return lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)


def token_steps(values: Array, limit: float) -> tuple[Array, Array]:
    """Values in steps of the token they belong to, and that step.

    Each token's largest value gets the largest code, so nothing is clipped, and derivatives pass
    (dynamic quantization: ZeroQuant, Yao et al., arXiv 2206.01861, section 4.2).

    Args:
      values: of `channel_values`, `[..., C]`.
      limit: the largest code.

    Returns:
      The steps, and D `[..., 1]`. Derivatives see D as a constant.
    """
    reach = lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True))
    # What is next to nothing has no digits to divide by.
    step = reach / limit
    step = jnp.where(step >= jnp.finfo(step.dtype).tiny, step, 1.0)
    return values / step, step


def two_range_steps(x: AnyArray, scale: Any, offset: Any, ratio: Any, bits: int) -> AnyArray:
    """Temporal features in steps of the fine range, clipped and not yet rounded.

    Two ranges have the codes 0 to 2^(b-1) - 1 each, a single one -2^(b-1) to 2^(b-1) - 1.

    Args:
      x: `[..., C]`.
      scale: 1 / D.
      offset: of the value of code 0, in steps, negated.
      ratio: of the coarse range's step to the fine one's, 2^m; 0 where there is one range.
      bits: b.
    """
    half = 2 ** (bits - 1)
    one_range = ratio == 0
    return (x * scale + offset).clip(-half * one_range, (ratio + one_range) * (half - 1))


def two_range_codes(steps: AnyArray, ratio: Any, bits: int) -> tuple[AnyArray, AnyArray]:
    """Rounds steps of `two_range_steps` to fine and coarse codes, int8.

    Where one is not zero the other is: whichever stands for the value that is nearer.
    """
    one_range = ratio == 0
    fine = steps.round().clip(max=2 ** (bits - 1) - 1)
    coarse = (steps / (ratio + one_range)).round()
    # Just above the fine range its last code may be nearer than the first coarse one.
    is_fine = one_range | (abs(steps - fine) <= abs(steps - ratio * coarse))
    return (fine * is_fine).astype(np.int8), (coarse * ~is_fine).astype(np.int8)
