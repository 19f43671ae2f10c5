"""Draws scenes: what a scene leaves open (place, size, phase, sway) is drawn at random."""

from typing import NamedTuple

import numpy as np

from qvd_jax.arrows.scenes import GROUNDS, HEADINGS, SHAPES, TEXTURES, draw_scenes
from qvd_jax.shapes.scenes import COLORS, Split

FRAMES = 16
SIZE = 64
BUCKETS = 256
"""Motion buckets, from the least to the most motion."""

_FULL_TURN = 2 * np.pi
_CANDIDATES = 96
# Of the picture's side.
_PERIODS = {"rows": 1 / 6, "columns": 1 / 6, "diagonals": 1 / 4, "checks": 1 / 4, "dots": 1 / 5}


class Course(NamedTuple):
    """Where two shapes are; lengths in halves of the picture's side, y points down.

    Attributes:
      center: x and y, `[N, 2, F, 2]`.
      radius: `[N, 2]`.
    """

    center: np.ndarray
    radius: np.ndarray


def travel_of(bucket: np.ndarray) -> np.ndarray:
    """How far shapes move on average, in halves of the picture's side, as a bucket tells."""
    return 0.25 + 0.55 * bucket / (BUCKETS - 1)


def render(
    scene: np.ndarray,
    bucket: np.ndarray,
    rng: np.random.Generator,
    frames: int = FRAMES,
    size: int = SIZE,
) -> np.ndarray:
    """Draws one video for each scene.

    Args:
      scene: indices `[N, 8]`.
      bucket: how much motion, `[N]` in [0, 255].
      rng: for what the scene leaves open.
      frames: F.
      size: H and W in pixels.

    Returns:
      uint8 `[N, F, H, W, 3]`.
    """
    course = _courses(scene, bucket, rng, frames)
    return _rasterize(scene, course, _textures(scene, rng, size))


def draw_clips(
    rng: np.random.Generator, count: int, frames: int, size: int, split: Split
) -> np.ndarray:
    """Random frames in a row of random scenes of a split: uint8 `[N, F, H, W, 3]`."""
    scene, bucket = draw_scenes(rng, count, split), rng.integers(BUCKETS, size=count)
    course = _courses(scene, bucket, rng, FRAMES)
    first = rng.integers(FRAMES - frames + 1, size=count)
    shown = first[:, None] + np.arange(frames)
    center = np.take_along_axis(course.center, shown[:, None, :, None], axis=2)
    return _rasterize(scene, course._replace(center=center), _textures(scene, rng, size))


def _courses(
    scene: np.ndarray, bucket: np.ndarray, rng: np.random.Generator, frames: int
) -> Course:
    """Both shapes stay inside the picture and apart, as far as `_CANDIDATES` draws allow."""
    count = len(scene)

    def draw(low: float, high: float, *more: int) -> np.ndarray:
        return rng.uniform(low, high, size=(count, 2, *more))

    radius = draw(0.29, 0.34)
    angle = scene[:, [4, 7]] * (_FULL_TURN / len(HEADINGS)) + draw(-0.1, 0.1)
    travel = travel_of(bucket)[:, None] * draw(0.92, 1.08)
    # What seeds differ by: when it is fast, and how it sways on its way.
    haste, sway = draw(-0.5, 0.5)[..., None], (travel * draw(-0.08, 0.08))[..., None]
    t = np.linspace(0, 1, frames)
    ahead = travel[..., None] * (t + haste * np.sin(_FULL_TURN * t) / _FULL_TURN)
    aside = sway * np.sin(_FULL_TURN * t)
    cosine, sine = np.cos(angle)[..., None], np.sin(angle)[..., None]
    way = np.stack([cosine * ahead - sine * aside, sine * ahead + cosine * aside], -1)

    room = (0.98 - radius)[..., None]
    low, high = -room - way.min(2), room - way.max(2)
    share = draw(0, 1, 2, _CANDIDATES)
    start = low[..., None] + share * (high - low)[..., None]
    center = start[:, :, None] + way[..., None]
    apart = np.linalg.norm(center[:, 0] - center[:, 1], axis=2).min(1)
    enough = apart > 1.05 * radius.sum(1)[:, None]
    chosen = np.where(enough.any(1), enough.argmax(1), apart.argmax(1))
    return Course(np.take_along_axis(center, chosen[:, None, None, None, None], -1)[..., 0], radius)


