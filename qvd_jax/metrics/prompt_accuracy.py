"""How often a generated video shows what its prompt asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvd_jax.data.moving_shapes import Description, describe
from qvd_jax.metrics.intervals import independent_draws

COUNTED = (*Description._fields, "all four")

_Z = 1.959964  # of the normal distribution, 95%


@dataclass(frozen=True)
class Proportion:
    """Hits among trials.

    Attributes:
      hits: how many.
      trials: of how many.
      draws: how many independent trials they are worth.
    """

    hits: int
    trials: int
    draws: float

    @property
    def value(self) -> float:
        """The share of hits."""
        return self.hits / self.trials

    def interval(self) -> tuple[float, float]:
        """95% score interval (Wilson, 1927) of the independent draws."""
        n, z2 = self.draws, _Z**2
        hits = n * self.value
        center = (hits + z2 / 2) / (n + z2)
        spread = _Z * math.sqrt(hits * (1 - self.value) + z2 / 4) / (n + z2)
        return max(center - spread, 0.0), min(center + spread, 1.0)


def prompt_hits(videos: np.ndarray, expected: Sequence[Description]) -> np.ndarray:
    """Which videos show what was expected.

    Args:
      videos: uint8 `[N, F, H, W, 3]`.
      expected: one for each.

    Returns:
      bool `[N, 5]`, a column for each of `COUNTED`.
    """
    if len(videos) != len(expected) or not len(videos):
        raise ValueError(f"{len(videos)} videos for {len(expected)} descriptions")
    right = np.array(
        [
            [a == b for a, b in zip(found, wanted, strict=True)]
            for found, wanted in zip(describe(videos), expected, strict=True)
        ]
    )
    return np.concatenate([right, right.all(1, keepdims=True)], axis=1)


def prompt_accuracy(hits: np.ndarray, seeds: int = 1) -> dict[str, Proportion]:
    """The share of hits of each of `COUNTED`.

    Args:
      hits: from `prompt_hits`, seed by seed.
      seeds: of each prompt.
    """
    return {
        name: Proportion(int(column.sum()), len(column), independent_draws(column, seeds))
        for name, column in zip(COUNTED, hits.T, strict=True)
    }


def paired_difference(
    reference: np.ndarray, candidate: np.ndarray, seeds: int = 1
) -> tuple[float, tuple[float, float]]:
    """Hits of the candidate less those of the reference, as a share, and its 95% interval.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005), with half a pair more
    in each of the four cells: where no pair differs it is not empty. Pairs count as the independent
    draws that they are worth.

    Args:
      reference: bool `[N]`, of each video, seed by seed.
      candidate: of the same prompts and seeds.
      seeds: of each prompt.
    """
    draws = independent_draws(candidate.astype(int) - reference, seeds)
    gained, lost = (
        draws * float((one & ~other).mean())
        for one, other in ((candidate, reference), (reference, candidate))
    )
    pairs = draws + 2
    center = (gained - lost) / pairs
    spread = _Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / pairs) / pairs
    value = float(candidate.mean() - reference.mean())
    return value, (float(center - spread), float(center + spread))
