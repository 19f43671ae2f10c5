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


_HALF_LOGIT = (
    0.7978842,
    0.03633428,
    -3.312997e-05,
    -5.524016e-05,
    3.96911e-06,
    -1.334464e-07,
    1.805617e-09,
)
"""Of x, x**3 and so on, what half of the logit of Phi(x) is next to, up to `_LARGEST`: fitted so
that the largest error of the GELU is least."""

_LARGEST = 6.0


def gelu_by_tanh(x: Array) -> Array:
    """`gelu` for kernels of the TPU, which has an instruction for tanh; within 1e-6; float32.

    Phi(x) is (1 + tanh(u)) / 2 with u half of its logit, which a polynomial comes near to. Beside
    erf this takes half of the operations.
    """
    near = jnp.clip(x, -_LARGEST, _LARGEST)
    square = jnp.square(near)
    ratio = jnp.zeros_like(square)
    for factor in reversed(_HALF_LOGIT):
        ratio = ratio * square + factor
    half = 0.5 * x
    return half + half * jnp.tanh(near * ratio)
