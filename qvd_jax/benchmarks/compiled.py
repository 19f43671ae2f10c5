"""What a chip's own compiler makes of our networks, on a machine that has no such chip.

A TPU's compiler writes an estimate of cycles beside each operation: its model of the chip, not a
measurement. It estimates nothing of kernels written by hand. For those stand the bundles it
schedules for one step of the grid, times the steps: waits for memory are not in it, and an inner
loop counts once. Where their products or their bytes take longer at the chip's peaks, these stand.
CUDA's compiler estimates no time at all.
"""

import functools
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from qvd_jax import markdown
from qvd_jax.benchmarks import compilers, hlo, parts, profile, roof
from qvd_jax.benchmarks.chips import Chip
from qvd_jax.benchmarks.parts import Part
from qvd_jax.benchmarks.rounds import Variant, in_fresh_process
from qvd_jax.benchmarks.unet import FLOAT_MODE, Case
from qvd_jax.errors import InputError, first_line
from qvd_jax.memory import tree_bytes
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.observers import list_layers
from qvd_jax.quant.policy import Layer, LayerSpec, decide, named_policy

COPIES = "copies"
KINDS = (
    *(kind for kind in profile.KINDS if kind != profile.PATCHES),
    COPIES,
    profile.OTHER,
)
"""Kinds of work."""

_KERNEL = "tpu_custom_call"
_BUNDLES = re.compile(r"total scheduled bundles:\s*(\d+)")


