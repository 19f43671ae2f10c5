"""Which of linen's layers are one matrix product over their input, and over which matrix."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.models.geometry import along_axes, extend, geometry, is_plain, kernel_size

_MOST_AXES = 3


# With weights that they multiply their input with.
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Einsum)


_CALLS = [cls.__call__ for cls in (nn.Dense, nn.DenseGeneral, nn.Conv)]


def is_linens_own(layer: nn.Module) -> bool:
    """Whether a layer is called as one of linen is, not by a call of its own."""
    return type(layer).__call__ in _CALLS


Handle = Callable[[nn.Module, Any, Callable[[], Any]], Any]
"""Called with a layer, its input and its call, in whose place it is."""


def intercepting(handle: Handle) -> AbstractContextManager[Any]:
    """Has `handle` called in the place of every layer of linen that multiplies by weights."""
    inside: list[nn.Module] = []

    def intercept(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        layer = context.module
        # A class derived from a layer calls that layer's call, which is no other layer.
        is_inner = any(layer is other for other in inside)
        if is_inner or not _multiplies(layer, context.method_name):
            return call(*arguments, **options)
        inside.append(layer)
        try:
            x = arguments[0] if arguments else next(iter(options.values()))
            return handle(layer, x, lambda: call(*arguments, **options))
        finally:
            inside.pop()

    return nn.intercept_methods(intercept)


def _multiplies(module: nn.Module, method: str) -> bool:
    if isinstance(module, nn.Embed):
        return method == "attend"
    return isinstance(module, _LAYERS) and method == "__call__"


def why_float(layer: nn.Module, shape: Sequence[int]) -> str | None:
    """Why a layer of linen cannot be int8; None where it can.

    Args:
      layer: one with a kernel.
      shape: of its input.
    """
    if isinstance(layer, nn.Dense | nn.DenseGeneral):
        if layer.dot_general is not None or layer.dot_general_cls is not None:
            return "it has a product of its own (dot_general)"
        if isinstance(layer, nn.DenseGeneral) and layer.batch_dims not in ((), []):
            return f"its weights are a batch of matrices (batch_dims = {layer.batch_dims})"
        return None
    if isinstance(layer, nn.Conv):
        return _why_conv_is_float(layer, shape)
    if isinstance(layer, nn.Embed):
        return "a table that is looked up in, too (nn.Embed.attend)"
    return f"a {type(layer).__name__} is no one matrix product with its input"


def _why_conv_is_float(layer: nn.Conv, shape: Sequence[int]) -> str | None:
    if layer.feature_group_count > 1:
        return f"its channels are in {layer.feature_group_count} groups (feature_group_count)"
    rank = len(kernel_size(layer))
    if set(along_axes(layer.input_dilation, rank)) != {1}:
        return f"its input is dilated (input_dilation = {layer.input_dilation})"
    if layer.mask is not None:
        return "its weights have a mask"
    if not is_plain(layer):
        return "it has a product of its own (conv_general_dilated)"
    if rank > _MOST_AXES:
        return f"its kernel has {rank} axes, more than {_MOST_AXES}"
    padding = [amount for pair in geometry(layer, shape[-rank - 1 : -1]).padding for amount in pair]
    if min(padding) < 0:
        return f"its padding is negative ({layer.padding})"
    if math.prod(kernel_size(layer)) == 1 and any(padding):
        return f"zeros stand around a kernel of one tap (padding = {layer.padding})"
    return None


def contracted(layer: nn.Module, rank: int) -> tuple[int, ...]:
    """The axes of an input of so many that a layer contracts, of a convolution the channels."""
    axes = layer.axis if isinstance(layer, nn.DenseGeneral) else -1
    return tuple(sorted(axis % rank for axis in ((axes,) if isinstance(axes, int) else axes)))


def channels_last(layer: nn.Module, x: Array) -> Array:
    """A layer's input as the product sees it.

    Args:
      layer: a Dense, DenseGeneral or Conv.
      x: its input.

    Returns:
      `[..., C]` of a dense layer, whose contracted axes are the last one, `[*batch, *spatial, C]`
      of a convolution, with what padding other than zeros adds.
    """
    if isinstance(layer, nn.Conv):
        return extend(layer, x)
    axes = contracted(layer, x.ndim)
    if axes == (x.ndim - 1,):
        return x
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: -len(axes)], -1)


def kernel_shape(layer: nn.Module, channels: int) -> tuple[int, ...]:
    """That of a layer's weights as one matrix for each tap, `[*taps, C, O]`."""
    taps = kernel_size(layer) if isinstance(layer, nn.Conv) else ()
    return (*taps, channels, math.prod(features(layer)))


def features(layer: Any) -> tuple[int, ...]:
    """Sizes of the axes that a layer's outputs lie along."""
    return (layer.features,) if isinstance(layer.features, int) else tuple(layer.features)
