"""What kernels for the TPU share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qvd_jax.axes import Array
from qvd_jax.kernels.blocks import largest_divisor
from qvd_jax.meshes import is_of_one_device

LANES = 128
"""Of the vector unit: what the last axis is padded to."""

SUBLANES = 8
"""Of the vector unit: what the axis before it is padded to, in float32."""

VMEM_BYTES = 64 * 2**20
"""What a kernel may use of the on-chip memory: half of a v5e's or v6e's, all of a v5p's."""


def on_tpu(kernel: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    """What a kernel makes of operands on TPUs, elsewhere what other operations make of them.

    A kernel has no derivative; that of the other operations is taken wherever one is asked. JAX
    cannot divide a kernel among devices either: where there are several, kernels are for functions
    inside `jax.shard_map`, and what is outside is made of the other operations.
    """
    if jax.device_count() > 1 and not is_of_one_device():
        return otherwise(*operands)
    return _on_tpu(kernel, otherwise, *operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _on_tpu(kernel: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    return lax.platform_dependent(*operands, tpu=kernel, default=otherwise)


@_on_tpu.defjvp
def _on_tpu_jvp(
    kernel: Callable[..., Any],
    otherwise: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Any, Any]:
    del kernel
    return jax.jvp(otherwise, primals, tangents)


def of_image(values: Array) -> pl.BlockSpec:
    """Of `[M, ...]` what belongs to an image, the first place in the grid."""
    shape = (None, *values.shape[1:])
    return pl.BlockSpec(shape, lambda n, *_: (lax.rem(n, len(values)), *(0 for _ in shape[1:])))


def block_of_outputs(outputs: int, row_bytes: int, most: int) -> int:
    """Outputs whose weights take at most `most` bytes: all, or lanes of the vector unit."""
    if outputs * row_bytes <= most or outputs % LANES:
        return outputs
    return LANES * largest_divisor(outputs // LANES, most // (LANES * row_bytes))


def round_to_codes(x: Array, limit: int) -> Array:
    """int8 codes of steps, halves to even."""
    return jnp.round(jnp.clip(x, -limit, limit)).astype(jnp.int8)
