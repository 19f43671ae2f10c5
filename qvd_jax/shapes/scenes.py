"""Scenes of one moving shape: five choices each, and the split that models are judged by."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "held_out"]

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

_HELD_OUT_FRACTION = 0.1


class Description(NamedTuple):
    """What is to be seen in a video; None where it cannot be told.

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


def scenes_of(split: Split) -> np.ndarray:
    """All scenes of a split, as indices `[N, 5]` into `ATTRIBUTES`."""
    return combinations_of(ATTRIBUTES, split)


def combinations_of(choices: Mapping[str, Sequence[str]], split: Split) -> np.ndarray:
    """All combinations of some choices in a split, as indices `[N, len(choices)]`.

    One combination in ten, spread at random, is held out: a model never trained on it, but on
    each of its parts.
    """
    sizes = [len(values) for values in choices.values()]
    every = np.indices(sizes).reshape(len(sizes), -1).T
    order = np.random.default_rng(0).permutation(len(every))
    count = round(_HELD_OUT_FRACTION * len(every))
    return every[order[:count] if split == "held_out" else order[count:]]


def description_of(scene: np.ndarray) -> Description:
    """The true description of a scene `[5]`."""
    values = [names[i] for names, i in zip(ATTRIBUTES.values(), scene, strict=True)]
    return Description(*values[1:])
