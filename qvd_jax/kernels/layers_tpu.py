"""Layers with what stands before and behind them as Pallas kernels for the TPU.

XLA makes three passes of a Dense layer: one that normalizes (and quantizes), a product whose
epilogue it issues slowly, and often another for what is done with the result. Here a block of
tokens is normalized, quantized where the weights are codes, multiplied, scaled, gated or added to
the residual without leaving the chip. Modelled for a v5e, 131,072 tokens, from 320 to 960 channels
behind a LayerNorm: in int8 0.4 ms, where XLA's passes take 1.8.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qvd_jax.axes import Array, Transposes
from qvd_jax.kernels import floating, int8
from qvd_jax.kernels.activations import gelu_by_tanh
from qvd_jax.kernels.tpu import LANES, VMEM_BYTES, block_of_outputs, of_image, round_to_codes

_TOKENS = 512
"""Of a block."""

_LEAST_TOKENS = 1024
"""With fewer the weights are most of what moves, and XLA's passes are as good."""

_WEIGHT_BYTES = 3 * 2**20
"""Weights of a block: a layer with less has all of them on the chip from the first block on."""


class Input(NamedTuple):
    """A layer's input and what is multiplied: x scale + offset, or its codes.

    Attributes:
      x: `[N, L, C]`.
      scale: `[M, C]`, float32; N is a multiple of M, and x[n] has scale[n mod M].
      offset: `[M, C]`, float32, with an M of its own.
      limit: the largest code, of clip(round(x scale + offset)); None where the weights are float.
      epsilon: of the LayerNorm, without scale and bias, of `x` in front of it; None without one.
      by_token: whether each position's values are divided by a step of its own, at which the
        largest is the largest code, and what is multiplied counts that step times.
    """

    x: Array
    scale: Array
    offset: Array
    limit: int | None = None
    epsilon: float | None = None
    by_token: bool = False


class Output(NamedTuple):
    """What is done with a product: product scale + bias.

    Attributes:
      scale: `[O]`, float32.
      bias: `[O]`, float32.
      dtype: of the result.
      gated: whether the first half of the outputs is a value, the second its gate, and the result
        value GELU(gate).
      residual: `[N, L, O]`, added to the result; None adds nothing.
    """

    scale: Array
    bias: Array
    dtype: DTypeLike
    gated: bool = False
    residual: Array | None = None


def can_use(shape: tuple[int, ...], outputs: int = 0, parts: int = 1) -> bool:
    """Whether a kernel is worth its call, and the chip holds its blocks.

    Args:
      shape: of its input, `[..., L, C]`.
      outputs: O of a product, or of its value where it is gated; 0 without a product.
      parts: 2 with a gate.
    """
    tokens, channels = math.prod(shape[:-1]), shape[-1]
    # What moves is there twice. Values count as float32, weights as bfloat16.
    width = block_of_outputs(outputs, 2 * parts * channels, _WEIGHT_BYTES)
    inputs = _TOKENS * channels * (2 * 4 + 4 + 2)
    weights = 2 * 2 * parts * width * channels
    results = _TOKENS * width * (2 * 2 * 4 + 2 * 4 * parts)
    return tokens >= _LEAST_TOKENS and inputs + weights + results <= VMEM_BYTES


def dense(
    given: Input,
    weights: Array,
    wanted: Output,
    transposes: Transposes = None,
    *,
    interpret: bool = False,
) -> Array:
    """Multiplies an input with weights: int8 codes, or bfloat16.

    Args:
      given: the input.
      weights: `[O, C]`.
      wanted: the output.
      transposes: as which side lies in memory; nothing but the time depends on it.
      interpret: whether to run the kernel's operations one by one, on any backend.

    Returns:
      `[N, L, O]`, with gates `[N, L, O/2]`.
    """
    with jax.named_scope(floating.SCOPE if given.limit is None else int8.SCOPE):
        return _dense(
            given.x,
            given.scale,
            given.offset,
            weights,
            wanted.scale,
            wanted.bias,
            wanted.residual,
            limit=given.limit,
            epsilon=given.epsilon,
            by_token=given.by_token,
            dtype=jnp.dtype(wanted.dtype),
            gated=wanted.gated,
            transposes=transposes,
            interpret=interpret,
        )


