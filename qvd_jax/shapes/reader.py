"""Reads the choices of a scene from pixels alone, so that what a model shows can be counted."""

import functools

import numpy as np

from qvd_jax.shapes.pixels import rasterize
from qvd_jax.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Description

_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
_SMALLEST_AREA = 0.003
_GRID = np.linspace(-2.1, 2.1, 25, dtype=np.float32)


def read(videos: np.ndarray) -> list[Description]:
    """Reads color, shape, motion and background of uint8 `[N, F, H, W, 3]` from the pixels."""
    return [_read(video) for video in videos]


def _read(video: np.ndarray) -> Description:
    pixels = video.astype(np.float32)
    edges = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    ground = np.median(border, axis=0)
    background = _nearest(ground, tuple(BACKGROUNDS))
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    core = contrast >= 0.8 * np.quantile(contrast, 0.995)
    ink = np.median(pixels[core], axis=0) - ground
    if np.linalg.norm(ink) < 25:
        return Description(None, None, None, background)
    coverage = np.clip((pixels - ground) @ ink / (ink @ ink), 0, 1)
    coverage = np.where(coverage > 0.2, coverage, 0)
    area, x, y, spread = moments(coverage)
    seen = area > _SMALLEST_AREA * video.shape[1] * video.shape[2]
    if seen.mean() < 0.75:
        return Description(_nearest(ground + ink, tuple(COLORS)), None, None, background)
    aligned = align(coverage[seen], x[seen], y[seen], spread[seen])
    likeness = (aligned * area[seen, None, None]).sum(0).reshape(-1)
    scores = _templates() @ (likeness - likeness.mean())
    half = video.shape[2] / 2
    return Description(
        _nearest(ground + ink, tuple(COLORS)),
        SHAPES[int(np.argmax(scores))],
        _motion(x[seen] / half, y[seen] / half, area[seen]),
        background,
    )


def _nearest(color: np.ndarray, allowed: tuple[str, ...]) -> str | None:
    """The name of the nearest color of the whole palette, None if it is not an allowed one."""
    names = (*COLORS, *BACKGROUNDS)
    name = names[int(np.argmin(np.linalg.norm(_PALETTE - color, axis=-1)))]
    return name if name in allowed else None


def moments(coverage: np.ndarray) -> tuple[np.ndarray, ...]:
    """Area, center x and y, and root mean square radius of each frame `[F]`, in pixels."""
    rows, columns = (np.arange(n, dtype=np.float32) for n in coverage.shape[1:])
    area = coverage.sum((1, 2))
    mass = np.maximum(area, 1e-6)
    x = coverage.sum(1) @ columns / mass
    y = coverage.sum(2) @ rows / mass
    square = coverage.sum(1) @ columns**2 / mass + coverage.sum(2) @ rows**2 / mass
    return area, x, y, np.sqrt(np.maximum(square - x**2 - y**2, 1))


def align(coverage: np.ndarray, x: np.ndarray, y: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Resamples each frame around its center, in units of its spread: `[F, G, G]`."""
    frames, height, width = coverage.shape
    columns = np.clip(x[:, None] + spread[:, None] * _GRID, 0, width - 1.001)
    rows = np.clip(y[:, None] + spread[:, None] * _GRID, 0, height - 1.001)
    left, top = columns.astype(int), rows.astype(int)
    fx, fy = (columns - left)[:, None, :], (rows - top)[:, :, None]
    frame = np.arange(frames)[:, None, None]

    def at(down: int, right: int) -> np.ndarray:
        return coverage[frame, top[:, :, None] + down, left[:, None, :] + right]

    upper = at(0, 0) * (1 - fx) + at(0, 1) * fx
    lower = at(1, 0) * (1 - fx) + at(1, 1) * fx
    return upper * (1 - fy) + lower * fy


@functools.cache
def _templates() -> np.ndarray:
    """What `align` makes of each shape: zero mean, unit norm, `[len(SHAPES), G * G]`."""
    index = np.arange(len(SHAPES))
    place = np.tile(np.array([[0.0, 0.0, 0.35]], np.float32), (len(index), 1))
    black, yellow = list(BACKGROUNDS).index("black"), list(COLORS).index("yellow")
    pictures = rasterize(place, index, np.full_like(index, yellow), np.full_like(index, black), 64)
    red = pictures[..., 0].astype(np.float32)
    coverage = (red - red.min()) / (red.max() - red.min())
    _, x, y, spread = moments(coverage)
    flat = align(coverage, x, y, spread).reshape(len(index), -1)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _motion(x: np.ndarray, y: np.ndarray, area: np.ndarray) -> str | None:
    """Names the motion of centers `[F]`, in halves of the picture, whose shape covers `area`."""
    quarter = max(1, len(x) // 4)
    ratio = np.log(area[-quarter:].mean() / area[:quarter].mean())
    steps = np.diff(np.stack([x, y], -1), axis=0)
    length = np.linalg.norm(steps, axis=-1).sum()
    shift = np.array([x[-1] - x[0], y[-1] - y[0]])
    if abs(ratio) > np.log(2) and length < 0.5:
        return "growing" if ratio > 0 else "shrinking"
    if length < 0.3:
        return None
    # Twice the signed area inside the path, closed by a straight line; a full circle of radius r
    # has 2 pi r^2 at a length of 2 pi r.
    around = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    if abs(around) > 0.5 * length**2 / (2 * np.pi):
        return "clockwise" if around > 0 else "counterclockwise"
    if np.linalg.norm(shift) > 0.7 * length:
        octant = round(float(np.arctan2(shift[1], shift[0])) / (np.pi / 4)) % 8
        around_the_clock = ("right", "down right", "down", "down left")
        return (*around_the_clock, "left", "up left", "up", "up right")[octant]
    if np.abs(steps[:, 1]).sum() > 0.9 * length:
        return "bouncing"
    return None
