"""Attention on CUDA: cuDNN's flash attention where it can be had, else blocks of XLA's products.

GB that its kernels read and write, and of temporaries, for 16 frames of 64x64 latents with
guidance in bfloat16; compiled for an H200 with jax 0.10.2, not run (`tests/measure_cuda.py`):

    sequences, keys, heads             cuDNN      blocks of 256 MiB    of 1 GiB
    32 x 4096, 4096, 8 of 40           0.34, 0    54.39, 0.66          53.30, 1.86
    32 x 1024, 1024, 8 of 80           0.17, 0     4.10, 0.53           3.72, 1.61
    2 x 65536, 77, 8 of 40             0.17, 0     1.89, 0.33           1.47, 0.48
    8192 x 16, 16, 8 of 40             0.34, 0     1.21, 0.18           1.21, 0.18
    16 x 4096, 4096, 1 of 512                -     4.50, 0.54           3.49, 1.61

A scan over blocks of keys, with running maxima and sums, moves 1.5 to 3.4 times what blocks of
queries and sequences do: XLA has one kernel for the softmax of whole rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qvd_jax.axes import Array
from qvd_jax.kernels.blocks import largest_divisor

_BLOCK_BYTES = 2**28
"""Logits of one block. A quarter of that takes four times as many rounds, and moves 6% more where
most time goes; four times as much saves 2% there."""

without_cudnn = jax.make_user_context(False)
"""`with without_cudnn(True):` what is traced is for any CUDA machine, with cuDNN or without."""

_CUDNN_MOST = 2**16 - 1
"""Sequences that cuDNN takes at once (pytorch/pytorch#181235: one more fails when it runs)."""

_CUDNN_WIDTH = 128
"""Head width beyond which cuDNN's kernels are for Hopper alone."""


def attention(q: Array, k: Array, v: Array, *, is_causal: bool = False) -> Array:
    """Softmax attention with scale D**-0.5; logits and softmax in float32.

    Args:
      q: `[B, L, heads, D]`.
      k: `[B, M, heads, D]`, M the number of keys.
      v: `[B, M, heads, D]`.
      is_causal: whether token i sees only the keys up to i.

    Returns:
      `[B, L, heads, D]` in the dtype of `q`.
    """
    if can_use_cudnn(q, k, v, is_causal=is_causal):
        return _cudnn(q, k, v, is_causal=is_causal)
    return attention_in_blocks(q, k, v, is_causal=is_causal)


def can_use_cudnn(q: Array, k: Array, v: Array, *, is_causal: bool = False) -> bool:
    """Whether cuDNN may be used, is installed and has kernels for these shapes and dtypes.

    jax asks for cuDNN, bfloat16 or float16, and head widths that are multiples of 8, when it
    traces; what it lets pass and cuDNN refuses when it runs is asked here. The GPUs are those of
    the default backend: on a machine without one the program is for Ampere or newer, and jax
    takes widths up to 128.
    """
    if without_cudnn.value:
        return False
    try:
        jax.eval_shape(functools.partial(_cudnn, is_causal=is_causal), q, k, v)
    except RuntimeError:  # Also NotImplementedError, of shapes and dtypes.
        return False
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    capabilities = {tuple(map(int, gpu.compute_capability.split("."))) for gpu in gpus}
    return (
        q.shape[0] <= _CUDNN_MOST
        and k.shape[1] > 1
        and all(capability >= (8, 0) for capability in capabilities)
        and (q.shape[-1] <= _CUDNN_WIDTH or capabilities == {(9, 0)})
    )


def attention_in_blocks(q: Array, k: Array, v: Array, *, is_causal: bool = False) -> Array:
    """`attention` without cuDNN, of which `_BLOCK_BYTES` of logits exist at a time.

    A block is several sequences, or, of a sequence with more logits than that, some queries. Only
    where one query has more does a block exceed the bound.
    """
    batch, length, heads, _ = q.shape
    query_bytes = 4 * heads * k.shape[1]
    sequence_bytes = length * query_bytes
    if batch * sequence_bytes <= _BLOCK_BYTES:
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
    if sequence_bytes <= _BLOCK_BYTES:
        return lax.map(
            lambda sequence: jax.nn.dot_product_attention(*sequence, is_causal=is_causal),
            (q, k, v),
            batch_size=largest_divisor(batch, _BLOCK_BYTES // sequence_bytes),
        )
    block = largest_divisor(length, _BLOCK_BYTES // query_bytes)

    def attend(sequence: tuple[Array, Array, Array]) -> Array:
        q, k, v = sequence

        def attend_block(queries: tuple[Array, Array]) -> Array:
            first, q = queries
            seen = first + jnp.arange(block)[:, None] >= jnp.arange(len(k))[None]
            return jax.nn.dot_product_attention(q, k, v, mask=seen if is_causal else None)

        starts = jnp.arange(0, length, block)
        return lax.map(attend_block, (starts, q.reshape(-1, block, *q.shape[1:]))).reshape(q.shape)

    return lax.map(attend, (q, k, v))


def _cudnn(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")
