"""A 3x3 convolution of an upsampled image's codes as a Pallas kernel for the TPU.

XLA writes the image doubled, and its codes, multiplies each code at four positions, and copies the
result into another layout. Here codes are made on the chip and meet each element of the kernel
once; what upsampling makes of the products is added up and laid between each other there. Modelled
for a v5e, 32 images of 32x32 positions to 64x64, 640 channels: 0.8 ms, where XLA's passes take 7.7.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qvd_jax.axes import Array
from qvd_jax.kernels import int8
from qvd_jax.kernels.blocks import largest_divisor
from qvd_jax.kernels.tpu import LANES, SUBLANES, VMEM_BYTES, round_to_codes

_POSITIONS = 1024
"""Of a block of small images, before they are doubled."""

_ALIGNMENT = 32
"""An image has a multiple of so many positions: int8 arrays are stored in such steps."""


def can_use(size: tuple[int, ...], channels: int, outputs: int, dtype: DTypeLike) -> bool:
    """Whether the kernel is for images of a size: its blocks fill the vector unit and fit the chip.

    Args:
      size: H and W, before they are doubled.
      channels: C.
      outputs: O.
      dtype: of the result.
    """
    (height, width), block = size, _block(outputs)
    positions = height * width
    # A pair of bfloat16 is one element, so two positions beside each other are written at once.
    if jnp.dtype(dtype) != jnp.bfloat16:
        return False
    if height == 1 or width % SUBLANES or positions % _ALIGNMENT:
        return False
    rows = max(positions, _POSITIONS)
    products, results = 9 * 4 * rows * block, 2 * 2 * 4 * rows * block
    return 2 * products + results + 5 * rows * channels + 18 * channels * block <= VMEM_BYTES


def conv(
    x: Array,
    quantizer: tuple[Array, Array],
    weights: Array,
    scale: Array,
    bias: Array,
    border: Array,
    *,
    size: tuple[int, ...],
    limit: int,
    interpret: bool = False,
) -> Array:
    """Correlates codes, each of which stands for 2x2 positions, with a kernel padded by code 0.

    Args:
      x: `[N, H * W, C]`.
      quantizer: scale and offset of the codes, `[C]` each, float32.
      weights: `[3, 3, O, C]`, int8 codes.
      scale: `[O]`, float32, of the products.
      bias: `[O]`, float32.
      border: `[3, 2W, O]`, float32, is added: in the first row, in the last, in those between.
      size: H and W, for which `can_use` must hold.
      limit: the largest code.
      interpret: whether to run the kernel's operations one by one, on any backend.

    Returns:
      bfloat16 `[N, 2H, 2W, O]`.
    """
    with jax.named_scope(int8.SCOPE):
        return _conv(
            x,
            *quantizer,
            weights,
            scale,
            bias[None, None] + border,
            size=size,
            limit=limit,
            interpret=interpret,
        )


@functools.partial(jax.jit, static_argnames=("size", "limit", "interpret"))
def _conv(
    x: Array,
    step_scale: Array,
    step_offset: Array,
    weights: Array,
    scale: Array,
    added: Array,
    *,
    size: tuple[int, ...],
    limit: int,
    interpret: bool,
) -> Array:
    count, positions, channels = x.shape
    height, width = size
    outputs = weights.shape[2]
    block = _block(outputs)
    images = largest_divisor(count, max(_POSITIONS // positions, 1))
    rows = images * positions
    # Even columns and odd ones apart, as the kernel makes them.
    added = jnp.swapaxes(added.reshape(3, width, 2, outputs), 1, 2)

    def kernel(
        x_ref: Any,
        step_scale_ref: Any,
        step_offset_ref: Any,
        weights_ref: Any,
        scale_ref: Any,
        added_ref: Any,
        out_ref: Any,
        codes_ref: Any,
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _quantize() -> None:
            x = x_ref[...].reshape(rows, channels).astype(jnp.float32)
            steps = x * step_scale_ref[...] + step_offset_ref[...]
            codes_ref[...] = round_to_codes(steps, limit)

        products = lax.dot_general(
            codes_ref[...],
            weights_ref[...].reshape(9 * block, channels),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        column = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % width

        def doubled(before: Array, here: Array, after: Array) -> tuple[Array, Array]:
            """What the even and the odd columns see through a row of the kernel."""
            from_before = jnp.where(column == 0, 0, pltpu.roll(before, 1, 0))
            from_after = jnp.where(column == width - 1, 0, pltpu.roll(after, rows - 1, 0))
            return from_before + here + after, before + here + from_after

        taps = [products[:, i * block : (i + 1) * block] for i in range(9)]
        of_rows = [doubled(*taps[3 * i : 3 * i + 3]) for i in range(3)]
        results: list[list[Array]] = [[], []]
        for parity in range(2):
            above, here, below = (
                pair[parity].reshape(images, height, width, block) for pair in of_rows
            )
            outside = jnp.zeros((images, 1, width, block), jnp.int32)
            from_above = jnp.concatenate([outside, above[:, :-1]], 1)
            from_below = jnp.concatenate([below[:, 1:], outside], 1)
            first, middle, last = (added_ref[i, parity][None] for i in range(3))
            inner = jnp.broadcast_to(middle, (height - 1, width, block))
            for row, total, edges in (
                (0, from_above + here + below, [first, inner]),
                (1, above + here + from_below, [inner, last]),
            ):
                y = total.astype(jnp.float32) * scale_ref[...] + jnp.concatenate(edges)[None]
                results[row].append(y.reshape(rows, block))
        for row, pair in enumerate(results):
            # In the bits of one float32 lie two positions beside each other.
            even, odd = (
                lax.bitcast_convert_type(y.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
                for y in pair
            )
            columns = pltpu.bitcast(odd | (even >> 16), jnp.bfloat16)
            out_ref[:, :, row] = columns.reshape(images, height, 2 * width, block)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda n, o: (0,) * len(shape))

    out = pl.pallas_call(
        kernel,
        grid=(count // images, outputs // block),
        in_specs=[
            pl.BlockSpec((images, positions, channels), lambda n, o: (n, 0, 0)),
            whole(1, channels),
            whole(1, channels),
            pl.BlockSpec((3, 3, block, channels), lambda n, o: (0, 0, o, 0)),
            pl.BlockSpec((1, 1, 1, block), lambda n, o: (0, 0, 0, o)),
            pl.BlockSpec((3, 2, width, block), lambda n, o: (0, 0, 0, o)),
        ],
        out_specs=pl.BlockSpec((images, height, 2, 2 * width, block), lambda n, o: (n, 0, 0, 0, o)),
        out_shape=jax.ShapeDtypeStruct((count, height, 2, 2 * width, outputs), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((rows, channels), jnp.int8)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="upsampled_conv",
    )(x, step_scale[None], step_offset[None], weights, scale[None, None, None], added)
    return out.reshape(count, 2 * height, 2 * width, outputs)


def _block(outputs: int) -> int:
    return outputs if outputs % LANES else LANES
