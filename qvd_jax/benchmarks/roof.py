"""What a traced function must do at least: the operations of its products, and read and write."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

from qvd_jax.benchmarks.chips import Chip
from qvd_jax.memory import tree_bytes

Types = tuple[str, ...]
"""Of arrays, as the compiler writes them: `bf16[8,128]`."""

Key = tuple[str, Types, Types]
"""What the calls of one kernel share: its name, and the types of its operands and results."""


_TYPES = {
    "int8": "s8",
    "int4": "s4",
    "int2": "s2",
    "int32": "s32",
    "bfloat16": "bf16",
    "float32": "f32",
}
"""What XLA calls types."""


class Kernel(NamedTuple):
    """A kernel written by hand, in Pallas.

    Attributes:
      name: its name; those of other bodies have other names.
      operands: the types of what it is given.
      results: the types of what it gives.
      steps: of its grid.
      operations: of its products in one run, as in `product_operations`.
      products: how many there are, by their operands' types as the compiler writes them.
      call: of the traced function.
    """

    name: str
    operands: Types
    results: Types
    steps: int
    operations: Counter[str]
    products: Counter[str]
    call: core.JaxprEqn

    @property
    def key(self) -> Key:
        """As `Key` says."""
        return self.name, self.operands, self.results


def product_operations(jaxpr: core.Jaxpr, platform: str) -> Counter[str]:
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
            sizes = _aval(equation.invars[0]).shape
            shared = math.prod(sizes[axis] for axis in contracted)
            found[_type(equation)] += 2 * shared * _size(equation)
        elif name == "conv_general_dilated":
            kernel = _aval(equation.invars[1]).shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            found[_type(equation)] += 2 * math.prod(kernel) // outputs * _size(equation)
        else:
            counts = [
                product_operations(inner, platform) for inner in alternatives(equation, platform)
            ]
            if name == "cond":
                counts = [max(counts, key=Counter.total)]
            for kind, count in sum(counts, Counter()).items():
                found[kind] += _times(equation) * count
    return found


def kernels(jaxpr: core.Jaxpr, platform: str) -> Iterator[Kernel]:
    """The kernels written by hand that a traced function may call on a platform."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            steps = _times(equation)
            one_step = product_operations(equation.params["jaxpr"], platform)
            yield Kernel(
                equation.params["name"],
                tuple(map(_typed, equation.invars)),
                tuple(map(_typed, equation.outvars)),
                steps,
                Counter({kind: steps * count for kind, count in one_step.items()}),
                Counter(_products(equation.params["jaxpr"], platform)),
                equation,
            )
        else:
            for inner in alternatives(equation, platform):
                yield from kernels(inner, platform)


def _products(jaxpr: core.Jaxpr, platform: str) -> Iterator[str]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield " x ".join(map(_element, equation.invars[:2]))
        else:
            for inner in alternatives(equation, platform):
                yield from _products(inner, platform)


def handed_bytes(jaxpr: core.Jaxpr) -> int:
    """Of the arguments that are used and of the results."""
    used = {id(var) for equation in jaxpr.eqns for var in equation.invars}
    arguments = [var.aval for var in jaxpr.invars if id(var) in used]
    return tree_bytes(arguments) + tree_bytes([var.aval for var in jaxpr.outvars])


def seconds(counts: Counter[str], handed: int, chip: Chip) -> float:
    """The least a chip could take at its published peaks.

    Args:
      counts: of `product_operations`.
      handed: of `handed_bytes`.
      chip: with the peaks.
    """
    int8 = counts["int8"]
    computing = int8 / chip.int8_operations + (counts.total() - int8) / chip.float_operations
    return max(computing, handed / chip.bandwidth)


def alternatives(equation: core.JaxprEqn, platform: str) -> list[core.Jaxpr]:
    """What an operation is made of; of alternatives by platform that of `platform`."""
    inner = core.jaxprs_in_params(equation.params)
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        return list(inner)
    # None is the alternative for all platforms that are not named.
    named = [some is not None and platform in some for some in platforms]
    return [list(inner)[named.index(True) if any(named) else platforms.index(None)]]


def _times(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return int(params["length"])
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1


def _element(var: core.Var | core.Literal) -> str:
    name = str(_aval(var).dtype)
    return _TYPES.get(name, name)


def _typed(var: core.Var | core.Literal) -> str:
    return f"{_element(var)}[{','.join(map(str, _aval(var).shape))}]"


def _type(equation: core.JaxprEqn) -> str:
    return str(_aval(equation.invars[0]).dtype)


def _size(equation: core.JaxprEqn) -> int:
    return math.prod(_aval(equation.outvars[0]).shape)


def _aval(var: core.Var | core.Literal) -> Any:
    return var.aval
