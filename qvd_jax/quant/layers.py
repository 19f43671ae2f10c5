"""The int8 layers, and the LayerSet that puts them where a policy says.

A quantized layer has the module path of the float layer it replaces, and these parameters:

    kernel      int8 or int4 `[O, *taps, C]`, codes of the weights
    sums        int32 `[O]`, of these codes, which unsigned products need
    scale       bfloat16 `[O]`, step of the input times scale of the weights
    bias        float32 `[O]`, the layer's own and what the input's shift adds
    in_scale    bfloat16 `[C]`, 1 / (factor step) of the input's quantizer
    in_offset   float32 `[C]`, -shift / (factor step)
    taps        float32 `[*taps, O]`, of kernels of several taps: what the shift adds through each,
                which is then no part of the bias

With HTDQ `in_scale` and `in_offset` are float32 scalars, and `coarse` is the ratio of the two
ranges' steps, 0 where there is one range. A float input (16 bits) has none of these, and no `sums`.
A step-aware layer also reads `gain` from the collection "quant": this step's D as a share of the
largest, which the parameters have.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from qvd_jax.axes import Array
from qvd_jax.kernels import floating, int8
from qvd_jax.kernels.patches import output_sizes
from qvd_jax.models.layers import Configured, Conv, Dense, LayerSet, in_parts
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.qtensor import SCALE_DTYPE, max_code

QUANTIZING = "quantizing"
"""The scope of what makes codes of inputs, in the names of a compiled program's operations."""


def layer_set(specs: Mapping[str, LayerSpec], dtype: DTypeLike = jnp.float32) -> LayerSet:
    """Layers of which those in `specs` are quantized and all others float.

    Args:
      specs: by module path.
      dtype: of everything around the int8 products, and of the float layers' parameters.
    """
    dense = FrozenDict(dot_general=floating.dot_general, specs=specs)
    conv = FrozenDict(conv_general_dilated=floating.conv_general_dilated, specs=specs)
    return LayerSet(
        dense_cls=Configured(QuantDense, dense),
        conv_cls=Configured(QuantConv, conv),
        dtype=dtype,
        param_dtype=dtype,
    )


def kernel_dtype(spec: LayerSpec) -> DTypeLike:
    """Codes of up to four bits are stored as int4."""
    return jnp.int4 if spec.weight_bits <= 4 else jnp.int8


class QuantDense(Dense):
    """`Dense` whose product is int8 where `specs` names its path.

    Attributes:
      specs: of all quantized layers, by module path.
    """

    specs: Mapping[str, LayerSpec] = FrozenDict()

    @nn.compact
    def __call__(self, x: Array) -> Any:
        """Maps `[..., C]` to `[..., O]`, or to the parts of it."""
        spec = self.specs.get("/".join(self.path))
        if spec is None:
            return super().__call__(x)
        channels = x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.zeros, (self.features, channels), kernel_dtype(spec)
        )
        scale, bias = _output_params(self, self.features)
        by_output = kernel, scale, bias
        inputs: Any
        if spec.activation_bits == 16:
            inputs = x.astype(self.dtype)
        else:
            by_output = *by_output, _sums(self, self.features)
            if spec.method == "htdq":
                inputs = _two_range_codes(self, x, spec)
            else:
                gain = _gain(self, spec)
                inputs = _codes(self, x, spec, gain), jnp.float32(gain)

        def product(inputs: Any, kernel: Array, scale: Array, bias: Array, *sums: Array) -> Array:
            if spec.activation_bits == 16:
                out = _float_dot(inputs, kernel)
            elif spec.method == "htdq":
                fine, coarse, ratio = inputs
                out = int8.dot(fine, kernel, *sums) + ratio * int8.dot(coarse, kernel, *sums)
            else:
                codes, gain = inputs
                out, scale = int8.dot(codes, kernel, *sums), scale * gain
            return _to_output(out, scale, bias).astype(self.dtype)

        if self.parts == 1:
            return product(inputs, *by_output)
        return in_parts(product, self.parts, inputs, by_output, axis=0)


