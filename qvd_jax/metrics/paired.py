"""Closeness of videos to reference videos of the same prompts and seeds."""

import numpy as np
from scipy import ndimage

_PEAK = 255.0
_WINDOW_SIGMA = 1.5
_WINDOW_RADIUS = 5
SSIM_WINDOW = 2 * _WINDOW_RADIUS + 1
"""Pixels that `ssim` needs on each side."""


def psnr(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each video in decibels; infinite where they are equal.

    Args:
      reference: uint8 `[B, F, H, W, 3]`.
      candidate: of the same shape.

    Returns:
      `[B]`.
    """
    _check_same_shape(reference, candidate)
    error = np.square(reference.astype(np.float64) - candidate).mean((1, 2, 3, 4))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(_PEAK**2 / error)


def ssim(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Structural similarity of each video, the mean over frames, positions and channels.

    Wang et al., IEEE Transactions on Image Processing 13(4), 2004, equation 13, with their
    Gaussian window of 11x11 and sigma 1.5, only where it lies inside the frame.

    Args:
      reference: uint8 `[B, F, H, W, 3]`, H and W at least 11.
      candidate: of the same shape.

    Returns:
      `[B]`, 1 where they are equal.

    Raises:
      ValueError: the videos are of other shapes, or too small.
    """
    _check_same_shape(reference, candidate)
    if min(reference.shape[2:4]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels on each side: {reference.shape}")
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3, 4))


def _blur(videos: np.ndarray) -> np.ndarray:
    sigma = (0, 0, _WINDOW_SIGMA, _WINDOW_SIGMA, 0)
    radius = (0, 0, _WINDOW_RADIUS, _WINDOW_RADIUS, 0)
    inside = slice(_WINDOW_RADIUS, -_WINDOW_RADIUS)
    return ndimage.gaussian_filter(videos, sigma, radius=radius)[:, :, inside, inside]


def _check_same_shape(reference: np.ndarray, candidate: np.ndarray) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(
            f"videos of shapes {reference.shape} and {candidate.shape} cannot be compared"
        )
