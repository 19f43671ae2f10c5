"""What QVD is compared with: other ways to find the quantizer of a layer's input."""

import functools

import jax
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.quant.codec import channel_values, scale_for
from qvd_jax.quant.scri import CLIP_CANDIDATES, ActivationQuantizer

SMOOTHQUANT_ALPHA = 0.5


def minmax(lower: Array, upper: Array, bits: int, clip: Array | float = 1.0) -> ActivationQuantizer:
    """One range for all channels, from the lowest to the highest value.

    Args:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      bits: of a code.
      clip: share of the range that keeps its codes.
    """
    low, high = lower.min(), upper.max()
    half = clip * (high - low) / 2
    ones = jnp.ones_like(lower)
    return ActivationQuantizer((low + high) / 2 * ones, ones, scale_for(half, bits))


def mse(lower: Array, upper: Array, inputs: Array, bits: int) -> ActivationQuantizer:
    """`minmax` clipped where the squared error of the sampled input is least.

    Args:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      inputs: sampled rows `[R, P, C]`.
      bits: of a code.
    """
    clip = min(CLIP_CANDIDATES, key=lambda clip: float(_error(lower, upper, inputs, clip, bits)))
    return minmax(lower, upper, bits, clip)


@functools.partial(jax.jit, static_argnames="bits")
def _error(lower: Array, upper: Array, inputs: Array, clip: Array, bits: int) -> Array:
    quantizer = minmax(lower, upper, bits, clip)
    return jnp.square(quantizer.dequantized(inputs, bits) - inputs).mean()


def rotated_clip(quantizer: ActivationQuantizer, inputs: Array, bits: int, rotation: int) -> float:
    """The share of rotated values' reach at which their squared error is least.

    Args:
      quantizer: of the input before it is rotated.
      inputs: sampled rows `[R, P, C]`.
      bits: of a code.
      rotation: channels of a group that are mixed.
    """

    def error(clip: float) -> float:
        suited = quantizer.suited(inputs, clip, bits, rotation, token=False)
        exact = channel_values(inputs, suited.in_scale, suited.in_offset, rotation)
        found = suited.multiplied(inputs, bits, rotation)
        return float(jnp.square((found - exact) * suited.step).mean())

    return min(CLIP_CANDIDATES, key=error)


def smoothquant(lower: Array, upper: Array, weights: Array, bits: int) -> ActivationQuantizer:
    """Moves the channels' ranges into the weights (Xiao et al., arXiv 2211.10438, equation 4).

    s = max|x|^alpha / max|W|^(1 - alpha), one symmetric range for all channels of x / s.

    Args:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      weights: `[P, C, O]`.
      bits: of a code.
    """
    reach = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    heaviest = jnp.abs(weights).max((0, 2))
    alpha = SMOOTHQUANT_ALPHA
    factor = reach**alpha / jnp.maximum(heaviest, 1e-8) ** (1 - alpha)
    factor = jnp.where((reach > 0) & (heaviest > 0), factor, 1.0)
    step = scale_for((reach / factor).max(), bits)
    return ActivationQuantizer(jnp.zeros_like(lower), factor, step)


def qdiffusion(
    lower: Array, upper: Array, inputs: Array, bits: int, split: int | None
) -> ActivationQuantizer:
    """`mse`, with ranges of their own for the two parts of a concatenated shortcut.

    Li et al., arXiv 2302.04304, section 3.3.2. The ratio of the two steps folds into the weights,
    which share a scale, where the paper quantizes them apart; its block reconstruction is left
    out.

    Args:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      inputs: sampled rows `[R, P, C]`.
      bits: of a code.
      split: how many channels come before the shortcut's; None where nothing is concatenated.
    """
    if split is None:
        return mse(lower, upper, inputs, bits)
    parts = [
        mse(lower[part], upper[part], inputs[..., part], bits)
        for part in (slice(None, split), slice(split, None))
    ]
    step = jnp.maximum(parts[0].step, parts[1].step)
    return ActivationQuantizer(
        jnp.concatenate([part.shift for part in parts]),
        jnp.concatenate([part.factor * part.step / step for part in parts]),
        step,
    )
