"""What a traced function must do at least: the operations of its products, and read and write."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

from qvd_jax.benchmarks.chips import Chip
from qvd_jax.memory import tree_bytes


def operations(jaxpr: core.Jaxpr, platform: str) -> Counter[str]:
    """Multiplications and additions of the dots and convolutions of one call, by operands' type.

    Of alternatives by platform the one of `platform` counts, of other ones the longest; a loop of
    unknown length counts once.

    Args:
      jaxpr: of the traced function; kernels written by hand are followed, too.
      platform: JAX's name of the backend.

    Returns:
      By the name of the type of the first operand: "int8", "bfloat16" and so on.
    """
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shared = math.prod(_aval(equation.invars[0]).shape[axis] for axis in contracted)
            found[_type(equation)] += 2 * shared * _size(equation)
        elif name == "conv_general_dilated":
            kernel = _aval(equation.invars[1]).shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            found[_type(equation)] += 2 * math.prod(kernel) // outputs * _size(equation)
        elif name == "cond":
            found += _of_branches(params, platform)
        else:
            times = _times(name, params)
            for inner in core.jaxprs_in_params(params):
                for kind, count in operations(inner, platform).items():
                    found[kind] += times * count
    return found


class Kernel(NamedTuple):
    """A kernel written by hand.

    Attributes:
      name: its name, if it has one.
      results: the shapes of its results.
      steps: of its grid.
      operations: of its products in one run, as in `operations`.
    """

    name: str | None
    results: tuple[tuple[int, ...], ...]
    steps: int
    operations: Counter[str]


def kernels(jaxpr: core.Jaxpr, platform: str) -> Iterator[Kernel]:
    """The kernels written by hand that a traced function calls."""
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "pallas_call":
            steps = _times("pallas_call", params)
            counts = Counter(
                {
                    kind: steps * count
                    for kind, count in operations(params["jaxpr"], platform).items()
                }
            )
            results = tuple(_aval(var).shape for var in equation.outvars)
            yield Kernel(params["name"], results, steps, counts)
        else:
            for inner in core.jaxprs_in_params(params):
                yield from kernels(inner, platform)


def handed_bytes(jaxpr: core.Jaxpr) -> int:
    """Of the arguments that are used and of the results."""
    used = {id(var) for equation in jaxpr.eqns for var in equation.invars}
    arguments = [var.aval for var in jaxpr.invars if id(var) in used]
    return tree_bytes(arguments) + tree_bytes([var.aval for var in jaxpr.outvars])


def seconds(counts: Counter[str], handed: int, chip: Chip) -> float:
    """The least a chip could take at its published peaks.

    Args:
      counts: of `operations`.
      handed: of `handed_bytes`.
      chip: with the peaks.
    """
    int8 = counts["int8"]
    computing = int8 / chip.int8_operations + (counts.total() - int8) / chip.float_operations
    return max(computing, handed / chip.bandwidth)


def _of_branches(params: dict[str, Any], platform: str) -> Counter[str]:
    counts = [operations(branch.jaxpr, platform) for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is None:
        return max(counts, key=Counter.total)
    # None is the alternative for all platforms that are not named.
    named = [some is not None and platform in some for some in platforms]
    return counts[named.index(True) if any(named) else platforms.index(None)]


def _times(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return int(params["length"])
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1


def _type(equation: core.JaxprEqn) -> str:
    return str(_aval(equation.invars[0]).dtype)


def _size(equation: core.JaxprEqn) -> int:
    return math.prod(_aval(equation.outvars[0]).shape)


def _aval(var: core.Var | core.Literal) -> Any:
    return var.aval
