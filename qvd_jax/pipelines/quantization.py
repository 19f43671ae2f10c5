"""Quantizes a pipeline's UNet: samples to see its layers' inputs, then solves layer by layer."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion import sampler
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.models.stages import shortcut_splits
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.quant import observers
from qvd_jax.quant.calibration import (
    LayerReport,
    find_quantizer,
    needs_quantizer,
    quantize_layer,
    step_gains,
)
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.observers import Statistics
from qvd_jax.quant.policy import Layer, LayerSpec, Policy, Quantization, match, named_policy
from qvd_jax.quant.record import QuantizedParams, replace_layers
from qvd_jax.quant.scri import ActivationQuantizer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationConfig:
    """What the layers' inputs are collected from.

    Attributes:
      steps: S of the sampling; None takes the pipeline's default.
      rows: rows sampled of each layer's input, over all steps and prompts.
      seed: of the noise and the rows.
      step_aware: whether layers inside the sampling loop get a step D for each of its steps.
    """

    steps: int | None = None
    rows: int = 256
    seed: int = 0
    step_aware: bool = False


def quantize(
    pipe: VideoPipeline,
    policy: str | Policy = "qvd-w8a8",
    prompts: str | Sequence[Any] | None = None,
    config: CalibrationConfig = CalibrationConfig(),
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[VideoPipeline, list[LayerReport]]:
    """Quantizes the UNet of a float pipeline.

    Args:
      pipe: the float pipeline; it is left as it is.
      policy: rules, or the name of some: METHOD-WIDTH such as "qvd-w8a8".
      prompts: to sample with; images for a pipeline that takes them; None takes the pipeline's
        own prompts.
      config: how much to sample.
      options: of the pipeline's calls: frames, height and width where not its defaults, and
        what a ControlNet is told.
      progress: called with what is done, how many parts are done and of how many.

    Returns:
      The quantized pipeline, and for each layer what it is worth. A layer no data reached stays
      float and has no report.

    Raises:
      InputError: the pipeline is quantized already, the policy fits no layer, there are no
        inputs, or a layer's input is not finite.
    """
    policy = named_policy(policy) if isinstance(policy, str) else policy
    layers, specs = _plan(pipe, policy, config, options)
    given = pipe.defaults.prompts if prompts is None else prompts
    inputs = [given] if isinstance(given, str) else list(given)
    report_progress = progress or (lambda *_: None)
    observed = collect(pipe, list(layers), inputs, config, dict(options or {}), report_progress)
    return _solve(pipe, policy.name, layers, specs, observed, config, report_progress)


def quantize_observed(
    pipe: VideoPipeline,
    policy: Policy,
    observed: "Observed",
    config: CalibrationConfig = CalibrationConfig(),
    options: Mapping[str, Any] | None = None,
) -> tuple[VideoPipeline, list[LayerReport]]:
    """Quantizes by what `collect` saw, which serves any number of policies.

    Args:
      pipe: the float pipeline; it is left as it is.
      policy: rules.
      observed: of the same pipeline, config and options.
      config: how much was sampled.
      options: as in `quantize`.

    Returns:
      As `quantize`.

    Raises:
      InputError: the pipeline is quantized already, or the policy fits no layer.
    """
    layers, specs = _plan(pipe, policy, config, options)
    return _solve(pipe, policy.name, layers, specs, observed, config, lambda *_: None)


def _solve(
    pipe: VideoPipeline,
    policy: str,
    layers: Mapping[str, Layer],
    specs: Mapping[str, LayerSpec],
    observed: "Observed",
    config: CalibrationConfig,
    progress: Progress,
) -> tuple[VideoPipeline, list[LayerReport]]:
    # What no data reached stays float.
    specs = {path: spec for path, spec in specs.items() if path in observed.joined}
    splits = shortcut_splits(pipe.unet.config)
    flat = flax.traverse_util.flatten_dict(pipe.params["unet"], sep="/")
    reports = []
    records: dict[str, QuantizedParams] = {}
    shared: dict[Any, ActivationQuantizer] = {}
    for done, (path, spec) in enumerate(specs.items()):
        progress("layers", done, len(specs))
        # Layers that read one tensor, in the same way, share its quantizer.
        reader = layers[path].source, layers[path].kernel[:-2], spec
        if needs_quantizer(spec) and reader not in shared:
            readers = [
                other
                for other in specs
                if (layers[other].source, layers[other].kernel[:-2], specs[other]) == reader
            ]
            kernels = [flat[f"{other}/kernel"] for other in readers]
            shared[reader] = find_quantizer(observed.joined[path], kernels, spec, splits.get(path))
        names = ("kernel", "bias")
        layer = {name: flat[f"{path}/{name}"] for name in names if f"{path}/{name}" in flat}
        record, report = quantize_layer(
            path, layer, observed.joined[path], spec, shared.get(reader)
        )
        if spec.step_aware:
            gain = step_gains(*observed.by_step[path], record, spec.activation_bits)
            record = record._replace(gain=gain)
        records[path] = record
        reports.append(report)
    progress("layers", len(specs), len(specs))
    unet = UNet3D(pipe.unet.config, layer_set(specs, pipe.unet.layers.dtype))
    quantized, gains = replace_layers(pipe.params["unet"], records)
    params = {**pipe.params, "unet": quantized}
    if gains:
        params[GAINS] = gains
    defaults, timesteps = pipe.defaults, None
    if gains:
        steps = config.steps or defaults.steps
        timesteps = tuple(pipe.schedule(steps).table.timestep.tolist())
        # What the checkpoint's scales are for is what it samples by default.
        defaults = replace(defaults, steps=steps)
    quantization = Quantization(policy, dict(specs), timesteps)
    quantized_pipe = replace(
        pipe, unet=unet, params=params, quantization=quantization, defaults=defaults
    )
    return quantized_pipe, reports


def _plan(
    pipe: VideoPipeline,
    policy: Policy,
    config: CalibrationConfig,
    options: Mapping[str, Any] | None,
) -> tuple[dict[str, Layer], dict[str, LayerSpec]]:
    """The UNet's layers by path, and how those that the policy names are quantized.

    Raises:
      InputError: the pipeline is quantized already, or the policy does not fit its layers.
    """
    if pipe.quantization is not None:
        raise InputError(
            f"the checkpoint is quantized already ({pipe.quantization.policy}); "
            f"a float one is needed"
        )
    layers = {layer.path: layer for layer in list_layers(pipe, options)}
    specs = match(policy, list(layers.values()))
    outside = _check_specs(pipe, specs)
    if config.step_aware:
        specs = {
            path: replace(spec, step_aware=path not in outside and spec.activation_bits < 16)
            for path, spec in specs.items()
        }
    return layers, specs


def list_layers(pipe: VideoPipeline, options: Mapping[str, Any] | None = None) -> list[Layer]:
    """The UNet's Dense and conv layers with the operations of one video's forward."""
    want, _ = _split(pipe, options or {})
    frames, height, width, _ = _latents_shape(pipe, want)
    shapes = pipe.configs.unet_shapes(pipe.window(frames), height, width, pipe.context_length)
    return observers.list_layers(UNet3D(pipe.unet.config), *shapes)


def _check_specs(pipe: VideoPipeline, specs: Mapping[str, LayerSpec]) -> set[str]:
    """Paths of the layers that run before the sampling loop.

    Raises:
      InputError: a layer is to be quantized as only layers elsewhere can be.
    """
    outside, temporal = _outside_loop(pipe)
    for path, spec in specs.items():
        if spec.method == "htdq" and path not in temporal:
            raise InputError(f"{path}: htdq is for layers that read the time embedding alone")
        if spec.step_aware and path in outside:
            raise InputError(f"{path}: it runs once before the sampler's steps, not step by step")
    return outside


def _outside_loop(pipe: VideoPipeline) -> tuple[set[str], set[str]]:
    """Paths of the layers that run before the sampling loop, and of those that read its steps."""
    stride = pipe.unet.config.stride
    shapes = pipe.configs.unet_shapes(1, stride, stride, 1)
    _, timestep, context, added_ids, control, _ = shapes
    calls = {
        "temporal_features": (timestep, added_ids),
        "context_features": (context,),
        "control_features": () if control is None else (control,),
    }
    found = {
        method: {
            layer.path
            for layer in observers.list_layers(UNet3D(pipe.unet.config), *inputs, method=method)
        }
        for method, inputs in calls.items()
        if inputs
    }
    return set().union(*found.values()), found["temporal_features"]


def _split(pipe: VideoPipeline, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Defaults with what the options say of the video, and the options about something else."""
    known = {field.name for field in fields(pipe.defaults)}
    video = {name: value for name, value in options.items() if name in known}
    more = {name: value for name, value in options.items() if name not in known}
    return replace(pipe.defaults, **video), more


