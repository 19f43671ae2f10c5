"""Reads two pointing shapes from pixels alone, so that what a model shows can be counted."""

import functools
from typing import NamedTuple

import numpy as np

from qvd_jax.arrows.pixels import coverage
from qvd_jax.arrows.scenes import HEADINGS, SHAPES, Object
from qvd_jax.shapes.reader import align, moments
from qvd_jax.shapes.scenes import COLORS

_INKS = np.array(list(COLORS.values()), np.float32)
# Of the distance in color from an ink to what is drawn with it: half of that to the next ink.
_NEAR = 60.0
# In pixels of 64: less in a frame on average is no shape, so much is as far as one reaches.
_SMALLEST_AREA, _REACH = 20.0, 14.0
# The grounds are nearly gray, and so cover a little of every pixel.
_LEAST_COVERAGE = 0.3
_LEAST_TRAVEL = 0.12


class Sight(NamedTuple):
    """What is seen of one shape.

    Attributes:
      object: color, shape and where it points.
      motion: of `HEADINGS`, where it moves; None where it does not, or not straight.
      travel: how far, in halves of the picture's side.
    """

    object: Object
    motion: str | None
    travel: float


def read(videos: np.ndarray) -> list[list[Sight]]:
    """Reads the two most visible shapes of uint8 `[N, F, H, W, 3]`, fewer where there are not."""
    return [_read(video) for video in videos]


def chroma_of(pixels: np.ndarray) -> np.ndarray:
    """What tells a color from gray: `[..., 3]` less its mean."""
    return pixels - pixels.mean(-1, keepdims=True)


def _read(video: np.ndarray) -> list[Sight]:
    pixels = video.astype(np.float32)
    frames, height, width, _ = pixels.shape
    scale = width / 64
    distance = np.linalg.norm(pixels[..., None, :] - _INKS, axis=-1)
    nearest = np.where(distance.min(-1) < _NEAR, distance.argmin(-1), -1)
    votes = np.bincount(nearest[nearest >= 0], minlength=len(_INKS))
    colors = [c for c in np.argsort(-votes)[:2] if votes[c] > _SMALLEST_AREA * scale**2 * frames]

    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    chroma = chroma_of(pixels)
    away = []
    for color in colors:
        painted = (nearest == color).astype(np.float32)
        _, x, y, _ = moments(painted)
        away.append(np.hypot(columns - x[:, None, None], rows - y[:, None, None]))
    sights = []
    for color, own in zip(colors, away, strict=True):
        ink = np.median(chroma[nearest == color], axis=0)
        covered = np.clip(chroma @ ink / (ink @ ink), 0, 1)
        others = np.min([far for far in away if far is not own] or [np.full_like(own, np.inf)], 0)
        is_own = (own < np.minimum(others, _REACH * scale)) & (covered > _LEAST_COVERAGE)
        sights.append(_sight(list(COLORS)[color], np.where(is_own, covered, 0)))
    return sights


def _sight(color: str, covered: np.ndarray) -> Sight:
    """What is seen of a shape that covers so much of each pixel, `[F, H, W]`."""
    area, x, y, spread = moments(covered)
    half = covered.shape[2] / 2
    seen = area > _SMALLEST_AREA * (half / 32) ** 2
    if seen.mean() < 0.75:
        return Sight(Object(color, None, None), None, 0.0)
    aligned = align(covered[seen], x[seen], y[seen], spread[seen])
    likeness = aligned.mean(0).reshape(-1)
    best = int(np.argmax(_templates() @ (likeness - likeness.mean())))
    shape, heading = divmod(best, len(HEADINGS))
    place = np.stack([x[seen], y[seen]], -1) / half
    motion, travel = _motion(place)
    return Sight(Object(color, SHAPES[shape], HEADINGS[heading]), motion, travel)


def _motion(place: np.ndarray) -> tuple[str | None, float]:
    """Where to and how far centers `[F, 2]` move, in halves of the picture."""
    shift = place[-1] - place[0]
    travel = float(np.hypot(*shift))
    # A few steps: what a center wavers from frame to frame is no way.
    stops = place[np.linspace(0, len(place) - 1, 6).round().astype(int)]
    length = np.linalg.norm(np.diff(stops, axis=0), axis=-1).sum()
    if travel < _LEAST_TRAVEL or travel < 0.8 * length:
        return None, travel
    eighths = round(float(np.arctan2(shift[1], shift[0])) / (2 * np.pi / len(HEADINGS)))
    return HEADINGS[eighths % len(HEADINGS)], travel


@functools.cache
def _templates() -> np.ndarray:
    """What `align` makes of each shape and heading: zero mean, unit norm, `[N, G * G]`."""
    shape, heading = np.indices((len(SHAPES), len(HEADINGS))).reshape(2, -1)
    place, radius = np.zeros((len(shape), 1, 2)), np.full(len(shape), 0.33)
    covered = coverage(place, radius, shape, heading, 64)[:, 0]
    covered = np.where(covered > _LEAST_COVERAGE, covered, 0)
    _, x, y, spread = moments(covered)
    flat = align(covered, x, y, spread).reshape(len(shape), -1)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)
