"""What a convolution's kernel sees, gathered by slices, so that products can stand in for it."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array

Padding = Sequence[tuple[int, int]]


def output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Padding
) -> list[int]:
    """Positions a convolution puts out along each spatial axis."""
    return [
        (size + sum(pad) - k) // stride + 1
        for size, k, stride, pad in zip(sizes, kernel, strides, padding, strict=True)
    ]


def taps(
    x: Array, kernel: Sequence[int], strides: Sequence[int], padding: Padding, fill: int = 0
) -> list[Array]:
    """What each element of the kernel is multiplied with.

    Args:
      x: `[B, *spatial, C]`.
      kernel: its spatial sizes.
      strides: one for each spatial axis.
      padding: (low, high) for each spatial axis.
      fill: what is padded.

    Returns:
      `[B, *out, C]` for each element, in row-major order.
    """
    sizes = output_sizes(x.shape[1:-1], kernel, strides, padding)
    # XLA would compute the producer of `x` anew for every tap: on the GPU the barrier keeps it
    # from that, on the CPU a concatenation, where `jnp.pad` would not.
    padded = lax.optimization_barrier(x)
    for axis, amounts in enumerate(padding, start=1):
        low, high = (
            jnp.full((*padded.shape[:axis], amount, *padded.shape[axis + 1 :]), fill, x.dtype)
            for amount in amounts
        )
        padded = jnp.concatenate([low, padded, high], axis)

    def tap(offsets: Sequence[int]) -> Array:
        window = (
            slice(start, start + (size - 1) * stride + 1, stride)
            for start, size, stride in zip(offsets, sizes, strides, strict=True)
        )
        return padded[(slice(None), *window)]

    return [tap(offsets) for offsets in itertools.product(*map(range, kernel))]
