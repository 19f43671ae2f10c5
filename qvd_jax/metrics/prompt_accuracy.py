"""How often a generated video shows what its prompt asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvd_jax.data.moving_shapes import Description, describe

_Z = 1.959964  # of the normal distribution, 95%
ALL = "all four"


@dataclass(frozen=True)
class Proportion:
    """Hits among trials.

    Attributes:
      hits: how many.
      trials: of how many.
    """

    hits: int
    trials: int

    @property
    def value(self) -> float:
        """The share of hits."""
        return self.hits / self.trials

    def interval(self) -> tuple[float, float]:
        """95% score interval (Wilson, 1927)."""
        n, z2 = self.trials, _Z**2
        center = (self.hits + z2 / 2) / (n + z2)
        spread = _Z * math.sqrt(self.hits * (n - self.hits) / n + z2 / 4) / (n + z2)
        return max(center - spread, 0.0), min(center + spread, 1.0)


def prompt_accuracy(videos: np.ndarray, expected: Sequence[Description]) -> dict[str, Proportion]:
    """Counts the videos whose pixels show what was expected.

    Args:
      videos: uint8 `[N, F, H, W, 3]`.
      expected: one for each.

    Returns:
      By attribute of `Description`, and "all four" of them.
    """
    if len(videos) != len(expected) or not len(videos):
        raise ValueError(f"{len(videos)} videos for {len(expected)} descriptions")
    right = np.array(
        [
            [a == b for a, b in zip(found, wanted, strict=True)]
            for found, wanted in zip(describe(videos), expected, strict=True)
        ]
    )
    hits = dict(zip(Description._fields, right.sum(0), strict=True)) | {ALL: right.all(1).sum()}
    return {name: Proportion(int(count), len(videos)) for name, count in hits.items()}
