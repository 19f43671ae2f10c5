"""Procedural videos of one moving shape, their prompts, and the reader that goes back.

A scene is five choices (`ATTRIBUTES`); everything else about its video (exact place, size, speed,
phase) is drawn at random. `describe` reads the choices from the pixels alone, so that what a
text-to-video model makes of a prompt can be counted.
"""

import functools
import re
from typing import Literal, NamedTuple

import numpy as np

SIZES = ("small", "large")
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 25),
    "green": (20, 150, 40),
    "cyan": (0, 205, 215),
    "blue": (30, 60, 225),
    "purple": (125, 20, 150),
    "pink": (255, 105, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = (
    "left",
    "right",
    "up",
    "down",
    "up left",
    "up right",
    "down left",
    "down right",
    "clockwise",
    "counterclockwise",
    "growing",
    "shrinking",
    "bouncing",
)
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "beige": (225, 200, 160),
}
ATTRIBUTES = {
    "size": SIZES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}

# Phrases for each motion; the first is the plainest.
_MOTION_PHRASES = {
    **{
        way: (f"moving {way}", f"going {way}", f"sliding {way}")
        for way in ("left", "right", "up", "down")
    },
    **{
        f"{rise} {side}": (
            f"moving {rise} and {side}",
            f"going diagonally {rise} {side}",
            f"sliding {rise} to the {side}",
        )
        for rise in ("up", "down")
        for side in ("left", "right")
    },
    **{
        turn: (f"orbiting {turn}", f"moving in a {turn} orbit", f"going around {turn}")
        for turn in ("clockwise", "counterclockwise")
    },
    "growing": ("growing", "getting bigger", "becoming larger"),
    "shrinking": ("shrinking", "getting smaller", "becoming tiny"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping up and down"),
}
# Subject S, motion M, background B.
_SENTENCES = (
    "{S} {M} on a {B} background",
    "{S} {M} over {B}",
    "{S} is {M} in front of a {B} background",
    "a video of {S} {M} on a {B} background",
    "on a {B} background, {S} {M}",
    "{S}, {M}, {B} background",
)

_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
_HELD_OUT_FRACTION = 0.1
_FULL_TURN = 2 * np.pi


class Description(NamedTuple):
    """What `describe` reads from one video; None where it cannot tell.

    Attributes:
      color: of `COLORS`.
      shape: of `SHAPES`.
      motion: of `MOTIONS`.
      background: of `BACKGROUNDS`.
    """

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None


def scenes(split: Literal["train", "held_out"]) -> np.ndarray:
    """All scenes of a split, as indices `[N, 5]` into `ATTRIBUTES`.

    One combination in ten, spread at random, is held out: a model never trained on it, but on
    each of its parts.
    """
    sizes = [len(values) for values in ATTRIBUTES.values()]
    every = np.indices(sizes).reshape(len(sizes), -1).T
    order = np.random.default_rng(0).permutation(len(every))
    count = round(_HELD_OUT_FRACTION * len(every))
    return every[order[:count] if split == "held_out" else order[count:]]


def describe_scene(scene: np.ndarray) -> Description:
    """The true description of a scene `[5]`."""
    values = [names[i] for names, i in zip(ATTRIBUTES.values(), scene, strict=True)]
    return Description(*values[1:])


def prompt(scene: np.ndarray, rng: np.random.Generator | None = None) -> str:
    """A sentence for a scene `[5]`; without `rng` the plainest one."""
    size, color, shape, motion, background = (
        names[i] for names, i in zip(ATTRIBUTES.values(), scene, strict=True)
    )
    phrases = _MOTION_PHRASES[motion]
    chosen = 0 if rng is None else int(rng.integers(len(phrases)))
    sentence = _SENTENCES[0 if rng is None else int(rng.integers(len(_SENTENCES)))]
    return sentence.format(S=f"a {size} {color} {shape}", M=phrases[chosen], B=background)


def words() -> list[str]:
    """Every word and punctuation mark of the grammar, in order."""
    phrases = [phrase for group in _MOTION_PHRASES.values() for phrase in group]
    sentences = [sentence.format(S="a", M="", B="") for sentence in _SENTENCES]
    text = " ".join([*SIZES, *COLORS, *SHAPES, *BACKGROUNDS, *phrases, *sentences])
    return sorted(set(re.findall(r"\w+|[^\w\s]+", text)))


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
    pictures = _rasterize(path.reshape(-1, 3), flat[2], flat[1], flat[4], size)
    return pictures.reshape(len(scene), frames, size, size, 3)


def render_frames(scene: np.ndarray, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draws one random frame of a video for each scene `[N, 5]`: uint8 `[N, H, W, 3]`."""
    path = _paths(scene, rng, 16)
    chosen = path[np.arange(len(scene)), rng.integers(16, size=len(scene))]
    return _rasterize(chosen, scene[:, 2], scene[:, 1], scene[:, 4], size)


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


def _rasterize(
    place: np.ndarray, shape: np.ndarray, color: np.ndarray, background: np.ndarray, size: int
) -> np.ndarray:
    """Draws anti-aliased shapes: place `[N, 3]` as of `_paths`, to uint8 `[N, H, W, 3]`."""
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


def describe(videos: np.ndarray) -> list[Description]:
    """Reads color, shape, motion and background of uint8 `[N, F, H, W, 3]` from the pixels."""
    return [_describe(video) for video in videos]


def _describe(video: np.ndarray) -> Description:
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
    area, x, y, spread = _moments(coverage)
    seen = area > _SMALLEST_AREA * video.shape[1] * video.shape[2]
    if seen.mean() < 0.75:
        return Description(_nearest(ground + ink, tuple(COLORS)), None, None, background)
    aligned = _align(coverage[seen], x[seen], y[seen], spread[seen])
    likeness = (aligned * area[seen, None, None]).sum(0).reshape(-1)
    scores = _templates() @ (likeness - likeness.mean())
    half = video.shape[2] / 2
    return Description(
        _nearest(ground + ink, tuple(COLORS)),
        SHAPES[int(np.argmax(scores))],
        _motion(x[seen] / half, y[seen] / half, area[seen]),
        background,
    )


_SMALLEST_AREA = 0.003
_GRID = np.linspace(-2.1, 2.1, 25, dtype=np.float32)


def _nearest(color: np.ndarray, allowed: tuple[str, ...]) -> str | None:
    """The name of the nearest color of the whole palette, None if it is not an allowed one."""
    names = (*COLORS, *BACKGROUNDS)
    name = names[int(np.argmin(np.linalg.norm(_PALETTE - color, axis=-1)))]
    return name if name in allowed else None


def _moments(coverage: np.ndarray) -> tuple[np.ndarray, ...]:
    """Area, center x and y, and root mean square radius of each frame `[F]`, in pixels."""
    rows, columns = (np.arange(n, dtype=np.float32) for n in coverage.shape[1:])
    area = coverage.sum((1, 2))
    mass = np.maximum(area, 1e-6)
    x = coverage.sum(1) @ columns / mass
    y = coverage.sum(2) @ rows / mass
    square = coverage.sum(1) @ columns**2 / mass + coverage.sum(2) @ rows**2 / mass
    return area, x, y, np.sqrt(np.maximum(square - x**2 - y**2, 1))


def _align(coverage: np.ndarray, x: np.ndarray, y: np.ndarray, spread: np.ndarray) -> np.ndarray:
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
    """What `_align` makes of each shape: zero mean, unit norm, `[len(SHAPES), G * G]`."""
    index = np.arange(len(SHAPES))
    place = np.tile(np.array([[0.0, 0.0, 0.35]], np.float32), (len(index), 1))
    black, yellow = list(BACKGROUNDS).index("black"), list(COLORS).index("yellow")
    pictures = _rasterize(place, index, np.full_like(index, yellow), np.full_like(index, black), 64)
    red = pictures[..., 0].astype(np.float32)
    coverage = (red - red.min()) / (red.max() - red.min())
    _, x, y, spread = _moments(coverage)
    flat = _align(coverage, x, y, spread).reshape(len(index), -1)
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
    if abs(around) > 0.5 * length**2 / _FULL_TURN:
        return "clockwise" if around > 0 else "counterclockwise"
    if np.linalg.norm(shift) > 0.7 * length:
        octant = round(float(np.arctan2(shift[1], shift[0])) / (np.pi / 4)) % 8
        around_the_clock = ("right", "down right", "down", "down left")
        return (*around_the_clock, "left", "up left", "up", "up right")[octant]
    if np.abs(steps[:, 1]).sum() > 0.9 * length:
        return "bouncing"
    return None
