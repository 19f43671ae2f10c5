"""Quantizes a linen module that nobody here wrote: finds its layers, observes them, solves each."""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, meta
from jax.extend.core import get_opaque_trace_state

from qvd_jax.axes import Array, Params
from qvd_jax.config import check_integer, check_seed
from qvd_jax.errors import InputError, first_line
from qvd_jax.quant.interception import Int8Layers, Int8Module, Int8Spec
from qvd_jax.quant.linen import is_linens_own, why_float
from qvd_jax.quant.policy import LayerSpec, Policy, TracedLayer, decide, match, module_policy
from qvd_jax.quant.record import QuantizedParams, leaf, replace_layers
from qvd_jax.quant.solve import LayerReport, solve_layers
from qvd_jax.quant.statistics import (
    STATISTICS,
    Statistics,
    Traced,
    draw_places,
    join,
    observe,
    thinned,
    tracing,
)

_CALLS = [cls.__call__ for cls in (nn.Dense, nn.DenseGeneral, nn.Conv)]
_NO_RULE = "no rule of the policy quantizes it"


class ModuleReport(NamedTuple):
    """What became of a module's layers.

    Attributes:
      layers: what each int8 layer is worth.
      kept_float: why each other layer with weights stays float, by module path.
    """

    layers: list[LayerReport]
    kept_float: dict[str, str]


class QuantizedModule(NamedTuple):
    """What `quantize_module` returns.

    Attributes:
      module: called as the float module is.
      variables: the float module's, with the int8 layers' records.
      report: on its layers.
    """

    module: Int8Module
    variables: dict[str, Any]
    report: ModuleReport


