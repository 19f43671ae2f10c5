"""`python -m qvd_jax.benchmark compiled`: what a compiler's text says, and refusals in one line."""

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from qvd_jax import accelerators, benchmark
from qvd_jax.benchmarks import chips, compiled, compilers, footprint, hlo, roof, rounds
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.benchmarks.unet import Case
from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig

# Written by hand: a loop of 5 turns around a loop of 3, told in two ways; a choice; a fusion in a
# fusion; a kernel written by hand; what costs nothing.
TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(s8[8,4]{1,0})->f32[8,2]{1,0}}

%inner_fused (p.0: s8[8,4], p.1: s8[4,2]) -> s32[8,2] {
  %p.0 = s8[8,4]{1,0} parameter(0)
  %p.1 = s8[4,2]{1,0:T(8,128)(4,1)} parameter(1)
  ROOT %product.1 = s32[8,2]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf, \
    <ff/proj/int8_product/dot_general >
}

%fused (p.2: s8[8,4], p.3: s8[4,2]) -> f32[8,2] {
  %p.2 = s8[8,4]{1,0} parameter(0)
  %p.3 = s8[4,2]{1,0} parameter(1)
  %nested = s32[8,2]{1,0} fusion(%p.2, /*index=1*/%p.3), kind=kOutput, calls=%inner_fused
  ROOT %convert.1 = f32[8,2]{1,0} convert(%nested), <norm1/mul >
}

%only_moving (p.4: f32[8,2]) -> f32[2,8] {
  %p.4 = f32[8,2]{1,0} parameter(0)
  %turned = f32[2,8]{1,0} transpose(%p.4), dimensions={1,0}
  ROOT %copied = f32[2,8]{0,1} copy(%turned)
}

%inner_body (state.1: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %state.1 = (s32[]{:T(128)}, f32[8,2]{1,0:T(8,128)}) parameter(0)
  %value.1 = f32[8,2]{1,0} get-tuple-element(%state.1), index=1
  %exp.1 = f32[8,2]{1,0} exponential(%value.1), <norm2/exp 7>
  ROOT %tuple.1 = (s32[], f32[8,2]) tuple(%value.1, %exp.1)
}

%inner_condition (state.2: (s32[], f32[8,2])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[8,2]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %turn = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (state.3: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %state.3 = (s32[]{:T(128)}, f32[8,2]{1,0:T(8,128)}) parameter(0)
  %copy.1 = f32[8,2]{1,0} copy(%state.3), < 11>
  ROOT %while.1 = (s32[]{:T(128)}, f32[8,2]{1,0:T(8,128)}) while(%state.3), \
    condition=%inner_condition, body=%inner_body
}

%cheap (p.5: f32[8,2]) -> f32[8,2] {
  %p.5 = f32[8,2]{1,0} parameter(0)
  ROOT %negate.1 = f32[8,2]{1,0} negate(%p.5), < 2>
}

%dear (p.6: f32[8,2]) -> f32[8,2] {
  %p.6 = f32[8,2]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,2]{1,0} dot(%p.6, %p.6), <attn1/attention/cond/dot_general 1000>
}

