"""Frechet distance between two sets of features, as of FVD (Unterthiner et al., 1812.01717)."""

from typing import Literal

import numpy as np

DegreesLost = Literal[0, 1]
"""What is taken from N where a covariance is divided: 1 is unbiased, 0 is the Gaussian's fit."""

_PARTS = (1, 2, 3)


def frechet_distance(first: np.ndarray, second: np.ndarray, degrees_lost: DegreesLost = 1) -> float:
    """Squared Frechet distance of two Gaussians fitted to features `[N, C]`.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau, 1982). With S = A'A, A the
    centered features, the square root's trace is the sum of the singular values of A1 A2'. Nothing
    is squared and no root is taken of what rounding left of a zero, so covariances may be singular.

    Raises:
      ValueError: a set has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least two rows of features")
    means, roots = zip(
        *(_mean_and_root(features, degrees_lost) for features in (first, second)), strict=True
    )
    shift = means[0] - means[1]
    traces = sum(np.square(root).sum() for root in roots)
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(shift @ shift + traces - 2 * shared)


def _mean_and_root(features: np.ndarray, degrees_lost: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean `[C]` and a root R of the covariance R'R, of no more than C rows."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    centered = (features - mean) / np.sqrt(len(features) - degrees_lost)
    count, width = centered.shape
    if count > width:
        centered = np.asarray(np.linalg.qr(centered, mode="r"))
    return mean, centered


def unbiased_frechet_distance(
    first: np.ndarray,
    second: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    degrees_lost: DegreesLost = 1,
) -> float | None:
    """What the distance tends to as both sets grow: the intercept of its line over 1 / N.

    Chong and Forsyth, "Effectively Unbiased FID" (arXiv 1911.07023, section 4): the bias of the
    distance is nearly linear in 1 / N. The line is fitted to the whole sets, their halves and their
    thirds. Equal distributions are estimated around zero, below it as well.

    Args:
      first: features `[N, C]`.
      second: `[M, C]`.
      places: of each row of both in [0, 1), by which it falls into a half and a third.
      degrees_lost: as of `frechet_distance`.

    Returns:
      None where a third has fewer than two rows.
    """
    inverse_sizes, distances = [], []
    for count in _PARTS:
        for part in range(count):
            one, other = (
                features[np.floor(count * place) == part]
                for features, place in zip((first, second), places, strict=True)
            )
            if min(len(one), len(other)) < 2:
                return None
            inverse_sizes.append(len(first) / len(one) / 2 + len(second) / len(other) / 2)
            distances.append(frechet_distance(one, other, degrees_lost))
    weights = np.sqrt(np.repeat(1 / np.array(_PARTS), _PARTS))
    _, intercept = np.polyfit(inverse_sizes, distances, 1, w=weights)
    return float(intercept)
