"""Int8 layers inside a linen module that nobody here wrote: its layers' calls are intercepted."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, meta

from qvd_jax.axes import Array
from qvd_jax.models.geometry import copies_edges, kernel_size
from qvd_jax.quant.layers import QuantConv, QuantDense, SpecTable
from qvd_jax.quant.linen import (
    channels_last,
    features,
    intercepting,
    is_linens_own,
    kernel_shape,
)
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.record import layout


class Int8Spec(NamedTuple):
    """How one layer of a module is int8.

    Attributes:
      spec: how it is quantized.
      param_dtype: of the weights that the codes stand for, which tells its result's.
    """

    spec: LayerSpec
    param_dtype: np.dtype


@dataclass(frozen=True)
class Int8Layers:
    """Of a module's int8 layers, by module path; a class, for flax walks through mappings."""

    by_path: FrozenDict[str, Int8Spec]


class Intercepting(nn.Module):
    """A linen module whose layers' calls are others' in part.

    It has the paths of the module it holds, and is called as that is: on its own (`apply`, `init`,
    with `method`, `rngs`, `mutable` and all arguments), or as a part of another module.

    Attributes:
      module: the module as it was written.
    """

    module: nn.Module

    @nn.nowrap
    def handle(self, depth: int, layer: nn.Module, x: Any, call: Callable[[], Any]) -> Any:
        """What is done in the place of a layer's call.

        Args:
          depth: of this module in the outermost one.
          layer: bound.
          x: its input.
          call: its own call.
        """
        raise NotImplementedError

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The module's call."""
        with intercepting(functools.partial(self.handle, len(self.path))):
            return self.module(*arguments, **options)

    @nn.nowrap
    def apply(self, variables: Any, *arguments: Any, **options: Any) -> Any:
        """`nn.Module.apply` of the module."""
        with intercepting(functools.partial(self.handle, 0)):
            return self.module.apply(variables, *arguments, **options)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *arguments: Any, **options: Any) -> Any:
        """`nn.Module.init_with_output` of the module."""
        with intercepting(functools.partial(self.handle, 0)):
            return self.module.init_with_output(rngs, *arguments, **options)


class Int8Module(Intercepting):
    """A linen module some of whose layers are int8.

    Attributes:
      layers: which of its layers are int8, and how.
    """

    layers: Int8Layers

    @nn.nowrap
    def handle(self, depth: int, layer: nn.Module, x: Any, call: Callable[[], Any]) -> Any:
        """Calls int8 layers in the place of float ones."""
        entry = self.layers.by_path.get("/".join(layer.path[depth:]))
        # What is applied inside, int8 layers and other modules, may have the same paths.
        if entry is None or not is_linens_own(layer) or _holds_floats(layer):
            return call()
        return call_int8(layer, entry, x)


def _holds_floats(layer: nn.Module) -> bool:
    kernel = meta.unbox(layer.get_variable("params", "kernel"))
    return kernel is not None and not jnp.issubdtype(kernel.dtype, jnp.integer)


def call_int8(layer: nn.Module, entry: Int8Spec, x: Array) -> Array:
    """What the int8 layer in a bound float layer's place makes of its input."""
    module = int8_layer(layer, entry)
    x = channels_last(layer, jnp.asarray(x))
    *taps, channels, outputs = kernel_shape(layer, x.shape[-1])

    def read(name: str) -> Array:
        if layer.has_variable("params", name):
            return layer.get_variable("params", name)
        return layer.scope.param(name, lambda key: module.init(key, x)["params"][name])

    names = layout(entry.spec, channels, outputs, taps).params()
    y = module.apply({"params": {name: read(name) for name in names}}, x)
    return y if isinstance(layer, nn.Conv) else y.reshape(*y.shape[:-1], *features(layer))


def int8_layer(layer: nn.Module, entry: Int8Spec) -> nn.Module:
    """The int8 layer that takes the place of a float one, of its input's `channels_last`."""
    common: dict[str, Any] = {
        "features": math.prod(features(layer)),
        "specs": SpecTable(FrozenDict({"": entry.spec})),
        "dtype": layer.dtype,
        "param_dtype": entry.param_dtype,
        "parent": None,
    }
    if not isinstance(layer, nn.Conv):
        return QuantDense(**common)
    # What `channels_last` has put around the input is not put there again.
    return QuantConv(
        kernel_size=kernel_size(layer),
        strides=layer.strides,
        padding="VALID" if copies_edges(layer) else layer.padding,
        kernel_dilation=layer.kernel_dilation,
        **common,
    )