class Observed(NamedTuple):
    """What calibration saw of the layers' inputs, by module path.

    Attributes:
      joined: over all steps and inputs.
      by_step: lowest and highest values of the channels at each step, `[S, C]` each, of the
        layers inside the sampling loop.
    """

    joined: dict[str, Statistics]
    by_step: dict[str, tuple[np.ndarray, np.ndarray]]


def collect(
    pipe: VideoPipeline,
    paths: Sequence[str],
    inputs: Sequence[Any],
    config: CalibrationConfig,
    options: dict[str, Any],
    progress: Progress,
) -> Observed:
    """Samples the inputs and observes every layer's input at every step.

    Args:
      pipe: the float pipeline.
      paths: of all layers, in the order in which they are called.
      inputs: prompts or images.
      config: how much to sample.
      options: of the pipeline's calls.
      progress: as in `quantize`.

    Raises:
      InputError: there are no inputs, or a layer's is not finite: it and its step are named.
    """
    if not inputs:
        raise InputError("there is nothing to calibrate with; one prompt or image is needed")
    want, more = _split(pipe, options)
    steps = config.steps or want.steps
    want = replace(want, steps=steps)
    schedule = pipe.schedule(steps)
    noise = pipe.initial_noise(config.seed, len(inputs), _latents_shape(pipe, want))
    first = np.asarray(noise) * schedule.initial_scale
    after, failure = _sample_path(pipe, inputs, options, steps, config.seed, noise, progress)
    before = [first, *after]
    unet, params = pipe.unet, pipe.params["unet"]
    key = jax.random.fold_in(jax.random.key(config.seed), len(inputs))
    timesteps = jnp.asarray(schedule.table.timestep)
    parts: dict[str, list[Statistics]] = {path: [] for path in paths}
    before_loop = observers.draw_places(key, math.ceil(config.rows / len(inputs)))
    temporal: Any = None
    calls = steps * len(inputs)
    rows = math.ceil(config.rows / calls)
    in_loop: set[str] = set()
    window = pipe.window(want.frames)
    for number, given in enumerate(inputs):
        conditions = pipe.conditions([given], want, config.seed, **more)
        if temporal is None:
            # They are the same for all inputs.
            told = (timesteps, conditions.added_ids)
            temporal, found = _observe(unet, params, told, None, method="temporal_features")
            _add(parts, found, "the time embedding")
        context, found = _observe(
            unet, params, (conditions.context,), before_loop, method="context_features"
        )
        _add(parts, found, f"input {number + 1}")
        control = None
        if conditions.control is not None:
            seen = conditions.control[:, :window]
            control, found = _observe(unet, params, (seen,), before_loop, method="control_features")
            _add(parts, found, f"input {number + 1}")
        for step in range(min(steps, len(before))):
            call = number * steps + step
            progress("observing", call, calls)
            scaled = schedule.table.model_in[step] * before[step][number, None, :window]
            latents = jnp.asarray(np.concatenate([scaled] * len(conditions.context)))
            latents = sampler.add_image(latents, conditions.image)
            feature = jax.tree.map(lambda leaf, step=step: leaf[step][None], temporal)
            places = observers.draw_places(jax.random.fold_in(key, call), rows)
            scale = jax.tree.map(lambda s, step=step: s[step], conditions.control_scale)
            inside = (latents, feature, context, control, conditions.reference, scale)
            _, found = _observe(unet, params, inside, places, method="denoise")
            if call * config.rows // calls == (call + 1) * config.rows // calls:
                # Of more calls than rows only some, evenly chosen, give one.
                found = {path: seen._replace(rows=seen.rows[:0]) for path, seen in found.items()}
            _add(parts, found, f"step {step + 1} of {steps}, input {number + 1}")
            in_loop |= found.keys()
    if failure is not None:
        raise failure
    by_step = {path: _by_step(parts[path], steps) for path in in_loop}
    joined = {path: observers.join(seen) for path, seen in parts.items() if seen}
    return Observed(joined, by_step)


