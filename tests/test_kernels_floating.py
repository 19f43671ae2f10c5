"""Convolutions as products equal PyTorch's, whatever formulation the shape selects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from parity import relative_error

from qvd_jax.kernels import floating


def conv(x, w, strides, padding):
    return floating.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    formulation=st.sampled_from(["patches", "rows"]),
    seed=st.integers(0, 99),
)
def test_products_equal_the_convolution(size, kernel, stride, padding, formulation, seed):
    if any(s + sum(p) < k for s, p, k in zip(size, padding, kernel, strict=True)):
        return
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *size, 5), dtype=np.float32)
    w = rng.standard_normal((*kernel, 5, 3), dtype=np.float32)
    (top, bottom), (left, right) = padding
    padded = torch.nn.functional.pad(
        torch.from_numpy(x).permute(0, 3, 1, 2), (left, right, top, bottom)
    )
    expected = torch.nn.functional.conv2d(
        padded, torch.from_numpy(w).permute(3, 2, 0, 1), stride=stride
    ).permute(0, 2, 3, 1)
    found = floating._conv_as_products(x, w, stride, padding, formulation)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 2, 160), (8, 8, 160), (12, 12, 160), (12, 12, 4)])
def test_every_selected_formulation_accumulates_in_float32(shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *shape)), dtype)
    w = jnp.asarray(rng.standard_normal((3, 3, shape[-1], 8)) / 40, dtype)
    padding = ((1, 1), (1, 1))
    expected = lax.conv_general_dilated(
        x.astype(jnp.float32),
        w.astype(jnp.float32),
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = jax.jit(lambda x, w: conv(x, w, (1, 1), padding))(x, w)
    assert found.dtype == dtype
    # One rounding of the result: half a unit of bfloat16's last place.
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
    assert relative_error(found.astype(jnp.float32), expected) <= tolerance


def test_convolutions_lower_for_every_platform():
    x, w = jnp.zeros((2, 4, 4, 160)), jnp.zeros((3, 3, 160, 8))
    exported = jax.export.export(
        jax.jit(lambda x, w: conv(x, w, (1, 1), ((1, 1), (1, 1)))),
        platforms=["cpu", "cuda", "tpu"],
    )(x, w)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_dot_general_returns_the_operands_dtype():
    x = jnp.ones((4, 300), jnp.bfloat16)
    y = floating.dot_general(x, x.T, (((1,), (0,)), ((), ())))
    assert y.dtype == jnp.bfloat16
    assert (y == 300).all()
