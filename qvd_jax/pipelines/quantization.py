"""Quantizes a pipeline's UNet: plans what becomes of its layers, observes them, solves each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.stages import shortcut_splits
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.images import to_arrays
from qvd_jax.pipelines.observation import (
    CalibrationConfig,
    Observed,
    Progress,
    collect,
    split_options,
    unseen,
)
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.text import as_prompts
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import (
    LayerSpec,
    Policy,
    Quantization,
    TracedLayer,
    match,
    named_policy,
)
from qvd_jax.quant.record import QuantizedParams, replace_layers
from qvd_jax.quant.solve import LayerReport, solve_layers, step_gains
from qvd_jax.quant.statistics import trace_layers

_DEFAULT = CalibrationConfig()


def quantize(
    pipe: VideoPipeline,
    policy: str | Policy = "qvd-w8a8",
    prompts: str | Sequence[Any] | None = None,
    config: CalibrationConfig = _DEFAULT,
    options: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
    mesh: MeshConfig | None = None,
) -> tuple[VideoPipeline, list[LayerReport]]:
    """Quantizes the UNet of a float pipeline: `make_plan`, `collect` and `solve`.

    Args:
      pipe: the float pipeline; it is left as it is.
      policy: rules, or the name of some: METHOD-WIDTH such as "qvd-w8a8".
      prompts: to sample with; images for a pipeline that takes them; None takes the pipeline's
        own prompts.
      config: how much to sample.
      options: of the pipeline's calls: frames, height and width where not its defaults, and
        what its videos follow.
      progress: told how far it is.
      mesh: of the pipeline's call.

    Returns:
      The quantized pipeline, and for each layer what it is worth. A layer no data reached stays
      float and has no report.

    Raises:
      InputError: the pipeline is quantized already, the policy fits no layer, there are no
        inputs or others than the pipeline takes, or a layer's input is not finite.
    """
    policy = named_policy(policy) if isinstance(policy, str) else policy
    plan = make_plan(pipe, policy, config, options)
    given: Any = pipe.defaults.prompts if prompts is None else prompts
    is_told_texts = isinstance(pipe, TextToVideoPipeline)
    inputs = as_prompts(given) if is_told_texts else to_arrays(given, "prompts")
    observed = collect(pipe, plan.layers, inputs, config, options, progress, mesh=mesh)
    return solve(pipe, plan, observed, inputs, config, options, progress, mesh)


@dataclass(frozen=True)
class Plan:
    """What becomes of a UNet's layers.

    Attributes:
      policy: its name.
      layers: all of them by path, in the order in which they are called.
      specs: how those are quantized that the policy names.
    """

    policy: str
    layers: dict[str, TracedLayer]
    specs: dict[str, LayerSpec]

    @property
    def propagates(self) -> bool:
        """Whether a first solution is observed for a second one."""
        return any(spec.propagate for spec in self.specs.values())


def make_plan(
    pipe: VideoPipeline,
    policy: Policy,
    config: CalibrationConfig = _DEFAULT,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """What a policy makes of a pipeline's layers; arguments as of `quantize`.

    Raises:
      InputError: the pipeline is quantized already, or the policy does not fit its layers.
    """
    if pipe.quantization is not None:
        raise InputError(
            f"the checkpoint is quantized already ({pipe.quantization.policy}); "
            f"a float one is needed"
        )
    if not isinstance(pipe.unet, UNet3D):
        raise InputError(
            "the UNet has an adapter attached; merge it into the float weights (lora.merge) first"
        )
    layers = unet_layers(pipe, options)
    specs = match(policy, layers)
    outside = _check_specs(pipe, specs)
    if config.step_aware:
        specs = {
            path: _by_step(path, spec) if path not in outside else spec
            for path, spec in specs.items()
        }
        if all(spec.ranges != "step" for spec in specs.values()):
            raise InputError(
                f"step_aware has no meaning for the policy {policy.name}: it quantizes the input "
                f"of no layer inside the sampling loop"
            )
    return Plan(policy.name, {layer.path: layer for layer in layers}, specs)


def unet_layers(pipe: VideoPipeline, options: Mapping[str, Any] | None = None) -> list[TracedLayer]:
    """The UNet's Dense and conv layers with the operations of one video's forward."""
    want, _ = split_options(pipe, options or {})
    frames, height, width, _ = pipe.latents_shape(want.frames, want.height, want.width)
    shapes = pipe.configs.unet_shapes(pipe.window(frames), height, width, pipe.context_length)
    return trace_layers(UNet3D(pipe.unet.config), *shapes)


def solve(
    pipe: VideoPipeline,
    plan: Plan,
    observed: Observed,
    inputs: Sequence[Any],
    config: CalibrationConfig = _DEFAULT,
    options: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
    mesh: MeshConfig | None = None,
) -> tuple[VideoPipeline, list[LayerReport]]:
    """Solves a plan, and where layers of it propagate, once more on what they see in the result.

    Args:
      pipe: the float pipeline; it is left as it is.
      plan: of the same pipeline, config and options.
      observed: of the pipeline, by `collect`.
      inputs: that were observed.
      config: how much was sampled.
      options: as of `collect`.
      progress: told how far it is; what is done the second time is called so, "layers again".
      mesh: as of `collect`.

    Returns:
      As `quantize`.
    """
    quantized, reports = solve_plan(pipe, plan, observed, config, progress)
    if not plan.propagates:
        return quantized, reports

    def progress_again(what: str, done: int, total: int) -> None:
        progress(f"{what} again", done, total)

    seen = collect(quantized, plan.layers, inputs, config, options, progress_again, mesh=mesh)
    joined = {
        path: found._replace(rows=seen.joined[path].rows)
        if path in plan.specs and plan.specs[path].propagate
        else found
        for path, found in observed.joined.items()
    }
    return solve_plan(pipe, plan, observed._replace(joined=joined), config, progress_again)


def solve_plan(
    pipe: VideoPipeline,
    plan: Plan,
    observed: Observed,
    config: CalibrationConfig = _DEFAULT,
    progress: Progress = unseen,
) -> tuple[VideoPipeline, list[LayerReport]]:
    """Quantizes by what `collect` saw, which serves any number of plans.

    Args:
      pipe: the float pipeline; it is left as it is.
      plan: of the same pipeline, config and options.
      observed: likewise.
      config: how much was sampled.
      progress: told how far it is.

    Returns:
      As `quantize`.
    """
    # What no data reached stays float.
    specs = {path: spec for path, spec in plan.specs.items() if path in observed.joined}
    splits = shortcut_splits(pipe.unet.config)
    reports = []
    records: dict[str, QuantizedParams] = {}
    solved = solve_layers(plan.layers, specs, observed.joined, pipe.params["unet"], splits)
    progress("layers", 0, len(specs))
    for path, record, report in solved:
        if specs[path].ranges == "step":
            gain = step_gains(*observed.by_step[path], record, specs[path])
            record = record._replace(gain=gain)
        records[path] = record
        reports.append(report)
        progress("layers", len(records), len(specs))
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
    quantization = Quantization(plan.policy, specs, timesteps)
    quantized_pipe = replace(
        pipe, unet=unet, params=params, quantization=quantization, defaults=defaults
    )
    return quantized_pipe, reports


def _check_specs(pipe: VideoPipeline, specs: Mapping[str, LayerSpec]) -> set[str]:
    """Paths of the layers that run before the sampling loop.

    Raises:
      InputError: a layer is to be quantized as only layers elsewhere can be.
    """
    outside, temporal = _outside_loop(pipe)
    for path, spec in specs.items():
        if spec.method == "htdq" and path not in temporal:
            raise InputError(f"{path}: htdq is for layers that read the time embedding alone")
        if spec.ranges == "step" and path in outside:
            raise InputError(f"{path}: it runs once before the sampler's steps, not step by step")
    return outside


def _by_step(path: str, spec: LayerSpec) -> LayerSpec:
    """A spec with a range for each step, where its input has one.

    Raises:
      InputError: it has one for each token.
    """
    if spec.ranges == "token":
        raise InputError(
            f"{path}: its policy has ranges of tokens, found while sampling; a range for each step "
            f"(step_aware) has no meaning beside them"
        )
    return spec if spec.activation_bits == 16 else replace(spec, ranges="step")


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
            layer.path for layer in trace_layers(UNet3D(pipe.unet.config), *inputs, method=method)
        }
        for method, inputs in calls.items()
        if inputs
    }
    return set().union(*found.values()), found["temporal_features"]