ENTRY %main (codes.1: s8[8,4], weights.1: s8[4,2]) -> f32[8,2] {
  %codes.1 = s8[8,4]{1,0} parameter(0)
  %weights.1 = s8[4,2]{1,0:T(8,128)S(1)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %fusion.1 = f32[8,2]{1,0:T(8,128)} fusion(%codes.1, %weights.1), kind=kOutput, calls=%fused, \
    <norm1/mul 100>
  %prefetch = (f32[8,2]{1,0:T(8,128)S(1)}, f32[8,2]{1,0}, u32[]{:S(2)}) copy-start(%fusion.1)
  %prefetched = f32[8,2]{1,0:T(8,128)S(1)} copy-done(%prefetch)
  %fusion.2 = f32[2,8]{0,1} fusion(%fusion.1), kind=kLoop, calls=%only_moving, \
    <attn1/attention/cond/transpose 30>
  %kernel.1 = f32[8,2]{1,0:T(8,128)} custom-call(%fusion.1, %weights.1, %fusion.1), \
    custom_call_target="tpu_custom_call", <int8_product/kernel/pallas_call >, \
    backend_config={"custom_call_config":{"body":"Tf(UzvUg)"}}
  %while.2 = (s32[]{:T(128)}, f32[8,2]{1,0:T(8,128)}) while(%start, %kernel.1), \
    condition=%unread, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %choice = f32[8,2]{1,0} conditional(%start, %kernel.1, %kernel.1), \
    branch_computations={%cheap, %dear}
  ROOT %called = f32[8,2]{1,0} call(%choice), to_apply=%cheap
}
"""


def _attributes(found):
    cycles = f'backend_config={{"window_config":{{"estimated_cycles":"{found[2]}"}}}}'
    return f'metadata={{op_name="jit(f)/{found[1]}"}}' + (f", {cycles}" if found[2] else "")


PROGRAM = re.sub(r"<(\S*) (\d*)>", _attributes, TEXT)


def test_every_operation_counts_as_often_as_it_runs():
    found = hlo.operations(PROGRAM)
    runs = {operation.name: (operation.runs, operation.cycles) for operation in found}
    assert runs == {
        "fusion.1": (1, 100),
        "prefetch": (1, None),
        "fusion.2": (1, 30),
        "kernel.1": (1, None),
        "copy.1": (5, 11),
        "exp.1": (15, 7),
        "dot.1": (1, 1000),  # the longer branch
        "negate.1": (1, 2),  # of the call
    }
    assert hlo.total_cycles(found) == 100 + 30 + 5 * 11 + 5 * 3 * 7 + 1000 + 2


def test_operations_are_known_by_what_is_fused_in_them():
    found = {operation.name: operation for operation in hlo.operations(PROGRAM)}
    assert {name: compiled.kind(operation) for name, operation in found.items()} == {
        "fusion.1": "int8 products",  # though its last operation is a norm's
        "prefetch": "copies",
        "fusion.2": "copies",
        "kernel.1": "int8 products",
        "copy.1": "copies",
        "exp.1": "norms",
        "dot.1": "attention",
        "negate.1": "all else",
    }
    products = [product.operands for one in found.values() for product in one.products]
    assert products == [("s8", "s8"), ("f32", "f32")]
    assert [name for name, one in found.items() if one.target] == ["kernel.1"]
    # Two arrays of float32 [8, 2], of which it is given one twice; the weights are on the chip.
    assert found["kernel.1"].bytes == 2 * 4 * 16
    assert hlo.types(*found["kernel.1"].operands) == ("f32[8,2]", "s8[4,2]", "f32[8,2]")
    assert hlo.types(found["prefetch"].result) == ("f32[8,2]", "f32[8,2]", "u32[]")


GPU_PROGRAM = """
%gemm (p.0: s8[8,4], p.1: s8[4,2]) -> s32[8,2] {
  %p.0 = s8[8,4]{1,0} parameter(0)
  %p.1 = s8[4,2]{1,0} parameter(1)
  ROOT %dot.1 = s32[8,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: s8[8,4], w: s8[4,2], y: bf16[8,2]) -> bf16[8,2] {
  %x = s8[8,4]{1,0} parameter(0)
  %w = s8[4,2]{1,0} parameter(1)
  %y = bf16[8,2]{1,0} parameter(2)
  %fused = s32[8,2]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, \
    backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %library = (f32[8,8]{1,0}, s8[1024]{0}) custom-call(%y, %y), \
    custom_call_target="__cublas$lt$matmul"
  ROOT %copy.1 = bf16[8,2]{1,0} copy(%y)
}
"""


def test_kernels_of_cuda_are_known_by_their_kinds_and_products():
    found = hlo.operations(GPU_PROGRAM)
    assert [operation.target for operation in found] == [
        "__triton_gemm",
        "__cublas$lt$matmul",
        None,
    ]
    products = [product.operands for one in found for product in one.products]
    assert products == [("s8", "s8"), ("bf16", "bf16")]
    assert [operation.moves_only for operation in found] == [False, False, True]


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO program"):
        hlo.operations("HloModule jit_f")


def function(x, w, images, kernel):
    """A loop of 3 products [4, 8] x [8, 2], a choice by platform, a convolution, a kernel."""

    def turn(total, part):
        return total + jnp.dot(part, w, preferred_element_type=jnp.int32), None

    total, _ = lax.scan(turn, jnp.zeros((4, 2), jnp.int32), x)
    chosen = lax.platform_dependent(
        images,
        cpu=lambda images: jnp.einsum("nhwc,nhwc->", images, images),
        default=lambda images: images.sum(),
    )
    convolved = lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return total, chosen, convolved, doubled(convolved.reshape(-1, 128))


ROWS = 8
"""Of each step of the kernel's grid."""


def doubled(x):
    """A kernel of two products for each `ROWS` of `x`, `[N, 128]`."""

    def body(x_ref, out_ref):
        rows = x_ref[...]
        out_ref[...] = lax.dot_general(rows, rows, (((1,), (1,)), ((), ()))) @ rows

    spec = pl.BlockSpec((ROWS, 128), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(len(x) // ROWS,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="doubled",
    )(x)


def test_the_roof_counts_the_products_of_the_platform():
    shapes = (
        jax.ShapeDtypeStruct((3, 4, 8), jnp.int8),
        jax.ShapeDtypeStruct((8, 2), jnp.int8),
        jax.ShapeDtypeStruct((2, 6, 6, 5), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 5, 128), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    convolution = 2 * (2 * 4 * 4 * 128) * (3 * 3 * 5)
    rows = 2 * 4 * 4
    kernel = (rows // ROWS) * 2 * (2 * ROWS * ROWS * 128)
    int8 = 3 * 2 * 4 * 8 * 2
    expected = {"int8": int8, "float32": convolution + kernel}
    assert roof.product_operations(jaxpr, "tpu") == expected
    assert roof.product_operations(jaxpr, "cpu") == expected | {
        "float32": expected["float32"] + 2 * 2 * 6 * 6 * 5
    }
    (found,) = roof.kernels(jaxpr, "tpu")
    typed = (f"f32[{rows},128]",)
    assert found[:-1] == (
        "doubled",
        typed,
        typed,
        rows // ROWS,
        {"float32": kernel},
        {"f32 x f32": 2},
    )
    handed = 3 * 4 * 8 + 8 * 2 + 4 * (2 * 6 * 6 * 5 + 3 * 3 * 5 * 128)
    assert roof.handed_bytes(jaxpr) == handed + 4 * (4 * 2 + 1 + 2 * rows * 128)


def footprint_of(run, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return footprint.fused_peak_bytes(jax.make_jaxpr(run)(*arrays).jaxpr, "tpu") // 4


def test_the_footprint_is_what_is_stored_at_once():
    x, w, y = (1000, 100), (100, 50), (1000, 50)
    sizes = dict(zip("xwy", map(math.prod, (x, w, y)), strict=True))
    given = sizes["x"] + sizes["w"]

    # What is before and behind a product is fused with it.
    assert footprint_of(lambda x, w: jnp.exp(jnp.sin(x) @ w) + 1, x, w) == given + sizes["y"]

    def read_twice(x, w):
        y = x @ w
        return (y * 2) @ w.T + (y - 1) @ w.T

    # The product, and what becomes of it twice.
    assert footprint_of(read_twice, x, w) == given + sizes["y"] + 2 * sizes["x"]

    def in_turn(x, w):
        return lax.map(lambda row: jnp.outer(row, row @ w).sum(0), x)

    # The result, and of one row at a time the product and the sum.
    assert footprint_of(in_turn, x, w) == given + sizes["y"] + 2 * 50

    def by_platform(x):
        return lax.platform_dependent(x, cpu=lambda x: (x @ x.T) @ x, default=lambda x: x + 1)

    assert footprint_of(by_platform, x) == 2 * sizes["x"]


def test_the_roof_is_the_slower_of_computing_and_reading():
    chip = chips.find("v5e")
    one_second = {"int8": int(chip.int8_operations / 2), "bfloat16": int(chip.float_operations / 2)}
    counts = roof.Counter(one_second)
    assert roof.seconds(counts, 0, chip) == pytest.approx(1)
    assert roof.seconds(counts, int(3 * chip.bandwidth), chip) == pytest.approx(3)


TINY = ["--size", "tiny", "--frames", "2", "--height", "16", "--width", "16"]
V5E = ["compiled", "--chip", "v5e", *TINY]


@pytest.fixture
def needs_libtpu():
    """Skips where there is no TPU compiler, or not one for this JAX, and says so."""
    try:
        compilers.check_installed(chips.find("v5e"))
    except InputError as missing:
        pytest.skip(str(missing))


@pytest.mark.usefixtures("needs_libtpu")
def test_a_part_is_compiled_for_a_chip_that_is_not_there(tmp_path, capsys, monkeypatch):
    # A TPU serves one process at a time, and none is needed.
    monkeypatch.delattr("qvd_jax.environment._device_kind")
    out = tmp_path / "v5e.json"
    options = ["--part", "0.resnet", "--policy", "qvd-w8a8", "--out", str(out)]
    assert benchmark.main([*V5E, *options]) == 0
    record = json.loads(out.read_text())
    assert record["device"] == "v5e, compiled for, not run"
    assert {"jax", "libtpu"} <= set(record["versions"])
    floating, int8 = record["results"]
    for result in (floating, int8):
        assert result["modelled_ms"] == pytest.approx(sum(result["modelled_ms_by_kind"].values()))
        assert result["modelled_by_roof"] * result["roof_ms"] == pytest.approx(
            result["modelled_ms"]
        )
        assert result["modelled_by_roof"] > 1
        assert 0 < result["peak_memory_bytes"] < result["chip_memory_bytes"]
        assert result["program_bytes"] > 0
    # Two convolutions; beside them the norms multiply float32.
    assert floating["products"].keys() - {"f32 x f32"} == {"bf16 x bf16"}
    assert int8["products"].keys() - {"f32 x f32"} == {"s8 x s8"}
    assert floating["products"]["bf16 x bf16"] == int8["products"]["s8 x s8"] == 2
    assert floating["modelled_ms_by_kind"]["int8 products"] == 0
    assert int8["modelled_ms_by_kind"]["int8 products"] > 0
    positions, channels = 2 * 2 * 2 * 2, 32
    convolutions = 2 * (2 * positions * 9 * channels * channels)
    assert floating["operations"]["bfloat16"] == int8["operations"]["int8"] == convolutions
    assert "| 0.resnet | qvd-w8a8 bfloat16 |" in capsys.readouterr().out
    assert record["table"].splitlines()[0].startswith("| part | layers | modelled ms |")


def describe_doubled(dump):
    chip, x = chips.find("v5e"), jax.ShapeDtypeStruct((512, 128), jnp.float32)
    (kernel,) = roof.kernels(jax.make_jaxpr(doubled)(x).jaxpr, "tpu")
    bundles = compilers.bundles(chip, kernel.call, dump)
    mesh = compilers.mesh(chip, MeshConfig())
    found = compiled.describe(chip, mesh, doubled, (x,), (PartitionSpec(),), {kernel.key: bundles})
    return bundles, found


@pytest.mark.usefixtures("needs_libtpu")
def test_kernels_written_by_hand_are_counted_by_their_bundles(tmp_path):
    with compilers.settings(chips.find("v5e"), str(tmp_path)):
        bundles, found = rounds.in_fresh_process("the kernel", describe_doubled, tmp_path)
    # Two products of eight rows are some dozens of instructions, four and more a bundle.
    assert 20 < bundles < 2000
    (kernel,) = found["handwritten"]
    assert (kernel["grid_steps"], kernel["bundles_a_step"]) == (512 // ROWS, bundles)
    assert kernel["modelled_by"] == "bundles, without waits for memory"
    assert kernel["modelled_ms"] == pytest.approx(512 // ROWS * bundles / 1.5e6)
    assert found["modelled_ms"] >= kernel["modelled_ms"]
    assert found["kernels"] == {"tpu_custom_call": 1}
    assert found["products"] == kernel["products"] == {"f32 x f32": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "v4"], "unknown chip 'v4'; known are v5e, v5p, v6e, h200"),
        (
            ["--part", "unet", "1.spatial"],
            r"unknown part '1.spatial'; known are unet, vae, 0",
        ),
        (["--height", "20"], "height = 20: it must be a positive multiple of 8"),
        (["--policy", "w9"], "unknown policy 'w9'"),
        (["--chip", "v5e:2x2x2"], "unknown grid of chips 'v5e:2x2x2'; one is written like v5e:2x2"),
        (["--chip", "h200:2x2"], "unknown grid of chips 'h200:2x2'"),
        (["--mesh", "tensor=8"], "unknown axis 'tensor'"),
        (["--chip", "v5e:2x4", "--mesh", "data=4"], "the axes multiply to 4, there are 8 devices"),
        (
            ["--chip", "v5e:2x4", "--mesh", "guidance=2,frame=4"],
            "2 frames do not divide into 4 parts; frame may be 1",
        ),
        (
            ["--chip", "v5e:2x4", "--mesh", "data=4,guidance=2"],
            "2 videos, guidance halves counted, do not divide into 8 parts",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, arguments, message):
    assert benchmark.main([*V5E, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("chip", "found", "message"),
    [
        ("v5e", None, r"compile for a v5e: libtpu is missing; .*'jax\[tpu\]=="),
        (
            "v6e",
            "0.0.1",
            r"libtpu 0.0.1 does not fit jax .* asks for .*'jax\[tpu\]==",
        ),
        ("h200", None, r"jax-cuda12-plugin is missing; .*pip install 'jax\[cuda12\]=="),
        ("h200", "99.0", r"jax-cuda12-plugin 99.0 does not fit jax"),
    ],
)
def test_a_compiler_that_is_missing_or_does_not_fit_is_named(
    capsys, monkeypatch, chip, found, message
):
    monkeypatch.setattr(accelerators, "version", lambda package: found)
    assert benchmark.main(["compiled", "--chip", chip, *TINY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_newer_compiler_than_jax_asks_for_is_taken_on_a_tpu(monkeypatch):
    monkeypatch.setattr(accelerators, "version", lambda package: "99.0")
    compilers.check_installed(chips.find("v5e"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm',
            "libtpu is held by another process, or the lock of one that ended was left behind: ABO",
        ),
        (
            "ABORTED: The TPU is already in use by process with pid 1.",
            "libtpu is held by another process, .*: ABORTED: The TPU is already in use by process",
        ),
        ("no such\nfunction", r"gives no v5e: no such; pip install 'jax\[tpu\]=="),
    ],
)
def test_a_compiler_that_cannot_be_had_is_refused(monkeypatch, said, message):
    def refuse(**_):
        raise RuntimeError(said)

    monkeypatch.setattr(compilers, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=message):
        compilers.mesh(chips.find("v5e"), MeshConfig())


def test_what_the_memory_cannot_hold_is_refused_with_what_fits(monkeypatch, tmp_path):
    one = MeshConfig().over(jax.devices())
    monkeypatch.setattr(compilers, "mesh", lambda *_: one)
    target = compiled.Target(chips.find("h200"))
    program = ("0.resnet", Variant("qvd_jax", "float", "bfloat16"))
    case = Case("tiny", 2, 16, 8192, 8192)
    with pytest.raises(InputError, match=r"needs about .* GB, a h200 has 141\.0") as refused:
        compiled.prepare(case, target, [program], tmp_path)
    frames = int(re.search(r"about (\d+) frames", str(refused.value))[1])
    assert 0 < frames < 16
    compiled.prepare(replace(case, frames=frames), target, [program], tmp_path)
    with pytest.raises(InputError, match="fits"):
        compiled.prepare(replace(case, frames=frames + 1), target, [program], tmp_path)
    side = int(re.search(r"16 of (\d+)x", str(refused.value))[1]) // 8
    compiled.prepare(replace(case, height=side, width=side), target, [program], tmp_path)


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (40.00G) exceeds available HBM (15.75G). HLO module: jit_f.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            OUT_OF_MEMORY,
            r"0\.resnet float .* needs about 43\.0 GB, .*: about 6 frames",
        ),
        ("INTERNAL: unsupported\n at", r"0\.resnet float for a v5e: INTERNAL: unsupported$"),
    ],
    ids=["memory", "other"],
)
def test_what_a_compiler_refuses_is_said_in_one_line(monkeypatch, said, message):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(compiled, "describe", refuse)
    one = MeshConfig().over(jax.devices())
    monkeypatch.setattr(compilers, "mesh", lambda *_: one)
    target = compiled.Target(chips.find("v5e"))
    program = ("0.resnet", Variant("qvd_jax", "float", "bfloat16"))
    with pytest.raises(InputError, match=message):
        compiled.compile_program(Case("tiny", 2, 16, 64, 64), target, program, {})
