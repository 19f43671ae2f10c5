"""SCRI, scattered channel range integration (Tian et al., arXiv 2407.11585, section 3.3).

A per-tensor quantizer wastes its levels on channels that are off-centre or narrow. SCRI centres
every channel, widens none and narrows those that reach beyond an integrated range; the factors
fold into the weights and the centres into the bias.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array
from qvd_jax.quant import clipping
from qvd_jax.quant.codec import (
    channel_codes,
    channel_steps,
    channel_values,
    max_code,
    rotate,
    scale_for,
    token_steps,
)

RANGE_CANDIDATES = 12
SEARCH_ROUNDS = 3
CLIP_CANDIDATES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


class ActivationQuantizer(NamedTuple):
    """How the input of a layer becomes codes: q = clip(round((x - z) / (s D))).

    Attributes:
      shift: z `[C]`.
      factor: s `[C]`, folded into the weights.
      step: D, a scalar.
    """

    shift: Array
    factor: Array
    step: Array

    @property
    def in_scale(self) -> Array:
        """1 / (s D), `[C]`."""
        return 1 / (self.factor * self.step)

    @property
    def in_offset(self) -> Array:
        """-z / (s D), `[C]`."""
        return -self.shift * self.in_scale

    def steps(self, x: Array, limit: float) -> Array:
        """`x`, `[..., C]`, in steps, clipped at a limit and not yet rounded."""
        return channel_steps(x, self.in_scale, self.in_offset, limit)

    def codes(self, x: Array, bits: int) -> Array:
        """int8 codes of `x`, `[..., C]`."""
        return channel_codes(self.steps(x, max_code(bits)))

    def multiplied(self, x: Array, bits: int, rotation: int = 1, *, token: bool = False) -> Array:
        """What weights are multiplied with: the codes of rotated rows, float32 `[R, P, C]`.

        Args:
          x: rows `[R, P, C]`.
          bits: b.
          rotation: channels of a group that are mixed; 1 mixes none.
          token: whether each row has a step of its own, which the codes then are multiplied with.
        """
        quantizer = self.in_scale, self.in_offset
        if token:
            values = channel_values(x, *quantizer, rotation)
            steps, step = token_steps(values, max_code(bits))
            return channel_codes(steps).astype(jnp.float32) * step
        steps = channel_steps(x, *quantizer, max_code(bits), rotation)
        return channel_codes(steps).astype(jnp.float32)

    def folded(self, weights: Array, rotation: int = 1) -> Array:
        """The weights that the codes are multiplied with: H(s W), `[P, C, O]`."""
        return rotate_inputs(weights * self.factor[None, :, None], rotation)

    def suited(
        self, inputs: Array, clip: Array | float, bits: int, rotation: int = 1, *, token: bool
    ) -> "ActivationQuantizer":
        """For rotated values or the ranges of tokens: with the means for shift, and with their D.

        The middle of a channel's range is far from where most of its values lie (of what comes out
        of SiLU they are near its lower end). Mixed, these distances would add up in one channel of
        a group, and no token would have a range smaller than they are.

        Args:
          inputs: rows `[R, P, C]`; of rotated values what lies beyond theirs is clipped.
          clip: share of the reach that keeps its codes.
          bits: b.
          rotation: channels of a group.
          token: whether ranges are those of tokens, which have their D beside this one, 1.
        """
        if rotation == 1 and not token:
            return self
        shift = inputs.mean((0, 1))
        if token:
            return self._replace(shift=shift, step=jnp.ones_like(self.step))
        values = channel_values(inputs, 1 / self.factor, -shift / self.factor, rotation)
        return self._replace(shift=shift, step=scale_for(clip * jnp.abs(values).max(), bits))

    def dequantized(self, x: Array, bits: int) -> Array:
        """The values that the codes of `x` stand for."""
        shift, scale = (_as_last(v, x.ndim) for v in (self.shift, self.factor * self.step))
        return shift + scale * self.codes(x, bits).astype(jnp.float32)


def rotate_inputs(weights: Array, rotation: int) -> Array:
    """Weights `[P, C, O]` for inputs whose channels are mixed: H along C."""
    return jnp.moveaxis(rotate(jnp.moveaxis(weights, 1, -1), rotation), -1, 1)


def _as_last(vector: Array, rank: int) -> Array:
    return vector.reshape((1,) * (rank - 1) + (-1,))


def integrate(
    lower: Array, upper: Array, target: Array, clip: Array, bits: int
) -> ActivationQuantizer:
    """The quantizer of an integrated half-range.

    z = (l + u) / 2, r = (u - l) / 2, s = max(1, r / R), D = rho max(r / s) / (2^(b-1) - 1).

    Args:
      lower: l, lowest value of each channel, `[C]`.
      upper: u, highest value of each channel, `[C]`.
      target: R, the integrated half-range; max r leaves all factors at 1.
      clip: rho in (0, 1].
      bits: b.
    """
    half = (upper - lower) / 2
    # A target of zero, of channels that are all constant, leaves them at a factor of one too.
    factor = jnp.maximum(1.0, half / jnp.where(target > 0, target, 1.0))
    widest = (half / factor).max()
    step = scale_for(clip * widest, bits)
    return ActivationQuantizer((lower + upper) / 2, factor, step)


def search(
    lower: Array,
    upper: Array,
    inputs: Array,
    weights: Array,
    activation_bits: int,
    weight_bits: int,
    rotation: int = 1,
    *,
    token: bool = False,
    spared: Array | None = None,
) -> tuple[ActivationQuantizer, float]:
    """The quantizer of least output error on sampled inputs, R and rho found in turn.

    Args:
      lower: lowest value of each channel, `[C]`.
      upper: highest value of each channel, `[C]`.
      inputs: sampled rows `[R, P, C]`; P taps of a convolution, 1 of a Dense layer.
      weights: `[P, C, O]`.
      activation_bits: b_a.
      weight_bits: b_w.
      rotation: channels of a group that are mixed; 1 mixes none.
      token: whether ranges are those of tokens; rho then has no meaning.
      spared: of `rounding.spared`, `[P C]`, where weights are rounded by GPTQ; the error is then
        the one that is to be expected of it (`expected_error`). Not of rotated channels.

    Returns:
      What `integrate` makes of R and rho, and rho. Errors are of it as suited to the rotation and
      the tokens, which is left to the caller, who may know more rows.
    """
    half = np.asarray(upper - lower) / 2
    positive = half[half > 0]
    if not len(positive):
        return integrate(lower, upper, jnp.float32(0), jnp.float32(1), activation_bits), 1.0
    targets = _range_candidates(positive)
    error = functools.partial(
        _error_of_candidate,
        lower,
        upper,
        inputs,
        weights,
        # Less the shift, beside whose part of the output errors would be lost to rounding.
        row_product(inputs - _as_last((lower + upper) / 2, 3), weights),
        spared,
        activation_bits=activation_bits,
        weight_bits=weight_bits,
        rotation=rotation,
        token=token,
    )
    clips = CLIP_CANDIDATES[:1] if token else CLIP_CANDIDATES
    target, clip = targets[0], CLIP_CANDIDATES[0]
    for _ in range(SEARCH_ROUNDS):
        before = target, clip
        # The first of equals: the plainest.
        target = targets[np.argmin([float(error(value, clip)) for value in targets])]
        clip = clips[np.argmin([float(error(target, value)) for value in clips])]
        if (target, clip) == before:
            break
    found = integrate(lower, upper, jnp.float32(target), jnp.float32(clip), activation_bits)
    return found, clip


def _range_candidates(half: np.ndarray) -> np.ndarray:
    """Values of R from the largest half-width down to the least, evenly apart in logarithms.

    They lie at most a factor of two apart, however narrow a nearly dead channel is, and end where
    float32 does not tell a channel beside the widest.

    Args:
      half: of the channels that are not constant.
    """
    widest = float(half.max())
    narrowest = max(float(half.min()), widest * float(np.finfo(np.float32).eps))
    count = max(RANGE_CANDIDATES, math.ceil(math.log2(widest / narrowest)) + 1)
    return np.geomspace(widest, narrowest, count).astype(np.float32)


_STATIC = ("activation_bits", "weight_bits", "rotation", "token")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _error_of_candidate(
    lower: Array,
    upper: Array,
    inputs: Array,
    weights: Array,
    exact: Array,
    spared: Array | None,
    target: Array,
    clip: Array,
    *,
    activation_bits: int,
    weight_bits: int,
    rotation: int,
    token: bool,
) -> Array:
    quantizer = integrate(lower, upper, target, clip, activation_bits)
    quantizer = quantizer.suited(inputs, clip, activation_bits, rotation, token=token)
    widths = activation_bits, weight_bits
    if spared is not None:
        return expected_error(inputs, weights, quantizer, spared, *widths, token=token).mean()
    errors = output_error(
        inputs, weights, exact, quantizer, *widths, rotation=rotation, token=token
    )
    return errors.mean()


@functools.partial(jax.jit, static_argnames=_STATIC)
def output_error(
    inputs: Array,
    weights: Array,
    exact: Array,
    quantizer: ActivationQuantizer,
    activation_bits: int,
    weight_bits: int,
    rotation: int = 1,
    token: bool = False,
) -> Array:
    """Variance of the error of each output when a layer's input and weights are quantized, `[O]`.

    The error's mean does not count: the layer's bias takes it.

    Args:
      inputs: sampled rows `[R, P, C]`.
      weights: `[P, C, O]`.
      exact: the float layer's output `[R, O]`, up to a constant.
      quantizer: of the input.
      activation_bits: b_a.
      weight_bits: b_w.
      rotation: as of `search`.
      token: as of `search`.
    """
    folded = quantizer.folded(weights, rotation).reshape(-1, weights.shape[-1])
    rows = quantizer.multiplied(inputs, activation_bits, rotation, token=token)
    return clipping.output_error(
        rows.reshape(len(rows), -1), folded, exact, weight_bits, quantizer.step
    )


def expected_error(
    inputs: Array,
    weights: Array,
    quantizer: ActivationQuantizer,
    spared: Array,
    activation_bits: int,
    weight_bits: int,
    *,
    token: bool = False,
) -> Array:
    """What `output_error` is to be expected where weights are rounded by GPTQ, `[O]`.

    With e the errors of the inputs' own rounding, and h what GPTQ spares each of an error's square,

        var (sum_k e_k W_ko) + sum_k h_k / s_k^2 (max_k s_k |W_ko| / (2^(b_w-1) - 1))^2 / 12

    Errors of weights are taken for evenly spread over a step.

    Args:
      inputs: sampled rows `[R, P, C]`.
      weights: `[P, C, O]`.
      quantizer: of the input.
      spared: h, `[P C]`, of `rounding.spared`.
      activation_bits: b_a.
      weight_bits: b_w.
      token: as of `search`.
    """
    codes = quantizer.multiplied(inputs, activation_bits, token=token)
    scale = quantizer.factor * quantizer.step
    errors = codes * _as_last(scale, 3) - (inputs - _as_last(quantizer.shift, 3))
    flat = weights.reshape(-1, weights.shape[-1])
    factor = jnp.tile(quantizer.factor, len(weights))
    step = jnp.abs(factor[:, None] * flat).max(0) / max_code(weight_bits)
    of_weights = (spared / jnp.square(factor)).sum() * jnp.square(step) / 12
    return row_product(errors, weights).var(0) + of_weights


def row_product(rows: Array, weights: Array) -> Array:
    """A layer's output `[R, O]` on sampled rows `[R, P, C]`, weights `[P, C, O]`."""
    flat = weights.reshape(-1, weights.shape[-1])
    return jnp.matmul(rows.reshape(len(rows), -1), flat, precision="highest")


def mean_product(rows: Array, weights: Array) -> Array:
    """What the rows' mean over everything but channels adds through each tap, `[P, O]`."""
    return jnp.einsum("c,tco->to", rows.mean((0, 1)), weights, precision="highest")


def coverage(lower: Array, upper: Array, quantizer: ActivationQuantizer, bits: int) -> Array:
    """Mean over channels of the share of the 2^b levels that a channel's range reaches."""
    ends = [quantizer.codes(end, bits).astype(jnp.float32) for end in (lower, upper)]
    return ((ends[1] - ends[0] + 1) / 2**bits).mean()
