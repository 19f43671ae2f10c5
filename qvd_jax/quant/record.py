"""The record of a quantized layer: what calibration writes, layers read and loading checks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.quant.codec import (
    LOW_RANK_DTYPE,
    SCALE_DTYPE,
    channel_steps,
    channel_values,
    hadamard,
    max_code,
    rotate,
    two_range_steps,
)
from qvd_jax.quant.policy import LayerSpec


class QuantizedParams(NamedTuple):
    """The parameters of a quantized Dense or conv layer; None where a layer has none.

    It has the module path of the float layer whose place it takes. What always holds of an input
    x `[..., C]` and the output y `[..., O]`, with b the bits of the input's codes and . a sum
    over C:

    SCRI, and whatever else gives channels a scale and an offset (`codec.channel_steps`):

        q = clip(round(H(x in_scale + in_offset)), -limit, limit),    limit = 2^(b-1) - 1
        y = scale q . kernel + bias

    H mixes groups of channels where the layer has a rotation (`codec.rotate`), else it leaves them.

    A conv of several taps is padded with code 0, which stands for the channels' shift and not for
    zero. What the shift adds through a tap counts where that tap lies inside the input alone, so
    it is no part of the bias:

        y[p] = scale sum_t q[p + t] . kernel[t] + bias + sum_{t: p + t inside} taps[t]

    A step-aware layer has at each sampler step that step's share of D, its gain: it reads in_scale
    / gain, in_offset / gain, scale gain and up gain in these formulas.

    Where ranges are those of tokens, in_scale has no D: a token, which is a position, has its own,
    and what is multiplied counts D times:

        D = max |H(x in_scale + in_offset)| / limit,    q = round(H(x in_scale + in_offset) / D)
        y = D scale q . kernel + bias

    With a low rank, scale q . kernel + (q . down) . up takes the place of scale q . kernel
    everywhere.

    HTDQ (`codec.two_range_steps`), where one of fine and coarse is zero:

        v = H(x) in_scale + in_offset
        coarse > 0, two ranges:  fine = round(v) or coarse_codes = round(v / coarse), whichever is
                                 nearer to v, each clipped to 0 ... 2^(b-1) - 1
        coarse = 0, one range:   fine = clip(round(v), -2^(b-1), 2^(b-1) - 1)
        y = scale (fine . kernel + coarse coarse_codes . kernel) + bias

    A float input (b = 16):

        y = scale H(x) . kernel + bias

    Attributes:
      kernel: `[O, *kernel_size, C]`, codes of the weights: int2 of two bits, int4 of three and
        four, else int8; -2^(b-1) is no code.
      scale: `[O]`, bfloat16, step of the input times scale of the weights.
      bias: `[O]`, float32, the layer's own, and in layers of one tap what the input's shift adds.
      sums: `[O]`, int32, of the kernel over all but O, which unsigned products need; None of a
        float input.
      in_scale: 1 / (s D): `[C]`, bfloat16, or of HTDQ a float32 scalar; None of a float input.
      in_offset: -z / (s D): `[C]`, float32, or of HTDQ a scalar; None of a float input.
      taps: `[*kernel_size, O]`, float32, what the input's shift adds through each tap; of kernels
        of several taps alone.
      coarse: float32 scalar of HTDQ, step of the coarse range over that of the fine one, 2^m; 0
        where there is one range.
      down: `[rank, *kernel_size, C]`, bfloat16, of codes to a few numbers; of layers with a low
        rank alone, as up.
      up: `[O, rank]`, bfloat16, of these to outputs.
      gain: float32, a scalar at a step, `[S]` in a checkpoint, in (0, 1]; of step-aware layers
        alone. It is no parameter of the network but in the collection "quant".
    """

    kernel: Array
    scale: Array
    bias: Array
    sums: Array | None = None
    in_scale: Array | None = None
    in_offset: Array | None = None
    taps: Array | None = None
    coarse: Array | None = None
    down: Array | None = None
    up: Array | None = None
    gain: Array | None = None

    def params(self) -> dict[str, Any]:
        """What the collection "params" has of it, by name."""
        return {k: v for k, v in self._asdict().items() if v is not None and k != "gain"}

    def in_float32(self) -> "QuantizedParams":
        """With scales as the formulas read them: float32, and the gain in them."""
        record = self._replace(scale=self.scale.astype(jnp.float32))
        if self.in_scale is None:
            return record
        scale, offset = self.quantizer
        record = record._replace(in_scale=scale.astype(jnp.float32))
        if self.gain is None:
            return record
        return record._replace(
            scale=record.scale * self.gain,
            up=None if self.up is None else self.up.astype(jnp.float32) * self.gain,
            in_scale=scale.astype(jnp.float32) / self.gain,
            in_offset=offset / self.gain,
            gain=None,
        )

    @property
    def quantizer(self) -> tuple[Array, Array]:
        """in_scale and in_offset of an input that becomes codes."""
        assert self.in_scale is not None
        assert self.in_offset is not None
        return self.in_scale, self.in_offset

    def dequantized(self, rotation: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The float layer that the codes stand for: kernel `[*kernel_size, C, O]` and bias `[O]`.

        Where codes are not rounded and not clipped, v = H(x in_scale + in_offset) stands in their
        place (of HTDQ v = fine + coarse coarse_codes), and y is linear in x. With

            M[t, c, o] = scale[o] kernel[o, t, c] + sum_r down[r, t, c] up[o, r]

        and H M its rotation along c, which is H's own transpose,

            W[t, c, o] = in_scale[c] (H M)[t, c, o]
            b[o] = bias[o] + sum_t (taps[t, o] + sum_c in_offset[c] (H M)[t, c, o])

        and of HTDQ, which rotates x alone, M in the place of H M in b. The D of a step or a token
        cancels. In b the shift of the channels meets what calibration subtracted for it; what is
        left are the mean errors that calibration corrected. Where taps are outside the input, b has
        their part all the same.

        Args:
          rotation: of the layer's spec.

        Returns:
          float32, computed in float64.
        """
        scale = np.asarray(self.scale, np.float64)
        multiplied = np.moveaxis(np.asarray(self.kernel).astype(np.float64), 0, -1) * scale
        if self.down is not None:
            down, up = (np.asarray(part).astype(np.float64) for part in (self.down, self.up))
            multiplied = multiplied + np.moveaxis(down, 0, -1) @ up.T
        groups = multiplied.reshape(*multiplied.shape[:-2], -1, rotation, len(scale))
        kernel = (hadamard(rotation).astype(np.float64) @ groups).reshape(multiplied.shape)
        bias = np.asarray(self.bias, np.float64)
        if self.in_scale is not None:
            in_scale, in_offset = (np.asarray(part, np.float64) for part in self.quantizer)
            channels = kernel.shape[-2:-1]
            shifted = kernel if self.coarse is None else multiplied
            by_channel = shifted.reshape(-1, *kernel.shape[-2:]).sum(0)
            bias = bias + np.broadcast_to(in_offset, channels) @ by_channel
            kernel = kernel * np.broadcast_to(in_scale, channels)[:, None]
        if self.taps is not None:
            bias = bias + np.asarray(self.taps, np.float64).reshape(-1, len(bias)).sum(0)
        return kernel.astype(np.float32), bias.astype(np.float32)

    def values(self, x: Array, spec: LayerSpec) -> Array:
        """The input in steps of its quantizer, neither clipped nor rounded, `[..., C]`.

        Args:
          x: `[..., C]`.
          spec: of the layer, whose input has a scale and an offset for each channel.
        """
        return channel_values(x, *self.in_float32().quantizer, spec.rotation)

    def steps(self, x: Array, spec: LayerSpec) -> Array:
        """The input in steps of its quantizer, clipped and not yet rounded, `[..., C]`.

        Args:
          x: `[..., C]`.
          spec: of the layer, whose ranges are not those of tokens.
        """
        scale, offset = self.in_float32().quantizer
        bits = spec.activation_bits
        if self.coarse is not None:
            rotated = rotate(x.astype(jnp.float32), spec.rotation)
            return two_range_steps(rotated, scale, offset, self.coarse, bits)
        return channel_steps(x, scale, offset, max_code(bits), spec.rotation)


