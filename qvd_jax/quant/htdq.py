"""HTDQ, high temporal discriminability quantization (Tian et al., arXiv 2407.11585, section 3.2).

Temporal features depend on the sampler's step alone: many tiny values and a long positive tail. A
uniform quantizer sized by the tail gives neighboring steps the same codes. HTDQ spends one bit on
choosing between a fine and a coarse range, and picks both by how well steps stay apart.
"""

from typing import NamedTuple

import numpy as np

from qvd_jax.quant.codec import two_range_codes, two_range_steps

_FINE_STEPS = 24
_UNIFORM_CLIPS = np.linspace(0.3, 1, 15)


class TwoRangeQuantizer(NamedTuple):
    """x = offset + step q below the fine range's end, offset + 2^shift step q above it.

    Attributes:
      offset: the value of code 0.
      step: D, of the fine range.
      shift: m; the coarse step is 2^m D. None: there is one range, uniform.
      bits: b.
    """

    offset: float
    step: float
    shift: int | None
    bits: int

    @property
    def ratio(self) -> float:
        """Of the ranges' steps; 0 where there is one range."""
        return 0.0 if self.shift is None else 2.0**self.shift

    @property
    def in_scale(self) -> float:
        """What features are multiplied with to be in steps."""
        return 1 / self.step

    @property
    def in_offset(self) -> float:
        """What is then added."""
        return -self.offset / self.step

    def codes(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fine and coarse codes, int8."""
        steps = two_range_steps(features, self.in_scale, self.in_offset, self.ratio, self.bits)
        return two_range_codes(steps, self.ratio, self.bits)

    def fine_steps(self, features: np.ndarray) -> np.ndarray:
        """Fine and coarse codes as one number of fine steps."""
        fine, coarse = self.codes(features)
        return fine + self.ratio * coarse

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The values that stand for `features`."""
        return self.offset + self.step * self.fine_steps(features)


def distances(features: np.ndarray) -> np.ndarray:
    """Euclidean distances of all pairs of steps, `[S, C] -> [S (S - 1) / 2]`."""
    first, second = np.triu_indices(len(features), 1)
    return np.linalg.norm(features[first] - features[second], axis=-1)


def td_score(features: np.ndarray, quantized: np.ndarray) -> float:
    """Temporal discriminability: 1 - mean over pairs of steps of |d^ - d| / d.

    Pairs of equal features, which no quantizer can tell apart, do not count; without any other
    pair the score is 1.
    """
    true = distances(features)
    apart = true > 0
    if not apart.any():
        return 1.0
    found = distances(quantized)
    return float(1 - np.mean(np.abs(found - true)[apart] / true[apart]))


def merged_steps(codes: np.ndarray) -> float:
    """Share of neighboring steps whose codes `[S, C]` coincide."""
    return float((codes[1:] == codes[:-1]).all(1).mean()) if len(codes) > 1 else 0.0


def uniform_candidates(features: np.ndarray, bits: int) -> list[TwoRangeQuantizer]:
    """Uniform quantizers from the lowest value up, the last one reaching the highest.

    Features that are all the same have code 0.
    """
    low, high = float(features.min()), float(features.max())
    if high == low:
        return [TwoRangeQuantizer(low, 1.0, None, bits)]
    return [
        TwoRangeQuantizer(low + 2 ** (bits - 1) * step, step, None, bits)
        for step in _UNIFORM_CLIPS * (high - low) / (2**bits - 1)
    ]


def search(features: np.ndarray, bits: int) -> TwoRangeQuantizer:
    """The quantizer of highest TDScore, among equals of least squared error.

    Args:
      features: of the sampler's own steps, `[S, C]`.
      bits: b.
    """
    features = np.asarray(features, np.float64)
    candidates = uniform_candidates(features, bits)
    low, high = float(features.min()), float(features.max())
    if high == low:
        return candidates[0]
    last = 2 ** (bits - 1) - 1
    for step in (high - low) / (2**bits - 1) / np.geomspace(1, 2**8, _FINE_STEPS):
        shift = max(0, int(np.ceil(np.log2((high - low) / (last * step)))))
        candidates.append(TwoRangeQuantizer(low, float(step), shift, bits))

    def merit(quantizer: TwoRangeQuantizer) -> tuple[float, float]:
        quantized = quantizer(features)
        return td_score(features, quantized), -float(np.square(quantized - features).mean())

    return max(candidates, key=merit)
