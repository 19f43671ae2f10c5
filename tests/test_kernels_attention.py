"""Every formulation of attention beside PyTorch's and 64-bit softmax, and what it lowers to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from parity import relative_error

from qvd_jax.kernels import attention, attention_tpu
from qvd_jax.kernels.attention import (
    attention_on_chip,
    attention_over_frames,
    attention_over_positions,
    dot_product_attention,
)
from qvd_jax.kernels.attention_tpu import positions_in_lanes, queries_in_lanes

TOLERANCE = 1e-4
ROW = 4 * 128
"""Bytes of a query's logits on a TPU with up to 128 keys."""


def tokens(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def torch_attention(q, k, v, *, is_causal=False):
    return torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), is_causal=is_causal
    ).transpose(1, 2)


def exact_attention_over_frames(qkv, heads):
    q, k, v = np.split(np.float64(qkv), 3, axis=-1)
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    weights = np.exp(np.einsum("bflhd,bglhd->blhfg", q, k) / math.sqrt(q.shape[-1]))
    out = np.einsum("blhfg,bglhd->bflhd", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*qkv.shape[:-1], -1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(3, 9, 2, 8), (10, 512, 4, 4), (3, 1024, 4, 8), (2, 2048, 4, 8), (8192, 16, 5, 4)],
    ids=["whole", "four heads", "two heads", "blocks of queries", "many positions"],
)
def test_attention_is_softmax_attention(shape, is_causal):
    q, k, v = (tokens(*shape, seed=seed) for seed in range(3))
    expected = torch_attention(q, k, v, is_causal=is_causal)
    compiled = jax.jit(dot_product_attention, static_argnames="is_causal")
    found = compiled(q, k, v, is_causal=is_causal)
    assert relative_error(found, expected) <= TOLERANCE
    half = compiled(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), is_causal=is_causal)
    assert half.dtype == jnp.bfloat16
    assert relative_error(half.astype(jnp.float32), expected) <= 2**-6


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "keys", "limit"),
    [
        pytest.param((3, 15, 4, 8), 15, 2**26, id="whole"),
        pytest.param((3, 15, 4, 8), 15, 3 * 15 * ROW, id="three heads"),
        pytest.param((3, 15, 4, 8), 15, 15 * ROW, id="a head"),
        pytest.param((3, 15, 4, 8), 15, 5 * ROW, id="five queries"),
        pytest.param((1, 13, 1, 5), 13, 2 * ROW, id="one query of a prime number"),
        pytest.param((2, 7, 3, 8), 77, 2**26, id="text"),
        pytest.param((2, 1, 3, 8), 9, 1, id="one query"),
        pytest.param((2, 7, 3, 8), 1, 2**26, id="one key"),
    ],
)
def test_attention_on_the_chip_is_softmax_attention(shape, keys, limit, is_causal, monkeypatch):
    monkeypatch.setattr(attention, "_TPU_LOGITS_BYTES", limit)
    q, k, v = (
        tokens(shape[0], length, *shape[2:], seed=seed)
        for seed, length in enumerate((shape[1], keys, keys))
    )
    found = jax.jit(functools.partial(attention_on_chip, is_causal=is_causal))(q, k, v)
    assert relative_error(found, torch_attention(q, k, v, is_causal=is_causal)) <= 1e-5


def test_all_frames_attend_to_the_same_keys(monkeypatch):
    q, k, v = tokens(2, 3, 8, 4, 8, seed=0), tokens(2, 5, 4, 8, seed=1), tokens(2, 5, 4, 8, seed=2)
    expected = torch_attention(q.reshape(2, 24, 4, 8), k, v).reshape(q.shape)
    assert relative_error(dot_product_attention(q, k, v), expected) <= TOLERANCE
    for platform in ("tpu", "cuda", "default"):
        monkeypatch.setattr(
            lax, "platform_dependent", lambda *given, platform=platform, **by: by[platform](*given)
        )
        # Of these arguments there is a trace, which another formulation is no part of.
        jax.clear_caches()
        assert relative_error(dot_product_attention(q, k, v), expected) <= TOLERANCE
    jax.clear_caches()


