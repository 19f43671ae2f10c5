"""The formulas of embeddings, norms and SiLU, beside PyTorch's and float64's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from parity import relative_error

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


def test_silu_is_float32():
    x = np.linspace(-20, 20, 4001).astype(jnp.bfloat16)
    exact = np.float64(x) / (1 + np.exp(-np.float64(x)))
    found = jax.jit(silu)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(found), exact, rtol=1e-6)
