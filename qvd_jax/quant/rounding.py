"""Rounding of weights that makes up for errors already made (GPTQ).

Rounding to the nearest code errs in every weight on its own, and the errors add up in a layer's
output as its inputs vary together. Frantar et al., arXiv 2210.17323 round one input after the other
and move what each rounding missed to the inputs not yet rounded, where the inputs' Gram matrix says
that it does least harm.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from qvd_jax.axes import Array
from qvd_jax.quant import clipping
from qvd_jax.quant.codec import max_code, quantize_weights

DAMPING = 0.01
"""Share of the Gram matrix' mean diagonal that is added to it, as in the paper's code."""

_BLOCK = 128
"""Inputs after which what they missed is moved to all that follow."""

_LARGEST = 4096
"""Inputs that are rounded with regard to each other: the work grows with the cube of them."""


def clip_and_round(
    weights: Array,
    rows: Array,
    exact: Array,
    bits: int,
    input_step: Array | float = 1.0,
    *,
    clips: Sequence[float],
    mean_counts: bool = False,
) -> tuple[Array, Array]:
    """Codes by `round_weights`, each output clipped where its error is then least.

    What is rounded last takes what the clipped ones missed, so each share is tried to its end.

    Args:
      weights: `[K, O]`.
      rows: what the weights multiply, sampled, `[R, K]`.
      exact: the float layer's output `[R, O]`, up to a constant unless the mean counts.
      bits: of a code.
      input_step: D of the input's codes, 1 of a float input.
      clips: shares of each output's largest weight that may get the largest code.
      mean_counts: as in `clipping.error_of_codes`.

    Returns:
      As `codec.quantize_weights`.
    """
    scales = jnp.stack([quantize_weights(weights, bits, input_step, clip)[1] for clip in clips])
    # Outputs are rounded apart, so those of all shares are so many outputs.
    steps = scales.astype(jnp.float32).reshape(-1) / input_step
    tiled = jnp.tile(weights, (1, len(clips)))
    codes = round_weights(tiled, steps, rows, bits, mean_counts=mean_counts)
    codes = codes.reshape(len(weights), len(clips), -1)
    errors = [
        clipping.error_of_codes(rows, codes[:, i], scale, exact, mean_counts=mean_counts)
        for i, scale in enumerate(scales)
    ]
    # The first of equals: the widest.
    best = jnp.stack(errors).argmin(0)[None]
    chosen = jnp.take_along_axis(codes, best[None], axis=1)[:, 0]
    return chosen, jnp.take_along_axis(scales, best, axis=0)[0]


def round_weights(
    weights: Array, scale: Array, rows: Array, bits: int, *, mean_counts: bool = False
) -> Array:
    """Codes of a weight matrix whose errors make up for each other on the inputs seen.

    Args:
      weights: `[K, O]`.
      scale: the weights' step for each output, `[O]`, float32.
      rows: what the weights multiply, sampled, `[R, K]`, up to a common factor.
      bits: of a code.
      mean_counts: as in `clipping.error_of_codes`.

    Returns:
      int8 codes `[K, O]`.
    """
    seen = rows if mean_counts else rows - rows.mean(0, keepdims=True)
    parts = _parts(len(weights))
    groups = zip(jnp.array_split(weights, parts), jnp.array_split(seen, parts, axis=1), strict=True)
    return jnp.concatenate([_gptq(part, scale, of_part, bits=bits) for part, of_part in groups])


def spared(rows: Array) -> Array:
    """How much of its rounding error each input is left with, `[K]`, in the units of the rows.

    The mean square of an output's error that `round_weights` makes is the sum over inputs of that
    number times the square of what rounding missed (Frantar et al., arXiv 2210.17323, equation 2):
    1 / U_kk^2 as of `_gptq`, the variance that input k has beside those rounded after it.

    Args:
      rows: what the weights multiply, sampled, `[R, K]`.
    """
    seen = rows - rows.mean(0, keepdims=True)
    groups = jnp.array_split(seen, _parts(seen.shape[1]), axis=1)
    return jnp.concatenate([_spared(group) for group in groups])


def _parts(inputs: int) -> int:
    """In how many groups of neighbors inputs are rounded: a tap's channels lie side by side."""
    return -(-inputs // _LARGEST)


@jax.jit
def _spared(rows: Array) -> Array:
    order, inverse = _inverse_factor(rows)
    return jnp.zeros(len(order)).at[order].set(1 / jnp.square(jnp.diag(inverse)))


def _inverse_factor(rows: Array) -> tuple[Array, Array]:
    """The order in which inputs are rounded, of the largest variance first, `[K]`, and U in it.

    With H the damped Gram matrix, H^-1 = U^T U and U `[K, K]` is upper triangular.
    """
    gram = jnp.matmul(rows.T, rows, precision="highest") / len(rows)
    variances = jnp.diag(gram)
    order = jnp.argsort(-variances)
    damping = DAMPING * variances.mean()
    # Inputs that none of the rows moved are rounded to the nearest code.
    damping = jnp.where(damping > 0, damping, 1.0)
    gram = gram[order][:, order] + damping * jnp.eye(len(gram))
    # H = R R^T with R upper triangular, from the Cholesky factor of H turned about; U = R^-1.
    factor = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return order, solve_triangular(factor, jnp.eye(len(gram)))


@functools.partial(jax.jit, static_argnames="bits")
def _gptq(weights: Array, scale: Array, rows: Array, *, bits: int) -> Array:
    """Algorithm 1 of the paper, inputs of the largest variance first.

    Rounding input k leaves the error e = (w_k - q_k) / U_kk, and each input j behind it becomes
    w_j - U_kj e, with U of `_inverse_factor`.

    Args:
      weights: `[K, O]`.
      scale: `[O]`.
      rows: `[R, K]`.
      bits: of a code.
    """
    inputs, outputs = weights.shape
    padded = -(-inputs // _BLOCK) * _BLOCK
    order, inverse = _inverse_factor(rows)
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
