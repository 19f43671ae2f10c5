"""What a chip's own compiler makes of our networks, on a machine that has no such chip.

A TPU's compiler writes an estimate of cycles beside each operation: its model of the chip, not a
measurement. It estimates nothing of kernels written by hand. For those stand the bundles it
schedules for one step of the grid, times the steps: waits for memory are not in it, and an inner
loop counts once. Where their products or their bytes take longer at the chip's peaks, these stand.
Nor does it estimate what chips do together: what they send stands, at the peak of all their links,
and as if nothing were computed meanwhile.
CUDA's compiler estimates no time at all.
"""

import contextlib
import functools
import itertools
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import markdown
from qvd_jax.benchmarks import compilers, footprint, hlo, parts, profile, roof
from qvd_jax.benchmarks.chips import Chip
from qvd_jax.benchmarks.parts import Part
from qvd_jax.benchmarks.rounds import Variant, in_fresh_process
from qvd_jax.benchmarks.unet import FLOAT_MODE, Case
from qvd_jax.errors import InputError, first_line
from qvd_jax.memory import tree_bytes
from qvd_jax.meshes import FRAME, MeshConfig, Work
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import decide, read_policy
from qvd_jax.quant.statistics import trace_layers

COPIES, COLLECTIVES = "copies", "collectives"
KINDS = (
    *(kind for kind in profile.KINDS if kind != profile.PATCHES),
    COPIES,
    COLLECTIVES,
    profile.OTHER,
)
"""Kinds of work; gathering patches is among the copies, collectives are what chips do together."""

_HANDWRITTEN = "tpu_custom_call"
_LARGEST_SHOWN = 5
_OUT_OF_MEMORY = re.compile(r"Ran out of memory.*?\(([\d.]+)G\) exceeds")

Program = tuple[str, Variant]
"""The name of a part, and the layers it is made of."""


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
      chip: one, or each of several.
      mesh: how the work divides over them.
    """

    chip: Chip
    mesh: MeshConfig = MeshConfig()

    def check(self, case: Case) -> None:
        """Raises `InputError` if the work does not divide so."""
        work = Work(case.batch, case.frames, case.positions)
        work.check(self.mesh, self.chip.count)
        rows = self.mesh.data * self.mesh.guidance
        if case.batch % rows:
            raise InputError(
                f"mesh {self.mesh}: {case.batch} videos, guidance halves counted, do not divide "
                f"into {rows} parts"
            )


Bundles = dict[roof.Key, int]
"""Of kernels written by hand, how many bundles of instructions one step of the grid is."""


def compile_programs(
    case: Case,
    target: Target,
    names: Sequence[str],
    variants: Sequence[Variant],
) -> list[dict[str, Any]]:
    """Compiles parts, each in every variant.

    Args:
      case: the UNet and its inputs.
      target: what for.
      names: of parts, as in `parts.names`.
      variants: ours; the VAE, which no policy quantizes, is compiled in the float ones.

    Returns:
      For each program its part, mode and dtype, and what `describe` says of it.

    Raises:
      InputError: the compiler cannot be had, or the chip's memory is too small.
    """
    chip = target.chip
    target.check(case)
    compilers.check_installed(chip)
    programs = [
        (name, variant)
        for name in names
        for variant in variants
        if name != parts.VAE or variant.mode == FLOAT_MODE
    ]
    with tempfile.TemporaryDirectory() as dump, compilers.settings(chip, dump):
        bundles = in_fresh_process("the estimate", prepare, case, target, programs, Path(dump))
    with compilers.settings(chip):
        return in_fresh_process("the compiler", compile_each, case, target, programs, bundles)


def prepare(case: Case, target: Target, programs: Sequence[Program], dump: Path) -> Bundles:
    """Checks that all can be compiled, and compiles the kernels written by hand alone.

    Alone, for to have a whole program's schedules written takes as long as to compile it twice.

    Args:
      case: the UNet and its inputs.
      target: what for.
      programs: the parts and variants.
      dump: the folder for the kernels' schedules.

    Raises:
      InputError: the compiler cannot be had, or the chip's memory is too small.
    """
    chip, mesh = target.chip, compilers.mesh(*target)
    bundles: Bundles = {}
    for program in programs:
        function, arguments, _ = _function(case, mesh, program)
        jaxpr = _of_one_chip(jax.make_jaxpr(function)(*arguments).jaxpr)
        _check_fits(
            case, chip, program, footprint.fused_peak_bytes(jaxpr, chip.platform), arguments
        )
        found = roof.kernels(jaxpr, chip.platform) if chip.clock is not None else ()
        for kernel in found:
            if kernel.key not in bundles:
                with _refusals(case, chip, program, arguments):
                    bundles[kernel.key] = compilers.bundles(chip, kernel.call, dump)
    return bundles


def compile_each(
    case: Case, target: Target, programs: Sequence[Program], bundles: Bundles
) -> list[dict[str, Any]]:
    """Compiles one program after the other; see `compile_programs`."""
    results = []
    with tqdm.tqdm(programs, desc="compiling", unit="program") as bar:
        for program in bar:
            bar.set_postfix_str(f"{program[0]} {program[1].mode} {program[1].dtype}")
            results.append(compile_program(case, target, program, bundles))
    return results


def compile_program(
    case: Case, target: Target, program: Program, bundles: Bundles
) -> dict[str, Any]:
    """Compiles one part in one variant; see `compile_programs` and `describe`."""
    (name, variant), chip = program, target.chip
    mesh = compilers.mesh(*target)
    function, arguments, places = _function(case, mesh, program)
    with _refusals(case, chip, program, arguments):
        found = describe(chip, mesh, function, arguments, places, bundles)
    _check_fits(case, chip, program, found["peak_memory_bytes"], arguments)
    return {"part": name, "mode": variant.mode, "dtype": variant.dtype, **found}


@contextlib.contextmanager
def _refusals(
    case: Case, chip: Chip, program: Program, arguments: tuple[Any, ...]
) -> Iterator[None]:
    """Says in one line what the compiler has against a program."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if temporaries := _OUT_OF_MEMORY.search(str(error)):
            peak = tree_bytes(arguments) + int(float(temporaries[1]) * 2**30)
            _check_fits(case, chip, program, peak, arguments)
        name, variant = program
        raise InputError(f"{name} {variant.mode} for a {chip.name}: {first_line(error)}") from error


