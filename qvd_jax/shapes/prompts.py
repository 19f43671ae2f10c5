"""The grammar of prompts: each scene in many sentences of few words."""

import re

import numpy as np

from qvd_jax.shapes.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, SHAPES, SIZES

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


def prompt_of(scene: np.ndarray, rng: np.random.Generator | None = None) -> str:
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