# Of layers of equal shape the kernel is traced once.
@functools.partial(
    jax.jit,
    static_argnames=("limit", "epsilon", "by_token", "dtype", "gated", "transposes", "interpret"),
)
def _dense(
    x: Array,
    in_scale: Array,
    in_offset: Array,
    weights: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    *,
    limit: int | None,
    epsilon: float | None,
    by_token: bool,
    dtype: DTypeLike,
    gated: bool,
    transposes: Transposes,
    interpret: bool,
) -> Array:
    images, length, channels = x.shape
    shares = length < _TOKENS and len(in_scale) == len(in_offset) == 1
    if transposes is None and shares:
        # Small images share a block.
        x = x.reshape(1, -1, channels)
        residual = None if residual is None else residual.reshape(1, -1, residual.shape[-1])
    count, tokens, _ = x.shape
    parts = 2 if gated else 1
    weights, scale, bias = (y.reshape(parts, -1, *y.shape[1:]) for y in (weights, scale, bias))
    outputs = scale.shape[-1]
    rows = min(_TOKENS, tokens)
    width = block_of_outputs(outputs, parts * channels * weights.dtype.itemsize, _WEIGHT_BYTES)
    read, written = transposes == "input", transposes == "output"

    def by_output(*others: int) -> pl.BlockSpec:
        return pl.BlockSpec((parts, width, *others), lambda n, t, o: (0, o, *(0 for _ in others)))

    def block(channels: int, *, transposed: bool, whole: bool) -> pl.BlockSpec:
        def place(n: Any, t: Any, o: Any) -> tuple[Any, ...]:
            channel = 0 if whole else o
            return (n, channel, t) if transposed else (n, t, channel)

        shape = (channels, rows) if transposed else (rows, channels)
        return pl.BlockSpec((None, *shape), place)

    # Vectors lie along the axis of what they are multiplied with.
    in_scale, in_offset = (y[:, :, None] if read else y[:, None, :] for y in (in_scale, in_offset))
    scale, bias = (y[:, :, None] if written else y[:, None, :] for y in (scale, bias))
    vector = pl.BlockSpec(
        (parts, width, 1) if written else (parts, 1, width),
        (lambda n, t, o: (0, o, 0)) if written else (lambda n, t, o: (0, 0, o)),
    )
    operands = [jnp.swapaxes(x, 1, 2) if read else x, in_scale, in_offset, weights, scale, bias]
    specs = [
        block(channels, transposed=read, whole=True),
        of_image(in_scale),
        of_image(in_offset),
        by_output(channels),
        vector,
        vector,
    ]
    if residual is not None:
        operands.append(jnp.swapaxes(residual, 1, 2) if written else residual)
        specs.append(block(width, transposed=written, whole=False))

    def kernel(x_ref: Any, in_scale_ref: Any, in_offset_ref: Any, *refs: Any) -> None:
        weights_ref, scale_ref, bias_ref, *residual_ref, out_ref = refs[: -len(scratch)]
        operand_ref, *step_ref = refs[-len(scratch) :]

        @pl.when(pl.program_id(2) == 0)
        def _prepare() -> None:
            x, axis = x_ref[...].astype(jnp.float32), 0 if read else 1
            if epsilon is not None:
                x = x - x.mean(axis, keepdims=True)
                x = x * lax.rsqrt(jnp.square(x).mean(axis, keepdims=True) + epsilon)
            x = x * in_scale_ref[...] + in_offset_ref[...]
            if by_token:
                assert limit is not None, "codes alone have steps"
                reach = jnp.abs(x).max(axis, keepdims=True)
                step = jnp.where(reach > 0, reach / limit, 1.0)
                x = x / step
                step_ref[0][...] = step if read == written else _turned(step)
            operand_ref[...] = (
                x.astype(weights.dtype) if limit is None else round_to_codes(x, limit)
            )

        def product(part: int) -> Array:
            sides = (operand_ref[...], weights_ref[part])
            axes = (0 if read else 1, 1)
            if written:
                sides, axes = sides[::-1], axes[::-1]
            total = lax.dot_general(
                *sides,
                (((axes[0],), (axes[1],)), ((), ())),
                preferred_element_type=jnp.float32 if limit is None else jnp.int32,
            )
            scaled = total.astype(jnp.float32) * scale_ref[part]
            for ref in step_ref:
                scaled = scaled * ref[...]
            return scaled + bias_ref[part]

        out = product(0) * gelu_by_tanh(product(1)) if gated else product(0)
        for ref in residual_ref:
            out = out + ref[...].astype(jnp.float32)
        out_ref[...] = out.astype(out_ref.dtype)

    scratch = [pltpu.VMEM((channels, rows) if read else (rows, channels), weights.dtype)]
    if by_token:
        scratch.append(pltpu.VMEM((1, rows) if written else (rows, 1), jnp.float32))
    shape = (count, outputs, tokens) if written else (count, tokens, outputs)
    out = pl.pallas_call(
        kernel,
        grid=(count, pl.cdiv(tokens, rows), pl.cdiv(outputs, width)),
        in_specs=specs,
        out_specs=block(width, transposed=written, whole=False),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
        name=("" if epsilon is None else "layer_norm_")
        + "dense"
        + ("_by_token" if by_token else ""),
    )(*operands)
    out = jnp.swapaxes(out, 1, 2) if written else out
    return out.reshape(images, length, outputs)


