"""Softmax attention, its formulation chosen per backend and shape.

    CPU     heads first; whole where the logits are few, else in blocks of heads or of queries
    TPU     blocks whose logits stay in the on-chip memory, by a kernel with the queries in its
            lanes where they fill them, else by a loop; over frames a kernel of the vector unit with
            the positions in its lanes
    CUDA    cuDNN's flash attention where it can be had, else blocks of bounded memory
    others  blocks of bounded memory

Logits and softmax are float32 everywhere. All formulations are traced, whichever is compiled: by
way of jit once for each shape, not for each layer.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array
from qvd_jax.kernels import attention_cuda, attention_tpu
from qvd_jax.kernels.blocks import largest_divisor
from qvd_jax.kernels.tpu import LANES, on_tpu

SCOPE = "attention"
"""In the names of all operations made here."""

_TPU_LOGITS_BYTES = 2**26
"""Logits of one block on a TPU: half of the on-chip memory of a v5e or v6e, all of a v5p's."""

_CPU_LOGITS_BYTES = 2**25
"""Logits of more bytes than this are computed in blocks on the CPU, unless a head's are small."""

_CPU_HEAD_BYTES = 2**19
"""A head's logits up to this gain nothing from blocks: over time, at 8192 positions of 16 frames,
and to the text, at 1024 tokens, all at once took 0.4 to 0.6 of their time."""

_CPU_BLOCK_BYTES = 2**23
"""Logits of one block: at 1024 and 2304 tokens such blocks took 0.3 of the time of all at once."""

_CPU_LEAST_BLOCK = 64
"""Where the queries divide into nothing larger, they are not divided."""


@functools.partial(jax.jit, static_argnames="is_causal", inline=True)
def dot_product_attention(q: Array, k: Array, v: Array, *, is_causal: bool = False) -> Array:
    """Softmax attention with scale D**-0.5; logits and softmax in float32.

    Args:
      q: `[B, L, heads, D]`, or `[B, F, L, heads, D]`: all frames attend to the same keys.
      k: `[B, M, heads, D]`, M the number of keys.
      v: `[B, M, heads, D]`.
      is_causal: whether token i sees only the keys up to i.

    Returns:
      The shape and dtype of `q`.
    """

    def in_kernel(q: Array, k: Array, v: Array) -> Array:
        heads = q.shape[-2]
        rows = q.reshape(-1, *q.shape[-3:])
        out = attention_tpu.queries_in_lanes(
            _columns(rows), _columns(k), _columns(v), (0, 0, 0), heads
        )
        return _rows(out, heads).reshape(q.shape)

    without_kernel = functools.partial(_without_kernel, is_causal=is_causal)
    with jax.named_scope(SCOPE):
        if is_causal or not attention_tpu.fills_lanes(q.shape[-3], k.shape[1]):
            return without_kernel(q, k, v)
        return on_tpu(in_kernel, without_kernel, q, k, v)


@functools.partial(jax.jit, static_argnames="heads", inline=True)
def attention_over_positions(qkv: Array, heads: int) -> Array:
    """Softmax attention of the positions of each image to each other, as `dot_product_attention`.

    Args:
      qkv: queries, keys and values, `[N, L, 3C]`.
      heads: their number; divides C.

    Returns:
      `[N, L, C]`.
    """

    def without_kernel(qkv: Array) -> Array:
        out = _without_kernel(*split_heads(qkv, 3, heads), is_causal=False)
        return out.reshape(*qkv.shape[:-1], -1)

    def in_kernel(qkv: Array) -> Array:
        columns = jnp.swapaxes(qkv, 1, 2)
        out = attention_tpu.queries_in_lanes(columns, columns, columns, (0, 1, 2), heads)
        return jnp.swapaxes(out, 1, 2)

    with jax.named_scope(SCOPE):
        if not attention_tpu.fills_lanes(qkv.shape[1], qkv.shape[1]):
            return without_kernel(qkv)
        return on_tpu(in_kernel, without_kernel, qkv)


