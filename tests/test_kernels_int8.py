"""int8 products against 64-bit integers, and what they lower to."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.extend import core

from qvd_jax.errors import InputError
from qvd_jax.kernels import int8

EXTREME = (-128, -127, -1, 0, 1, 127)


def codes(rng, shape, kind):
    if kind == "random":
        return rng.integers(-128, 128, shape).astype(np.int8)
    if kind == "extreme":
        return rng.choice(EXTREME, shape).astype(np.int8)
    return np.full(shape, -128, np.int8)


def sums(weights):
    """What layers store beside their kernel `[O, ...]`."""
    return weights.astype(np.int32).reshape(len(weights), -1).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(1,), (7,), (2, 3), (1, 2, 5)]),
    k=st.sampled_from([1, 3, 64, 321]),
    o=st.sampled_from([1, 5, 32]),
    kind=st.sampled_from(["random", "extreme", "lowest"]),
    seed=st.integers(0, 99),
)
def test_dot_equals_64_bit_integers(lead, k, o, kind, seed):
    rng = np.random.default_rng(seed)
    x, w = codes(rng, (*lead, k), kind), codes(rng, (o, k), kind)
    found = jax.jit(int8.dot)(x, w, sums(w))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w.astype(np.int64).T)


def test_dot_of_the_largest_contraction_does_not_overflow():
    x, w = np.full((2, 11520), -128, np.int8), np.full((3, 11520), -128, np.int8)
    found = int8.dot(x, w, sums(w))
    np.testing.assert_array_equal(found, np.full((2, 3), 128 * 128 * 11520))


CONVS = [
    ((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((6, 7), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((6, 6), (3, 3), (2, 2), ((0, 1), (0, 1))),
    ((4, 5), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((4, 5), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((4, 3, 2), (3, 1, 1), (1, 1, 1), ((1, 1), (0, 0), (0, 0))),
]


def conv_in_64_bits(x, w, strides, padding):
    x = np.pad(x.astype(np.int64), ((0, 0), *padding, (0, 0)))
    kernel = w.shape[1:-1]
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], kernel, strides, strict=True)]
    out = np.zeros((len(x), *sizes, len(w)), np.int64)
    for place in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(p * s, p * s + k) for p, s, k in zip(place, strides, kernel, strict=True)
        )
        seen = x[(slice(None), *window)].reshape(len(x), -1)
        out[(slice(None), *place)] = seen @ w.reshape(len(w), -1).astype(np.int64).T
    return out


@pytest.mark.parametrize("kind", ["random", "extreme", "lowest"])
@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CONVS)
def test_conv_equals_64_bit_integers(size, kernel, strides, padding, kind):
    rng = np.random.default_rng(0)
    x, w = codes(rng, (2, *size, 5), kind), codes(rng, (4, *kernel, 5), kind)
    expected = conv_in_64_bits(x, w, strides, padding)
    convolve = jax.jit(int8.conv, static_argnums=(3, 4, 5))
    for implementation in (None, *int8.runnable_convs()):
        found = convolve(x, w, sums(w), strides, padding, implementation)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected, implementation)


@pytest.mark.parametrize(
    ("size", "dilation", "strides"),
    [((11,), (3,), (1,)), ((9, 8), (2, 3), (1, 2)), ((17, 16), (2, 1), (1, 1))],
)
def test_dilated_conv_is_that_of_a_kernel_with_zeros_between_its_taps(size, dilation, strides):
    rng, rank = np.random.default_rng(0), len(size)
    x, w = codes(rng, (2, *size, 5), "random"), codes(rng, (4, *(3,) * rank, 5), "random")
    spread = np.zeros((4, *(2 * d + 1 for d in dilation), 5), np.int8)
    spread[(slice(None), *(slice(None, None, d) for d in dilation))] = w
    padding = ((2, 1),) * rank
    expected = conv_in_64_bits(x, spread, strides, padding)
    for implementation in (None, *int8.runnable_convs()):
        found = int8.conv(x, w, sums(w), strides, padding, implementation, dilation)
        np.testing.assert_array_equal(found, expected, implementation)


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CONVS)
def test_patches_padded_as_on_accelerators_equal_64_bit_integers(
    size, kernel, strides, padding, monkeypatch
):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    rng = np.random.default_rng(0)
    x, w = codes(rng, (2, *size, 5), "extreme"), codes(rng, (4, *kernel, 5), "extreme")
    expected = conv_in_64_bits(x, w, strides, padding)
    for implementation in int8.runnable_convs():
        found = int8.conv(x, w, sums(w), strides, padding, implementation)
        np.testing.assert_array_equal(found, expected, implementation)


def test_the_gpu_gathers_patches_and_multiplies_once():
    shapes = (2, 6, 7, 5), (4, 3, 3, 5)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    convolve = jax.jit(lambda x, w, sums: int8.conv(x, w, sums, (1, 1), ((1, 1), (1, 1))))
    lowered = convolve.trace(*arguments, jax.ShapeDtypeStruct((4,), jnp.int32))
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    (product,) = re.findall(r"stablehlo\.dot_general.* : (\(.*)", text)
    assert product == "(tensor<2x6x7x45xi8>, tensor<4x45xi8>) -> tensor<2x6x7x4xi32>"
    (gathered,) = re.findall(r"stablehlo\.concatenate.* -> (.*)", text)
    assert gathered == "tensor<2x6x7x45xi8>"


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "products"),
    [(16, 3, 1, 3), (15, 3, 1, 1), (16, 3, 2, 1), (16, 1, 1, 1)],
)
def test_the_cpu_multiplies_large_images_by_rows_of_the_kernel(side, kernel, stride, products):
    rng = np.random.default_rng(0)
    x, w = codes(rng, (1, side, side, 3), "random"), codes(rng, (2, kernel, kernel, 3), "random")
    arguments = (x, w, sums(w), (stride,) * 2, ((kernel // 2,) * 2,) * 2)
    convolve = jax.jit(int8.conv, static_argnums=(3, 4))
    text = export.export(convolve, platforms=["cpu"])(*arguments).mlir_module()
    assert len(re.findall(r"stablehlo\.dot_general", text)) == products
    expected = conv_in_64_bits(x, w, *arguments[3:])
    np.testing.assert_array_equal(convolve(*arguments), expected)


@pytest.mark.parametrize("kind", ["random", "extreme", "lowest"])
@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(("size", "products"), [((7, 9), 1), ((8, 8), 2), ((5, 13), 2)])
def test_conv_of_an_upsampled_image_equals_64_bit_integers(size, products, vnni, kind, monkeypatch):
    if vnni and "unsigned" not in int8.runnable_dots():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(int8, "_has_vnni", lambda: vnni)
    rng = np.random.default_rng(0)
    x, w = codes(rng, (2, *size, 5), kind), codes(rng, (4, 3, 3, 5), kind)
    convolve = jax.jit(lambda *arguments: int8.upsampled_conv(*arguments))
    expected = conv_in_64_bits(x.repeat(2, 1).repeat(2, 2), w, (1, 1), ((1, 1), (1, 1)))
    for implementation in (None, *int8.runnable_upsampled_convs()):
        found = int8.upsampled_conv(x, w, sums(w), implementation)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected, implementation)
    text = export.export(convolve, platforms=["cpu"])(x, w, sums(w)).mlir_module()
    assert len(re.findall(r"stablehlo\.dot_general", text)) == (products if vnni else 1)


@pytest.mark.parametrize("vnni", [True, False])
def test_what_every_cpu_can_run_agrees(vnni, monkeypatch):
    monkeypatch.setattr(int8, "_has_vnni", lambda: vnni)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    x, w = codes(rng, (6, 33), "random"), codes(rng, (5, 33), "random")
    dots = int8.runnable_dots()
    assert ("unsigned" in dots) == vnni
    for implementation in (None, *dots):
        found = int8.dot(x, w, sums(w), implementation)
        np.testing.assert_array_equal(found, x.astype(np.int64) @ w.astype(np.int64).T)


def test_an_implementation_the_machine_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(int8, "_has_vnni", lambda: False)
    x = np.ones((2, 3), np.int8)
    with pytest.raises(InputError, match="'unsigned' cannot run on this cpu; 'signed' can"):
        int8.dot(x, x, sums(x), "unsigned")
    image = np.ones((1, 2, 2, 3), np.int8)
    with pytest.raises(InputError, match="'winograd' cannot run on this cpu; 'signed patches', "):
        int8.conv(image, image, sums(image), (1, 1), ((0, 0), (0, 0)), "winograd")
    with pytest.raises(InputError, match="cannot run on this cpu; 'signed before upsampling', "):
        int8.upsampled_conv(image, image, sums(image), "unsigned before upsampling")


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.int2, 1), (jnp.int4, 7)])
def test_weights_of_few_bits(dtype, limit):
    rng = np.random.default_rng(0)
    x = codes(rng, (6, 33), "random")
    w = rng.integers(-limit, limit + 1, (5, 33)).astype(np.int8)
    expected = x.astype(np.int64) @ w.T.astype(np.int64)
    np.testing.assert_array_equal(int8.dot(x, jnp.asarray(w, dtype), sums(w)), expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_products_may_be_mapped_over(axes):
    rng = np.random.default_rng(0)
    x = codes(rng, (3, 6, 8) if axes[0] == 0 else (6, 8), "random")
    w = codes(rng, (3, 5, 8) if axes[1] == 0 else (5, 8), "random")
    expected = x.astype(np.int64) @ np.swapaxes(w.astype(np.int64), -1, -2)
    totals = w.astype(np.int32).sum(-1)
    found = jax.vmap(int8.dot, (*axes, axes[1]))(x, w, totals)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_products_keep_int8_operands_on_every_platform(platform, monkeypatch):
    monkeypatch.setattr(int8, "_has_vnni", lambda: True)

    def both(x, w, image, kernel, w_sums, kernel_sums):
        products = int8.conv(image, kernel, kernel_sums, (1, 1), ((1, 1), (1, 1)))
        return int8.dot(x, w, w_sums), products

    shapes = [(8, 16), (4, 16), (2, 6, 6, 4), (8, 3, 3, 4)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, 8)]
    text = export.export(jax.jit(both), platforms=[platform])(*arguments).mlir_module()
    products = [line for line in text.splitlines() if ".dot_general" in line or ".conv" in line]
    products = [line for line in products if "stablehlo.convert" not in line]
    assert len(products) == 2
    left = "ui8" if platform == "cpu" else "i8"
    for line in products:
        types = re.findall(r"x(ui8|i8|i32|f32)>", line.split(" : ")[-1])
        assert types == [left, "i8", "i32"]


def choices(jaxpr):
    """Conditions of a program and its parts; its printed text shows shared parts once."""
    here = sum(equation.primitive.name == "cond" for equation in jaxpr.eqns)
    parts = (part for equation in jaxpr.eqns for part in core.jaxprs_in_params(equation.params))
    return here + sum(map(choices, parts))


def test_products_of_one_shape_are_traced_once(monkeypatch):
    traced = []
    original = lax.platform_dependent

    def counted(*arrays, **branches):
        # Of codes, weights and sums; the images that patches are cut from are padded, too.
        if len(arrays) == 3:
            traced.append(tuple(array.shape for array in arrays))
        return original(*arrays, **branches)

    monkeypatch.setattr(lax, "platform_dependent", counted)
    x, w = jnp.ones((3, 29), jnp.int8), jnp.ones((29, 29), jnp.int8)
    image, kernel = jnp.ones((1, 3, 5, 29), jnp.int8), jnp.ones((29, 3, 3, 29), jnp.int8)

    def layers(x, image):
        for _ in range(3):
            x = int8.dot(x, w, sums(w)).astype(jnp.int8)
            image = int8.conv(image, kernel, sums(kernel), (1, 1), ((1, 1), (1, 1)))
            image = image.astype(jnp.int8)
        return x, image

    jaxpr = jax.make_jaxpr(layers)(x, image)
    assert len(traced) == len(set(traced)) == 2
    # Each layer still chooses by platform: its product, and for three platforms a convolution its
    # padding.
    assert choices(jaxpr.jaxpr) == 3 * (1 + 1 + 3)
