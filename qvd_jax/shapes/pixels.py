"""Draws scenes: what a scene leaves open (exact place, size, speed, phase) is drawn at random."""

from typing import Literal

import numpy as np

from qvd_jax.shapes.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, scenes_of

_FULL_TURN = 2 * np.pi


def render(
    scene: np.ndarray, rng: np.random.Generator, frames: int = 16, size: int = 64
) -> np.ndarray:
    """Draws one video for each scene.

    Args:
      scene: indices `[N, 5]`.
      rng: for what the scene leaves open.
      frames: F.
      size: H and W in pixels.

    Returns:
      uint8 `[N, F, H, W, 3]`.
    """
    path = _paths(scene, rng, frames)
    flat = [np.repeat(scene[:, i], frames) for i in range(5)]
    pictures = rasterize(path.reshape(-1, 3), flat[2], flat[1], flat[4], size)
    return pictures.reshape(len(scene), frames, size, size, 3)


def draw_clips(
    rng: np.random.Generator,
    count: int,
    frames: int,
    size: int,
    split: Literal["train", "held_out"],
) -> np.ndarray:
    """The first frames of videos of random scenes of a split, but any frame where it is one.

    Returns:
      uint8 `[N, F, H, W, 3]`.
    """
    every = scenes_of(split)
    scene = every[rng.integers(len(every), size=count)]
    if frames == 1:
        return render_frames(scene, rng, size)[:, None]
    return render(scene, rng, frames, size)


def render_frames(scene: np.ndarray, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draws one random frame of a video for each scene `[N, 5]`: uint8 `[N, H, W, 3]`."""
    path = _paths(scene, rng, 16)
    chosen = path[np.arange(len(scene)), rng.integers(16, size=len(scene))]
    return rasterize(chosen, scene[:, 2], scene[:, 1], scene[:, 4], size)


def _paths(scene: np.ndarray, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Center x, y and radius in halves of the picture's side, `[N, F, 3]`; y points down."""
    count = len(scene)
    large, motion = scene[:, 0] == 1, scene[:, 3]

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, size=(count, 1))

    radius = np.where(large[:, None], draw(0.4, 0.46), draw(0.29, 0.33))
    travel, across, along = draw(0.75, 0.95), draw(-1, 1), draw(-1, 1)
    # An orbit begins near its top: were the phase any, the mean of a prompt's videos would not
    # turn, and which way to turn would be learned from single videos under noise.
    orbit, phase, hop = draw(0.4, 0.45), draw(-0.375, -0.125) * _FULL_TURN, draw(0.75, 0.9)
    center_x, center_y = draw(-0.08, 0.08), draw(-0.08, 0.08)
    t = np.linspace(0, 1, frames)[None]
    room = 0.97 - radius

    x, y = np.zeros((count, frames)), np.zeros((count, frames))
    scale = np.ones((count, frames))
    for index, name in enumerate(MOTIONS):
        rows = motion == index
        if name in ("clockwise", "counterclockwise"):
            turn = 1 if name == "clockwise" else -1  # y points down
            angle = phase[rows] + turn * _FULL_TURN * np.arange(frames)[None] / frames
            x[rows] = center_x[rows] + orbit[rows] * np.cos(angle)
            y[rows] = center_y[rows] + orbit[rows] * np.sin(angle)
        elif name in ("growing", "shrinking"):
            step = t if name == "growing" else 1 - t
            scale[rows] = 0.5 + 0.8 * step
            x[rows], y[rows] = 3 * center_x[rows], 3 * center_y[rows]
        elif name == "bouncing":
            cycles = 2 * t + 0.15 * along[rows]
            x[rows] = 0.7 * room[rows] * across[rows]
            y[rows] = 0.5 * hop[rows] - hop[rows] * np.abs(np.sin(np.pi * cycles))
        else:
            direction = np.array(
                [("right" in name) - ("left" in name), ("down" in name) - ("up" in name)], float
            )
            diagonal = np.abs(direction).sum() == 2
            direction /= np.sqrt(np.abs(direction).sum())
            length = travel[rows] * (1.2 if diagonal else 1)
            slack = room[rows] - length / 2 / (np.sqrt(2) if diagonal else 1)
            ahead = length * (t - 0.5) + slack * along[rows] * (0.7 if diagonal else 1)
            aside = (0.5 * slack if diagonal else 0.7 * room[rows]) * across[rows]
            x[rows] = direction[0] * ahead - direction[1] * aside
            y[rows] = direction[1] * ahead + direction[0] * aside
    return np.stack([x, y, radius * scale], axis=-1).astype(np.float32)


def rasterize(
    place: np.ndarray, shape: np.ndarray, color: np.ndarray, background: np.ndarray, size: int
) -> np.ndarray:
    """Draws anti-aliased shapes.

    Args:
      place: center x, y and radius in halves of the picture's side, `[N, 3]`; y points down.
      shape: index of each into `SHAPES`, `[N]`.
      color: into `COLORS`.
      background: into `BACKGROUNDS`.
      size: H and W in pixels.

    Returns:
      uint8 `[N, H, W, 3]`.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    coverage = np.empty((len(place), size, size), np.float32)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        center_x, center_y, radius = (place[rows, i, None, None] for i in range(3))
        distance = _signed_distance(
            name, axis[None, None, :] - center_x, axis[None, :, None] - center_y, radius
        )
        coverage[rows] = np.clip(0.5 - distance * (size / 2), 0, 1)
    inside = np.array(list(COLORS.values()), np.float32)[color][:, None, None]
    outside = np.array(list(BACKGROUNDS.values()), np.float32)[background][:, None, None]
    return np.rint(outside + coverage[..., None] * (inside - outside)).astype(np.uint8)


def _signed_distance(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance from the outline, negative inside; y points down."""
    if name == "circle":
        return np.sqrt(x * x + y * y) - 0.95 * radius
    if name == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.74 * radius) - 0.24 * radius
    if name == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
    if name == "cross":
        across = np.maximum(np.abs(x) - radius, np.abs(y) - 0.32 * radius)
        upright = np.maximum(np.abs(y) - radius, np.abs(x) - 0.32 * radius)
        return np.minimum(across, upright)
    if name == "triangle":
        y = y - 0.2 * radius
        slope = np.sqrt(0.75) * np.abs(x) - 0.5 * y
        return np.maximum(slope, y) - 0.55 * radius
    # A star: all five points folded onto half of one, bounded by a single edge.
    sector = _FULL_TURN / 10
    length = np.sqrt(x * x + y * y)
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    outer = 1.1 * radius
    inner = 0.45 * radius
    edge_x, edge_y = inner * np.cos(sector) - outer, inner * np.sin(sector)
    along, aside = length * np.cos(folded) - outer, length * np.sin(folded)
    return (edge_x * aside - edge_y * along) / -np.hypot(edge_x, edge_y)
