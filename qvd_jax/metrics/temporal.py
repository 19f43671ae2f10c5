"""Steadiness and motion over time, without optical flow."""

import numpy as np

FLICKER_FRAMES = 3
"""Frames that `flicker` needs."""

MOTION_FRAMES = 2
"""Frames that `motion` needs."""


def flicker(videos: np.ndarray) -> np.ndarray:
    """Mean absolute second difference over time of each video, in units of 0 to 255.

    Steady motion of a sharp edge has some too, so it says something beside a reference's alone.

    Args:
      videos: uint8 `[B, F, H, W, 3]`, F at least 3.

    Returns:
      `[B]`.
    """
    return _mean_difference(videos, 2, "second difference")


def motion(videos: np.ndarray) -> np.ndarray:
    """Mean absolute first difference over time of each video, in units of 0 to 255.

    How much moves, and how fast: a video that stands still has none. It knows no direction, and
    flicker counts as motion.

    Args:
      videos: uint8 `[B, F, H, W, 3]`, F at least 2.

    Returns:
      `[B]`.
    """
    return _mean_difference(videos, 1, "difference")


def _mean_difference(videos: np.ndarray, order: int, name: str) -> np.ndarray:
    needed = order + 1
    if videos.shape[1] < needed:
        raise ValueError(f"{videos.shape[1]} frames have no {name}; {needed} are needed")
    return np.abs(np.diff(videos.astype(np.float32), n=order, axis=1)).mean((1, 2, 3, 4))
