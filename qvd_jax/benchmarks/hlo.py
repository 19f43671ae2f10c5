"""What a compiler's text of a program says: which operations run, how often, how long by estimate.

The text is that of XLA's optimized HLO (`jax.stages.Compiled.as_text()`). A TPU's compiler writes
an estimate of cycles beside each operation, but for kernels written by hand.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# The type may be a tuple and has parentheses in its layout, but no word right before one.
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_REFERENCE = re.compile(r"%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FUSION_KIND = re.compile(r'"kind":"(__\w+)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")

_PRODUCTS = ("dot", "convolution")
_LIBRARY_PRODUCT = re.compile(r"__cublas|__cudnn\$conv|__cudnn\$fmha")
_MOVES = {
    "bitcast",
    "broadcast",
    "concatenate",
    "constant",
    "copy",
    "copy-start",
    "dynamic-slice",
    "dynamic-update-slice",
    "get-tuple-element",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "slice",
    "slice-start",
    "transpose",
    "tuple",
}
"""Operations that give what they are given, in other places."""
_GROUPS = re.compile(r"replica_groups=\{(\{.*?\})\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
_SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda chips: chips - 1,
    "all-reduce": lambda chips: 2 * (chips - 1) / chips,
    "all-to-all": lambda chips: (chips - 1) / chips,
    "collective-permute": lambda chips: 1,
    "reduce-scatter": lambda chips: (chips - 1) / chips,
}
"""By operation, how much of what it is given each of some chips sends, in a ring or directly."""
_NO_KERNEL = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')


@dataclass(frozen=True)
class Product:
    """A dot or a convolution.

    Attributes:
      operands: the types of elements of both operands, such as `("s8", "s8")`.
      op_name: where in the traced function it comes from.
    """

    operands: tuple[str, str]
    op_name: str


@dataclass(frozen=True)
class Collective:
    """What chips do together.

    Attributes:
      kind: the operation's name.
      bytes: that each chip sends at least.
      groups: the numbers of the chips that do it with each other.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Operation:
    """Something the program runs as a whole: an instruction, or several the compiler fused.

    Attributes:
      name: the instruction's.
      opcode: the instruction's.
      result: the type of the result, with its layout.
      op_name: where in the traced function it comes from; of a fusion, its last instruction. Empty
        where the compiler knows of no such place, or of several results.
      inner_op_names: the same of what is fused.
      runs: how often it runs in one call of the program.
      cycles: the compiler's estimate of one run; None where there is none.
      products: the dots and convolutions in it.
      moves_only: whether it only copies, transposes, slices and so on.
      target: of a custom call; of a fusion that the compiler gave a kernel of its own, its kind.
      operands: the types of what it is given.
      bytes: of what it is given and gives that is in the chip's main memory, each array once.
      collective: what it does with other chips, if it does.
    """

    name: str
    opcode: str
    result: str
    op_name: str
    inner_op_names: tuple[str, ...]
    runs: int
    cycles: int | None
    products: tuple[Product, ...]
    moves_only: bool
    target: str | None
    operands: tuple[str, ...]
    bytes: int
    collective: Collective | None


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of what it is given."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @functools.cached_property
    def op_name(self) -> str:
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """The computation an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


_Computations = Mapping[str, Mapping[str, _Instruction]]


def operations(text: str) -> list[Operation]:
    """What one call of a program runs.

    Loops are followed as often as they run, once where the text does not tell; of alternatives the
    one with the most cycles.

    Args:
      text: of the optimized program.

    Returns:
      The operations in the order of the text. Parameters, constants and the like do nothing and are
      left out.
    """
    computations, entry = _read(text)
    return list(_walk(computations, entry, 1))


def _read(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            _, name, result, opcode, rest = found.groups()
            current[name] = _Instruction(name, opcode, result, *_split_arguments(rest))
    if not entry:
        raise ValueError("the text is no HLO program: it has no ENTRY")
    return computations, entry


def _split_arguments(rest: str) -> tuple[str, str]:
    """What stands before the closing parenthesis, and what follows it."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _walk(computations: _Computations, name: str, runs: int) -> Iterator[Operation]:
    for instruction in computations[name].values():
        match instruction.opcode:
            case "while":
                body = instruction.called("body")
                assert body is not None
                yield from _walk(computations, body, runs * _trips(computations, instruction))
            case "call" | "async-start":
                called = instruction.called("to_apply") or instruction.called("calls")
                if called:
                    yield from _walk(computations, called, runs)
            case "conditional":
                branches = [
                    list(_walk(computations, branch, runs)) for branch in _branches(instruction)
                ]
                yield from max(branches, key=total_cycles, default=[])
            case "parameter" | "constant" | "tuple" | "get-tuple-element" | "bitcast":
                pass
            case opcode if opcode.endswith("-done"):
                pass
            case _:
                yield _operation(computations, name, instruction, runs)