def quantize_module(
    module: nn.Module,
    variables: Mapping[str, Any],
    batches: Sequence[Any],
    policy: str | Policy = "qvd-w8a8",
    *,
    rows: int = 1024,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> QuantizedModule:
    """Quantizes any linen module after training, on batches of its inputs.

    Args:
      module: of float layers; `nn.Dense`, `nn.DenseGeneral` (those inside attention, too) and
        `nn.Conv` become int8.
      variables: its collections, "params" among them.
      batches: each what it is called with once: a tuple of positional arguments, a dict of keyword
        arguments, or the one argument. They are to be as varied as what the module will see.
      policy: the name of a policy (METHOD-WIDTH), by which every layer that can be is int8; or
        rules, which must name none that cannot.
      rows: rows sampled of each layer's input, over all batches, of each of which as many are
        taken; that number is rounded up.
      seed: of the rows.
      options: of each call: those of `nn.Module.apply` (`method`, `rngs`, `mutable`), and keyword
        arguments such as `train=False`.

    Returns:
      The module with int8 layers, its variables, and the report on its layers.

    Raises:
      InputError: there are no batches, the module cannot be called with one, the policy does not
        fit its layers, or a layer's input is not finite.
    """
    params = _check(module, variables, batches)
    rows, seed = check_integer("rows", rows, 1), check_seed(seed)
    calls = [_call_of(batch) for batch in batches]
    run = _Run(module, variables, dict(options or {}))
    layers: Traced = {}
    kept: dict[str, str] = {}
    for number, call in enumerate(calls):
        if call not in calls[:number]:
            found, refused = _survey(run, call, number)
            layers = _joined(layers, found)
            kept |= refused
    layers = {path: layer for path, layer in layers.items() if path not in kept}
    specs = _decide(policy, layers, kept)
    kept |= {path: _NO_RULE for path in layers if path not in specs}
    statistics = _collect(run, calls, specs, rows, seed)
    records: dict[str, QuantizedParams] = {}
    reports = []
    for path, record, report in solve_layers(layers, specs, statistics, params, {}):
        records[path] = record
        reports.append(report)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    entries = {
        path: Int8Spec(spec, np.dtype(flat[leaf(path, "kernel")].dtype))
        for path, spec in specs.items()
    }
    int8 = Int8Module(module, Int8Layers(FrozenDict(entries)))
    quantized, _ = replace_layers(flax.core.unfreeze(variables["params"]), records)
    return QuantizedModule(
        int8, {**variables, "params": quantized}, ModuleReport(reports, dict(sorted(kept.items())))
    )


@dataclass(frozen=True)
class _Call:
    """What a module is called with once; two are equal that one traced program serves.

    Attributes:
      structure: of positional and keyword arguments.
      static: all that is no array, in the order of the leaves.
      shapes: of the arrays.
      arrays: in the order of the leaves.
    """

    structure: Any
    static: tuple[Any, ...]
    shapes: tuple[tuple[tuple[int, ...], Any], ...]
    arrays: Sequence[Array | np.ndarray] = field(compare=False)

    def arguments(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other arrays in the place of these."""
        left, given = iter(arrays), iter(self.static)
        leaves = [next(left) if value is _ARRAY else value for value in given]
        return jax.tree.unflatten(self.structure, leaves)


class _Array:
    """Marks the place of an array."""


_ARRAY = _Array()


def _call_of(batch: Any) -> _Call:
    if isinstance(batch, tuple):
        given: Any = batch, {}
    elif isinstance(batch, Mapping):
        given = (), dict(batch)
    else:
        given = (batch,), {}
    leaves, structure = jax.tree.flatten(given)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
    static = tuple(_ARRAY if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
    shapes = tuple((array.shape, array.dtype) for array in arrays)
    return _Call(structure, static, shapes, arrays)


class _Run(NamedTuple):
    """A module, its variables, and the options of each call."""

    module: nn.Module
    variables: Mapping[str, Any]
    options: dict[str, Any]


def _check(module: nn.Module, variables: Any, batches: Any) -> Params:
    """The module's parameters, without what stands around them."""
    if not isinstance(module, nn.Module):
        raise InputError(
            f"a flax.linen module is needed, not a {type(module).__name__}; from_nnx makes one of "
            f"a module of flax.nnx"
        )
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise InputError('variables: a dict of collections is needed, with "params" among them')
    if isinstance(batches, jax.Array | np.ndarray | Mapping | str):
        raise InputError("batches: a list is needed; a single batch is a list of one")
    if not isinstance(batches, Sized):
        raise InputError(
            f"batches: a list is needed, not a {type(batches).__name__}; list(...) makes one of "
            f"what can be iterated over"
        )
    if not len(batches):
        raise InputError("there are no batches to calibrate with; one at least is needed")
    params = meta.unbox(flax.core.unfreeze(variables["params"]))
    for path, value in flax.traverse_util.flatten_dict(params, sep="/").items():
        if path.rpartition("/")[2] == "kernel" and jnp.issubdtype(value.dtype, jnp.integer):
            raise InputError(f"{path}: it is quantized already; float weights are needed")
    return params


def _joined(layers: Traced, found: Traced) -> Traced:
    """Layers of several calls, with the shapes of the first and what all of them read."""
    begin = 1 + max((n for layer in layers.values() for n in layer.source), default=-1)
    joined = dict(layers)
    for path, layer in found.items():
        more = tuple(begin + number for number in layer.source)
        known = layers.get(path, replace(layer, source=()))
        joined[path] = replace(known, source=known.source + more)
    return joined


def _survey(run: _Run, call: _Call, number: int) -> tuple[Traced, dict[str, str]]:
    """The layers a call would quantize by path, and why others stay float; nothing is computed.

    Raises:
      InputError: the module cannot be called so.
    """
    refused: dict[str, str] = {}

    def trace(variables: Any, arrays: Sequence[Array]) -> Traced:
        level = get_opaque_trace_state(convention="flax")
        flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")

        def select(layer: nn.Module, x: Any) -> bool:
            path = "/".join(layer.path)
            weights = flat.get(leaf(path, "kernel"), flat.get(leaf(path, "embedding")))
            if weights is None:
                # Of a module with other variables, applied inside this one.
                return False
            if path not in refused and (reason := _why_float(layer, x, weights, level)):
                refused[path] = reason
            if path not in refused and not math.prod(jnp.shape(x)):
                raise InputError(f"{path}: its input is empty, of shape {jnp.shape(x)}")
            return path not in refused

        arguments, keywords = call.arguments(arrays)
        options = {**run.options, **keywords}
        with tracing(select) as found:
            places = draw_places(jax.random.key(0), 1)
            observe(run.module, variables, *arguments, places=places, select=select, **options)
        return found

    found: list[Traced] = []
    try:
        jax.eval_shape(lambda *given: found.append(trace(*given)), run.variables, call.arrays)
    except InputError as error:
        raise InputError(f"batch {number + 1}: {error}") from error
    except Exception as error:  # What a module raises that nobody here wrote.
        raise InputError(
            f"batch {number + 1}: the module cannot be called with it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return found[0], refused


def _why_float(layer: nn.Module, x: Any, weights: Any, level: Any) -> str | None:
    """Why a layer stays float, as `linen.why_float`, or for where it stands.

    Args:
      layer: bound, and called.
      x: its input.
      weights: what the module's variables have at its path, maybe boxed.
      level: of the trace in which the module is called.
    """
    if reason := why_float(layer, jnp.shape(x)):
        return reason
    if not is_linens_own(layer):
        return f"a {type(layer).__name__} has a call of its own, which is not linen's"
    given = layer.get_variable("params", "kernel")
    kernel = meta.unbox(given)
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(kernel):
        return "it multiplies complex numbers"
    if get_opaque_trace_state(convention="flax") != layer.scope.trace_level:
        return "it is called inside a transformation of jax that flax does not know of"
    if not layer.is_mutable_collection(STATISTICS) or kernel.shape != meta.unbox(weights).shape:
        return (
            "it is called inside nn.scan, nn.vmap, nn.WeightNorm or the like, which hide its input"
        )
    if layer.scope.trace_level == level and given is not weights:
        return "its weights are computed from its parameters (nn.map_variables)"
    return None


def _decide(policy: str | Policy, layers: Traced, kept: Mapping[str, str]) -> dict[str, LayerSpec]:
    """How the layers are quantized.

    Raises:
      InputError: the policy does not fit them, or names one that cannot be int8.
    """
    if isinstance(policy, str):
        policy = module_policy(policy)
        if not layers:
            raise InputError(f"no layer of the module can be int8{_listed(kept)}")
        return decide(policy, list(layers.values()))
    others = [TracedLayer(path, (), (), (), ()) for path in kept]
    specs = match(policy, [*layers.values(), *others])
    if demanded := {path: reason for path, reason in kept.items() if path in specs}:
        raise InputError(
            f"policy {policy.name!r} quantizes layers that cannot be int8; rules without a spec, "
            f"before the others, keep them float{_listed(demanded)}"
        )
    for path, spec in specs.items():
        if spec.propagate:
            raise InputError(
                f"policy {policy.name!r}: {path}: propagate needs a second observation, of the "
                f"quantized module, and a module is observed once; leave it out"
            )
        if spec.method == "htdq" or spec.ranges == "step":
            raise InputError(
                f"policy {policy.name!r}: {path}: htdq and ranges = 'step' are about a "
                f"sampler's steps, which a module has none of"
            )
    return specs


def _listed(reasons: Mapping[str, str]) -> str:
    return "".join(f"\n  {path or '(the module itself)'}: {why}" for path, why in reasons.items())


def _collect(
    run: _Run, calls: Sequence[_Call], specs: Mapping[str, LayerSpec], rows: int, seed: int
) -> dict[str, Statistics]:
    """The statistics of the layers' inputs over all calls, by path.

    Raises:
      InputError: an input is not finite.
    """
    key = jax.random.key(seed)
    programs: list[tuple[_Call, Callable[..., dict[str, Statistics]]]] = []
    parts: dict[str, list[Statistics]] = {path: [] for path in specs}
    for number, call in enumerate(calls):
        program = next((made for known, made in programs if known == call), None)
        if program is None:
            program = _program(run, call, specs)
            programs.append((call, program))
        places = draw_places(jax.random.fold_in(key, number), math.ceil(rows / len(calls)))
        found = program(run.variables, call.arrays, places)
        # In the order of the calls: the first that is not finite is where it began.
        for path in filter(found.__contains__, parts):
            if not bool(found[path].finite):
                raise InputError(f"{path}: its input is not finite in batch {number + 1}")
            parts[path].append(thinned(found[path], number, len(calls), rows))
    return {path: join(seen) for path, seen in parts.items()}


def _program(
    run: _Run, call: _Call, specs: Mapping[str, LayerSpec]
) -> Callable[..., dict[str, Statistics]]:
    """Observes the layers of `specs` in a call, compiled."""

    @jax.jit
    def program(variables: Any, arrays: Sequence[Array], places: Array) -> dict[str, Statistics]:
        arguments, keywords = call.arguments(arrays)
        options = {**run.options, **keywords}
        _, found = observe(
            run.module,
            variables,
            *arguments,
            places=places,
            select=lambda layer, _: "/".join(layer.path) in specs,
            **options,
        )
        return found

    return program
