"""The float branch of low rank beside a product, of what the rounding of weights left."""

import functools

import jax
import jax.numpy as jnp

from qvd_jax.axes import Array
from qvd_jax.quant.codec import LOW_RANK_DTYPE

_FLOOR = 1e-3
"""Of an input's weight in the error, as a share of the mean: what no row moved counts, too."""


@functools.partial(jax.jit, static_argnames=("rank", "mean_counts"))
def factors(
    left: Array, rows: Array, rank: int, *, mean_counts: bool = False
) -> tuple[Array, Array]:
    """Two thin matrices whose product is nearest to what rounding left, bfloat16.

    With S the diagonal matrix of how much each input varies, down = S^-1 U and up = E V^T of the
    largest singular values E of S left (LQER: Zhang et al., arXiv 2402.02446, section 3.2).

    Args:
      left: weights less what their codes stand for, `[K, O]`.
      rows: what the weights multiply, sampled, `[R, K]`.
      rank: of the product, at most that of `left`.
      mean_counts: as in `clipping.error_of_codes`.

    Returns:
      `[K, rank]` and `[rank, O]`.
    """
    spread = jnp.square(rows).mean(0) ** 0.5 if mean_counts else rows.std(0)
    spread = jnp.maximum(spread, _FLOOR * spread.mean())
    spread = jnp.where(spread > 0, spread, 1.0)
    left_vectors, values, right_vectors = jnp.linalg.svd(
        spread[:, None] * left, full_matrices=False
    )
    down = left_vectors[:, :rank] / spread[:, None]
    up = values[:rank, None] * right_vectors[:rank]
    return down.astype(LOW_RANK_DTYPE), up.astype(LOW_RANK_DTYPE)
