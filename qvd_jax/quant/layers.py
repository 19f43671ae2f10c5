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

Derivatives pass straight through the rounding (Bengio et al., arXiv 1308.3432): a layer's input has
the gradient of the float layer with the weights that the codes stand for, where the quantizer does
not clip it, and none where it does. The codes of the weights are integers and have none.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.errors import ScopeParamShapeError
from jax import lax
from jax.typing import DTypeLike

from qvd_jax.axes import Array
from qvd_jax.kernels import floating, int8, layers_tpu
from qvd_jax.kernels.patches import output_sizes
from qvd_jax.kernels.tpu import on_tpu
from qvd_jax.models.layers import (
    Configured,
    Conv,
    Dense,
    LayerSet,
    Normalized,
    as_images,
    gated_product,
    tpu_input,
    value_of,
)
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.qtensor import SCALE_DTYPE, max_code

QUANTIZING = "quantizing"
"""The scope of what makes codes of inputs, in the names of a compiled program's operations."""


@dataclass(frozen=True)
class SpecTable:
    """Which layers are quantized, and how.

    Flax walks through mappings that are attributes of a module, for there may be modules in them.
    Every layer has this table of all layers, and hidden from it, a network of N layers is traced
    in a time that grows with N, not with its square.

    Attributes:
      by_path: specs of the quantized layers, by module path.
    """

    by_path: FrozenDict[str, LayerSpec]

    def find(self, layer: nn.Module) -> LayerSpec | None:
        """The spec of a layer; None where it is float."""
        return self.by_path.get("/".join(layer.path))


def layer_set(specs: Mapping[str, LayerSpec], dtype: DTypeLike = jnp.float32) -> LayerSet:
    """Layers of which those in `specs` are quantized and all others float.

    Args:
      specs: by module path.
      dtype: of everything around the int8 products, and of the float layers' parameters.
    """
    options = FrozenDict(specs=SpecTable(FrozenDict(specs)))
    return LayerSet(
        dense_cls=Configured(QuantDense, options),
        conv_cls=Configured(QuantConv, options),
        dtype=dtype,
        param_dtype=dtype,
    )


def kernel_dtype(spec: LayerSpec) -> DTypeLike:
    """Codes of up to four bits are stored as int4."""
    return jnp.int4 if spec.weight_bits <= 4 else jnp.int8


class StoredParams:
    """Before a flax layer: parameters that are there are compared with their shapes alone.

    Flax traces the initializer of each once more for its shape, at every call, which is a third of
    a trace of the quantized UNet, whose layers have seven parameters each.
    """

    def param(
        self: Any,
        name: str,
        init_fn: Callable[..., Array],
        shape: tuple[int, ...],
        *arguments: Any,
        **options: Any,
    ) -> Array:
        """`nn.Module.param` of an initializer that is called with a shape."""
        if not self.has_variable("params", name):
            return super().param(name, init_fn, shape, *arguments, **options)  # type: ignore[misc]
        value = self.get_variable("params", name)
        if value.shape != shape:
            path = "/".join(self.path)
            raise ScopeParamShapeError(name, path, value.shape, shape)
        return value


