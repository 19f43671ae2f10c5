"""What a traced function needs of an accelerator's memory, estimated before it is compiled."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

from qvd_jax.benchmarks.roof import alternatives
from qvd_jax.memory import tree_bytes

_VIEWS = {
    "broadcast_in_dim",
    "convert_element_type",
    "iota",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "transpose",
}
"""What a compiler repeats for every reader rather than to store it."""

_STORED = {
    "concatenate",
    "conv_general_dilated",
    "dot_general",
    "pallas_call",
    "reduce_max",
    "reduce_sum",
    "scan",
    "while",
}
"""What a compiler does not fuse with what reads it."""
_PRODUCTS = {"conv_general_dilated", "dot_general"}


@dataclass(eq=False)
class _Value:
    """An array; one is no other's equal.

    Attributes:
      bytes: its size.
      sources: the stored arrays that whoever reads it reads; itself where it is stored.
    """

    bytes: int
    sources: set["_Value"] = field(default_factory=set)


@dataclass(eq=False)
class _Step:
    """An operation.

    Attributes:
      name: of the primitive.
      operands: what it reads.
      results: what it gives.
      inside: bytes it needs while it runs.
    """

    name: str
    operands: list[_Value]
    results: list[_Value]
    inside: int


def fused_peak_bytes(jaxpr: core.Jaxpr, platform: str) -> int:
    """The most bytes alive at once while a function runs, its arguments included.

    Counted in the order of the traced function, as if the compiler stored what products, reductions
    and loops give and what several of them read, and fused all else with its reader.

    Args:
      jaxpr: of the traced function.
      platform: JAX's name of the backend; of alternatives by platform its own counts.
    """
    given = {var: _argument(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    steps: list[_Step] = []
    results = _flatten(jaxpr, dict(given), platform, steps)
    _store(steps, results)

    last_read = {
        source: number
        for number, step in enumerate(steps)
        for value in step.operands
        for source in value.sources
    }
    kept = {source for value in (*given.values(), *results) for source in value.sources}
    alive = peak = sum(value.bytes for value in given.values())
    for number, step in enumerate(steps):
        alive += sum(value.bytes for value in step.results if value in value.sources)
        peak = max(peak, alive + step.inside)
        read = {source for value in step.operands for source in value.sources} - kept
        alive -= sum(source.bytes for source in read if last_read[source] == number)
    return peak


def _flatten(
    jaxpr: core.Jaxpr, known: dict[core.Var, _Value], platform: str, steps: list[_Step]
) -> list[_Value]:
    """Adds a function's operations to `steps`, those of functions it calls among them.

    Returns:
      What the function gives.
    """
    for equation in jaxpr.eqns:
        operands = _look_up(equation.invars, known)
        inner = alternatives(equation, platform)
        if len(inner) == 1 and equation.primitive.name not in _STORED:
            (called,) = inner
            # The number of the alternative is no argument of it.
            own = dict(zip(called.invars, operands[-len(called.invars) :], strict=True))
            own |= {var: _argument(var) for var in called.constvars}
            results = _flatten(called, own, platform, steps)
        elif equation.primitive.name == "optimization_barrier":
            results = operands
        else:
            results = [_Value(_bytes(var)) for var in equation.outvars]
            inside = max((_inside(one, platform) for one in inner), default=0)
            steps.append(_Step(equation.primitive.name, operands, results, inside))
        known |= dict(zip(equation.outvars, results, strict=True))
    return _look_up(jaxpr.outvars, known)


def _look_up(
    variables: list[core.Var | core.Literal], known: dict[core.Var, _Value]
) -> list[_Value]:
    return [known[var] if isinstance(var, core.Var) else _Value(0) for var in variables]


def _inside(jaxpr: core.Jaxpr, platform: str) -> int:
    return fused_peak_bytes(jaxpr, platform) - sum(map(_bytes, jaxpr.invars))


def _store(steps: list[_Step], results: list[_Value]) -> None:
    """Decides what is stored."""
    sinks: defaultdict[_Value, set[_Step | None]] = defaultdict(set)
    readers: defaultdict[_Value, list[_Step | None]] = defaultdict(list)
    for value in results:
        sinks[value].add(None)
        readers[value].append(None)
    stored = set()
    for step in reversed(steps):
        reading = set().union(*(sinks[value] for value in step.results))
        given = any(value in results for value in step.results)
        several = len(reading) > 1 and step.name not in _VIEWS
        if given or several or step.name in _STORED:
            stored.add(step)
            reading = {step}
        for value in step.operands:
            sinks[value] |= reading
            readers[value].append(step)
    ends: set[_Step] = set()
    for step in reversed(steps):
        # What ends behind two products ends but one of them.
        if step.name in _PRODUCTS and (last := _last_fused(step, readers)) not in ends:
            ends.add(last)
            stored.discard(step)
            stored.add(last)
    for step in steps:
        sources = set().union(*(value.sources for value in step.operands))
        for value in step.results:
            value.sources = {value} if step in stored else sources


def _last_fused(step: _Step, readers: Mapping[_Value, list[_Step | None]]) -> _Step:
    """The last of the operations behind a product that a compiler computes before it stores it."""
    (result,) = step.results
    following = readers[result][0] if len(readers[result]) == 1 else None
    if following is None or following.name in _STORED or len(following.results) > 1:
        return step
    if following.results[0].bytes > result.bytes:
        return step
    return _last_fused(following, readers)


def _argument(var: core.Var) -> _Value:
    value = _Value(_bytes(var))
    value.sources = {value}
    return value


def _bytes(var: Any) -> int:
    return tree_bytes([var.aval]) if hasattr(var.aval, "dtype") else 0
