"""Attention as Pallas kernels for the TPU."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qvd_jax.axes import Array
from qvd_jax.kernels.blocks import largest_divisor
from qvd_jax.kernels.tpu import LANES, SUBLANES, VMEM_BYTES

_LOGITS_BYTES = 2**23
"""Logits of one step of the kernel; a v5e takes as long for twice as many."""

_LAGGING_BYTES = 2**22
"""Logits from which on a step finishes the block before; fewer do not make up for a step more."""


def fills_lanes(queries: int, keys: int) -> bool:
    """Whether `queries_in_lanes` is for so many."""
    return queries % LANES == 0 and 4 * LANES * keys <= _LOGITS_BYTES


def queries_in_lanes(
    q: Array,
    k: Array,
    v: Array,
    parts: tuple[int, int, int],
    heads: int,
    *,
    interpret: bool = False,
) -> Array:
    """Attention as a Pallas kernel for the TPU: a block of a head's queries to all keys at once.

    With the queries in the lanes their largest logits are found by comparing whole vectors, and
    the sums of the weights are more rows of the product with v. Of large blocks a step finishes
    the one before and begins the next, so that the compiler puts the exponentials of one between
    the products of the other. Modelled for a v5e, 32 images of 4096 tokens, 8 heads of 40: 8.1 ms,
    where a block after the other takes 11.1; its matrix units, of 128 rows and columns for each
    head of 40, are busy for 7.8. A loop of XLA takes 14, and more where it keeps other arrays on
    the chip.

    Args:
      q: `[N, parts * C, L]`, L a multiple of `LANES`.
      k: `[K, parts * C, M]`, M the number of keys; N is a multiple of K, and as many images as
        that follow each other have the same keys.
      v: `[K, parts * C, M]`.
      parts: which C channels are meant in each of the three.
      heads: their number; divides C.
      interpret: whether to run the kernel's operations one by one, on any backend.

    Returns:
      `[N, C, L]`.
    """
    images, _, length = q.shape
    sharing, keys = images // len(k), k.shape[-1]
    width = (q.shape[1] // (1 + max(parts))) // heads
    padding = -keys % LANES
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding))) if padding else x for x in (k, v))
    row_bytes = 4 * LANES * (keys + padding)
    queries = LANES * largest_divisor(length // LANES, _LOGITS_BYTES // row_bytes)
    blocks = heads * (length // queries)
    lag = int(queries * row_bytes // LANES >= _LAGGING_BYTES)
    base = math.log2(math.e) / math.sqrt(width)

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, logits_ref: Any, largest_ref: Any
    ) -> None:
        def begin() -> None:
            logits = lax.dot_general(
                k_ref[...], q_ref[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            if padding:
                places = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                logits = jnp.where(places < keys, logits, jnp.finfo(jnp.float32).min)
            logits_ref[...] = logits
            largest_ref[...] = logits.max(0, keepdims=True)

        def finish() -> None:
            weights = jnp.exp2((logits_ref[...] - largest_ref[...]) * base).astype(v_ref.dtype)
            v = jnp.concatenate([v_ref[...], jnp.ones((SUBLANES, keys + padding), v_ref.dtype)])
            out = lax.dot_general(
                v, weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            out_ref[...] = (out[:width] / out[width : width + 1]).astype(out_ref.dtype)

        for do in (finish, begin) if lag else (begin, finish):
            do()

    def block(part: int, size: int, images: int, *, lag: int, of_queries: bool) -> pl.BlockSpec:
        def place(n: Any, step: Any) -> tuple[Any, ...]:
            number = jnp.clip(step - lag, 0, blocks - 1)
            head, block = (function(number, blocks // heads) for function in (lax.div, lax.rem))
            return (lax.div(n, images), part * heads + head, 0, block if of_queries else 0)

        return pl.BlockSpec((None, None, width, size), place)

    of_queries = functools.partial(block, size=queries, images=1, of_queries=True)
    of_keys = functools.partial(block, size=keys + padding, images=sharing, of_queries=False)
    out = pl.pallas_call(
        kernel,
        grid=(images, blocks + lag),
        in_specs=[
            of_queries(parts[0], lag=0),
            of_keys(parts[1], lag=0),
            of_keys(parts[2], lag=lag),
        ],
        out_specs=of_queries(0, lag=lag),
        out_shape=jax.ShapeDtypeStruct((images, heads, width, length), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((keys + padding, queries), jnp.float32),
            pltpu.VMEM((1, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="attention_over_positions",
    )(*(x.reshape(len(x), -1, width, x.shape[-1]) for x in (q, k, v)))
    return out.reshape(images, heads * width, length)


def positions_in_lanes(qkv: Array, heads: int, *, interpret: bool = False) -> Array:
    """`attention.attention_over_frames` as a Pallas kernel for the TPU.

    Few frames make products that leave most of the matrix unit idle. Here every position is a
    lane of the vector unit, which multiplies and adds: modelled for a v5e, 16 frames of 2 x 4096
    positions, 8 heads of 40, 1.0 ms, where products take 19 with the relayout they need.

    Args:
      qkv: as in `attention.attention_over_frames`.
      heads: as there.
      interpret: whether to run the kernel's operations one by one, on any backend.

    Returns:
      As there.
    """
    batch, frames, positions, channels = qkv.shape
    width = channels // (3 * heads)
    scale = 1 / math.sqrt(width)

    def kernel(q_ref: Array, k_ref: Array, v_ref: Array, out_ref: Array) -> None:
        k, v = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
        for frame in range(frames):
            logits = (q_ref[frame].astype(jnp.float32)[None] * k).sum(1) * scale
            weights = jnp.exp(logits - logits.max(0, keepdims=True))
            out = (weights[:, None] * v).sum(0) / weights.sum(0, keepdims=True)
            out_ref[frame] = out.astype(out_ref.dtype)

    def block(part: int) -> pl.BlockSpec:
        # Batch and head are chosen, a block of positions of all frames and of a head's width.
        return pl.BlockSpec(
            (None, frames, None, width, LANES), lambda b, h, p: (b, 0, part * heads + h, 0, p)
        )

    rows = jnp.swapaxes(qkv, 2, 3).reshape(batch, frames, 3 * heads, width, positions)
    out = pl.pallas_call(
        kernel,
        grid=(batch, heads, pl.cdiv(positions, LANES)),
        in_specs=[block(0), block(1), block(2)],
        out_specs=block(0),
        out_shape=jax.ShapeDtypeStruct((batch, frames, heads, width, positions), qkv.dtype),
        interpret=interpret,
        name="attention_over_frames",
    )(rows, rows, rows)
    return jnp.swapaxes(out.reshape(batch, frames, channels // 3, positions), 2, 3)
