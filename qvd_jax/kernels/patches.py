"""What a convolution's kernel sees, gathered by slices, so that products can stand in for it."""

import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array

Padding = Sequence[tuple[int, int]]


def output_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int] | None = None,
) -> list[int]:
    """Positions a convolution puts out along each spatial axis."""
    axes = zip(sizes, kernel, strides, padding, dilation or (1,) * len(kernel), strict=True)
    return [
        (size + sum(pad) - (k - 1) * distance - 1) // stride + 1
        for size, k, stride, pad, distance in axes
    ]


def taps(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    fill: int = 0,
    dilation: Sequence[int] | None = None,
) -> list[Array]:
    """What each element of the kernel is multiplied with.

    Args:
      x: `[B, *spatial, C]`.
      kernel: its spatial sizes.
      strides: one for each spatial axis.
      padding: (low, high) for each spatial axis.
      fill: what is padded.
      dilation: distance of the kernel's elements along each spatial axis; None is 1.

    Returns:
      `[B, *out, C]` for each element, in row-major order.
    """
    dilation = dilation or (1,) * len(kernel)
    sizes = output_sizes(x.shape[1:-1], kernel, strides, padding, dilation)
    # XLA would compute the producer of `x` anew for every tap: the barrier keeps it from that, and
    # on the CPU a concatenation, where `jnp.pad` would not. On the GPU `jnp.pad` is no pass of its
    # own: int8 convolutions move 0.75 to 0.9 of the bytes (compiled for an H200, not run).
    padded = lax.platform_dependent(
        lax.optimization_barrier(x),
        cpu=functools.partial(_pad_by_concatenation, padding=padding, fill=fill),
        default=lambda x: jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill),
    )

    def tap(offsets: Sequence[int]) -> Array:
        window = (
            slice(offset * distance, offset * distance + (size - 1) * stride + 1, stride)
            for offset, distance, size, stride in zip(
                offsets, dilation, sizes, strides, strict=True
            )
        )
        return padded[(slice(None), *window)]

    return [tap(offsets) for offsets in itertools.product(*map(range, kernel))]


def _pad_by_concatenation(x: Array, padding: Padding, fill: int) -> Array:
    for axis, amounts in enumerate(padding, start=1):
        # Made of a part of the input, so that on a mesh of explicit axes it lies as that does.
        one = jnp.full_like(lax.slice_in_dim(x, 0, 1, axis=axis), fill)
        low, high = (
            jnp.broadcast_to(one, (*x.shape[:axis], amount, *x.shape[axis + 1 :]))
            for amount in amounts
        )
        x = jnp.concatenate([low, x, high], axis)
    return x