def _function(
    case: Case, mesh: Mesh, program: Program
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[PartitionSpec, ...]]:
    """What is compiled, the shapes it is called with, parameters first, and how these lie."""
    name, variant = program
    part = parts.find(name, case, jnp.dtype(variant.dtype))
    layers = _layer_set(part, variant)
    init = functools.partial(part.network(layers).init, method=part.method)
    params = jax.eval_shape(init, jax.random.key(0), *part.inputs)
    places = PartitionSpec(), *part.placed
    divides = mesh.shape[FRAME] > 1
    network = part.network(replace(layers, frame_axis=FRAME) if divides else layers)
    function = functools.partial(network.apply, method=part.method)
    if mesh.size > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=places, out_specs=part.placed[0], check_vma=False
        )
    return function, (params, *part.inputs), places


def _of_one_chip(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """What each of several chips runs."""
    (first, *others) = jaxpr.eqns
    is_divided = not others and first.primitive.name == "shard_map"
    return first.params["jaxpr"] if is_divided else jaxpr


def _layer_set(part: Part, variant: Variant) -> LayerSet:
    dtype = jnp.dtype(variant.dtype)
    floating = replace(FLOAT, dtype=dtype, param_dtype=dtype)
    if variant.mode == FLOAT_MODE:
        return floating
    layers = trace_layers(part.network(floating), *part.inputs, method=part.method)
    return layer_set(decide(read_policy(variant.mode), layers), dtype)


def _check_fits(
    case: Case, chip: Chip, program: Program, peak: int, arguments: tuple[Any, ...]
) -> None:
    """Refuses what needs more memory than there is, with the sizes that would fit.

    All but the parameters grows with the positions.
    """
    if peak <= chip.memory:
        return
    name, variant = program
    params = tree_bytes(arguments[0])
    share = max(chip.memory - params, 0) / (peak - params)
    frames = int(share * case.frames)
    side = 8 * int(math.sqrt(share * case.height * case.width))
    side -= side % (8 * case.config.stride)
    fitting = [
        *([f"{frames} frames of that size"] if frames else []),
        *([f"{case.frames} of {side}x{side}"] if side else []),
    ]
    raise InputError(
        f"{name} {variant.mode} {variant.dtype} at {case.batch} x {case.frames} frames of "
        f"{8 * case.height}x{8 * case.width} needs about {peak / 1e9:.1f} GB, a {chip.name} has "
        f"{chip.memory / 1e9:.1f}: about {' or '.join(fitting) or 'nothing'} fits"
    )


def describe(
    chip: Chip,
    mesh: Mesh,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    places: tuple[PartitionSpec, ...],
    bundles: Bundles,
) -> dict[str, Any]:
    """Compiles a function; to be called inside `compilers.settings`, in a process begun there.

    Args:
      chip: what for.
      mesh: of it, or of several.
      function: of arrays.
      arguments: shapes of them.
      places: how they lie on the mesh.
      bundles: of the kernels written by hand that it calls.

    Returns:
      `modelled_ms` of one call, and of each kind of work in it; None where the compiler estimates
      no time. What the kernels written by hand are counted as. The least the chip could take.
      Memory, also without the parameters. How many products, copies and kernels the program has,
      what chips do together, and its largest arrays outside the memory on the chip. How long it
      took to make it. All of several chips is of one of them.
    """
    placed = tuple(NamedSharding(mesh, place) for place in places)
    started = time.perf_counter()
    traced = jax.jit(function, in_shardings=placed).trace(*arguments)
    lowered = traced.lower()
    lowering, busy = time.perf_counter() - started, time.process_time()
    program = lowered.compile(compilers.options(chip))
    compiling, busy = time.perf_counter() - started - lowering, time.process_time() - busy
    found = hlo.operations(program.as_text() or "")
    jaxpr = _of_one_chip(traced.jaxpr.jaxpr)
    counts, handed = roof.product_operations(jaxpr, chip.platform), roof.handed_bytes(jaxpr)
    stats = program.memory_analysis()
    estimated = [operation for operation in found if operation.cycles is not None]
    modelled = _modelled(chip, mesh, found, list(roof.kernels(jaxpr, chip.platform)), bundles)
    products = Counter(" x ".join(product.operands) for one in found for product in one.products)
    for kernel in modelled["handwritten"]:
        products.update(kernel["products"])
    whole, least = modelled["modelled_ms"], 1e3 * roof.seconds(counts, handed, chip)
    together: dict[str, Any] = {}
    if mesh.size > 1:
        divided = str(MeshConfig(*mesh.shape.values()))
        together = {"mesh": divided, "chips": mesh.size, "collectives": _collectives(found)}
    return {
        **together,
        **modelled,
        "roof_ms": least,
        "modelled_by_roof": None if whole is None else whole / least,
        "operations": dict(counts),
        "handed_bytes": handed,
        "peak_memory_bytes": stats.peak_memory_in_bytes,
        "activations_bytes": stats.peak_memory_in_bytes - tree_bytes(arguments[0]),
        "chip_memory_bytes": chip.memory,
        "program_bytes": stats.generated_code_size_in_bytes or None,
        "products": dict(products),
        "copies": sum(kind(operation) == COPIES for operation in estimated or found),
        "kernels": dict(Counter(one.target for one in found if one.target)),
        "largest_arrays": _largest(found),
        "lowering_s": lowering,
        "compile_s": compiling,
        "compile_cpu_s": busy,
    }


def kind(operation: hlo.Operation) -> str:
    """The kind of work of an operation, one of `KINDS`: of its products, else by its name."""
    if operation.collective is not None:
        return COLLECTIVES
    if operation.moves_only:
        return COPIES
    names = [product.op_name for product in operation.products] or [operation.op_name]
    if names == [""]:
        names = [name for name, _ in Counter(operation.inner_op_names).most_common(1)]
    kinds = [profile.kind(name) for name in names]
    first = next((known for known in profile.KINDS if known in kinds), profile.OTHER)
    return COPIES if first == profile.PATCHES else first


def programs_table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown, a line each."""
    return markdown.table([_row(result) for result in results])


def _row(result: dict[str, Any]) -> dict[str, str]:
    whole, program = result["modelled_ms"], result["program_bytes"]
    row = {"part": result["part"], "layers": f"{result['mode']} {result['dtype']}"}
    if "mesh" in result:
        row["mesh"] = result["mesh"]
    if whole is not None:
        spent = result["modelled_ms_by_kind"]
        row["modelled ms"] = f"{whole:.2f}"
        shown = (name for name in KINDS if name != COLLECTIVES or "mesh" in result)
        row |= {f"modelled {name}": f"{spent[name]:.2f}" for name in shown}
    row["roof ms"] = f"{result['roof_ms']:.2f}"
    if whole is not None:
        row["modelled / roof"] = f"{result['modelled_by_roof']:.1f}"
    peak, memory = result["peak_memory_bytes"] / 1e9, result["chip_memory_bytes"] / 1e9
    row["peak / chip GB"] = f"{peak:.2f} / {memory:.1f}"
    if program is not None:
        row["program GB"] = f"{program / 1e9:.3f}"
    if "mesh" in result:
        row["sent by each chip"] = ", ".join(
            f"{found['count']} {kind}, {found['bytes'] / 1e6:.1f} MB"
            for kind, found in result["collectives"].items()
        )
    return row | {
        "products": _counted(result["products"]),
        "copies": str(result["copies"]),
        "kernels": _counted(result["kernels"]),
        "compile s": f"{result['compile_s']:.0f}",
    }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _collectives(found: Sequence[hlo.Operation]) -> dict[str, dict[str, int]]:
    """By kind, how many a call has and how much each chip sends in them."""
    totals: dict[str, dict[str, int]] = {}
    for operation in found:
        if (together := operation.collective) is not None:
            total = totals.setdefault(together.kind, {"count": 0, "bytes": 0})
            total["count"] += operation.runs
            total["bytes"] += operation.runs * together.bytes
    return totals


def _together_seconds(chip: Chip, mesh: Mesh, together: hlo.Collective) -> float:
    """The least a collective takes, for which the compiler has no estimate.

    What the chips send passes as many links as lie between them, and is spread over all links.
    """
    assert chip.link is not None
    places = np.array([device.coords for device in mesh.devices.flat])
    pairs = [
        np.abs(places[one] - places[other]).sum()
        for group in together.groups
        for one, other in itertools.permutations(group, 2)
    ]
    # Around a ring, each to its neighbor; else from each to every other.
    passed = float(np.mean(pairs)) if together.kind == "all-to-all" else 1.0
    return together.bytes * passed / (chip.links * chip.link)


def _modelled(
    chip: Chip,
    mesh: Mesh,
    found: Sequence[hlo.Operation],
    kernels: Sequence[roof.Kernel],
    bundles: Bundles,
) -> dict[str, Any]:
    """The milliseconds of a program, and what its kernels written by hand are counted as."""
    if chip.clock is None:
        return {"modelled_ms": None, "modelled_ms_by_kind": None, "handwritten": []}
    spent = dict.fromkeys(KINDS, 0.0)
    handwritten = []
    for operation in found:
        milliseconds = 1e3 * (operation.cycles or 0) / chip.clock
        if operation.target == _HANDWRITTEN:
            handwritten.append(_handwritten(chip, chip.clock, operation, kernels, bundles))
            milliseconds = handwritten[-1]["modelled_ms"]
        if operation.collective is not None:
            milliseconds += 1e3 * _together_seconds(chip, mesh, operation.collective)
        spent[kind(operation)] += operation.runs * milliseconds
    return {
        "modelled_ms": sum(spent.values()),
        "modelled_ms_by_kind": spent,
        "handwritten": handwritten,
    }


def _handwritten(
    chip: Chip,
    clock: float,
    operation: hlo.Operation,
    kernels: Sequence[roof.Kernel],
    bundles: Bundles,
) -> dict[str, Any]:
    """One run of a kernel written by hand, by the largest of what bounds it from below."""
    types = hlo.types(*operation.operands), hlo.types(operation.result)
    same = (
        kernel
        for kernel in kernels
        if (kernel.operands, kernel.results) == types
        and operation.op_name.endswith(f"/{kernel.name}/pallas_call")
    )
    kernel = next(same, None)
    bounds = {"bytes at the memory's peak": operation.bytes / chip.bandwidth}
    if kernel is not None:
        bounds |= {
            "products at the chip's peak": roof.seconds(kernel.operations, 0, chip),
            "bundles, without waits for memory": kernel.steps * bundles[kernel.key] / clock,
        }
    basis = max(bounds, key=lambda name: bounds[name])
    return {
        "name": operation.name,
        "runs": operation.runs,
        "grid_steps": kernel and kernel.steps,
        "bundles_a_step": kernel and bundles[kernel.key],
        "products": dict(kernel.products) if kernel else {},
        "modelled_ms": 1e3 * bounds[basis],
        "modelled_by": basis,
    }


def _largest(found: Sequence[hlo.Operation]) -> list[dict[str, Any]]:
    arrays: list[dict[str, Any]] = [
        {"type": element, "shape": list(shape), "bytes": size, "of": operation.op_name}
        for operation in found
        # The result of what starts a transfer is also what it reads.
        if not operation.opcode.endswith("-start")
        for element, shape, size in hlo.arrays(operation.result)
    ]
    return sorted(arrays, key=lambda array: -array["bytes"])[:_LARGEST_SHOWN]
