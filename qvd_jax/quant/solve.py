"""From a float layer, its statistics and its specification to its record and a report.

Rounding errors of weights add up to a constant where a layer's input has a mean, and inputs are far
from zero-mean once SCRI has centered their ranges (what comes out of SiLU lies near one end). The
bias of a layer with quantized inputs takes that constant (bias correction: Nagel et al., arXiv
1906.04721, section 4.2): on the sampled rows the mean of the output is the float layer's.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import flax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.quant import baselines, clipping, htdq, learned, low_rank, rounding, scri
from qvd_jax.quant.codec import SCALE_DTYPE, max_code, quantize_weights, rotate
from qvd_jax.quant.policy import LayerSpec, TracedLayer
from qvd_jax.quant.record import QuantizedParams, layout, leaf
from qvd_jax.quant.statistics import Statistics

# Of which clips and factors are searched, for a search tries dozens of candidates, and the means
# that center tokens are taken. Ranges and Gram matrices are of all rows.
SEARCHED_ROWS = 256
# Of the layers that pictures show.
_EXAMPLES = 3
LARGEST_SQNR = 200.0
"""Decibels that stand for no noise at all, for JSON has no infinity."""


@dataclass(frozen=True)
class LayerReport:
    """How well one layer is quantized.

    Attributes:
      path: module path.
      method: how its input's quantizer was found.
      sqnr: of its output on the sampled rows, in decibels.
      coverage_before: share of the levels a channel uses on average with one range for all.
      coverage_after: with the quantizer found.
      td_score_before: temporal discriminability with the plain uniform quantizer, of layers that
        read the temporal features of several steps.
      td_score_after: with the quantizer found.
      merged_before: share of neighboring steps with the same codes, plain uniform.
      merged_after: with the quantizer found.
      arrays: for plots: `lower`, `upper`, `shift` and `factor` of the channels `[C]`; or the
        `features` `[S, C]` with their codes before (`uniform`) and after (`codes`). A checkpoint
        has those of the `examples` alone.
    """

    path: str
    method: str
    sqnr: float
    coverage_before: float | None = None
    coverage_after: float | None = None
    td_score_before: float | None = None
    td_score_after: float | None = None
    merged_before: float | None = None
    merged_after: float | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def figures(self) -> dict[str, Any]:
        """All but the arrays."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        del values["arrays"]
        return values


def examples(reports: Sequence[LayerReport]) -> tuple[list[LayerReport], list[LayerReport]]:
    """The layers in which SCRI gained most coverage, and HTDQ most discriminability."""

    def most_gained(before: str, after: str) -> list[LayerReport]:
        measured = [report for report in reports if getattr(report, after) is not None]
        measured.sort(key=lambda report: getattr(report, before) - getattr(report, after))
        return measured[:_EXAMPLES]

    return (
        most_gained("coverage_before", "coverage_after"),
        most_gained("td_score_before", "td_score_after"),
    )


class _FloatLayer(NamedTuple):
    """A layer before it is quantized.

    Attributes:
      path: module path.
      weights: `[P, C, O]`.
      bias: `[O]`, zeros where it has none.
      kernel_size: of a conv.
      exact: what it makes of the sampled rows, without its bias, `[R, O]`.
    """

    path: str
    weights: Array
    bias: Array
    kernel_size: tuple[int, ...]
    exact: Array


def _check(path: str, statistics: Statistics) -> None:
    """Raises `InputError` where what calibration saw of a layer's input is too large to solve on.

    Errors are squares, and no entry of a Gram matrix is larger than the sum of these.
    """
    if not bool(jnp.isfinite(jnp.square(statistics.rows).sum())):
        raise InputError(
            f"{path}: its input reaches {float(jnp.abs(statistics.rows).max()):.2g} during "
            f"calibration, so the squares of its values are not finite in float32; an input of "
            f"ordinary size, below 1e15, is needed"
        )


