"""HTDQ, high temporal discriminability quantization (Tian et al., arXiv 2407.11585, section 3.2).

Temporal features depend on the sampler's step alone: many tiny values and a long positive tail. A
uniform quantizer sized by the tail gives neighboring steps the same codes. HTDQ spends one bit on
choosing between a fine and a coarse range, and picks both by how well steps stay apart.
"""

from typing import NamedTuple

import numpy as np

_FINE_STEPS = 24
_UNIFORM_CLIPS = np.linspace(0.3, 1, 15)


class TwoRangeQuantizer(NamedTuple):
    """x = offset + step q below the fine range's end, offset + 2^shift step q above it.

    Two ranges have the codes 0 to 2^(b-1) - 1 each, a single one -2^(b-1) to 2^(b-1) - 1.

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

    def codes(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fine and coarse codes, int8; where one is not zero the other is."""
        steps = (features - self.offset) / self.step
        if self.shift is None:
            half = 2 ** (self.bits - 1)
            fine = np.clip(np.rint(steps), -half, half - 1)
            return fine.astype(np.int8), np.zeros(features.shape, np.int8)
        last = 2 ** (self.bits - 1) - 1
        fine = np.clip(np.rint(steps), 0, last)
        coarse = np.clip(np.rint(steps / 2**self.shift), 0, last)
        # Just above the fine range its last code may be nearer than the first coarse one.
        is_fine = np.abs(steps - fine) <= np.abs(steps - 2**self.shift * coarse)
        fine, coarse = np.where(is_fine, fine, 0), np.where(is_fine, 0, coarse)
        return fine.astype(np.int8), coarse.astype(np.int8)

    def dequantize(self, fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
        """The values that codes stand for."""
        return self.offset + self.step * (fine + 2.0 ** (self.shift or 0) * coarse)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The values that stand for `features`."""
        return self.dequantize(*self.codes(features))


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
