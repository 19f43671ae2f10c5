"""Activations that layers and kernels share."""

import math

import jax
import jax.numpy as jnp

from qvd_jax.axes import Array


def gelu(x: Array) -> Array:
    """GELU, x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415), as PyTorch computes it; float32.

    `nn.gelu` takes erfc, which differs only where the result is next to zero, and costs a CPU
    several times as much.
    """
    half = 0.5 * x.astype(jnp.float32)
    return half + half * jax.lax.erf(half * math.sqrt(2))
