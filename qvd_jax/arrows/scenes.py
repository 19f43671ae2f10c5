"""Scenes of two pointing shapes on a textured ground, and the split that models are judged by."""

from typing import NamedTuple

import numpy as np

from qvd_jax.shapes.scenes import COLORS, Split, combinations_of

SHAPES = ("triangle", "arrow", "drop", "chevron", "dome")
HEADINGS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
"""Clockwise by eighths of a turn, for y points down."""

TEXTURES = ("rows", "columns", "diagonals", "checks", "dots")
GROUNDS = {
    "gray": ((108, 108, 108), (152, 152, 152)),
    "sand": ((150, 140, 122), (192, 182, 164)),
    "slate": ((62, 70, 82), (98, 106, 118)),
    "moss": ((78, 90, 72), (114, 126, 108)),
}
"""Dark and light tone; next to `COLORS` nearly gray, so that what moves can be told from it."""

OBJECT = {"color": tuple(COLORS), "shape": SHAPES, "heading": HEADINGS}
ATTRIBUTES = {"texture": TEXTURES, "ground": tuple(GROUNDS)} | {
    f"{name} {which}": values for which in ("one", "two") for name, values in OBJECT.items()
}
"""What a scene chooses, in its order."""


class Object(NamedTuple):
    """One shape; None where something of it cannot be told.

    Attributes:
      color: of `COLORS`.
      shape: of `SHAPES`.
      heading: of `HEADINGS`, where it points and moves.
    """

    color: str | None
    shape: str | None
    heading: str | None


def objects_of(split: Split) -> np.ndarray:
    """All objects of a split, as indices `[N, 3]` into `OBJECT`."""
    return combinations_of(OBJECT, split)


def draw_scenes(rng: np.random.Generator, count: int, split: Split) -> np.ndarray:
    """Random scenes `[N, 8]`, indices into `ATTRIBUTES`, of two objects of different colors."""
    objects = objects_of(split)
    first = objects[rng.integers(len(objects), size=count)]
    second = np.empty_like(first)
    for color in np.unique(first[:, 0]):
        rows, others = first[:, 0] == color, objects[objects[:, 0] != color]
        second[rows] = others[rng.integers(len(others), size=rows.sum())]
    grounds = [rng.integers(len(values), size=count) for values in (TEXTURES, GROUNDS)]
    return np.column_stack([*grounds, first, second])


def objects_in(scene: np.ndarray) -> tuple[Object, Object]:
    """The two objects of a scene `[8]`."""
    _, _, *named = (names[i] for names, i in zip(ATTRIBUTES.values(), scene, strict=True))
    return Object(*named[:3]), Object(*named[3:])


def title_of(scene: np.ndarray) -> str:
    """A scene `[8]` in words."""
    texture, ground = TEXTURES[scene[0]], list(GROUNDS)[scene[1]]
    shown = " and ".join(f"a {o.color} {o.shape} pointing {o.heading}" for o in objects_in(scene))
    return f"{shown} on {ground} {texture}"
