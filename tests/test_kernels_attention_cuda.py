"""Attention on CUDA against 64-bit softmax, what it keeps in memory, and when it is cuDNN's."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo

from qvd_jax.kernels import attention_cuda
from qvd_jax.kernels.attention import dot_product_attention
from qvd_jax.kernels.attention_cuda import (
    attention,
    attention_in_blocks,
    can_use_cudnn,
    without_cudnn,
)

FEW = 4 * 2 * 12
"""Bytes of one query's logits with two heads and twelve keys."""

BLOCKS = [
    pytest.param((6, 12, 12), 2**28, True, id="all at once"),
    pytest.param((6, 12, 12), FEW * 12 * 2, False, id="sequences in twos"),
    pytest.param((5, 9, 12), FEW * 9 * 2, True, id="odd sequences, one by one"),
    pytest.param((2, 15, 12), FEW * 6, False, id="queries in fives"),
    pytest.param((2, 12, 12), FEW * 4, True, id="queries in fours"),
    pytest.param((3, 13, 7), FEW, False, id="one query, odd keys"),
    pytest.param((3, 4, 1), 16, False, id="one key"),
    pytest.param((3, 1, 12), FEW // 2, False, id="one query of more than a block"),
]
HEADS, WIDTH = 2, 8


def operands(batch, length, keys, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, HEADS, WIDTH) for n in (length, keys, keys)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def softmax_attention(q, k, v, *, is_causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.exp(np.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1]))
    if is_causal:
        weights = np.tril(weights)
    return np.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdims=True), v)


def float32_bytes(text):
    """Of each float32 value in a lowered program, slices of a loop's operands included."""
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", text)
    return [4 * math.prod(map(int, shape.split("x")[:-1])) for shape in shapes]


@pytest.mark.parametrize(("shape", "block", "is_causal"), BLOCKS)
def test_blocks_are_softmax_attention(shape, block, is_causal, monkeypatch):
    monkeypatch.setattr(attention_cuda, "_BLOCK_BYTES", block)
    inputs = operands(*shape)
    expected = softmax_attention(*inputs, is_causal=is_causal)
    attend = jax.jit(lambda *inputs: attention_in_blocks(*inputs, is_causal=is_causal))
    np.testing.assert_allclose(attend(*inputs), expected, atol=1e-5)
    half = attend(*(x.astype(jnp.bfloat16) for x in inputs))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=2**-5)


@pytest.mark.parametrize(
    ("block", "loops"), [(2**28, 0), (4 * HEADS * 64 * 64 * 2, 1), (4 * HEADS * 64 * 16, 2)]
)
def test_no_more_logits_than_a_block_has_are_kept(block, loops, monkeypatch):
    monkeypatch.setattr(attention_cuda, "_BLOCK_BYTES", block)
    inputs = operands(6, 64, 64, jnp.bfloat16)
    text = jax.jit(lambda *inputs: attention_in_blocks(*inputs)).lower(*inputs).as_text()
    assert len(re.findall("stablehlo.while", text)) == loops
    assert max(float32_bytes(text)) == min(block, 4 * 6 * HEADS * 64 * 64)


def test_gradients_of_blocks_are_those_of_softmax_attention(monkeypatch):
    inputs = operands(2, 4, 4)

    def loss(*inputs):
        return jnp.sin(attention_in_blocks(*inputs, is_causal=True)).sum()

    monkeypatch.setattr(attention_cuda, "_BLOCK_BYTES", 4 * HEADS * 4 * 2)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    rng, step = np.random.default_rng(1), 1e-6
    for place, gradient in enumerate(gradients):
        along = rng.standard_normal(gradient.shape)
        moved = [list(map(np.float64, inputs)) for _ in range(2)]
        moved[0][place] += step * along
        moved[1][place] -= step * along
        above, below = (np.sin(softmax_attention(*x, is_causal=True)).sum() for x in moved)
        assert (np.float64(gradient) * along).sum() == pytest.approx(
            (above - below) / (2 * step), rel=1e-4
        )