def _code_dtype(bits: int) -> Any:
    """The narrowest integers that hold codes of some bits."""
    return jnp.int2 if bits == 2 else jnp.int4 if bits <= 4 else jnp.int8


def layout(
    spec: LayerSpec, channels: int, features: int, kernel_size: Sequence[int] = ()
) -> QuantizedParams:
    """Shapes and dtypes of a layer's record, as `jax.ShapeDtypeStruct`.

    Args:
      spec: how it is quantized.
      channels: C.
      features: O.
      kernel_size: of a conv.
    """

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    record = QuantizedParams(
        kernel=array(features, *kernel_size, channels, dtype=_code_dtype(spec.weight_bits)),
        scale=array(features, dtype=SCALE_DTYPE),
        bias=array(features),
    )
    if rank := spec.low_rank:
        record = record._replace(
            down=array(rank, *kernel_size, channels, dtype=LOW_RANK_DTYPE),
            up=array(features, rank, dtype=LOW_RANK_DTYPE),
        )
    if spec.activation_bits == 16:
        return record
    record = record._replace(sums=array(features, dtype=jnp.int32))
    if spec.method == "htdq":
        return record._replace(in_scale=array(), in_offset=array(), coarse=array())
    return record._replace(
        in_scale=array(channels, dtype=SCALE_DTYPE),
        in_offset=array(channels),
        taps=array(*kernel_size, features) if math.prod(kernel_size) > 1 else None,
        gain=array() if spec.ranges == "step" else None,
    )


def layouts(shapes: Params, specs: Mapping[str, LayerSpec]) -> dict[str, QuantizedParams]:
    """The layout of every quantized layer, by module path.

    Args:
      shapes: of the float network's parameters.
      specs: by module path.

    Raises:
      InputError: the network has no such layer.
    """
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    unknown = [path for path in specs if leaf(path, "kernel") not in flat]
    if unknown:
        raise InputError(f"quantized layers that the UNet does not have: {', '.join(unknown)}")
    found = {}
    for path, spec in specs.items():
        *kernel_size, channels, features = flat[leaf(path, "kernel")].shape
        found[path] = layout(spec, channels, features, kernel_size)
    return found


def leaf(path: str, name: str) -> str:
    """The name of a layer's parameter among those of a network; a path may be that of the root."""
    return f"{path}/{name}" if path else name


def replace_layers(params: Params, records: Mapping[str, QuantizedParams]) -> tuple[Params, Params]:
    """A network's parameters with records in the place of float layers.

    Args:
      params: the float network's, arrays or their shapes.
      records: by module path.

    Returns:
      The collections "params" and "quant", the latter empty without step-aware layers.
    """
    parts = {path: tuple(path.split("/")) if path else () for path in records}
    flat = flax.traverse_util.flatten_dict(params)
    layers = set(parts.values())
    kept = {place: value for place, value in flat.items() if place[:-1] not in layers}
    gains = {}
    for path, record in records.items():
        kept |= {(*parts[path], name): value for name, value in record.params().items()}
        if record.gain is not None:
            gains[*parts[path], "gain"] = record.gain
    unflatten = flax.traverse_util.unflatten_dict
    return unflatten(kept), unflatten(gains)