def types(*shaped: str) -> tuple[str, ...]:
    """The types of arrays, without their layouts, such as `bf16[8,128]`."""
    return tuple(
        f"{element}[{sizes}]" for text in shaped for element, sizes, _ in _ARRAY.findall(text)
    )


def arrays(shaped: str, *, on_chip: bool = False) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Elements, shapes and bytes of a type's arrays, of those in the chip's main memory.

    What a TPU keeps in a memory on the chip has the number of that in its layout.

    Args:
      shaped: the type.
      on_chip: whether those in memories on the chip are given, too.
    """
    for element, sizes, layout in _ARRAY.findall(shaped):
        if on_chip or "S(" not in layout:
            shape, width = _sizes(sizes), re.match(r"[a-z]+(\d+)", element)
            yield element, shape, (int(width[1]) if width else 8) * math.prod(shape) // 8


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def total_cycles(found: list[Operation]) -> int:
    """The estimates of all runs of operations, where there are any."""
    return sum(operation.runs * (operation.cycles or 0) for operation in found)


def _branches(instruction: _Instruction) -> list[str]:
    if several := _BRANCHES.search(instruction.attributes):
        return _REFERENCE.findall(several[1])
    both = (instruction.called(f"{name}_computation") for name in ("true", "false"))
    return [name for name in both if name]


def _trips(computations: _Computations, loop: _Instruction) -> int:
    """How often a loop runs, 1 where nothing tells."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = loop.called("condition")
    assert condition is not None
    limits = [
        int(line.arguments)
        for line in computations[condition].values()
        if line.opcode == "constant" and line.arguments.isdecimal()
    ]
    return limits[0] if len(limits) == 1 else 1


def _operation(
    computations: _Computations, place: str, instruction: _Instruction, runs: int
) -> Operation:
    fused = list(_fused(computations, place, instruction))
    inner = tuple(name for _, line in fused if (name := line.op_name))
    cycles = _CYCLES.search(instruction.attributes)
    target = _TARGET.search(instruction.attributes) or _FUSION_KIND.search(instruction.attributes)
    products = tuple(
        Product(_element_types(computations[where], line), line.op_name)
        for where, line in fused
        if line.opcode in _PRODUCTS
        or (line.opcode == "custom-call" and target and _LIBRARY_PRODUCT.match(target[1]))
    )
    moves_only = all(
        line.opcode in _MOVES or _NO_KERNEL.search(line.attributes) for _, line in fused
    )
    given = {name: computations[place][name].result for name in instruction.operands}
    types = (instruction.result, *given.values())
    return Operation(
        instruction.name,
        instruction.opcode,
        instruction.result,
        instruction.op_name,
        inner,
        runs,
        int(cycles[1]) if cycles else None,
        products,
        moves_only,
        target[1] if target and not moves_only else None,
        tuple(given[name] for name in instruction.operands),
        sum(size for shaped in types for _, _, size in arrays(shaped)),
        next(filter(None, (_collective(computations[where], line) for where, line in fused)), None),
    )


def _collective(lines: Mapping[str, _Instruction], instruction: _Instruction) -> Collective | None:
    """What an instruction does with other chips."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT:
        return None
    given = sum(
        size
        for name in instruction.operands
        for _, _, size in arrays(lines[name].result, on_chip=True)
    )
    groups = _groups(instruction.attributes)
    return Collective(kind, math.ceil(_SENT[kind](len(groups[0])) * given), groups)


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    if pairs := _PAIRS.search(attributes):
        return tuple(tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1]))
    if listed := _GROUPS.search(attributes):
        return tuple(_sizes(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = _COUNTED_GROUPS.search(attributes)
    if counted is None:
        raise ValueError(f"no groups of chips in {attributes[:200]}")
    shape, axes, order = (_sizes(text or "") for text in counted.groups())
    numbers = np.arange(math.prod(axes)).reshape(axes)
    rows = numbers.transpose(order or range(len(axes))).reshape(shape)
    return tuple(map(tuple, rows.tolist()))


def _fused(
    computations: _Computations, place: str, instruction: _Instruction
) -> Iterator[tuple[str, _Instruction]]:
    """An instruction, or those a fusion consists of, with the computations they stand in."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else None
    if called is None:
        yield place, instruction
        return
    for line in computations[called].values():
        yield from _fused(computations, called, line)


def _element_types(lines: Mapping[str, _Instruction], product: _Instruction) -> tuple[str, str]:
    (first, *_), (second, *_) = (
        _ARRAY.findall(lines[name].result) for name in product.operands[:2]
    )
    return first[0], second[0]
