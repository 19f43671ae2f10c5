"""The formulas of attention, embeddings and SiLU, beside PyTorch's and float64's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers.models.embeddings import get_timestep_embedding
from jax import lax

from qvd_jax.models import attention
from qvd_jax.models.attention import dot_product_attention
from qvd_jax.models.layers import silu, sinusoidal_embedding, sinusoidal_positions

TOLERANCE = 1e-4


def test_timestep_embedding_is_diffusers_with_cosines_first():
    timesteps = np.float32([0, 1, 500.5, 961])
    expected = get_timestep_embedding(
        torch.from_numpy(timesteps), 320, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    found = np.asarray(sinusoidal_embedding(timesteps, 320))
    assert relative_error(found, expected) <= TOLERANCE
    np.testing.assert_allclose(found[3, :2], [0.946897, -0.778964], atol=1e-4)


def test_positions_interleave_sines_and_cosines():
    found = np.asarray(sinusoidal_positions(24, 64))
    np.testing.assert_allclose(
        found[1, :6], [0.84147, 0.54030, 0.68156, 0.73176, 0.53317, 0.84601], atol=1e-5
    )


def tokens(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def torch_attention(q, k, v, *, is_causal):
    return torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)), is_causal=is_causal
    ).transpose(1, 2)


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
    "limit", [2**30, 2**14, 2**10], ids=["whole", "four by four", "one by one"]
)
def test_attention_on_accelerators_is_softmax_attention(limit, is_causal, monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS_BYTES", limit)
    compiled = jax.jit(functools.partial(dot_product_attention, is_causal=is_causal))
    q, k, v = (tokens(12, 16, 4, 8, seed=seed) for seed in range(3))
    for platform in ("cuda", "tpu"):
        lowered = jax.export.export(compiled, platforms=[platform])(q, k, v).mlir_module()
        assert ("while" in lowered) == (limit < 2**30)
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    found = dot_product_attention(q, k, v, is_causal=is_causal)
    assert relative_error(found, torch_attention(q, k, v, is_causal=is_causal)) <= TOLERANCE


def test_silu_is_float32():
    x = np.linspace(-20, 20, 4001).astype(jnp.bfloat16)
    exact = np.float64(x) / (1 + np.exp(-np.float64(x)))
    found = jax.jit(silu)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(found), exact, rtol=1e-6)
