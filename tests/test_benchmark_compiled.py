"""`python -m qvd_jax.benchmark compiled`: what a compiler's text says, and refusals in one line."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from qvd_jax.benchmarks import chips, compiled, hlo, roof

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
  ROOT %dot.1 = f32[8,2]{1,0} dot(%p.6, %p.6), <attn1/cond/dot_general 1000>
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
    <attn1/cond/transpose 30>
  %kernel.1 = f32[8,2]{1,0:T(8,128)} custom-call(%fusion.1, %weights.1), \
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
    # Two arrays of float32 [8, 2]; the weights are on the chip.
    assert found["kernel.1"].bytes == 2 * 4 * 16
    assert hlo.shapes(found["prefetch"].result) == ((8, 2), (8, 2), ())


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
    return total, chosen, convolved, doubled(convolved.reshape(-1, 16))


def doubled(x):
    def body(x_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...].T) @ x_ref[...]

    spec = pl.BlockSpec((4, 16), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(len(x) // 4,),
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
        jax.ShapeDtypeStruct((3, 3, 5, 16), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    convolution = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 5)
    rows = 2 * 4 * 4
    kernel = (rows // 4) * (2 * 4 * 4 * 16) * 2
    int8 = 3 * 2 * 4 * 8 * 2
    expected = {"int8": int8, "float32": convolution + kernel}
    assert roof.operations(jaxpr, "tpu") == expected
    assert roof.operations(jaxpr, "cpu") == expected | {
        "float32": expected["float32"] + 2 * 2 * 6 * 6 * 5
    }
    (found,) = roof.kernels(jaxpr, "tpu")
    assert found == ("doubled", ((rows, 16),), rows // 4, {"float32": kernel})
    handed = 3 * 4 * 8 + 8 * 2 + 4 * (2 * 6 * 6 * 5 + 3 * 3 * 5 * 16)
    assert roof.handed_bytes(jaxpr) == handed + 4 * (4 * 2 + 1 + 2 * rows * 16)


def test_the_roof_is_the_slower_of_computing_and_reading():
    chip = chips.find("v5e")
    one_second = {"int8": int(chip.int8_operations / 2), "bfloat16": int(chip.float_operations / 2)}
    counts = roof.Counter(one_second)
    assert roof.seconds(counts, 0, chip) == pytest.approx(1)
    assert roof.seconds(counts, int(3 * chip.bandwidth), chip) == pytest.approx(3)
