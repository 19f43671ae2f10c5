"""A 3x3 convolution behind a norm and a SiLU as one Pallas kernel for the TPU.

XLA writes what norm and activation make of the input (or its codes), multiplies it in a layout of
its own, and copies the result back. Here an image is normalized, activated and quantized into the
on-chip memory once, and multiplied there. Modelled for a v5e, 32 images of 64x64 positions, from
320 to 320 channels: 1.0 ms in int8, 1.6 in bfloat16, where XLA's passes take 2.1 and 2.8.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qvd_jax.axes import Array
from qvd_jax.kernels import floating, int8
from qvd_jax.kernels.blocks import largest_divisor
from qvd_jax.kernels.tpu import VMEM_BYTES, block_of_outputs, of_image, round_to_codes

_POSITIONS = 512
"""Of a block."""

_WEIGHT_BYTES = 6 * 2**20
"""Weights of a block of outputs."""

_ALIGNMENT = 32
"""A row of an image has a multiple of so many positions: int8 arrays are read in such steps."""


class Input(NamedTuple):
    """The input of a convolution: silu(x scale + offset), or codes of that.

    Attributes:
      x: `[N, H * W, C]`.
      scale: `[M, C]`, float32; N is a multiple of M, and x[n] has scale[n mod M].
      offset: `[M, C]`, float32, with an M of its own.
      quantizer: scale and offset of the codes, `[C]` each, float32; None where weights are float.
    """

    x: Array
    scale: Array
    offset: Array
    quantizer: tuple[Array, Array] | None = None


class Output(NamedTuple):
    """What is done with the products: products scale + bias + border + residual.

    Attributes:
      scale: `[O]`, float32.
      bias: `[M, O]`, float32, M as in `Input`.
      border: `[H * W, O]`, float32, of all images; None adds nothing.
      residual: `[N, H * W, O]`; None adds nothing.
    """

    scale: Array
    bias: Array
    border: Array | None = None
    residual: Array | None = None


def can_use(size: tuple[int, ...], channels: int, outputs: int, dtype: DTypeLike) -> bool:
    """Whether the kernel is for images of a size: a row fills its blocks, an image the chip.

    Args:
      size: H and W.
      channels: C.
      outputs: O.
      dtype: of the weights.
    """
    height, width = size
    if width % _ALIGNMENT or width > _POSITIONS:
        return False
    bytes_of, positions = jnp.dtype(dtype).itemsize, height * width
    block = _block(outputs, channels, bytes_of)
    image = positions * channels * (2 * 2 + bytes_of)
    at_once = 2 * 9 * channels * block * bytes_of + 4 * _POSITIONS * (6 * block + 2 * channels)
    return image + at_once <= VMEM_BYTES


def conv(
    given: Input,
    weights: Array,
    wanted: Output,
    *,
    size: tuple[int, ...],
    dtype: DTypeLike,
    limit: int = 0,
    interpret: bool = False,
) -> Array:
    """Correlates images with a 3x3 kernel, padded by one position of zeros, or of code 0.

    Args:
      given: the input.
      weights: `[3, 3, O, C]`, int8 codes or bfloat16.
      wanted: the output.
      size: H and W, for which `can_use` must hold.
      dtype: of the result.
      limit: the largest code, where there are codes.
      interpret: whether to run the kernel's operations one by one, on any backend.

    Returns:
      `[N, H * W, O]`.
    """
    with jax.named_scope(floating.SCOPE if given.quantizer is None else int8.SCOPE):
        return _conv(
            given,
            weights,
            wanted,
            size=size,
            dtype=jnp.dtype(dtype),
            limit=limit,
            interpret=interpret,
        )


# Of layers of equal shape the kernel is traced once.
@functools.partial(jax.jit, static_argnames=("size", "dtype", "limit", "interpret"))
def _conv(
    given: Input,
    weights: Array,
    wanted: Output,
    *,
    size: tuple[int, ...],
    dtype: DTypeLike,
    limit: int,
    interpret: bool,
) -> Array:
    images, positions, channels = given.x.shape
    height, width = size
    outputs = weights.shape[2]
    block = _block(outputs, channels, weights.dtype.itemsize)
    rows = width * largest_divisor(height, _POSITIONS // width)
    quantized = given.quantizer is not None
    total_dtype = jnp.int32 if quantized else jnp.float32

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda n, o, p: (0,) * len(shape))

    bias = wanted.bias
    results = pl.BlockSpec((None, rows, block), lambda n, o, p: (n, p, o))
    named = {
        "x": (given.x, pl.BlockSpec((None, positions, channels), lambda n, o, p: (n, 0, 0))),
        "in_scale": (given.scale[:, None], of_image(given.scale[:, None])),
        "in_offset": (given.offset[:, None], of_image(given.offset[:, None])),
        "weights": (weights, pl.BlockSpec((3, 3, block, channels), lambda n, o, p: (0, 0, o, 0))),
        "scale": (wanted.scale[None], pl.BlockSpec((1, block), lambda n, o, p: (0, o))),
        "bias": (
            bias[:, None],
            pl.BlockSpec((None, 1, block), lambda n, o, p: (lax.rem(n, len(bias)), 0, o)),
        ),
    }
    if given.quantizer is not None:
        step_scale, step_offset = given.quantizer
        named["step_scale"] = (step_scale[None], whole(1, channels))
        named["step_offset"] = (step_offset[None], whole(1, channels))
    if wanted.border is not None:
        named["border"] = (
            wanted.border,
            pl.BlockSpec((rows, block), lambda n, o, p: (p, o)),
        )
    if wanted.residual is not None:
        named["residual"] = (wanted.residual, results)

    def kernel(*all_refs: Any) -> None:
        *refs, out_ref, operand_ref = all_refs
        ref = dict(zip(named, refs, strict=True))

        def prepare(number: Any, _: Any) -> None:
            place = pl.multiple_of(number * rows, rows)
            x = ref["x"][pl.ds(place, rows)].astype(jnp.float32)
            x = x * ref["in_scale"][...] + ref["in_offset"][...]
            x = x / (1 + jnp.exp(-x))
            if quantized:
                x = round_to_codes(x * ref["step_scale"][...] + ref["step_offset"][...], limit)
            operand_ref[pl.ds(pl.multiple_of(place + width, width), rows)] = x.astype(weights.dtype)

        first_of_image = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)

        @pl.when(first_of_image)
        def _prepare_image() -> None:
            outside = jnp.zeros((width, channels), weights.dtype)
            operand_ref[:width] = operand_ref[width + positions :] = outside
            lax.fori_loop(0, positions // rows, prepare, None)

        place = pl.program_id(2) * rows
        total = jnp.zeros((rows, 3 * block), total_dtype)
        for row in range(3):
            seen = operand_ref[pl.ds(pl.multiple_of(place + row * width, width), rows)]
            total += lax.dot_general(
                seen,
                ref["weights"][row].reshape(3 * block, channels),
                (((1,), (1,)), ((), ())),
                preferred_element_type=total_dtype,
            )
        # What a column of the kernel sees lies a position before or behind.
        left, middle, right = jnp.split(total, 3, axis=1)
        column = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % width
        left = jnp.where(column == 0, 0, pltpu.roll(left, 1, 0))
        right = jnp.where(column == width - 1, 0, pltpu.roll(right, rows - 1, 0))
        total = (left + middle + right).astype(jnp.float32)
        out = total * ref["scale"][...] + ref["bias"][...]
        for name in ("border", "residual"):
            if name in ref:
                out = out + ref[name][...].astype(jnp.float32)
        out_ref[...] = out.astype(out_ref.dtype)

    operands, specs = zip(*named.values(), strict=True)
    return pl.pallas_call(
        kernel,
        grid=(images, outputs // block, positions // rows),
        in_specs=specs,
        out_specs=results,
        out_shape=jax.ShapeDtypeStruct((images, positions, outputs), dtype),
        scratch_shapes=[pltpu.VMEM(((height + 2) * width, channels), weights.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="_".join(["conv", *(name for name in ("border", "residual") if name in named)]),
    )(*operands)


def _block(outputs: int, channels: int, bytes_of: int) -> int:
    return block_of_outputs(outputs, 9 * channels * bytes_of, _WEIGHT_BYTES)