def _sample_path(
    pipe: VideoPipeline,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    steps: int,
    seed: int,
    noise: Array,
    progress: Progress,
) -> tuple[list[np.ndarray], NotFiniteError | None]:
    """Latents `[B, F, h, w, C]` after each step; up to the one that gave none, and why."""
    after: list[np.ndarray] = []

    def keep(done: int, latents: Array) -> None:
        progress("sampling", done, steps)
        after.append(np.array(latents))

    try:
        pipe(
            inputs,
            **options,
            steps=steps,
            seed=seed,
            latents=noise,
            output_type="latents",
            callback_on_step_end=keep,
        )
    except NotFiniteError as error:
        # The layer it began in is found by observing the steps up to there.
        return after, error
    return after, None


def _by_step(parts: list[Statistics], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranges at each step, from statistics of prompt after prompt."""
    lower = np.stack([part.lower for part in parts]).reshape(-1, steps, len(parts[0].lower))
    upper = np.stack([part.upper for part in parts]).reshape(lower.shape)
    return lower.min(0), upper.max(0)


@functools.partial(jax.jit, static_argnames=("unet", "method"))
def _observe(
    unet: UNet3D,
    params: Params,
    arguments: tuple[Any, ...],
    places: Array | None,
    *,
    method: str,
) -> tuple[Any, dict[str, Statistics]]:
    return observers.observe(unet, params, *arguments, method=method, places=places)


def _add(parts: dict[str, list[Statistics]], found: dict[str, Statistics], where: str) -> None:
    # In the order of the calls: the first that is not finite is where it began.
    for path in filter(found.__contains__, parts):
        if not bool(found[path].finite):
            raise InputError(
                f"{path}: its input is not finite at {where}; the checkpoint cannot be "
                f"calibrated, float32 may help"
            )
        parts[path].append(found[path])


def _latents_shape(pipe: VideoPipeline, want: Any) -> tuple[int, int, int, int]:
    return pipe.latents_shape(want.frames, want.height, want.width)
