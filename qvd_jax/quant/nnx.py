"""A flax.nnx module as a linen one, whose layers are linen's and can be int8.

The bridge of flax itself (`nnx.bridge.to_linen`) keeps a module's layers as nnx's, which linen
cannot intercept.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from qvd_jax.errors import InputError

_STATE = "state"


class Slot(nnx.Module):
    """The place of a layer that linen calls.

    Attributes:
      name: of the layer.
      layer: what is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.layer: Callable[..., Any] | None = None

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        """The layer's call."""
        if out_sharding is not None:
            raise InputError(f"{self.name}: out_sharding is nothing that a layer of linen takes")
        assert self.layer is not None
        return self.layer(inputs)


class FromNNX(nn.Module):
    """A linen module that calls an nnx module whose layers are linen's.

    Its variables come with it: it cannot make new ones.

    Attributes:
      graph: of the nnx module, with slots.
      params: names and structure of its parameters outside of layers.
      state: names and structure of everything else that changes: statistics, counts, keys.
      layers: linen's layers, by name.
    """

    graph: Any
    params: tuple[tuple[str, ...], Any]
    state: tuple[tuple[str, ...], Any]
    layers: tuple[tuple[str, nn.Module], ...]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The nnx module's call; what it changes is written where `mutable` has "state"."""
        return self.run(None, *arguments, **options)

    @nn.compact
    def run(self, method: str | None, *arguments: Any, **options: Any) -> Any:
        """A method of the nnx module, by its name; None is its call."""
        parts = (
            jax.tree.unflatten(structure, [self.get_variable(collection, n) for n in names])
            for collection, (names, structure) in (("params", self.params), (_STATE, self.state))
        )
        model = nnx.merge(self.graph, *parts)
        layers = {name: layer.clone(name=name, parent=self) for name, layer in self.layers}
        for _, node in nnx.iter_graph(model):
            if isinstance(node, Slot):
                node.layer = layers[node.name]
        result = (model if method is None else getattr(model, method))(*arguments, **options)
        if self.is_mutable_collection(_STATE):
            changed = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
            for name, value in zip(self.state[0], changed, strict=True):
                self.put_variable(_STATE, name, value)
        return result


def from_nnx(model: nnx.Module) -> tuple[FromNNX, dict[str, Any]]:
    """An nnx module as a linen one for `quantize_module`.

    Its `Linear`, `LinearGeneral` and `Conv` layers become linen's, named by their paths, "a.0.b".
    Classes derived from them, and all others, stay nnx's and float.

    Args:
      model: it is left as it is.

    Returns:
      The linen module, which computes the same, and its variables: "params" and "state".

    Raises:
      InputError: the model is none of nnx, or has no such layer.
    """
    if not isinstance(model, nnx.Module):
        raise InputError(f"a flax.nnx module is needed, not a {type(model).__name__}")
    model = nnx.clone(model)
    found: dict[int, tuple[str, nn.Module, Any]] = {}
    for path, node in nnx.iter_graph(model):
        layer = _linen_layer(node)
        if layer is not None:
            found[id(node)] = ".".join(map(str, path)), layer, node
    if not found:
        raise InputError("the module has no Linear, LinearGeneral or Conv layer below it")
    slots = {key: Slot(name) for key, (name, _, _) in found.items()}
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if id(value) in slots:
                    setattr(node, name, slots[id(value)])
    graph, params, state = nnx.split(model, nnx.Param, ...)
    names, leaves, structures = zip(*(_flat(part) for part in (params, state)), strict=True)
    variables: dict[str, Any] = {
        "params": dict(zip(names[0], leaves[0], strict=True)),
        _STATE: dict(zip(names[1], leaves[1], strict=True)),
    }
    for name, _, node in found.values():
        weights = {"kernel": node.kernel, "bias": node.bias}
        variables["params"][name] = {
            part: variable[...] for part, variable in weights.items() if variable is not None
        }
    layers = tuple((name, layer) for name, layer, _ in found.values())
    linen = FromNNX(graph, (names[0], structures[0]), (names[1], structures[1]), layers)
    return linen, variables


def _flat(state: Any) -> tuple[tuple[str, ...], list[Any], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return tuple(n.removesuffix(".value") for n in names), [leaf for _, leaf in leaves], structure


def _linen_layer(node: Any) -> nn.Module | None:
    """The layer of linen that computes what one of nnx does; None where there is none."""
    if type(node) not in (nnx.Linear, nnx.LinearGeneral, nnx.Conv):
        return None
    if node.preferred_element_type is not None or node.promote_dtype is not promote_dtype:
        return None
    # One of a stack, made by `nnx.vmap`, has an axis more.
    if node.kernel[...].ndim != _kernel_rank(node):
        return None
    common: dict[str, Any] = {
        "use_bias": node.bias is not None,
        "dtype": node.dtype,
        "param_dtype": node.param_dtype,
        "precision": node.precision,
        "parent": None,
    }
    if isinstance(node, nnx.Conv):
        own = node.conv_general_dilated
        return nn.Conv(
            node.out_features,
            node.kernel_size,
            strides=node.strides,
            padding=node.padding,
            input_dilation=node.input_dilation,
            kernel_dilation=node.kernel_dilation,
            feature_group_count=node.feature_group_count,
            mask=node.mask,
            conv_general_dilated=None if own is lax.conv_general_dilated else own,
            **common,
        )
    dot_general = node.dot_general
    common["dot_general"] = None if dot_general is lax.dot_general else dot_general
    if isinstance(node, nnx.Linear):
        return nn.Dense(node.out_features, **common)
    if node.batch_axis:
        return None
    return nn.DenseGeneral(node.out_features, axis=node.axis, **common)


def _kernel_rank(node: nnx.Linear | nnx.LinearGeneral | nnx.Conv) -> int:
    """How many axes the kernel of one layer has."""
    if isinstance(node, nnx.Conv):
        return len(node.kernel_shape)
    if isinstance(node, nnx.Linear):
        return 2
    return len(node.batch_axis) + len(node.axis) + len(node.out_features)
