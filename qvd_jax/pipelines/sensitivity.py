"""What the final latents lose by the rounded weights of each layer alone, measured by sampling.

One layer of the float network at a time gets the weights that its codes stand for, and the network
samples the same videos from the same noise. Inputs stay float: rounded, they would turn the
smallest change of a layer's weights into other codes further on, and that noise, which is there
whatever the widths, would hide what the change itself does. All is float32 for the same reason.
The weights are parameters, so that one compiled program measures all layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.geometry import geometry, kernel_size
from qvd_jax.models.layers import Conv, Dense, LayerSet
from qvd_jax.models.norms import Normalized
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.observation import CalibrationConfig, Observed, Progress, unseen
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.quantization import Plan, solve_plan
from qvd_jax.quant import scri
from qvd_jax.quant.layers import border_bias
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.record import QuantizedParams, leaf

VIDEOS = 2
"""Sampled for each layer, of the calibration's inputs."""

BEFORE_LAYERS = 2
"""Samplings before the first layer's: of the float network and of the quantized one."""

PROBE_BITS = 4
"""Of the weights whose errors are sampled: far above float32's rounding, and small enough to add
up. What other widths lose is told from it by the errors of the layer's own output."""


class Sensitivities(NamedTuple):
    """What the final latents x of some videos lose.

    Attributes:
      signal: |x|^2 of the float network.
      noise: |x^ - x|^2 of the quantized network with all weights of the most bits.
      errors: |x^ - x|^2 by the weights of one layer alone, by module path and bits.
    """

    signal: float
    noise: float
    errors: dict[str, dict[int, float]]


def measure(
    pipe: VideoPipeline,
    plan: Plan,
    widths: Sequence[int],
    observed: Observed,
    inputs: Sequence[Any],
    config: CalibrationConfig,
    options: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
    mesh: MeshConfig | None = None,
) -> Sensitivities:
    """Solves all layers at each width and samples with the weights of one layer after the other.

    Args:
      pipe: the float pipeline.
      plan: of layers that data reached; the bits of their weights do not matter.
      widths: bits of weights.
      observed: what calibration saw of the layers' inputs.
      inputs: of the calibration.
      config: likewise.
      options: likewise.
      progress: told how far it is: with "rounding" of all widths, then with "measuring".
      mesh: of the pipeline's call.
    """
    solved: dict[int, VideoPipeline] = {}
    for number, bits in enumerate(widths):

        def rounding(_: str, done: int, total: int, number: int = number) -> None:
            progress("rounding", number * total + done, len(widths) * total)

        at_width = with_widths(plan, dict.fromkeys(plan.specs, bits))
        solved[bits], _ = solve_plan(pipe, at_width, observed, config, rounding)
    records = {bits: _records(quantized) for bits, quantized in solved.items()}
    numbers = probed_inputs(len(inputs))
    shown = [inputs[number] for number in numbers]
    call = {**(options or {}), "steps": config.steps, "seed": config.seed, "indices": numbers}

    def sample(pipe: VideoPipeline) -> np.ndarray:
        return pipe(shown, **call, output_type="latents", mesh=mesh).astype(np.float64)

    probed = _probed(pipe, plan)
    exact = sample(probed)
    ticks = BEFORE_LAYERS + len(plan.specs)
    progress("measuring", 1, ticks)
    noise = float(np.square(sample(solved[max(widths)]) - exact).sum())
    progress("measuring", BEFORE_LAYERS, ticks)
    probe = min(widths, key=lambda bits: abs(bits - PROBE_BITS))
    errors: dict[str, dict[int, float]] = {}
    unet = flax.traverse_util.flatten_dict(probed.params["unet"], sep="/")
    for path, spec in plan.specs.items():
        weights = unet[leaf(path, "kernel")].reshape(plan.layers[path].kernel)
        rows = observed.joined[path].rows
        changes = {bits: _change(records[bits][path], weights, rows, spec) for bits in widths}
        lost = float(np.square(sample(_changed(probed, path, changes[probe])) - exact).sum())
        own = changes[probe].error or 1.0
        errors[path] = {bits: lost * one.error / own for bits, one in changes.items()}
        progress("measuring", BEFORE_LAYERS + len(errors), ticks)
    return Sensitivities(float(np.square(exact).sum()), noise, errors)