def solve_layers(
    layers: Mapping[str, TracedLayer],
    specs: Mapping[str, LayerSpec],
    statistics: Mapping[str, Statistics],
    params: Params,
    splits: Mapping[str, int],
) -> Iterator[tuple[str, QuantizedParams, LayerReport]]:
    """Quantizes layer after layer.

    Args:
      layers: by module path.
      specs: of those that are quantized.
      statistics: of their inputs.
      params: of the float network.
      splits: where a layer's input is a concatenation, of how many channels its first part is.

    Yields:
      Path, record and report of each layer.

    Raises:
      InputError: the squares of a layer's inputs are not finite; before the first is solved.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def kernel(path: str) -> Array:
        return jnp.asarray(flat[leaf(path, "kernel")]).reshape(layers[path].kernel)

    def reader(path: str) -> Any:
        """Layers that read one tensor, in the same way, share its quantizer."""
        return layers[path].source, layers[path].kernel[:-1], specs[path]

    for path in specs:
        _check(path, statistics[path])
    shared: dict[Any, scri.ActivationQuantizer] = {}
    for path, spec in specs.items():
        key = reader(path)
        if needs_quantizer(spec) and key not in shared:
            kernels = [kernel(other) for other in specs if reader(other) == key]
            shared[key] = find_quantizer(statistics[path], kernels, spec, splits.get(path))
        layer = {"kernel": kernel(path)}
        if (bias := flat.get(leaf(path, "bias"))) is not None:
            layer["bias"] = jnp.asarray(bias).reshape(-1)
        yield path, *solve_layer(path, layer, statistics[path], spec, shared.get(key))


def solve_layer(
    path: str,
    params: Params,
    statistics: Statistics,
    spec: LayerSpec,
    quantizer: scri.ActivationQuantizer | None = None,
) -> tuple[QuantizedParams, LayerReport]:
    """Quantizes one Dense or conv layer.

    Args:
      path: module path, for the report.
      params: `kernel` `[*kernel_size, C, O]` and maybe `bias` `[O]`.
      statistics: of its input.
      spec: how.
      quantizer: of its input, from `find_quantizer`; None where `needs_quantizer` says so.

    Returns:
      The record of `QuantDense` or `QuantConv`, and what it is worth.
    """
    kernel = jnp.asarray(params["kernel"], jnp.float32)
    kernel_size, (channels, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    weights = kernel.reshape(-1, channels, outputs)
    bias = jnp.asarray(params.get("bias", jnp.zeros(outputs)), jnp.float32)
    exact = scri.row_product(statistics.rows, weights)
    layer = _FloatLayer(path, weights, bias, kernel_size, exact)
    if spec.activation_bits == 16:
        return _with_float_input(layer, statistics, spec)
    if quantizer is None:
        return _with_two_ranges(layer, statistics, spec)
    return _with_channel_ranges(layer, statistics, spec, quantizer)


def _with_float_input(
    layer: _FloatLayer, statistics: Statistics, spec: LayerSpec
) -> tuple[QuantizedParams, LayerReport]:
    rows = rotate(statistics.rows, spec.rotation)
    weights = scri.rotate_inputs(layer.weights, spec.rotation)
    product = _quantize_product(rows, weights, layer, spec)
    found = scri.row_product(rows, product.multiplied)
    record = product.record(layer, spec)
    return record, LayerReport(layer.path, spec.method, _output_sqnr(layer.exact, found))


def _with_channel_ranges(
    layer: _FloatLayer,
    statistics: Statistics,
    spec: LayerSpec,
    quantizer: scri.ActivationQuantizer,
) -> tuple[QuantizedParams, LayerReport]:
    bits, rotation = spec.activation_bits, spec.rotation
    # Rounded before the factor folds into the weights.
    in_scale = quantizer.in_scale.astype(SCALE_DTYPE)
    scaled = in_scale.astype(jnp.float32)
    quantizer = quantizer._replace(factor=1 / (scaled * quantizer.step))
    rows = quantizer.multiplied(statistics.rows, bits, rotation, token=spec.ranges == "token")
    folded = quantizer.folded(layer.weights, rotation)
    product = _quantize_product(rows, folded, layer, spec, quantizer.step)
    # SCRI's shift z W, plus the mean error (m - z) W - D mean(q) dW Wq that the bias takes.
    through_taps = scri.mean_product(statistics.rows, layer.weights)
    through_taps -= scri.mean_product(rows, product.multiplied)
    one_tap = len(layer.weights) == 1
    record = product.record(layer, spec)._replace(
        bias=layer.bias + through_taps[0] if one_tap else layer.bias,
        in_scale=in_scale,
        in_offset=-quantizer.shift * scaled,
        taps=None if one_tap else through_taps.reshape(*layer.kernel_size, -1),
    )
    found = scri.row_product(rows, product.multiplied) + through_taps.sum(0)[None]
    report = LayerReport(layer.path, spec.method, _output_sqnr(layer.exact, found))
    if not spec.plain:
        # Mixed channels and the ranges of tokens have no levels that one channel uses.
        return record, report
    ends = statistics.lower, statistics.upper
    plain = baselines.minmax(*ends, bits)
    return record, replace(
        report,
        coverage_before=float(scri.coverage(*ends, plain, bits)),
        coverage_after=float(scri.coverage(*ends, quantizer, bits)),
        arrays={
            "lower": np.asarray(statistics.lower),
            "upper": np.asarray(statistics.upper),
            "shift": np.asarray(quantizer.shift),
            "factor": np.asarray(quantizer.factor),
        },
    )


def _with_two_ranges(
    layer: _FloatLayer, statistics: Statistics, spec: LayerSpec
) -> tuple[QuantizedParams, LayerReport]:
    """A layer whose input is a function of the step: its rows are all the steps."""
    rotated = rotate(statistics.rows[:, 0], spec.rotation)
    features = np.asarray(rotated, np.float64)
    quantizer = htdq.search(features, spec.activation_bits)
    uniform = htdq.uniform_candidates(features, spec.activation_bits)[-1]
    steps = quantizer.fine_steps(features)
    rows = jnp.asarray(steps, jnp.float32)[:, None]
    weights = scri.rotate_inputs(layer.weights, spec.rotation)
    product = _quantize_product(rows, weights, layer, spec, quantizer.step)
    found = scri.row_product(rows, product.multiplied)
    # The offset's part of the output, and the mean error that the bias takes.
    constant = (layer.exact - found).mean(0)
    record = product.record(layer, spec)._replace(
        bias=layer.bias + constant,
        in_scale=jnp.float32(quantizer.in_scale),
        in_offset=jnp.float32(quantizer.in_offset),
        coarse=jnp.float32(quantizer.ratio),
    )
    sqnr = _output_sqnr(layer.exact, found + constant[None])
    report = LayerReport(layer.path, spec.method, sqnr)
    if len(features) == 1:
        # One step has no other to be told from.
        return record, report
    return record, replace(
        report,
        td_score_before=htdq.td_score(features, uniform(features)),
        td_score_after=htdq.td_score(features, quantizer(features)),
        merged_before=htdq.merged_steps(uniform.fine_steps(features)),
        merged_after=htdq.merged_steps(steps),
        arrays={"features": features, "uniform": uniform.codes(features)[0], "codes": steps},
    )


def step_gains(
    lower: np.ndarray, upper: np.ndarray, record: QuantizedParams, spec: LayerSpec
) -> Array:
    """Each step's D as a share of the layer's, `[S]`: what that step's values need, at most 1.

    Args:
      lower: lowest value of each channel at each step, `[S, C]`.
      upper: highest value of each channel at each step, `[S, C]`.
      record: of the quantized layer.
      spec: of the layer.
    """
    values = jnp.abs(record.values(jnp.stack([lower, upper]), replace(spec, rotation=1))).max(0)
    if spec.rotation == 1:
        needed = values.max(1) / max_code(spec.activation_bits)
        needed = jnp.minimum(needed, 1.0)
    else:
        # Of mixed channels a step's range is not known, only how it grows: with the norm of those.
        groups = values.reshape(len(values), -1, spec.rotation)
        needed = jnp.square(groups).mean(-1).max(1) ** 0.5
        needed = needed / jnp.maximum(needed.max(), jnp.finfo(jnp.float32).tiny)
    return jnp.where(needed > 0, needed, 1.0)


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise, 10 log10(signal / noise), in decibels; at most 200.

    Args:
      signal: |y|^2.
      noise: |y^ - y|^2.
    """
    if noise == 0:
        return LARGEST_SQNR
    return min(10 * math.log10(max(signal, sys.float_info.min) / noise), LARGEST_SQNR)


