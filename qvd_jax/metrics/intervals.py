"""Intervals over prompts, each of which may have several seeds.

Other prompts are what would be drawn anew, and the K videos of one of the J prompts are alike. So a
prompt is the unit of all of this. Videos are numbered seed by seed, as they are sampled: N = K J.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import special


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