class QuantDense(StoredParams, Dense):
    """`Dense` whose product is int8 where `specs` names its path.

    Attributes:
      specs: of all layers.
    """

    specs: SpecTable = SpecTable(FrozenDict())

    @nn.compact
    def __call__(self, x: Array | Normalized, residual: Array | None = None) -> Array:
        """Maps `[..., C]` to `[..., O]`, gated to `[..., O/2]`, and adds the residual."""
        spec = self.specs.find(self)
        if spec is None:
            return super().__call__(x, residual)
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.zeros, shape, kernel_dtype(spec))
        scale, bias = _output_params(self, self.features)
        finish = functools.partial(self._finish, residual)
        if spec.activation_bits == 16:
            return finish(_float_dot, value_of(x).astype(self.dtype), (kernel, scale, bias))
        sums = _sums(self, self.features)
        if spec.method == "htdq":
            steps, ratio = _two_range_steps(self, value_of(x), spec)
            multiply = functools.partial(_two_range_dot, spec.activation_bits)

            def product(steps: Array, kernel: Array, sums: Array) -> Array:
                return _straight_through(multiply, _float_dot, steps, kernel, sums, ratio)

            return finish(product, steps, (kernel, scale, bias, sums))
        gain, limit = _gain(self, spec), max_code(spec.activation_bits)
        scale, quantizer = scale * gain, _quantizer(self, shape[1], gain)

        def in_passes(
            x: Array | Normalized, quantizer: Any, by_output: Any, residual: Array | None
        ) -> Array:
            multiply = functools.partial(_product_of_codes, int8.dot)
            product = functools.partial(_straight_through, multiply, _float_dot)
            steps = _steps(value_of(x), quantizer, limit)
            return self._finish(residual, product, steps, by_output)

        def fused(
            x: Array | Normalized, quantizer: Any, by_output: Any, residual: Array | None
        ) -> Array:
            kernel, scale, bias, _ = by_output
            added = None if residual is None else as_images(residual)
            output = layers_tpu.Output(scale, bias, self.dtype, self.gated, added)
            y = layers_tpu.dense(
                tpu_input(x, *quantizer, limit), kernel.astype(jnp.int8), output, self.transposes
            )
            return y.reshape(*x.shape[:-1], y.shape[-1])

        operands = x, quantizer, (kernel, scale, bias, sums), residual
        activated = isinstance(x, Normalized) and x.activated
        if activated or not layers_tpu.can_use(x.shape):
            return in_passes(*operands)
        return on_tpu(fused, in_passes, *operands)

    def _finish(
        self,
        residual: Array | None,
        product: Callable[..., Array],
        inputs: Array,
        by_output: tuple[Array, ...],
    ) -> Array:
        """What is done behind a product, given what by_output holds: kernel, scale, bias, sums."""

        def scaled(inputs: Array, kernel: Array, scale: Array, bias: Array, *sums: Array) -> Array:
            return _to_output(product(inputs, kernel, *sums), scale, bias).astype(self.dtype)

        if self.gated:
            y = gated_product(scaled, inputs, by_output, axis=0).astype(self.dtype)
        else:
            y = scaled(inputs, *by_output)
        return y if residual is None else residual + y