def _output_sqnr(exact: Array, found: Array) -> float:
    return sqnr(float(jnp.square(exact).sum()), float(jnp.square(found - exact).sum()))


def needs_quantizer(spec: LayerSpec) -> bool:
    """Whether a layer's input becomes codes by an `ActivationQuantizer`."""
    return spec.activation_bits < 16 and spec.method != "htdq"


def find_quantizer(
    statistics: Statistics, kernels: Sequence[Array], spec: LayerSpec, split: int | None = None
) -> scri.ActivationQuantizer:
    """The quantizer of what one or more layers read.

    Args:
      statistics: of the tensor.
      kernels: `[*taps, C, O]` of each layer; taps and C are the same for all.
      spec: how the layers are quantized.
      split: where the tensor is a concatenation, of how many channels its first part is.
    """
    *_, channels, _ = kernels[0].shape
    weights = jnp.concatenate(
        [jnp.asarray(k, jnp.float32).reshape(-1, channels, k.shape[-1]) for k in kernels], axis=-1
    )
    lower, upper, all_rows, _ = statistics
    rows = all_rows[_searched(all_rows)]
    bits = spec.activation_bits
    rotation, token, clip = spec.rotation, spec.ranges == "token", 1.0
    if spec.method in ("scri", "learned"):
        widths = bits, spec.weight_bits
        flat, spared = all_rows.reshape(len(all_rows), -1), None
        if spec.rounding == "gptq" and rotation == 1:
            spared = rounding.spared(flat)
        found, clip = scri.search(
            lower, upper, rows, weights, *widths, rotation, token=token, spared=spared
        )
    elif spec.method == "smoothquant":
        found = baselines.smoothquant(lower, upper, weights, bits)
    elif spec.method == "qdiffusion":
        found = baselines.qdiffusion(lower, upper, rows, bits, split)
    elif spec.method == "mse":
        found = baselines.mse(lower, upper, rows, bits)
    else:
        found = baselines.minmax(lower, upper, bits)
    if rotation > 1 and spec.method in ("qdiffusion", "mse"):
        clip = baselines.rotated_clip(found, rows, bits, rotation)
    found = found.suited(rows if token else all_rows, clip, bits, rotation, token=token)
    if spec.method == "learned":
        left = flat.var(0) if spared is None else spared
        found = learned.learn(found, lower, upper, rows, weights, left, *widths, token=token)
    return found


