"""Activations that layers and kernels share."""

import functools
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


_HALF_LOGIT = (0.7978276, 0.03646993, -0.0001254763, -3.046718e-05, 1.112631e-06)
"""Of x, x**3 and so on, what half of the logit of Phi(x) is next to, up to `_LARGEST`: fitted so
that the largest error of the GELU is least."""

_LARGEST = 5.5


def gelu_by_tanh(x: Array) -> Array:
    """`gelu` for kernels of the TPU, which has an instruction for tanh; within 4e-6; float32.

    Phi(x) is (1 + tanh(u)) / 2 with u half of its logit, which a polynomial comes near to. Beside
    erf this takes a third of the operations.
    """
    near = jnp.clip(x, -_LARGEST, _LARGEST)
    square = jnp.square(near)
    ratio = functools.reduce(lambda sum, factor: sum * square + factor, reversed(_HALF_LOGIT))
    half = 0.5 * x
    return half + half * jnp.tanh(near * ratio)
