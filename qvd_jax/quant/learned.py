"""Factors of channels learned by descent, from those that SCRI finds.

SCRI has one number for all channels, the range they are narrowed to. Which factors are best is a
question for each: a factor makes the codes of its channel coarser, and its weights larger, whose
largest one sets the step of an output's weights. Both errors are smooth enough in the factors to
descend along their sum (learnable equivalent transformations: Shao et al., arXiv 2308.13137,
section 3.3, which descends along a block's output by the network's own gradients).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from qvd_jax.axes import Array
from qvd_jax.quant.codec import max_code
from qvd_jax.quant.scri import ActivationQuantizer

_STEPS = 100
_RATE = 0.1
_NORM = 8
"""Of the weights of an output, in the place of their largest: clipping comes to less than that."""


@functools.partial(jax.jit, static_argnames=("activation_bits", "weight_bits", "token"))
def learn(
    quantizer: ActivationQuantizer,
    lower: Array,
    upper: Array,
    inputs: Array,
    weights: Array,
    left: Array,
    activation_bits: int,
    weight_bits: int,
    *,
    token: bool = False,
) -> ActivationQuantizer:
    """The quantizer with the factors at which the error to be expected of a layer is least.

    With D the step of the inputs' codes (a token's, or that of all), h what of the square of an
    error in a weight is left in the output, and r_o the largest weight of an output,

        mean D^2 / 12 sum_c s_c^2 mean_o W_co^2
            + mean_o r_o^2 mean_o |s W_o / r_o|_8^2 / (2^(b_w-1) - 1)^2 / 12 sum_c h_c / s_c^2

    Errors are taken for evenly spread over a step, and for independent. The second mean counts all
    outputs alike: those of the largest weights would decide about all factors.

    Args:
      quantizer: to begin with.
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      inputs: sampled rows `[R, P, C]`.
      weights: `[P, C, O]`.
      left: h, `[P C]`: `rounding.spared`, or the inputs' variances where weights are rounded to the
        nearest code.
      activation_bits: b_a.
      weight_bits: b_w.
      token: whether ranges are those of tokens.
    """
    reach = jnp.abs(inputs - quantizer.shift[None, None]).max(1)
    half = (upper - lower) / 2
    clipped = quantizer.step / jnp.maximum((half / quantizer.factor).max(), 1e-30)
    power = jnp.square(weights).mean(-1).sum(0)
    largest = jnp.max(jnp.abs(weights), 0)
    largest = largest / jnp.maximum(largest.max(0), 1e-30)[None]
    range_ = jnp.square(jnp.abs(weights).max((0, 1))).mean()
    by_channel = left.reshape(weights.shape[:2]).sum(0)

    def step_of(factor: Array) -> Array:
        if token:
            return (reach / factor[None]).max(1) / max_code(activation_bits)
        return clipped * (half / factor).max()

    def error(logarithm: Array) -> Array:
        factor = jnp.exp(logarithm)
        of_inputs = jnp.square(step_of(factor)).mean() / 12 * (jnp.square(factor) * power).sum()
        norms = ((factor[:, None] * largest) ** _NORM).sum(0) ** (2 / _NORM)
        step = range_ * norms.mean() / max_code(weight_bits) ** 2
        return jnp.log(of_inputs + step / 12 * (by_channel / jnp.square(factor)).sum())

    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))
    first = jnp.log(quantizer.factor)

    def descend(state: tuple, _: None) -> tuple[tuple, None]:
        logarithm, moments, least, best = state
        value, slope = jax.value_and_grad(error)(logarithm)
        best = jnp.where(value < least, logarithm, best)
        # A layer without any error has no slope.
        updates, moments = optimizer.update(jnp.nan_to_num(slope), moments)
        return (logarithm + updates, moments, jnp.fmin(least, value), best), None

    begin = (first, optimizer.init(first), jnp.float32(jnp.inf), first)
    (*_, best), _ = jax.lax.scan(descend, begin, length=_STEPS)
    factor = jnp.exp(best)
    step = quantizer.step if token else step_of(factor)
    # An input that is constant has no range to learn a factor of, nor a step.
    is_constant = half.max() == 0
    return quantizer._replace(
        factor=jnp.where(is_constant, quantizer.factor, factor),
        step=jnp.where(is_constant, quantizer.step, step),
    )