class QuantConv(Conv):
    """`Conv` with explicit padding whose product is int8 where `specs` names its path.

    Attributes:
      specs: of all quantized layers, by module path.
    """

    specs: Mapping[str, LayerSpec] = FrozenDict()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *out, O]`."""
        spec = self.specs.get("/".join(self.path))
        if spec is None:
            return super().__call__(x)
        if math.prod(self.kernel_size) == 1 and np.any(self.padding):
            raise ValueError(f"padding = {self.padding} of a kernel of one tap is no use")
        form = (tuple(self.kernel_size), self.strides, self.padding)
        if self.upsampled and form != ((3, 3), (1, 1), ((1, 1), (1, 1))):
            raise ValueError(
                "a convolution of an upsampled input must be 3x3, padded by 1, not of "
                "kernel, strides and padding {}, {}, {}".format(*form)
            )
        rank, channels = len(self.kernel_size), x.shape[-1]
        shape = (self.features, *self.kernel_size, channels)
        kernel = self.param("kernel", nn.initializers.zeros, shape, kernel_dtype(spec))
        scale, bias = _output_params(self, self.features)
        batch, spatial = x.shape[: -rank - 1], x.shape[-rank - 1 : -1]
        x = x.reshape(-1, *spatial, channels)
        if spec.activation_bits == 16:
            weights = jnp.moveaxis(kernel, 0, -1).astype(self.dtype)
            product = self.conv_general_dilated(
                x.astype(self.dtype),
                weights,
                self.strides,
                self.padding,
                dimension_numbers=_channels_last(rank),
            )
            y = _to_output(product, scale, bias)
        else:
            gain = _gain(self, spec)
            codes = _codes(self, x[:, ::2, ::2] if self.upsampled else x, spec, gain)
            sums = _sums(self, self.features)
            if self.upsampled:
                product = int8.upsampled_conv(codes, kernel, sums)
            else:
                product = int8.conv(codes, kernel, sums, self.strides, self.padding)
            y = _to_output(product, scale * gain, bias)
            if math.prod(self.kernel_size) > 1:
                taps = self.param(
                    "taps", nn.initializers.zeros, (*self.kernel_size, self.features), jnp.float32
                )
                y = y + border_bias(taps, spatial, self.strides, self.padding)[None]
        return y.reshape(*batch, *y.shape[1:]).astype(self.dtype)


def border_bias(
    taps: Array,
    spatial: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Array:
    """What the input's shift adds at each output position.

    A convolution pads with zeros, and zero is not code 0 once channels are shifted. Padding with
    code 0 stands for the shift, so the shift's part counts only through taps inside the input.

    Args:
      taps: sum over channels of shift times weight, `[*kernel, O]`.
      spatial: the input's size along each axis.
      strides: one for each axis.
      padding: (low, high) for each axis.

    Returns:
      `[*out, O]`.
    """
    sizes = output_sizes(spatial, taps.shape[:-1], strides, padding)
    for axis, (size, out) in enumerate(zip(spatial, sizes, strict=True)):
        first = np.arange(out)[:, None] * strides[axis] - padding[axis][0]
        place = first + np.arange(taps.shape[axis])[None]
        inside = ((place >= 0) & (place < size)).astype(np.float32)
        summed = jnp.tensordot(inside, taps, (1, axis), precision=lax.Precision.HIGHEST)
        taps = jnp.moveaxis(summed, 0, axis)
    return taps


def _output_params(layer: nn.Module, features: int) -> tuple[Array, Array]:
    scale = layer.param("scale", nn.initializers.ones, (features,), SCALE_DTYPE)
    bias = layer.param("bias", nn.initializers.zeros, (features,), jnp.float32)
    return scale.astype(jnp.float32), bias


def _sums(layer: nn.Module, features: int) -> Array:
    return layer.param("sums", nn.initializers.zeros, (features,), jnp.int32)


def _gain(layer: nn.Module, spec: LayerSpec) -> Array | float:
    return layer.variable("quant", "gain", jnp.ones, ()).value if spec.step_aware else 1.0


def _codes(layer: nn.Module, x: Array, spec: LayerSpec, gain: Array | float) -> Array:
    channels = x.shape[-1]
    along = (1,) * (x.ndim - 1) + (channels,)
    scale = layer.param("in_scale", nn.initializers.ones, (channels,), SCALE_DTYPE)
    offset = layer.param("in_offset", nn.initializers.zeros, (channels,), jnp.float32)
    limit = max_code(spec.activation_bits)
    with jax.named_scope(QUANTIZING):
        scale, offset = scale.astype(jnp.float32) / gain, offset / gain
        codes = x.astype(jnp.float32) * scale.reshape(along) + offset.reshape(along)
        return _to_int8(jnp.clip(codes, -limit, limit))


def _to_int8(x: Array) -> Array:
    """Rounds values from -128 to 127, halves to even.

    Next to 1.5 * 2**23 a float32 has no bits for fractions, and its last eight are the integer's:
    on a CPU cheaper than to round and to convert.
    """
    return lax.bitcast_convert_type(x + np.float32(1.5 * 2**23), jnp.int32).astype(jnp.int8)


def _two_range_codes(layer: nn.Module, x: Array, spec: LayerSpec) -> tuple[Array, Array, Array]:
    """`htdq.TwoRangeQuantizer.codes` with parameters, and the ratio of the ranges' steps."""
    scale, offset, ratio = (
        layer.param(name, nn.initializers.ones, (), jnp.float32)
        for name in ("in_scale", "in_offset", "coarse")
    )
    levels = 2**spec.activation_bits
    with jax.named_scope(QUANTIZING):
        steps = x.astype(jnp.float32) * scale + offset
        uniform = jnp.clip(jnp.round(steps), -levels // 2, levels // 2 - 1)
        fine = jnp.clip(jnp.round(steps), 0, levels // 2 - 1)
        coarse = jnp.clip(jnp.round(steps / jnp.maximum(ratio, 1)), 0, levels // 2 - 1)
        is_fine = jnp.abs(steps - fine) <= jnp.abs(steps - ratio * coarse)
        one_range = ratio == 0
        fine = jnp.where(one_range, uniform, jnp.where(is_fine, fine, 0))
        coarse = jnp.where(one_range | is_fine, 0, coarse)
        return fine.astype(jnp.int8), coarse.astype(jnp.int8), ratio


def _float_dot(x: Array, kernel: Array) -> Array:
    return lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _to_output(product: Array, scale: Array, bias: Array) -> Array:
    along = (1,) * (product.ndim - 1) + (-1,)
    return product.astype(jnp.float32) * scale.reshape(along) + bias.reshape(along)


def _channels_last(rank: int) -> tuple[str, str, str]:
    spatial = "DHW"[-rank:]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
