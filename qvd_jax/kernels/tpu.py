"""What kernels for the TPU share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from qvd_jax.axes import Array

LANES = 128
"""Of the vector unit: what the last axis is padded to."""

SUBLANES = 8
"""Of the vector unit: what the axis before it is padded to, in float32."""

VMEM_BYTES = 64 * 2**20
"""What a kernel may use of the on-chip memory: half of a v5e's or v6e's, all of a v5p's."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def on_tpu(kernel: Callable[..., Array], otherwise: Callable[..., Array], *operands: Any) -> Array:
    """What a kernel makes of operands on TPUs, elsewhere what other operations make of them.

    A kernel has no derivative; that of the other operations is taken wherever one is asked.
    """
    return lax.platform_dependent(*operands, tpu=kernel, default=otherwise)


@on_tpu.defjvp
def _on_tpu_jvp(
    kernel: Callable[..., Array],
    otherwise: Callable[..., Array],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    del kernel
    return jax.jvp(otherwise, primals, tangents)
