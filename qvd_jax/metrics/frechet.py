"""Frechet distance between two sets of features, as of FVD (Unterthiner et al., 1812.01717)."""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to features `[N, C]`.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau, 1982), the square root's trace
    from the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.

    Raises:
      ValueError: a set has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least two rows of features")
    first, second = first.astype(np.float64), second.astype(np.float64)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    shift = first.mean(0) - second.mean(0)
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(shift @ shift + traces - 2 * np.sqrt(np.maximum(product, 0)).sum())