def _turned(vector: Array) -> Array:
    """`[L, 1]` as `[1, L]`, or the other way; what turns arrays on the chip takes whole tiles."""
    length, along = max(vector.shape), vector.shape[1] == 1
    tile = jnp.broadcast_to(vector, (length, LANES) if along else (LANES, length)).T
    return tile[:1] if along else tile[:, :1]


def quantize_activated(
    x: Array,
    norm: tuple[Array, Array],
    steps: tuple[Array, Array],
    limit: int,
    *,
    interpret: bool = False,
) -> Array:
    """Codes behind a norm and a SiLU, clip(round(silu(x scale + offset) step_scale + step_offset)).

    XLA lays the float32 values of norm and activation out anew before it rounds them: modelled for
    a v5e, 131,072 positions of 640 channels, 2.7 ms.

    Args:
      x: `[N, L, C]`.
      norm: scale and offset, each `[M, C]` as in `Input`.
      steps: `step_scale` and `step_offset`, each `[C]`, float32.
      limit: the largest code.
      interpret: as in `dense`.

    Returns:
      int8 `[N, L, C]`.
    """
    with jax.named_scope(int8.SCOPE):
        return _quantize_activated(x, *norm, *steps, limit=limit, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("limit", "interpret"))
def _quantize_activated(
    x: Array,
    scale: Array,
    offset: Array,
    step_scale: Array,
    step_offset: Array,
    *,
    limit: int,
    interpret: bool,
) -> Array:
    images, length, channels = x.shape
    rows = min(_TOKENS, length)

    def kernel(x_ref: Any, *refs: Any) -> None:
        scale, offset, step_scale, step_offset = (ref[...] for ref in refs[:-1])
        x = x_ref[...].astype(jnp.float32) * scale + offset
        x = x / (1 + jnp.exp(-x))
        refs[-1][...] = round_to_codes(x * step_scale + step_offset, limit)

    vectors = [y[:, None, :] for y in (scale, offset, step_scale[None], step_offset[None])]
    block = pl.BlockSpec((None, rows, channels), lambda n, t: (n, t, 0))
    return pl.pallas_call(
        kernel,
        grid=(images, pl.cdiv(length, rows)),
        in_specs=[block, *(of_image(y) for y in vectors)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.int8),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="quantize_activated",
    )(x, *vectors)


def moments(x: Array, *, interpret: bool = False) -> tuple[Array, Array]:
    """Means of x - x[:, 0] over the positions, and of its squares.

    XLA writes the float32 values anew before it adds them up: modelled for a v5e, 131,072 positions
    of 320 channels, 0.8 ms, where reading them takes 0.1.

    Args:
      x: `[N, L, C]`.
      interpret: as in `dense`.

    Returns:
      Two `[N, C]`, float32.
    """
    return _moments(x, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _moments(x: Array, *, interpret: bool) -> tuple[Array, Array]:
    images, length, channels = x.shape
    rows = min(_TOKENS, length)

    def kernel(x_ref: Any, first_ref: Any, second_ref: Any, about_ref: Any) -> None:
        block = pl.program_id(1)
        x = x_ref[...].astype(jnp.float32)

        @pl.when(block == 0)
        def _start() -> None:
            about_ref[...] = x[:1]
            first_ref[...] = second_ref[...] = jnp.zeros((1, channels), jnp.float32)

        x = x - about_ref[...]
        if length % rows:
            place = block * rows + lax.broadcasted_iota(jnp.int32, x.shape, 0)
            x = jnp.where(place < length, x, 0)
        first_ref[...] += x.sum(0, keepdims=True) / length
        second_ref[...] += jnp.square(x).sum(0, keepdims=True) / length

    result = pl.BlockSpec((None, 1, channels), lambda n, t: (n, 0, 0))
    shape = jax.ShapeDtypeStruct((images, 1, channels), jnp.float32)
    first, second = pl.pallas_call(
        kernel,
        grid=(images, pl.cdiv(length, rows)),
        in_specs=[pl.BlockSpec((None, rows, channels), lambda n, t: (n, t, 0))],
        out_specs=[result, result],
        out_shape=[shape, shape],
        scratch_shapes=[pltpu.VMEM((1, channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="moments",
    )(x)
    return first[:, 0], second[:, 0]
