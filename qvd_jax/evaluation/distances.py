"""Figures of videos with their intervals, and all that a Frechet distance depends on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvd_jax.evaluation.features import Features
from qvd_jax.evaluation.intervals import delete_groups, mean_interval
from qvd_jax.metrics.frechet import frechet_distance, unbiased_frechet_distance
from qvd_jax.metrics.fvd import Protocol

_GROUPS = 10

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over videos.

    Attributes:
      value: the mean.
      interval: 95%, over prompts; None for one.
      videos: how many.
    """

    value: float
    interval: Interval | None
    videos: int


@dataclass(frozen=True)
class Distance:
    """A Frechet video distance, and what another must share with it to be compared.

    Attributes:
      value: at this number of videos.
      interval: 95%, by leaving out a tenth of the videos in turn; None for fewer than four.
      unbiased: what it tends to as videos grow in number; None for too few of them.
      unbiased_interval: 95%, of the same kind.
      clips: N of the set that is judged.
      reference_clips: N of the set it is compared with.
      frames: F of a clip.
      size: of the videos, before they are resized.
      protocol: the name of the protocol.
      weights: where the network's weights came from.
      warning: what is wrong with the number; empty where nothing is known.
    """

    value: float
    interval: Interval | None
    unbiased: float | None
    unbiased_interval: Interval | None
    clips: int
    reference_clips: int
    frames: int
    size: str
    protocol: str
    weights: str
    warning: str = ""


def estimate(values: np.ndarray, seeds: int) -> Estimate:
    """The mean of a figure of each video.

    Args:
      values: `[N]`, seed by seed.
      seeds: of each prompt.
    """
    value, interval = mean_interval(values, seeds)
    return Estimate(value, interval, len(values))


def distance(
    judged: Features,
    reference: Features,
    protocol: Protocol,
    *,
    size: str,
    weights: str,
    prompts: Sequence[int] | None = None,
) -> Distance:
    """The Frechet video distance of two sets.

    Args:
      judged: features of one.
      reference: of the other.
      protocol: by which they were computed.
      size: of the videos, in words.
      weights: of the network, in words.
      prompts: how many prompts the videos of each set have, seed by seed; None is one each.
        Videos of one prompt are left out together.
    """
    lost = protocol.degrees_lost
    sets = judged.values, reference.values
    counts = prompts or [int(features.videos[-1]) + 1 for features in (judged, reference)]
    numbers = [
        features.videos % count for features, count in zip((judged, reference), counts, strict=True)
    ]
    # One draw for both, so that prompts that both have stay together.
    drawn = np.random.default_rng(0).random(max(counts))

    def plain(kept: Sequence[np.ndarray]) -> float | None:
        first, second = (rows[some] for rows, some in zip(sets, kept, strict=True))
        return None if min(len(first), len(second)) < 2 else frechet_distance(first, second, lost)

    def without_bias(kept: Sequence[np.ndarray]) -> float | None:
        (first, one), (second, other) = (
            (rows[some], drawn[number[some]])
            for rows, number, some in zip(sets, numbers, kept, strict=True)
        )
        return unbiased_frechet_distance(first, second, (one, other), lost)

    groups = [number % _GROUPS for number in numbers]
    value, interval = delete_groups(plain, groups)
    unbiased, unbiased_interval = delete_groups(without_bias, groups)
    assert value is not None
    return Distance(
        value,
        None if interval is None else (max(interval[0], 0.0), interval[1]),
        unbiased,
        unbiased_interval,
        len(judged.values),
        len(reference.values),
        judged.frames,
        size,
        protocol.name,
        weights,
        "; ".join(filter(None, (_rank(judged, reference), protocol.faults))),
    )


def _rank(*sets: Features) -> str:
    """What is to be said of covariances that have no full rank."""
    fewest, width = min(len(features.values) for features in sets), sets[0].values.shape[1]
    if fewest > width:
        return ""
    return (
        f"{fewest} clips give a covariance of {width} features no full rank: the distance falls "
        f"as they grow in number, and compares at {fewest} alone"
    )
