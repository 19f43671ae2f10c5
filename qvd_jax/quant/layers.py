"""The int8 layers, and the LayerSet that puts them where a policy says.

A quantized layer has the module path of the float layer it replaces, and as parameters a
`QuantizedParams`.
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

from qvd_jax.axes import Array, Transposes
from qvd_jax.errors import InputError
from qvd_jax.kernels import int8, layers_tpu, upsampled_conv_tpu
from qvd_jax.kernels.patches import output_sizes
from qvd_jax.kernels.tpu import on_tpu
from qvd_jax.models.geometry import copies_edges, extend, geometry, kernel_size
from qvd_jax.models.layers import (
    Configured,
    Conv,
    Dense,
    LayerSet,
    gated_product,
)
from qvd_jax.models.norms import (
    LayerInput,
    Normalized,
    Upsampled,
    as_images,
    is_activated_group_norm,
    tpu_input,
    value_of,
)
from qvd_jax.quant.codec import (
    max_code,
    rotate,
)
from qvd_jax.quant.linen import why_float
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.products import (
    float_conv,
    float_conv_of_upsampled,
    float_dot,
    input_steps,
    low_rank_branch,
    product_of_codes,
    straight_through,
    to_output,
)
from qvd_jax.quant.record import QuantizedParams, layout

_INITIAL = {"scale": nn.initializers.ones, "in_scale": nn.initializers.ones}


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
        record, dtype = _read(self, spec, x), jnp.dtype(_result_dtype(self, x))
        return _dense(
            x,
            record,
            residual,
            spec=spec,
            dtype=dtype,
            gated=self.gated,
            transposes=self.transposes,
        )


# By way of jit it is traced once for each shape, not for each layer.
@functools.partial(jax.jit, static_argnames=("spec", "dtype", "gated", "transposes"), inline=True)
def _dense(
    x: Array | Normalized,
    record: QuantizedParams,
    residual: Array | None,
    *,
    spec: LayerSpec,
    dtype: DTypeLike,
    gated: bool,
    transposes: Transposes,
) -> Array:
    """`QuantDense` of its parameters."""
    finish = functools.partial(_finish, gated=gated, dtype=dtype)
    if spec.activation_bits == 16:
        values = rotate(value_of(x).astype(dtype), spec.rotation)
        branch = low_rank_branch(float_dot, values, record, spec)
        return finish(float_dot, (values, None, branch), record, residual)

    def in_passes(x: Array | Normalized, record: QuantizedParams, residual: Array | None) -> Array:
        steps, token = input_steps(value_of(x), record, spec)
        multiply = functools.partial(product_of_codes, int8.dot, spec.activation_bits)
        ratio = () if record.coarse is None else (record.coarse,)

        def product(steps: Array, kernel: Array, sums: Array) -> Array:
            return straight_through(multiply, float_dot, steps, kernel, sums, *ratio)

        branch = low_rank_branch(float_dot, steps, record, spec)
        return finish(product, (steps, token, branch), record, residual)

    def fused(x: Array | Normalized, record: QuantizedParams, residual: Array | None) -> Array:
        added = None if residual is None else as_images(residual)
        output = layers_tpu.Output(record.scale, record.bias, dtype, gated, added)
        given = tpu_input(x, *record.quantizer, max_code(spec.activation_bits))
        given = given._replace(by_token=spec.ranges == "token")
        y = layers_tpu.dense(given, record.kernel.astype(jnp.int8), output, transposes)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    operands = x, record, residual
    activated = isinstance(x, Normalized) and x.activated
    parts = 2 if gated else 1
    fits = layers_tpu.can_use(x.shape, record.scale.shape[-1] // parts, parts)
    if activated or not spec.fused or not fits:
        return in_passes(*operands)
    return on_tpu(fused, in_passes, *operands)


def _finish(
    product: Callable[..., Array],
    inputs: tuple[Array, Array | None, Array | None],
    record: QuantizedParams,
    residual: Array | None,
    *,
    gated: bool,
    dtype: DTypeLike,
) -> Array:
    """What is done behind a product of the inputs with kernel and, of codes, its sums.

    Args:
      product: of what it gets and the kernel.
      inputs: what is multiplied, each token's step and the low-rank branch, where there are.
      record: of the layer.
      residual: added to the result.
      gated: as of `Dense`.
      dtype: of the result.
    """
    held = {name: getattr(record, name) for name in ("kernel", "scale", "bias", "sums", "up")}
    held = {name: array for name, array in held.items() if array is not None}

    def scaled(inputs: tuple[Array, Array | None, Array | None], *parts: Array) -> Array:
        part = dict(zip(held, parts, strict=True))
        factors = [part[name] for name in ("kernel", "sums") if name in part]
        values, token, branch = inputs
        y = to_output(
            product(values, *factors),
            part["scale"],
            part["bias"],
            token,
            branch,
            part.get("up"),
        )
        return y.astype(dtype)

    if gated:
        y = gated_product(scaled, inputs, tuple(held.values()), axis=0).astype(dtype)
    else:
        y = scaled(inputs, *held.values())
    return y if residual is None else residual + y


class QuantConv(StoredParams, Conv):
    """`Conv` whose product is int8 where `specs` names its path.

    Attributes:
      specs: of all layers.
    """

    specs: SpecTable = SpecTable(FrozenDict())

    @nn.compact
    def __call__(self, x: LayerInput, residual: Array | None = None) -> Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *out, O]` and adds the residual."""
        spec = self.specs.find(self)
        if spec is None:
            return super().__call__(x, residual)
        rank, channels, dtype = len(kernel_size(self)), x.shape[-1], _result_dtype(self, x)
        record, bits = _read(self, spec, x), spec.activation_bits
        if copies_edges(self):
            x = extend(self, value_of(x))
        batch, spatial = x.shape[: -rank - 1], x.shape[-rank - 1 : -1]
        strides, padding, dilation = geometry(self, spatial)

        def as_batch(x: Array) -> Array:
            return x.reshape(-1, *x.shape[-rank - 1 :])

        def border(record: QuantizedParams) -> Array | None:
            if record.taps is None:
                return None
            return border_bias(record.taps, spatial, strides, padding, dilation)

        def finish(
            product: Array,
            record: QuantizedParams,
            residual: Array | None,
            token: Array | None = None,
            branch: Array | None = None,
        ) -> Array:
            y = to_output(product, record.scale, record.bias, token, branch, record.up)
            outside = border(record)
            y = y if outside is None else y + outside[None]
            y = y.reshape(*batch, *y.shape[1:]).astype(dtype)
            return y if residual is None else residual + y

        convolve = functools.partial(float_conv, strides, padding, dilation)
        if bits == 16:
            values = rotate(as_batch(value_of(x)).astype(dtype), spec.rotation)
            branch = low_rank_branch(convolve, values, record, spec)
            return finish(convolve(values, record.kernel), record, residual, branch=branch)
        int8_conv: Callable[..., Array] = functools.partial(
            int8.conv, strides=strides, padding=padding, dilation=dilation
        )
        differentiate: Callable[..., Array] = convolve
        doubled = isinstance(x, Upsampled) and x.is_doubled and self.is_padded_3x3(spatial)
        if doubled:
            int8_conv = int8.upsampled_conv
            differentiate = functools.partial(float_conv_of_upsampled, convolve)
        multiply = functools.partial(product_of_codes, int8_conv, bits)

        def in_passes(x: Any, record: QuantizedParams, residual: Array | None) -> Array:
            values = as_batch(x.x if doubled else value_of(x))
            steps, token = input_steps(values, record, spec)
            if token is not None:
                # Of a kernel of one tap, which reads the positions that its strides leave.
                token = token[(slice(None), *(slice(None, None, stride) for stride in strides))]
            product = straight_through(multiply, differentiate, steps, record.kernel, record.sums)
            branch = low_rank_branch(differentiate, steps, record, spec)
            return finish(product, record, residual, token, branch)

        def fused(x: Normalized, record: QuantizedParams, residual: Array | None) -> Array:
            weights = jnp.moveaxis(record.kernel.astype(jnp.int8), 0, -2)
            results = record.scale, record.bias
            outside, limit = border(record), max_code(bits)
            return self.in_kernel(x, record.quantizer, weights, results, outside, residual, limit)

        def quantized_in_kernel(
            x: Normalized, record: QuantizedParams, residual: Array | None
        ) -> Array:
            norm = x.by_image(x.scale), x.by_image(x.offset)
            codes = layers_tpu.quantize_activated(
                as_images(x.x), norm, record.quantizer, max_code(bits)
            )
            codes = codes.reshape(-1, *spatial, channels)
            return finish(int8_conv(codes, record.kernel, record.sums), record, residual)

        halved = tuple(side // 2 for side in spatial)

        def upsampled_in_kernel(
            x: Upsampled, record: QuantizedParams, residual: Array | None
        ) -> Array:
            assert record.taps is not None
            y = upsampled_conv_tpu.conv(
                x.x.reshape(-1, math.prod(halved), channels),
                record.quantizer,
                jnp.moveaxis(record.kernel.astype(jnp.int8), 0, -2),
                record.scale,
                record.bias,
                border_bias(record.taps, (3, spatial[1]), strides, padding, dilation),
                size=halved,
                limit=max_code(bits),
            )
            y = y.reshape(*batch, *y.shape[1:])
            return y if residual is None else residual + y

        operands = x, record, residual
        if spec.plain and self.fits_kernel(x, jnp.int8):
            return on_tpu(fused, in_passes, *operands)
        if spec.plain and doubled:
            sizes = halved, channels, self.features
            if upsampled_conv_tpu.can_use(*sizes, dtype):
                return on_tpu(upsampled_in_kernel, in_passes, *operands)
        if spec.plain and is_activated_group_norm(x) and layers_tpu.can_use(x.shape):
            return on_tpu(quantized_in_kernel, in_passes, *operands)
        return in_passes(*operands)


def border_bias(
    taps: Array,
    spatial: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Array:
    """What the input's shift adds at each output position.

    A convolution pads with zeros, and zero is not code 0 once channels are shifted. Padding with
    code 0 stands for the shift, so the shift's part counts only through taps inside the input.

    Args:
      taps: of `QuantizedParams`.
      spatial: the input's size along each axis.
      strides: one for each axis.
      padding: (low, high) for each axis.
      dilation: distance of the taps along each axis.

    Returns:
      `[*out, O]`.
    """
    sizes = output_sizes(spatial, taps.shape[:-1], strides, padding, dilation)
    for axis, (size, out) in enumerate(zip(spatial, sizes, strict=True)):
        first = np.arange(out)[:, None] * strides[axis] - padding[axis][0]
        place = first + np.arange(taps.shape[axis])[None] * dilation[axis]
        inside = ((place >= 0) & (place < size)).astype(np.float32)
        summed = jnp.tensordot(inside, taps, (1, axis), precision=lax.Precision.HIGHEST)
        taps = jnp.moveaxis(summed, 0, axis)
    return taps


def _read(layer: nn.Module, spec: LayerSpec, x: LayerInput) -> QuantizedParams:
    """A layer's record, with scales as products need them.

    Raises:
      InputError: the layer is one that cannot be int8, or not with its spec's ranges.
    """
    if reason := why_float(layer, x.shape):
        raise InputError(f"{'/'.join(layer.path) or type(layer).__name__}: {reason}")
    taps = kernel_size(layer) if isinstance(layer, nn.Conv) else ()
    if spec.ranges == "token" and math.prod(taps) > 1:
        raise InputError(
            f"{'/'.join(layer.path) or type(layer).__name__}: ranges = 'token': a kernel of "
            f"{math.prod(taps)} taps sums over positions, which can have no step of their own; "
            f"static and step are possible"
        )
    shapes = layout(spec, x.shape[-1], layer.features, taps).params()
    params = {
        name: layer.param(name, _INITIAL.get(name, nn.initializers.zeros), leaf.shape, leaf.dtype)
        for name, leaf in shapes.items()
    }
    gain = layer.variable("quant", "gain", jnp.ones, ()).value if spec.ranges == "step" else None
    return QuantizedParams(**params, gain=gain).in_float32()


def _result_dtype(layer: nn.Module, x: LayerInput) -> jnp.dtype:
    """That of a layer's result: its own, or what linen makes of its input's and its weights'."""
    if layer.dtype is not None:
        return jnp.dtype(layer.dtype)
    return jnp.result_type(value_of(x).dtype, layer.param_dtype)