REFUSED = [
    pytest.param((2, 64, 64, 40), {"dtype": np.float32}, id="float32"),
    pytest.param((2, 64, 64, 36), {}, id="width 36"),
    pytest.param((16, 64, 64, 512), {}, id="the VAE's head"),
    pytest.param((2, 64, 1, 40), {}, id="one key"),
    pytest.param((2**16, 8, 8, 40), {}, id="more sequences than a grid has"),
]
TAKEN = [
    pytest.param((32, 4096, 4096, 40), {}, id="spatial"),
    pytest.param((2, 65536, 77, 80), {}, id="text"),
    pytest.param((8192, 16, 16, 40), {}, id="temporal"),
    pytest.param((3, 77, 77, 64), {"is_causal": True}, id="CLIP"),
    pytest.param((5, 1, 33, 64), {}, id="one query"),
]


def described(shape, dtype=jnp.bfloat16):
    batch, length, keys, width = shape
    return [jax.ShapeDtypeStruct((batch, n, HEADS, width), dtype) for n in (length, keys, keys)]


def lowered(shape, dtype=jnp.bfloat16, **options):
    """For CUDA on any machine, beside another platform's formulation, mapped over twice."""

    def attend(*inputs):
        def on_cuda(*inputs):
            return attention(*inputs, **options)

        return lax.platform_dependent(*inputs, cuda=on_cuda, default=lambda q, k, v: q)

    def scanned(*inputs):
        return lax.map(lambda inputs: attend(*inputs), tuple(x[None] for x in inputs))

    traced = jax.jit(jax.vmap(scanned)).trace(
        *(jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in described(shape, dtype))
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cudnn():
    pytest.importorskip("jax_cuda12_plugin", reason="needs jax-cuda12-plugin and cuDNN")
    if not can_use_cudnn(*described((2, 64, 64, 40))):
        pytest.skip("cuDNN is not installed")


@pytest.mark.parametrize(("shape", "options"), TAKEN)
def test_cudnn_attends_where_it_can(shape, options, cudnn):
    assert "__cudnn$fmhaSoftmax" in lowered(shape, **options)


@pytest.mark.parametrize(("shape", "options"), REFUSED)
def test_blocks_attend_where_cudnn_cannot(shape, options, cudnn):
    assert "cudnn" not in lowered(shape, **options)


@pytest.mark.parametrize(
    ("capabilities", "narrow", "wide"),
    [
        ([], True, True),
        (["7.5"], False, False),
        (["8.0"], True, False),
        (["9.0", "9.0"], True, True),
        (["9.0", "8.0"], True, False),
        (["10.0"], True, False),
    ],
)
def test_cudnn_is_asked_for_what_the_gpus_have(capabilities, narrow, wide, monkeypatch):
    gpus = [SimpleNamespace(platform="gpu", compute_capability=c) for c in capabilities]
    monkeypatch.setattr(jax, "local_devices", lambda: gpus)
    monkeypatch.setattr(attention_cuda, "_cudnn", lambda q, k, v, *, is_causal: q)
    if gpus:
        assert can_use_cudnn(*described((2, 64, 64, 128))) == narrow
        assert can_use_cudnn(*described((2, 64, 64, 160))) == wide
    else:
        assert can_use_cudnn(*described((2, 64, 64, 128)))


def test_blocks_attend_where_programs_are_for_any_machine(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    inputs = described((2, 64, 64, 40))
    attend = jax.jit(lambda *inputs: dot_product_attention(*inputs))

    def program():
        return attend.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()

    assert "__cudnn$fmhaSoftmax" in program()
    with without_cudnn(True):
        assert "cudnn" not in program()
    assert "__cudnn$fmhaSoftmax" in program()


def test_without_cudnn_blocks_attend(monkeypatch):
    def refuse(*inputs, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(attention_cuda, "_cudnn", refuse)
    inputs = operands(2, 6, 6, jnp.bfloat16)
    assert not can_use_cudnn(*inputs)
    text = jax.jit(lambda *inputs: attention(*inputs)).lower(*inputs).as_text()
    assert len(re.findall("stablehlo.dot_general", text)) == 2
