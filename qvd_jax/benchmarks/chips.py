"""The accelerators whose compilers run without them, and what their makers say they can do."""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from qvd_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One accelerator, or each of several that are connected.

    Attributes:
      name: what it is called here.
      platform: JAX's name of its backend.
      topology: what the compiler calls one of it, or all of several.
      float_operations: multiplications and additions a second of bfloat16, at most; a TPU takes
        float32 for bfloat16 in products, unless more precision is asked for.
      int8_operations: the same of int8.
      memory: bytes.
      bandwidth: bytes of that memory a second.
      clock: cycles a second; None where the compiler estimates none.
      link: bytes a second to a neighboring chip, in one direction.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    topology: str
    float_operations: float
    int8_operations: float
    memory: float
    bandwidth: float
    clock: float | None = None
    link: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are along each axis of their grid."""
        return tuple(map(int, self.topology.rpartition(":")[2].split("x")))

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def links(self) -> float:
        """To how many neighbors each has a link, on average; grids are not closed to rings."""
        along = (self.count // size * (size - 1) for size in self.shape)
        return 2 * sum(along) / self.count

    @property
    def one(self) -> "Chip":
        """One of them alone."""
        return CHIPS[self.name.partition(":")[0]]


# Google, "TPU v5e", "TPU v5p" and "TPU v6e" in the Cloud TPU documentation, a chip's interconnect
# by its four links, six of a v5p; NVIDIA, "H200 Tensor Core GPU" datasheet, SXM, without sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "v5e:1x1", 197e12, 393e12, 16 * 2**30, 819e9, 1.5e9, 50e9),
        Chip("v5p", "tpu", "v5p:1x1x1", 459e12, 918e12, 95 * 2**30, 2765e9, 1.75e9, 100e9),
        Chip("v6e", "tpu", "v6e:1x1", 918e12, 1836e12, 32 * 2**30, 1640e9, 1.75e9, 112e9),
        Chip("h200", "cuda", "1x1x1", 989e12, 1979e12, 141e9, 4.8e12),
    )
}


def find(name: str) -> Chip:
    """The chip of a name, such as v5e; of v5e:2x4 each of eight.

    Raises:
      InputError: it is unknown.
    """
    kind, several, grid = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"unknown chip {name!r}; known are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    if not several:
        return chip
    axes = len(chip.shape)
    if chip.platform != "tpu" or not re.fullmatch("x".join(["[1-9][0-9]*"] * axes), grid):
        example = ":".join([kind, "x".join("2" * axes)]) if chip.platform == "tpu" else "v5e:2x2"
        raise InputError(f"unknown grid of chips {name!r}; one is written like {example}")
    found = replace(chip, name=name, topology=name)
    return chip if found.count == 1 else found