class QuantConv(StoredParams, Conv):
    """`Conv` with explicit padding whose product is int8 where `specs` names its path.

    Attributes:
      specs: of all layers.
    """

    specs: SpecTable = SpecTable(FrozenDict())

    @nn.compact
    def __call__(self, x: Array | Normalized) -> Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *out, O]`."""
        spec = self.specs.find(self)
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

        def as_batch(x: Array) -> Array:
            return x.reshape(-1, *spatial, channels)

        float_conv = functools.partial(_float_conv, self.strides, self.padding)
        if spec.activation_bits == 16:
            product = float_conv(as_batch(value_of(x)).astype(self.dtype), kernel)
            y = _to_output(product, scale, bias)
        else:
            gain = _gain(self, spec)
            int8_conv: Callable[..., Array] = functools.partial(
                int8.conv, strides=self.strides, padding=self.padding
            )
            differentiate: Callable[..., Array] = float_conv
            doubled = self.repeats_positions(spatial)
            if doubled:
                int8_conv = int8.upsampled_conv
                differentiate = functools.partial(_float_conv_of_upsampled, float_conv)
            multiply = functools.partial(_product_of_codes, int8_conv)
            limit, sums = max_code(spec.activation_bits), _sums(self, self.features)

            def in_passes(x: Any, quantizer: Any, kernel: Array, sums: Array) -> Array:
                values = as_batch(value_of(x))
                values = values[:, ::2, ::2] if doubled else values
                steps = _steps(values, quantizer, limit)
                return _straight_through(multiply, differentiate, steps, kernel, sums)

            def fused(x: Any, quantizer: Any, kernel: Array, sums: Array) -> Array:
                norm = x.by_image(x.scale), x.by_image(x.offset)
                codes = layers_tpu.quantize_activated(as_images(x.x), norm, quantizer, limit)
                return int8_conv(as_batch(codes), kernel, sums).astype(jnp.float32)

            operands = x, _quantizer(self, channels, gain), kernel, sums
            # The kernel is for what comes out of a GroupNorm and a SiLU, every position once.
            activated = isinstance(x, Normalized) and x.activated and x.epsilon is None
            if activated and not doubled and layers_tpu.can_use(x.shape):
                product = on_tpu(fused, in_passes, *operands)
            else:
                product = in_passes(*operands)
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


def _quantizer(layer: nn.Module, channels: int, gain: Array | float) -> tuple[Array, Array]:
    """Scale and offset of the input's quantizer, `[C]` each, float32."""
    scale = layer.param("in_scale", nn.initializers.ones, (channels,), SCALE_DTYPE)
    offset = layer.param("in_offset", nn.initializers.zeros, (channels,), jnp.float32)
    return scale.astype(jnp.float32) / gain, offset / gain


def _steps(x: Array, quantizer: tuple[Array, Array], limit: int) -> Array:
    """The input in steps of its quantizer, clipped and not yet rounded."""
    along = (1,) * (x.ndim - 1) + (-1,)
    with jax.named_scope(QUANTIZING):
        scale, offset = quantizer
        steps = x.astype(jnp.float32) * scale.reshape(along) + offset.reshape(along)
        return jnp.clip(steps, -limit, limit)


def _two_range_steps(layer: nn.Module, x: Array, spec: LayerSpec) -> tuple[Array, Array]:
    """The input in fine steps, clipped and not yet rounded, and the ratio of the ranges' steps."""
    scale, offset, ratio = (
        layer.param(name, nn.initializers.ones, (), jnp.float32)
        for name in ("in_scale", "in_offset", "coarse")
    )
    half = 2 ** (spec.activation_bits - 1)
    with jax.named_scope(QUANTIZING):
        steps = x.astype(jnp.float32) * scale + offset
        lowest = jnp.where(ratio == 0, -half, 0)
        return jnp.clip(steps, lowest, jnp.maximum(ratio, 1) * (half - 1)), ratio


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(
    multiply: Callable[..., Array],
    differentiate: Callable[[Array, Array], Array],
    steps: Array,
    kernel: Array,
    *others: Array,
) -> Array:
    """The product of rounded steps with a kernel's codes, float32.

    A rule for tangents serves gradients too, and forward mode, which a rule for cotangents forbids.

    Args:
      multiply: rounds and multiplies all the arrays.
      differentiate: the same product of `steps` and `kernel` alone, in float and not rounded.
      steps: of the input.
      kernel: codes of the weights.
      *others: what else the product takes.
    """
    del differentiate
    return multiply(steps, kernel, *others).astype(jnp.float32)


@_straight_through.defjvp
def _straight_through_jvp(
    multiply: Callable[..., Array],
    differentiate: Callable[[Array, Array], Array],
    primals: tuple[Array, ...],
    tangents: tuple[Array, ...],
) -> tuple[Array, Array]:
    product = _straight_through(multiply, differentiate, *primals)
    return product, differentiate(tangents[0], primals[1])


def _product_of_codes(
    multiply: Callable[[Array, Array, Array], Array], steps: Array, kernel: Array, sums: Array
) -> Array:
    """An int8 product of clipped steps, rounded."""
    return multiply(_codes(steps), kernel, sums)


def _codes(steps: Array) -> Array:
    """Rounds steps from -128 to 127 to int8, halves to even.

    Next to 1.5 * 2**23 a float32 has no bits for fractions, and its last eight are the integer's:
    on a CPU cheaper than to round and to convert.
    """
    with jax.named_scope(QUANTIZING):
        shifted = steps + np.float32(1.5 * 2**23)
        return lax.bitcast_convert_type(shifted, jnp.int32).astype(jnp.int8)


def _two_range_dot(bits: int, steps: Array, kernel: Array, sums: Array, ratio: Array) -> Array:
    """The product with `htdq.TwoRangeQuantizer.codes` of clipped steps."""
    last = 2 ** (bits - 1) - 1
    with jax.named_scope(QUANTIZING):
        rounded = jnp.round(steps)
        fine = jnp.minimum(rounded, last)
        coarse = jnp.round(steps / jnp.maximum(ratio, 1))
        is_fine = jnp.abs(steps - fine) <= jnp.abs(steps - ratio * coarse)
        one_range = ratio == 0
        fine = jnp.where(one_range, rounded, jnp.where(is_fine, fine, 0))
        coarse = jnp.where(one_range | is_fine, 0, coarse)
    fine, coarse = fine.astype(jnp.int8), coarse.astype(jnp.int8)
    return int8.dot(fine, kernel, sums) + ratio * int8.dot(coarse, kernel, sums)


def _float_dot(x: Array, kernel: Array) -> Array:
    return lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _float_conv(
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    x: Array,
    kernel: Array,
) -> Array:
    weights = jnp.moveaxis(kernel, 0, -1).astype(x.dtype)
    numbers = _channels_last(kernel.ndim - 2)
    return floating.conv_general_dilated(x, weights, strides, padding, dimension_numbers=numbers)


def _float_conv_of_upsampled(
    convolve: Callable[[Array, Array], Array], x: Array, kernel: Array
) -> Array:
    return convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def _to_output(product: Array, scale: Array, bias: Array) -> Array:
    along = (1,) * (product.ndim - 1) + (-1,)
    return product.astype(jnp.float32) * scale.reshape(along) + bias.reshape(along)


def _channels_last(rank: int) -> tuple[str, str, str]:
    spatial = "DHW"[-rank:]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
