"""Networks inside programs whose mesh has axes of explicit sharding."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

from qvd_jax.axes import Array


def divided_by_xla(
    method: Callable[..., Array], module: nn.Module, x: Array, *inputs: Array | None
) -> Array:
    """What a module's method returns, with XLA dividing the operations among devices.

    On explicit axes, those of `jax.make_mesh` unless it is told otherwise, the type of every array
    says how it lies. A network brings the axes of videos, frames and positions together, takes them
    apart and loops over blocks of them, and has one formulation for each platform, which all lie
    otherwise: between its inputs and its result their types are XLA's affair.

    Args:
      method: of the module, not bound to it.
      module: a bound one.
      x: the first input; the result lies as it does, but for the last axis, which is whole.
      *inputs: the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    # What a module stores, it stores in its own scope: it is initialized and observed on arrays
    # that are whole, which every operation takes.
    if not explicit or module.is_initializing() or module.scope.mutable:
        return method(module, x, *inputs)
    unbound, variables = module.unbind()

    def run(variables: Any, *inputs: Array | None) -> Array:
        return unbound.apply(variables, *inputs, method=method)

    *spec, _ = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    divided = jax.sharding.auto_axes(run, axes=explicit, out_sharding=PartitionSpec(*spec, None))
    return divided(variables, x, *inputs)
