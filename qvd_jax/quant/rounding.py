"""Rounding of weights that makes up for errors already made (GPTQ).

Rounding to the nearest code errs in every weight on its own, and the errors add up in a layer's
output as its inputs vary together. Frantar et al., arXiv 2210.17323 round one input after the other
and move what each rounding missed to the inputs not yet rounded, where the inputs' Gram matrix says
that it does least harm.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from qvd_jax.axes import Array
from qvd_jax.quant.codec import max_code

DAMPING = 0.01
"""Share of the Gram matrix' mean diagonal that is added to it, as in the paper's code."""

_BLOCK = 128
"""Inputs after which what they missed is moved to all that follow."""

_LARGEST = 4096
"""Inputs that are rounded with regard to each other: the work grows with the cube of them."""


def round_weights(
    weights: Array, scale: Array, rows: Array, bits: int, *, mean_counts: bool = False
) -> Array:
    """Codes of a weight matrix whose errors make up for each other on the inputs seen.

    Args:
      weights: `[K, O]`.
      scale: the weights' step for each output, `[O]`, float32.
      rows: what the weights multiply, sampled, `[R, K]`, up to a common factor.
      bits: of a code.
      mean_counts: as in `clipping.output_error`.

    Returns:
      int8 codes `[K, O]`.
    """
    seen = rows if mean_counts else rows - rows.mean(0, keepdims=True)
    # Neighbors are rounded together: a tap's channels lie side by side.
    parts = -(-weights.shape[0] // _LARGEST)
    groups = zip(jnp.array_split(weights, parts), jnp.array_split(seen, parts, axis=1), strict=True)
    return jnp.concatenate([_gptq(part, scale, of_part, bits=bits) for part, of_part in groups])


@functools.partial(jax.jit, static_argnames="bits")
def _gptq(weights: Array, scale: Array, rows: Array, *, bits: int) -> Array:
    """Algorithm 1 of the paper, inputs of the largest variance first.

    With H the damped Gram matrix, H^-1 = U^T U and U upper triangular, rounding input k leaves the
    error e = (w_k - q_k) / U_kk, and each input j behind it becomes w_j - U_kj e.

    Args:
      weights: `[K, O]`.
      scale: `[O]`.
      rows: `[R, K]`.
      bits: of a code.
    """
    inputs, outputs = weights.shape
    padded = -(-inputs // _BLOCK) * _BLOCK
    gram = jnp.matmul(rows.T, rows, precision="highest") / len(rows)
    variances = jnp.diag(gram)
    order = jnp.argsort(-variances)
    damping = DAMPING * variances.mean()
    # Inputs that none of the rows moved are rounded to the nearest code.
    damping = jnp.where(damping > 0, damping, 1.0)
    gram = gram[order][:, order] + damping * jnp.eye(inputs)
    # H = R R^T with R upper triangular, from the Cholesky factor of H turned about; U = R^-1.
    factor = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    inverse = solve_triangular(factor, jnp.eye(inputs))
    shares = inverse / jnp.diag(inverse)[:, None]
    shares = jnp.pad(shares, (0, padded - inputs))
    left = jnp.pad(weights[order] / scale[None], ((0, padded - inputs), (0, 0)))
    limit = max_code(bits)
    places = jnp.arange(_BLOCK)

    def round_block(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, codes = state
        start = number * _BLOCK
        mine = lax.dynamic_slice(left, (start, 0), (_BLOCK, outputs))
        forward = lax.dynamic_slice(shares, (start, 0), (_BLOCK, padded))
        inside = lax.dynamic_slice(forward, (0, start), (_BLOCK, _BLOCK))

        def round_input(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mine, rounded, errors = state
            code = jnp.clip(jnp.round(mine[k]), -limit, limit)
            error = mine[k] - code
            behind = jnp.where(places > k, inside[k], 0.0)
            return (
                mine - behind[:, None] * error[None],
                rounded.at[k].set(code),
                errors.at[k].set(error),
            )

        empty = jnp.zeros_like(mine)
        _, rounded, errors = lax.fori_loop(0, _BLOCK, round_input, (mine, empty, empty))
        beyond = jnp.where(jnp.arange(padded)[None] >= start + _BLOCK, forward, 0.0)
        left = left - jnp.matmul(beyond.T, errors, precision="highest")
        return left, lax.dynamic_update_slice(codes, rounded, (start, 0))

    _, codes = lax.fori_loop(0, padded // _BLOCK, round_block, (left, jnp.zeros_like(left)))
    return jnp.zeros((inputs, outputs), jnp.int8).at[order].set(codes[:inputs].astype(jnp.int8))