@pytest.mark.parametrize("lagging", [True, False])
@pytest.mark.parametrize(
    ("images", "sharing", "length", "keys", "heads", "width"),
    [
        pytest.param(2, 1, 256, 256, 2, 40, id="its own tokens, two blocks"),
        pytest.param(1, 1, 128, 128, 1, 8, id="one block"),
        pytest.param(6, 3, 128, 77, 2, 16, id="a text for three images"),
        pytest.param(2, 2, 384, 1, 1, 24, id="one key"),
        pytest.param(2, 1, 128, 200, 3, 8, id="more keys than queries"),
    ],
)
def test_queries_in_lanes_is_softmax_attention(
    images, sharing, length, keys, heads, width, lagging, monkeypatch
):
    monkeypatch.setattr(attention_tpu, "_LAGGING_BYTES", 0 if lagging else 2**30)
    # One block of queries holds all the lanes of 200 keys.
    monkeypatch.setattr(attention_tpu, "_LOGITS_BYTES", 128 * 256 * 4)
    q = 3 * tokens(images, length, heads, width, seed=0)
    k, v = (tokens(images // sharing, keys, heads, width, seed=seed) for seed in (1, 2))
    columns = (x.reshape(*x.shape[:2], -1).swapaxes(1, 2) for x in (q, k, v))
    found = queries_in_lanes(*columns, (0, 0, 0), heads, interpret=True)
    expected = torch_attention(q, *(np.repeat(x, sharing, axis=0) for x in (k, v)))
    assert relative_error(found.swapaxes(1, 2).reshape(q.shape), expected) <= 1e-5


@pytest.mark.parametrize(("length", "dtype"), [(256, "float32"), (256, "bfloat16"), (9, "float32")])
def test_positions_of_an_image_attend_to_each_other(length, dtype):
    """By the kernel and without it; a length that does not fill the lanes has none."""
    qkv = tokens(2, length, 3 * 24, seed=0)
    q, k, v = (part.reshape(2, length, 3, 8) for part in np.split(qkv, 3, axis=-1))
    expected = torch_attention(q, k, v).reshape(2, length, 24)
    given = jnp.asarray(qkv, dtype)
    tolerance = TOLERANCE if dtype == "float32" else 2**-6
    found = attention_over_positions(given, 3)
    assert found.dtype == given.dtype
    assert relative_error(found.astype(jnp.float32), expected) <= tolerance
    if length % 128 == 0:
        columns = given.swapaxes(1, 2)
        found = queries_in_lanes(columns, columns, columns, (0, 1, 2), 3, interpret=True)
        assert relative_error(found.swapaxes(1, 2).astype(jnp.float32), expected) <= tolerance


@pytest.mark.parametrize(
    ("shape", "heads"),
    [((2, 16, 6, 3 * 24), 3), ((1, 1, 5, 3 * 8), 2), ((1, 7, 131, 3 * 20), 4)],
    ids=["sixteen frames", "one frame", "odd positions of two blocks"],
)
def test_frames_of_a_position_attend_to_each_other(shape, heads):
    qkv = tokens(*shape, seed=0)
    expected = exact_attention_over_frames(qkv, heads)
    found = jax.jit(attention_over_frames, static_argnames="heads")(qkv, heads=heads)
    assert relative_error(found, expected) <= 1e-5
    kernel = functools.partial(positions_in_lanes, heads=heads, interpret=True)
    assert relative_error(kernel(qkv), expected) <= 1e-5
    half = kernel(jnp.asarray(qkv, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert relative_error(half.astype(jnp.float32), expected) <= 2**-6


def test_gradients_are_those_of_softmax_attention(monkeypatch):
    monkeypatch.setattr(attention, "_TPU_LOGITS_BYTES", 3 * ROW)
    q, k, v = (tokens(2, 6, 2, 4, seed=seed) for seed in range(3))

    def loss(attend):
        return lambda *x: jnp.sin(attend(*x)).sum()

    expected = jax.jit(jax.grad(loss(jax.nn.dot_product_attention), argnums=(0, 1, 2)))(q, k, v)
    on_chip = functools.partial(attention_on_chip, is_causal=False)
    for attend in (dot_product_attention, on_chip):
        found = jax.jit(jax.grad(loss(attend), argnums=(0, 1, 2)))(q, k, v)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize(
    ("attend", "shape"),
    [(attention_over_frames, (1, 4, 3, 24)), (attention_over_positions, (1, 128, 24))],
)
def test_kernels_pass_gradients_whatever_the_platform(attend, shape):
    """A kernel has no derivative: that of XLA's operations is taken."""
    qkv = tokens(*shape, seed=0)

    def loss(qkv):
        return jnp.sin(attend(qkv, 2)).sum()

    exact = jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" not in exact.as_text()
    step = 1e-3
    along = tokens(*qkv.shape, seed=1)
    numeric = (loss(qkv + step * along) - loss(qkv - step * along)) / (2 * step)
    np.testing.assert_allclose((jax.grad(loss)(qkv) * along).sum(), numeric, rtol=1e-2)


@pytest.mark.parametrize(("platform", "kernels"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
@pytest.mark.parametrize(
    ("attend", "shape"),
    [
        (attention_over_frames, (1, 4, 5, 24)),
        (attention_over_positions, (1, 128, 24)),
        (lambda x, heads: dot_product_attention(x, x[:, 0], x[:, 1]), (2, 3, 128, 2, 8)),
    ],
    ids=["frames", "positions", "to the same keys"],
)
def test_kernels_are_for_tpus_alone(attend, shape, platform, kernels):
    attend = jax.jit(functools.partial(attend, heads=2))
    text = attend.trace(tokens(*shape, seed=0)).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("tpu_custom_call") == kernels