class _Product(NamedTuple):
    """What stands for a layer's product of its inputs, rotated and as codes, with its weights.

    Attributes:
      codes: of the weights, `[P, C, O]`.
      scale: of the product of codes, `[O]`.
      down: `[P, C, rank]`; None without a low rank.
      up: `[rank, O]`.
    """

    codes: Array
    scale: Array
    down: Array | None
    up: Array | None

    @property
    def multiplied(self) -> Array:
        """The weights that all this is together, `[P, C, O]`."""
        weights = self.codes * self.scale.astype(jnp.float32)[None, None]
        if self.down is None or self.up is None:
            return weights
        down, up = self.down.astype(jnp.float32), self.up.astype(jnp.float32)
        return weights + jnp.matmul(down, up, precision="highest")

    def record(self, layer: _FloatLayer, spec: LayerSpec) -> QuantizedParams:
        """The record as far as it is of the weights, in the order in which layers store it."""
        _, channels, outputs = layer.weights.shape
        shapes = layout(spec, channels, outputs, layer.kernel_size)

        def stored(array: Array, shape: Any) -> Array:
            return jnp.moveaxis(array, -1, 0).reshape(shape.shape).astype(shape.dtype)

        sums = self.codes.sum((0, 1), dtype=jnp.int32)
        return QuantizedParams(
            stored(self.codes, shapes.kernel),
            self.scale,
            layer.bias,
            sums=None if shapes.sums is None else sums,
            down=None if self.down is None else stored(self.down, shapes.down),
            up=None if self.up is None else stored(self.up, shapes.up),
        )


def _quantize_product(
    rows: Array,
    weights: Array,
    layer: _FloatLayer,
    spec: LayerSpec,
    input_step: Array | float = 1.0,
) -> _Product:
    """Weights clipped where the error is least, and rounded, as the spec says.

    Args:
      rows: what the weights are multiplied with, `[R, P, C]`, codes or float.
      weights: `[P, C, O]`.
      layer: the float layer.
      spec: how.
      input_step: D of the input's codes, 1 of a float input.
    """
    # A float input's layer has no bias that takes the error's mean.
    mean_counts = spec.activation_bits == 16
    shape, bits = weights.shape, spec.weight_bits
    rows, weights = rows.reshape(len(rows), -1), weights.reshape(-1, shape[-1])
    if spec.rounding == "gptq":
        # Every other share: each is rounded by itself.
        clips = clipping.clip_candidates(bits)[::2] if spec.clips_weights else (1.0,)
        codes, scale = rounding.clip_and_round(
            weights, rows, layer.exact, bits, input_step, clips=clips, mean_counts=mean_counts
        )
    else:
        clip: Array | float = 1.0
        if spec.clips_weights:
            some = _searched(rows)
            clip = clipping.search_weight_clip(
                rows[some], weights, layer.exact[some], bits, input_step, mean_counts=mean_counts
            )
        codes, scale = quantize_weights(weights, bits, input_step, clip)
    down = up = None
    if spec.low_rank:
        left = weights * input_step - codes * scale.astype(jnp.float32)[None]
        down, up = low_rank.factors(left, rows, spec.low_rank, mean_counts=mean_counts)
        down = down.reshape(*shape[:2], -1)
    return _Product(codes.reshape(shape), scale, down, up)


def _searched(rows: Array) -> np.ndarray:
    """Places of the rows that searches see, evenly apart."""
    count = len(rows)
    return np.unique(np.arange(SEARCHED_ROWS) * count // SEARCHED_ROWS)