def measure(
    case: Case, chip: Chip, names: Sequence[str], variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """Compiles parts, each in every variant, each in a process of its own.

    Args:
      case: the UNet and its inputs.
      chip: what for.
      names: of parts, as in `parts.names`.
      variants: ours; the VAE, which no policy quantizes, is compiled in the float ones.

    Returns:
      For each program what `compile_program` finds.

    Raises:
      InputError: the compiler cannot be had, or the chip's memory is too small.
    """
    compilers.check_installed(chip)
    programs = [
        (name, variant)
        for name in names
        for variant in variants
        if name != parts.VAE or variant.mode == FLOAT_MODE
    ]
    with compilers.environment(chip):
        in_fresh_process("the estimate", check, case, chip, programs)
    results = []
    with tqdm.tqdm(programs, desc="compiling", unit="program") as bar:
        for name, variant in bar:
            what = f"{name} {variant.mode} {variant.dtype}"
            bar.set_postfix_str(what)
            with tempfile.TemporaryDirectory() as dump, compilers.environment(chip, dump):
                results.append(
                    in_fresh_process(what, compile_program, case, chip, name, variant, dump)
                )
    return results


def check(case: Case, chip: Chip, programs: Sequence[tuple[str, Variant]]) -> None:
    """Raises `InputError` if the compiler cannot be had or the chip's memory is too small."""
    compilers.placement(chip)
    for name, variant in programs:
        part = parts.find(name, case, jnp.dtype(variant.dtype))
        weights, working = needed_bytes(part, variant)
        if weights + working > chip.memory:
            raise InputError(_too_large(case, chip, f"{name} {variant.mode}", weights, working))


def needed_bytes(part: Part, variant: Variant) -> tuple[int, int]:
    """What a part needs at least: of weights, and of its inputs and the largest of a layer."""
    layers, specs = _layers(part, variant), _specs(part, variant)
    bits = 8 * jnp.dtype(variant.dtype).itemsize
    weights = sum(
        layer.parameters * (specs[layer.path].weight_bits if layer.path in specs else bits)
        for layer in layers
    )
    largest = max(math.prod(layer.inputs) for layer in layers)
    return weights // 8, tree_bytes(part.inputs) + largest * bits // 8


def compile_program(
    case: Case, chip: Chip, name: str, variant: Variant, dump: str
) -> dict[str, Any]:
    """Compiles one part; to be called inside `compilers.environment` in a fresh process.

    Args:
      case: the UNet and its inputs.
      chip: what for.
      name: of the part.
      variant: float, or a policy's.
      dump: the folder for the schedules of a TPU's kernels.

    Returns:
      The part and the variant; `modelled_ms` of all runs of all operations and of each kind of
      work, None where the compiler estimates nothing; what the kernels written by hand are counted
      as; the least the chip could take; memory; how many products, copies and kernels the program
      has; how long it took to make it.

    Raises:
      InputError: the chip's memory is too small.
    """
    part = parts.find(name, case, jnp.dtype(variant.dtype))
    network = part.network(_layer_set(part, variant))
    init = functools.partial(network.init, method=part.method)
    params = jax.eval_shape(init, jax.random.key(0), *part.inputs)
    placed = compilers.placement(chip)
    apply = functools.partial(network.apply, method=part.method)
    started = time.perf_counter()
    traced = jax.jit(apply, in_shardings=placed, out_shardings=placed).trace(params, *part.inputs)
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    lowering = time.perf_counter() - started
    idle = time.process_time()
    try:
        program = lowered.compile(compilers.options(chip))
    except jax.errors.JaxRuntimeError as error:
        raise _refused(case, chip, name, variant, error) from error
    compiling = time.perf_counter() - started - lowering
    busy = time.process_time() - idle
    found = hlo.operations(program.as_text() or "")
    jaxpr = traced.jaxpr.jaxpr
    counts, handed = roof.operations(jaxpr, chip.platform), roof.handed_bytes(jaxpr)
    stats = program.memory_analysis()
    timed = [operation for operation in found if operation.cycles is not None]
    return {
        "part": name,
        "mode": variant.mode,
        "dtype": variant.dtype,
        **_modelled(chip, found, list(roof.kernels(jaxpr, chip.platform)), Path(dump)),
        "roof_ms": 1e3 * roof.seconds(counts, handed, chip),
        "operations": dict(counts),
        "handed_bytes": handed,
        "peak_memory_bytes": stats.peak_memory_in_bytes,
        "chip_memory_bytes": chip.memory,
        "program_bytes": stats.generated_code_size_in_bytes,
        "products": dict(
            Counter(" x ".join(product.operands) for one in found for product in one.products)
        ),
        "copies": sum(kind(operation) == COPIES for operation in timed or found),
        "kernels": dict(Counter(one.target for one in found if one.target)),
        "lowering_s": lowering,
        "compile_s": compiling,
        "compile_cpu_s": busy,
    }


def kind(operation: hlo.Operation) -> str:
    """The kind of work of an operation, one of `KINDS`: of its products, else by its name."""
    if operation.moves_only:
        return COPIES
    names = [product.op_name for product in operation.products] or [operation.op_name]
    if names == [""]:
        names = [name for name, _ in Counter(operation.inner_op_names).most_common(1)]
    kinds = [profile.kind(name) for name in names]
    first = next((known for known in (*profile.KINDS, profile.OTHER) if known in kinds), None)
    return COPIES if first == profile.PATCHES else first or profile.OTHER


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown, a line each."""
    return markdown.table([_row(result) for result in results])


def _row(result: dict[str, Any]) -> dict[str, str]:
    whole, by_kind = result["modelled_ms"], result["modelled_ms_by_kind"]
    row = {"part": result["part"], "layers": f"{result['mode']} {result['dtype']}"}
    if whole is not None:
        row["modelled ms"] = f"{whole:.2f}"
        row |= {f"modelled, {name}": f"{spent:.2f}" for name, spent in by_kind.items()}
    row["roof ms"] = f"{result['roof_ms']:.2f}"
    if whole is not None:
        row["modelled / roof"] = f"{whole / result['roof_ms']:.1f}"
    return row | {
        "peak GB": f"{result['peak_memory_bytes'] / 1e9:.2f}",
        "program GB": f"{result['program_bytes'] / 1e9:.3f}",
        "products": _counted(result["products"]),
        "copies": str(result["copies"]),
        "kernels": _counted(result["kernels"]),
        "compile s": f"{result['compile_s']:.0f}",
    }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _modelled(
    chip: Chip, found: Sequence[hlo.Operation], kernels: Sequence[roof.Kernel], dump: Path
) -> dict[str, Any]:
    """The milliseconds of a program, and what its kernels written by hand are counted as."""
    if chip.clock is None:
        return {"modelled_ms": None, "modelled_ms_by_kind": None, "handwritten": []}
    milliseconds_each = 1e3 / chip.clock
    spent = dict.fromkeys(KINDS, 0.0)
    handwritten = []
    for operation in found:
        if operation.target == _KERNEL:
            handwritten.append(_handwritten(chip, operation, kernels, dump))
            milliseconds = handwritten[-1]["modelled_ms"]
        else:
            milliseconds = (operation.cycles or 0) * milliseconds_each
        spent[kind(operation)] += operation.runs * milliseconds
    return {
        "modelled_ms": sum(spent.values()),
        "modelled_ms_by_kind": spent,
        "handwritten": handwritten,
    }


def _handwritten(
    chip: Chip, operation: hlo.Operation, kernels: Sequence[roof.Kernel], dump: Path
) -> dict[str, Any]:
    """One run of a kernel written by hand, by the largest of what bounds it from below."""
    shapes = hlo.shapes(operation.result)
    same = [k for k in kernels if (k.name or "") in operation.op_name and k.results == shapes]
    bounds = {"bytes": operation.bytes / chip.bandwidth}
    steps = bundles = None
    if same:
        steps = same[0].steps
        bounds["operations"] = roof.seconds(same[0].operations, 0, chip)
        schedules = list(dump.glob(f"*-{operation.name}-*{compilers.SCHEDULE}*"))
        if chip.clock and schedules and (counted := _BUNDLES.search(schedules[0].read_text())):
            bundles = int(counted[1])
            bounds["bundles without waits for memory"] = bundles * steps / chip.clock
    counted_as = max(bounds, key=lambda name: bounds[name])
    return {
        "name": operation.name,
        "runs": operation.runs,
        "grid_steps": steps,
        "bundles": bundles,
        "modelled_ms": 1e3 * bounds[counted_as],
        "counted_as": counted_as,
    }


def _layers(part: Part, variant: Variant) -> list[Layer]:
    network = part.network(_float_layers(variant))
    return list_layers(network, *part.inputs, method=part.method)


def _specs(part: Part, variant: Variant) -> dict[str, LayerSpec]:
    if variant.mode == FLOAT_MODE:
        return {}
    return decide(named_policy(variant.mode), _layers(part, variant))


def _layer_set(part: Part, variant: Variant) -> LayerSet:
    if variant.mode == FLOAT_MODE:
        return _float_layers(variant)
    return layer_set(_specs(part, variant), jnp.dtype(variant.dtype))


def _float_layers(variant: Variant) -> LayerSet:
    dtype = jnp.dtype(variant.dtype)
    return replace(FLOAT, dtype=dtype, param_dtype=dtype)


def _too_large(case: Case, chip: Chip, what: str, weights: float, working: float) -> str:
    """A message with the size that would fit: memory but for weights grows with the positions."""
    most = int((chip.memory - weights) / working * case.frames)
    pixels = f"{8 * case.height}x{8 * case.width}"
    side = int(math.sqrt(max(most, 0) / case.frames * case.height * case.width))
    side = 8 * (side - side % case.config.stride)
    fitting = f"at most {most} frames of {pixels}" if most >= 1 else "no frame of that size"
    if side:
        fitting += f", or {case.frames} of {side}x{side},"
    return (
        f"{what} at {case.frames} frames of {pixels} needs at least "
        f"{(weights + working) / 1e9:.1f} GB, a {chip.name} has {chip.memory / 1e9:.1f}: "
        f"{fitting} may fit"
    )


def _refused(
    case: Case, chip: Chip, name: str, variant: Variant, error: jax.errors.JaxRuntimeError
) -> InputError:
    """What a compiler's refusal says in one line."""
    return InputError(f"{name} {variant.mode} for {chip.name}: {first_line(error)}")