def _textures(scene: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """The grounds, `[N, H, W, 3]`."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    phase = rng.uniform(size=(len(scene), 2, 1, 1)).astype(np.float32)
    wave = np.empty((len(scene), size, size), np.float32)
    for index, name in enumerate(TEXTURES):
        rows = scene[:, 0] == index
        x, y = (
            _FULL_TURN * (along / _PERIODS[name] + phase[rows, i])
            for i, along in enumerate((axis[None, None, :], axis[None, :, None]))
        )
        wave[rows] = {
            "rows": lambda x, y: np.sin(y) + 0 * x,
            "columns": lambda x, y: np.sin(x) + 0 * y,
            "diagonals": lambda x, y: np.sin(x + y),
            "checks": lambda x, y: np.sin(x) * np.sin(y),
            "dots": lambda x, y: np.cos(x) + np.cos(y) - 0.7,
        }[name](x, y)
    light = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
    tones = np.array(list(GROUNDS.values()), np.float32)[scene[:, 1]]
    return tones[:, 0, None, None] + light * (tones[:, 1] - tones[:, 0])[:, None, None]


def _rasterize(scene: np.ndarray, course: Course, ground: np.ndarray) -> np.ndarray:
    """Draws anti-aliased shapes on grounds `[N, H, W, 3]`: uint8 `[N, F, H, W, 3]`."""
    frames, size = course.center.shape[2], ground.shape[1]
    picture = np.repeat(ground[:, None], frames, axis=1)
    colors = np.array(list(COLORS.values()), np.float32)
    for which in range(2):
        color, shape, heading = scene[:, 2 + 3 * which : 5 + 3 * which].T
        cover = coverage(course.center[:, which], course.radius[:, which], shape, heading, size)[
            ..., None
        ]
        picture += cover * (colors[color][:, None, None, None] - picture)
    return np.rint(picture).astype(np.uint8)


def coverage(
    center: np.ndarray, radius: np.ndarray, shape: np.ndarray, heading: np.ndarray, size: int
) -> np.ndarray:
    """How much of each pixel a shape covers.

    Args:
      center: x and y in halves of the picture's side, `[N, F, 2]`; y points down.
      radius: likewise, `[N]`.
      shape: index of each into `SHAPES`, `[N]`.
      heading: into `HEADINGS`, `[N]`.
      size: H and W in pixels.

    Returns:
      float32 `[N, F, H, W]` in [0, 1].
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    center, radius = center.astype(np.float32), radius.astype(np.float32)[:, None, None, None]
    x = (axis - center[..., 0, None, None]) / radius
    y = (axis[:, None] - center[..., 1, None, None]) / radius
    angle = (heading * (_FULL_TURN / len(HEADINGS))).astype(np.float32)[:, None, None, None]
    ahead = np.cos(angle) * x + np.sin(angle) * y
    aside = np.abs(np.cos(angle) * y - np.sin(angle) * x)
    covered = np.empty(ahead.shape, np.float32)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        distance = _signed_distance(name, ahead[rows], aside[rows]) * radius[rows]
        covered[rows] = np.clip(0.5 - distance * (size / 2), 0, 1)
    return covered


def _signed_distance(name: str, ahead: np.ndarray, aside: np.ndarray) -> np.ndarray:
    """Distance from the outline of a shape of radius one, negative inside.

    Args:
      name: of `SHAPES`.
      ahead: how far in front of the center.
      aside: how far from the axis, at least zero; all shapes are symmetric.
    """

    def edge(x: float, y: float, to_x: float, to_y: float) -> np.ndarray:
        """Distance from the line through two points, positive ahead of one that goes back."""
        length = np.hypot(to_x - x, to_y - y)
        return ((to_y - y) * (ahead - x) - (to_x - x) * (aside - y)) / length

    if name == "triangle":
        return np.maximum(edge(1, 0, -0.75, 0.8), -0.75 - ahead)
    if name == "arrow":
        head = np.maximum(edge(1, 0, 0, 0.9), -ahead)
        shaft = np.maximum(np.maximum(aside - 0.3, -1 - ahead), ahead - 0.5)
        return np.minimum(head, shaft)
    if name == "drop":
        tangent = 0.62 / 1.36
        wedge = tangent * (ahead - 1) + np.sqrt(1 - tangent**2) * aside
        tip = np.maximum(wedge, -0.36 + 0.62 * tangent - ahead)
        return np.minimum(tip, np.hypot(ahead + 0.36, aside) - 0.62)
    if name == "chevron":
        band = np.abs(ahead + aside - 0.55) / np.sqrt(2) - 0.32
        return np.maximum(band, aside - 0.9)
    return np.maximum(np.hypot(ahead + 0.4, aside) - 0.95, -0.4 - ahead)
