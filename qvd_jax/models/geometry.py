"""Where the kernel of a linen convolution stands: strides, padding and dilation in numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import lax

from qvd_jax.axes import Array


class Geometry(NamedTuple):
    """One entry for each spatial axis.

    Attributes:
      strides: of the kernel's places.
      padding: (low, high) zeros around the input.
      dilation: distance of the kernel's taps.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


PADDED_3X3 = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
"""Of a 3x3 kernel whose result has the input's size."""


def along_axes(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """An attribute of a linen convolution as one entry for each of its axes."""
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def kernel_size(layer: nn.Conv) -> tuple[int, ...]:
    """Taps of a linen convolution along each of its axes."""
    size = layer.kernel_size
    return (size,) if isinstance(size, int) else tuple(size)


def is_plain(layer: nn.Conv) -> bool:
    """Whether a convolution is one dense kernel over its input: no groups, mask or own product."""
    return (
        layer.feature_group_count == 1
        and set(along_axes(layer.input_dilation, len(kernel_size(layer)))) == {1}
        and layer.mask is None
        and layer.conv_general_dilated is None
        and layer.conv_general_dilated_cls is None
    )


def copies_edges(layer: nn.Conv) -> bool:
    """Whether a convolution is padded with parts of its input, which `extend` adds, not zeros."""
    return isinstance(layer.padding, str) and layer.padding in ("CIRCULAR", "REFLECT")


def extend(layer: nn.Conv, x: Array) -> Array:
    """An input with what circular or reflecting padding puts around it; else as it is."""
    if not copies_edges(layer):
        return x
    rank = len(kernel_size(layer))
    reaches = _reaches(layer)
    pads = [((reach - 1) // 2, reach // 2) for reach in reaches]
    around = [(0, 0)] * (x.ndim - rank - 1) + pads + [(0, 0)]
    return jnp.pad(x, around, mode="wrap" if layer.padding == "CIRCULAR" else "reflect")


def geometry(layer: nn.Conv, spatial: Sequence[int]) -> Geometry:
    """The geometry of a convolution.

    Args:
      layer: of linen.
      spatial: sizes of its input, which `extend` has extended.
    """
    rank = len(kernel_size(layer))
    strides, dilation = (
        along_axes(given, rank) for given in (layer.strides, layer.kernel_dilation)
    )
    padding: Any = canonicalize_padding(layer.padding, rank)
    if copies_edges(layer):
        padding = [(0, 0)] * rank
    elif padding == "CAUSAL":
        if rank != 1:
            raise ValueError("causal padding is for convolutions of one axis alone")
        padding = [(reach - 1, 0) for reach in _reaches(layer)]
    elif isinstance(padding, str):
        padding = lax.padtype_to_pads(spatial, _reaches(layer), strides, padding)
    return Geometry(strides, tuple((int(low), int(high)) for low, high in padding), dilation)


def _reaches(layer: nn.Conv) -> list[int]:
    """How far a kernel reaches along each axis, from its first tap to its last."""
    dilation = along_axes(layer.kernel_dilation, len(kernel_size(layer)))
    return [(k - 1) * d + 1 for k, d in zip(kernel_size(layer), dilation, strict=True)]