@functools.partial(jax.jit, static_argnames="heads", inline=True)
def attention_over_frames(qkv: Array, heads: int) -> Array:
    """Softmax attention of the frames of each position to each other, as `dot_product_attention`.

    Args:
      qkv: queries, keys and values, `[B, F, L, 3C]`.
      heads: their number; divides C.

    Returns:
      `[B, F, L, C]`.
    """

    def by_positions(qkv: Array) -> Array:
        q, k, v = split_heads(jnp.swapaxes(qkv, 1, 2), 3, heads)
        out = dot_product_attention(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
        return jnp.swapaxes(out.reshape(*q.shape[:3], -1), 1, 2)

    with jax.named_scope(SCOPE):
        return on_tpu(
            functools.partial(attention_tpu.positions_in_lanes, heads=heads), by_positions, qkv
        )


def split_heads(x: Array, parts: int, heads: int) -> tuple[Array, ...]:
    """Parts of the last axis, each divided among the heads: `[..., C]` to `[..., heads, D]`s."""
    return tuple(part.reshape(*part.shape[:-1], heads, -1) for part in jnp.split(x, parts, axis=-1))


def attention_on_chip(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """Attention in blocks of heads, and of queries where one head's logits are too many.

    The logits of a block stay on the chip. The sums of the weights are one more column of the
    product with v, which the matrix unit has room for. Modelled for a v5e, 32 images of 4096
    tokens, 8 heads of 40: 14 ms, where logits in the main memory take 150, a sum beside the
    product 69, blocks of 1024 queries 19, and jax's Pallas kernels 22.
    """
    batch, length, heads, width = q.shape
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], width) for x in (q, k, v))
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    row_bytes = 4 * LANES * math.ceil(k.shape[1] / LANES)
    block = length
    if length * row_bytes > _TPU_LOGITS_BYTES:
        block = largest_divisor(length, _TPU_LOGITS_BYTES // row_bytes)
    group = largest_divisor(batch * heads, _TPU_LOGITS_BYTES // (row_bytes * block))

    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head

        def attend(queries: tuple[Array, Array]) -> Array:
            first, q = queries
            out = _weigh(_exponentials(q, k, first=first if is_causal else None), v)
            return (out[..., :width] / out[..., width:]).astype(q.dtype)

        if block == length:
            return attend((jnp.int32(0), q))
        starts = jnp.arange(0, length, block)
        return lax.map(attend, (starts, q.reshape(-1, block, width))).reshape(q.shape)

    if group == len(q):
        out = jax.vmap(attend_head)((q, k, v))
    else:
        out = lax.map(attend_head, (q, k, v), batch_size=group)
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


def _without_kernel(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """`dot_product_attention` by XLA's operations."""

    def frame_by_frame(q: Array, k: Array, v: Array) -> Array:
        frames = 1 if q.ndim == 4 else q.shape[1]
        k, v = (jnp.repeat(x, frames, axis=0) for x in (k, v))
        out = attention_on_chip(q.reshape(-1, *q.shape[-3:]), k, v, is_causal=is_causal)
        return out.reshape(q.shape)

    def all_frames(
        attend: Callable[..., Array],
    ) -> Callable[[Array, Array, Array], Array]:
        def attend_all(q: Array, k: Array, v: Array) -> Array:
            out = attend(q.reshape(len(q), -1, *q.shape[-2:]), k, v, is_causal=is_causal)
            return out.reshape(q.shape)

        return attend_all

    return lax.platform_dependent(
        q,
        k,
        v,
        cpu=all_frames(_cpu),
        tpu=frame_by_frame,
        cuda=all_frames(attention_cuda.attention),
        default=all_frames(attention_cuda.attention_in_blocks),
    )


def _columns(x: Array) -> Array:
    """`[N, L, heads, D]` with a token in each column, `[N, heads * D, L]`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)


def _rows(x: Array, heads: int) -> Array:
    """The opposite of `_columns`."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], heads, -1)


def _cpu(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    # Without the barrier XLA folds the transpositions into products that are half as fast.
    q, k, v = lax.optimization_barrier(tuple(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    batch, heads, length, _ = q.shape
    head = 4 * length * k.shape[2]
    if is_causal or head <= _CPU_HEAD_BYTES or batch * heads * head <= _CPU_LOGITS_BYTES:
        out = _attend(q, k, v, is_causal=is_causal)
    else:
        out = _attend_in_blocks(q, k, v)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _attend(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """Attention of `[..., heads, L, D]`, float32, that divides after the product with v.

    The division then runs over `[L, D]` instead of `[L, M]`. With the heads before the tokens it
    took 0.5 to 0.8 of the time on two cores of a Xeon; `jax.nn.dot_product_attention` was the
    slowest of the formulations measured.
    """
    weights = _exponentials(q, k, first=0 if is_causal else None)
    return _weigh(weights, v) / weights.sum(-1, keepdims=True)


def _attend_in_blocks(q: Array, k: Array, v: Array) -> Array:
    """`_attend` without a mask, in blocks of heads, and of a head's queries where one is larger.

    Few heads with all their queries took 0.7 to 0.8 of the time of all heads with few queries.
    The sums of the weights are one more column of the product with v: with a single use of the
    exponentials XLA fuses everything into one pass, in 0.6 to 0.8 of the time. Results stay
    float32 for the loops: XLA's CPU writes a slice of bfloat16 by converting the whole array.
    """
    heads, length, width = q.shape[1:]
    row_bytes = 4 * k.shape[2]
    group = _power_of_two_in(heads, _CPU_BLOCK_BYTES / (row_bytes * length))
    block = _power_of_two_in(length, _CPU_BLOCK_BYTES / (row_bytes * group))
    block = block if block >= _CPU_LEAST_BLOCK else length
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head

        def attend(q: Array) -> Array:
            out = _weigh(_exponentials(q, k), v)
            return out[..., :width] / out[..., width:]

        return lax.map(attend, q.reshape(-1, block, width)).reshape(q.shape)

    per_head = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return lax.map(attend_head, per_head, batch_size=group).reshape(q.shape)


def _power_of_two_in(number: int, size: float) -> int:
    """The power of two next to `size`, or the largest one that divides `number`."""
    return math.gcd(number, 2 ** max(round(math.log2(size)), 0))


def _exponentials(q: Array, k: Array, first: Array | int | None = None) -> Array:
    """Weights before they are divided by their sums, float32 `[..., L, M]`.

    Args:
      q: `[..., L, D]`.
      k: `[..., M, D]`.
      first: which token the first query is, where a token sees only those up to itself; None
        lets it see all.
    """
    logits = jnp.einsum("...ld,...md->...lm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (1 / math.sqrt(q.shape[-1]))
    if first is not None:
        rows, columns = (
            lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim + axis) for axis in (-2, -1)
        )
        logits = jnp.where(columns <= rows + first, logits, jnp.finfo(jnp.float32).min)
    return jnp.exp(logits - logits.max(-1, keepdims=True))


def _weigh(weights: Array, v: Array) -> Array:
    """Float32 `[..., L, D]`."""
    return jnp.einsum(
        "...lm,...md->...ld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
