"""Intervals over prompts, each of which may have several seeds.

Other prompts are what would be drawn anew, and the K videos of one of the J prompts are alike. So a
prompt is the unit of all of this. Videos are numbered seed by seed, as they are sampled: N = K J.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from qvd_jax.metrics.frechet import frechet_distance

_Z = 1.959964  # of the normal distribution, 95%


def jackknife(
    ratio: Callable[[np.ndarray], float], prompts: int, seeds: int
) -> tuple[float, tuple[float, float]]:
    """A positive ratio and its 95% interval, by leaving out one prompt after the other.

    The jackknife (Miller, Biometrika 61, 1974) of the logarithm, with Student's quantile. To
    resample with duplicates would bias a distance between distributions, which grows with every
    video that counts twice; here the interval lies around the estimate.

    Args:
      ratio: of the videos of some numbers.
      prompts: J, at least 2.
      seeds: K.
    """
    numbers = np.arange(prompts * seeds)
    left_out = np.log([ratio(numbers[numbers % prompts != out]) for out in range(prompts)])
    error = math.sqrt((prompts - 1) * float(left_out.var()))
    factor = math.exp(float(special.stdtrit(prompts - 1, 0.975)) * error)
    value = ratio(numbers)
    return value, (value / factor, value * factor)


def independent_draws(values: np.ndarray, seeds: int) -> float:
    """How many independent draws would tell the mean as well, from J to N.

    N over the design effect (Kish, Survey Sampling, 1965), which is the variance of the mean that
    the prompts' means show, over that of as many independent draws. Values that are all the same
    show none: then a prompt counts once.

    Args:
      values: `[N]`.
      seeds: K.
    """
    by_seed = values.reshape(seeds, -1).astype(np.float64)
    prompts = by_seed.shape[1]
    among_all, among_prompts = by_seed.var(ddof=1), by_seed.mean(0).var(ddof=1)
    if among_all == 0:
        return prompts
    if among_prompts == 0:
        return by_seed.size
    return float(np.clip(prompts * among_all / among_prompts, prompts, by_seed.size))


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


def frechet_ratio(
    reference: np.ndarray, candidate: np.ndarray, real: np.ndarray, seeds: int
) -> tuple[float, tuple[float, float]]:
    """The candidate's Frechet distance over the reference's, and its 95% interval.

    Args:
      reference: features of its videos, `[N, C]`, seed by seed.
      candidate: of the same prompts and seeds, which are left out together.
      real: features of real videos.
      seeds: of each prompt.
    """

    def ratio(numbers: np.ndarray) -> float:
        found, exact = (
            frechet_distance(features[numbers], real) for features in (candidate, reference)
        )
        return found / exact

    return jackknife(ratio, len(reference) // seeds, seeds)


def mean_interval(values: np.ndarray, seeds: int) -> tuple[float, tuple[float, float] | None]:
    """The mean of a figure and its 95% interval, of Student's t over the prompts' means.

    Args:
      values: `[N]`, seed by seed.
      seeds: of each prompt.

    Returns:
      No interval for one prompt.
    """
    means = values.reshape(seeds, -1).mean(0, dtype=np.float64)
    value = float(means.mean())
    if len(means) < 2:
        return value, None
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    spread = float(special.stdtrit(len(means) - 1, 0.975)) * error
    return value, (value - spread, value + spread)


def delete_groups(
    statistic: Callable[[Sequence[np.ndarray]], float | None], groups: Sequence[np.ndarray]
) -> tuple[float | None, tuple[float, float] | None]:
    """A statistic of some sets and its 95% interval, by leaving out one group after the other.

    The grouped jackknife (Shao and Tu, The Jackknife and Bootstrap, 1995, section 2.3), with
    Student's quantile: some tens of distances in the place of thousands.

    Args:
      statistic: of the rows that are kept, bool `[N]` of each set; None where they are too few.
      groups: the group of each row of each set; one is left out of all sets at once.
    """
    value = statistic([np.ones(len(of_rows), bool) for of_rows in groups])
    names = sorted({name for of_rows in groups for name in of_rows.tolist()})
    left_out = [statistic([of_rows != name for of_rows in groups]) for name in names]
    found = [one for one in left_out if one is not None]
    if value is None or len(found) < max(2, len(names)):
        return value, None
    error = math.sqrt((len(found) - 1) * float(np.var(found)))
    spread = float(special.stdtrit(len(found) - 1, 0.975)) * error
    return value, (value - spread, value + spread)
