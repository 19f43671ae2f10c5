"""Steadiness over time."""

import numpy as np

FLICKER_FRAMES = 3
"""Frames that `flicker` needs."""


def flicker(videos: np.ndarray) -> np.ndarray:
    """Mean absolute second difference over time of each video, in units of 0 to 255.

    Steady motion of a sharp edge has some too, so it says something beside a reference's alone.

    Args:
      videos: uint8 `[B, F, H, W, 3]`, F at least 3.

    Returns:
      `[B]`.
    """
    if videos.shape[1] < FLICKER_FRAMES:
        raise ValueError(
            f"{videos.shape[1]} frames have no second difference; {FLICKER_FRAMES} are needed"
        )
    return np.abs(np.diff(videos.astype(np.float32), n=2, axis=1)).mean((1, 2, 3, 4))
