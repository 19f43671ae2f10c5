"""The accelerators whose compilers run without them, and what their makers say they can do."""

from dataclasses import dataclass
from typing import Literal

from qvd_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: what it is called here.
      platform: JAX's name of its backend.
      topology: what the compiler calls one of it.
      float_operations: multiplications and additions a second of bfloat16, at most; a TPU takes
        float32 for bfloat16 in products, unless more precision is asked for.
      int8_operations: the same of int8.
      memory: bytes.
      bandwidth: bytes of that memory a second.
      clock: cycles a second; None where the compiler estimates none.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    topology: str
    float_operations: float
    int8_operations: float
    memory: float
    bandwidth: float
    clock: float | None = None


# Google, "TPU v5e", "TPU v5p" and "TPU v6e" in the Cloud TPU documentation; NVIDIA, "H200 Tensor
# Core GPU" datasheet, SXM, without sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "v5e:1x1", 197e12, 393e12, 16 * 2**30, 819e9, 1.5e9),
        Chip("v5p", "tpu", "v5p:1x1x1", 459e12, 918e12, 95 * 2**30, 2765e9, 1.75e9),
        Chip("v6e", "tpu", "v6e:1x1", 918e12, 1836e12, 32 * 2**30, 1640e9, 1.75e9),
        Chip("h200", "cuda", "1x1x1", 989e12, 1979e12, 141e9, 4.8e12),
    )
}


def find(name: str) -> Chip:
    """The chip of a name.

    Raises:
      InputError: it is unknown.
    """
    if name not in CHIPS:
        raise InputError(f"unknown chip {name!r}; known are {', '.join(CHIPS)}")
    return CHIPS[name]