def probed_inputs(count: int) -> list[int]:
    """The numbers of those that are sampled, evenly among so many."""
    return sorted({i * count // VIDEOS for i in range(VIDEOS)})


def with_widths(plan: Plan, widths: Mapping[str, int]) -> Plan:
    """The plan of the layers that have widths, by path, with these."""
    specs = {path: replace(plan.specs[path], weight_bits=bits) for path, bits in widths.items()}
    return replace(plan, specs=specs)


class _Change(NamedTuple):
    """What rounded weights make of a float layer.

    Attributes:
      kernel: what the codes stand for, `[*taps, C, O]`.
      constant: what the bias takes of the error, through each tap, `[*taps, O]`.
      error: of the layer's output on the sampled rows, behind that.
    """

    kernel: Array
    constant: Array
    error: float


def _change(record: QuantizedParams, weights: Array, rows: Array, spec: LayerSpec) -> _Change:
    """The change of a layer with weights `[*taps, C, O]` that read `rows` `[R, P, C]`."""
    kernel = jnp.asarray(record.dequantized(spec.rotation)[0])
    missed = (weights - kernel).reshape(-1, *weights.shape[-2:])
    constant = jnp.zeros((len(missed), missed.shape[-1]))
    if spec.activation_bits < 16:
        # As in `quant.solve`: the mean over rows and taps, of all steps where they are the rows.
        constant = scri.mean_product(rows, missed)
    left = scri.row_product(rows, missed) - constant.sum(0)[None]
    return _Change(
        kernel, constant.reshape(*weights.shape[:-2], -1), float(jnp.square(left).mean())
    )


def _records(quantized: VideoPipeline) -> dict[str, QuantizedParams]:
    """The records of a quantized pipeline's layers, by module path."""
    assert quantized.quantization is not None
    flat = flax.traverse_util.flatten_dict(quantized.params["unet"], sep="/")
    return {
        path: QuantizedParams(
            **{
                name: flat[leaf(path, name)]
                for name in QuantizedParams._fields
                if leaf(path, name) in flat
            }
        )
        for path in quantized.quantization.specs
    }


@dataclass(frozen=True)
class _ProbedLayers(LayerSet):
    """Float layers with a bias each, and convs of several taps with one for each tap."""

    def dense(self, features: int, *, use_bias: bool = True, **options: Any) -> nn.Module:
        return super().dense(features, use_bias=True, **options)

    def conv(
        self, features: int, kernel_size: tuple[int, ...], *, use_bias: bool = True, **options: Any
    ) -> nn.Module:
        return super().conv(features, kernel_size, use_bias=True, **options)


class _ProbedConv(Conv):
    """`Conv`, padded with zeros, that adds a constant for each tap that is inside its input."""

    @nn.compact
    def __call__(self, x: Array | Normalized, residual: Array | None = None) -> Array:
        y = super().__call__(x, residual)
        size = kernel_size(self)
        if math.prod(size) == 1:
            return y
        taps = self.param("taps", nn.initializers.zeros, (*size, self.features), jnp.float32)
        spatial = x.shape[-len(size) - 1 : -1]
        inside = border_bias(taps, spatial, *geometry(self, spatial))
        return y + inside.reshape((1,) * (y.ndim - inside.ndim) + inside.shape)


def _probed(pipe: VideoPipeline, plan: Plan) -> VideoPipeline:
    """The float pipeline in float32, whose layers have a bias for what a change may add."""
    flat = flax.traverse_util.flatten_dict(
        jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), pipe.params["unet"]), sep="/"
    )
    for path, layer in plan.layers.items():
        *size, _, features = layer.kernel
        flat.setdefault(leaf(path, "bias"), jnp.zeros(features))
        if math.prod(size) > 1:
            flat[leaf(path, "taps")] = jnp.zeros((*size, features))
    # Bound to their devices: those that are and those that are not are other programs to jit.
    flat = {name: jax.device_put(array, array.sharding) for name, array in flat.items()}
    params = {**pipe.params, "unet": flax.traverse_util.unflatten_dict(flat, sep="/")}
    return replace(
        pipe, unet=UNet3D(pipe.unet.config, _ProbedLayers(Dense, _ProbedConv)), params=params
    )


def _changed(probed: VideoPipeline, path: str, change: _Change) -> VideoPipeline:
    """The pipeline with one layer changed."""
    flat = flax.traverse_util.flatten_dict(probed.params["unet"], sep="/")

    def change_to(name: str, value: Array) -> None:
        old = flat[leaf(path, name)]
        flat[leaf(path, name)] = jax.device_put(value.reshape(old.shape), old.sharding)

    change_to("kernel", change.kernel)
    if leaf(path, "taps") in flat:
        change_to("taps", change.constant)
    else:
        change_to("bias", flat[leaf(path, "bias")] + change.constant.reshape(-1))
    unet: Params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return replace(probed, params={**probed.params, "unet": unet})
