"""Axis letters and array aliases.

Every docstring and comment of the package gives shapes in these letters:

    B  videos of a batch          K  contracted axis of a product
    F  frames                     O  output channels of a product
    H  height                     S  sampler steps
    W  width                      N  timesteps of a batch: B, or 1 for all of it
    C  channels                   D  width of one attention head
    L  tokens                     T  training timesteps of the diffusion process
    R  rows sampled of an input   P  taps of a kernel, 1 of a Dense layer's

Videos are channels-last everywhere, `[B, F, H, W, C]`; H and W count pixels, or latent
positions where the text says so. Other layouts exist only inside `convert/`.
"""

from typing import Any, Literal, TypeVar

import jax
import jax.export

T = TypeVar("T")

Array = jax.Array
Params = Any
"""Nested dict of arrays, as flax stores a module's parameters."""

NormScope = Literal["frame", "joint"]
"""Whether a GroupNorm takes its statistics per frame, or jointly over all frames of a video."""

Positions = Literal["sinusoidal", "stored"]
"""Whether positional tables are sinusoids (Vaswani et al., arXiv 1706.03762) or parameters."""

Transposes = Literal["input", "output"] | None
"""Which of a layer's input and output lies in memory with the tokens last, as attention has it."""


def exportable(tree: type[T]) -> type[T]:
    """Names a NamedTuple of arrays for `jax.export`, which writes no tree it has no name of."""
    jax.export.register_namedtuple_serialization(
        tree, serialized_name=f"{tree.__module__}.{tree.__qualname__}"
    )
    return tree
