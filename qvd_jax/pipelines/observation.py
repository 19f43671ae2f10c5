"""Samples with a float pipeline to see what its UNet's layers read, at every step."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion import sampler
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.quant.statistics import Statistics, draw_places, join, observe

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many parts are done and of how many."""


def unseen(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


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
    paths: Iterable[str],
    inputs: Sequence[Any],
    config: CalibrationConfig = CalibrationConfig(),
    options: Mapping[str, Any] | None = None,
    progress: Progress = unseen,
    mesh: MeshConfig | None = None,
) -> Observed:
    """Samples the inputs and observes every layer's input at every step.

    Args:
      pipe: the float pipeline.
      paths: of all layers, in the order in which they are called.
      inputs: prompts or images.
      config: how much to sample.
      options: of the pipeline's calls, as in `quantize`.
      progress: told how far it is.
      mesh: of the pipeline's call; what it sampled is observed on the parameters' device.

    Raises:
      InputError: there are no inputs, or a layer's is not finite: it and its step are named.
    """
    if not inputs:
        raise InputError("there is nothing to calibrate with; one prompt or image is needed")
    options = options or {}
    want, more = split_options(pipe, options)
    steps = config.steps or want.steps
    want = replace(want, steps=steps)
    schedule = pipe.schedule(steps)
    noise = pipe.initial_noise(config.seed, len(inputs), _latents_shape(pipe, want))
    first = np.asarray(noise) * schedule.initial_scale
    after, failure = _sample_path(
        pipe, inputs, {**options, "mesh": mesh}, steps, config.seed, noise, progress
    )
    before = [first, *after]
    unet, params = pipe.unet, pipe.params["unet"]
    key = jax.random.fold_in(jax.random.key(config.seed), len(inputs))
    timesteps = jnp.asarray(schedule.table.timestep)
    parts: dict[str, list[Statistics]] = {path: [] for path in paths}
    before_loop = draw_places(key, math.ceil(config.rows / len(inputs)))
    temporal: Any = None
    calls = steps * len(inputs)
    rows = math.ceil(config.rows / calls)
    in_loop: set[str] = set()
    window = pipe.window(want.frames)
    for number, given in enumerate(inputs):
        conditions = pipe.conditions([given], want, config.seed, **more)
        if temporal is None:
            # They are the same for all inputs.
            steps_and_ids = (timesteps, conditions.added_ids)
            temporal, found = _observe(
                unet, params, steps_and_ids, None, method="temporal_features"
            )
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
            places = draw_places(jax.random.fold_in(key, call), rows)
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
    joined = {path: join(seen) for path, seen in parts.items() if seen}
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
    return observe(unet, {"params": params}, *arguments, method=method, places=places)


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


def split_options(pipe: VideoPipeline, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Defaults with what the options say of the video, and the options about something else."""
    known = {field.name for field in fields(pipe.defaults)}
    video = {name: value for name, value in options.items() if name in known}
    more = {name: value for name, value in options.items() if name not in known}
    return replace(pipe.defaults, **video), more
