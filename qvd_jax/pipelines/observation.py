"""Samples with a float pipeline to see what its UNet's layers read, at every step."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.config import check_integer, check_seed
from qvd_jax.diffusion import sampler
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.hosts import ALONE, Hosts
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.quant.statistics import Statistics, draw_places, observe, thinned

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many parts are done and of how many."""


def unseen(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class CalibrationConfig:
    """What the layers' inputs are collected from.

    Attributes:
      steps: S of the sampling; None takes the pipeline's default.
      rows: rows sampled of each layer's input, over all steps and prompts, of each of which as
        many are taken; that number is rounded up.
      seed: of the noise and the rows.
      step_aware: whether layers inside the sampling loop get a step D for each of its steps.
    """

    steps: int | None = None
    rows: int = 1024
    seed: int = 0
    step_aware: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        check_integer("rows", self.rows, 1)
        check_seed(self.seed)


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
    hosts: Hosts = ALONE,
    mesh: MeshConfig | None = None,
) -> Observed:
    """Samples the inputs and observes every layer's input at every step.

    Args:
      pipe: the pipeline, float, or quantized for what layers see behind quantized ones.
      paths: of all layers, in the order in which they are called.
      inputs: prompts or images.
      config: how much to sample.
      options: of the pipeline's calls, as in `quantize`.
      progress: told how far it is.
      hosts: among which the inputs are shared out.
      mesh: of the pipeline's call; what it sampled is observed on the parameters' device.

    Returns:
      What was seen on all hosts, at the first; nothing elsewhere.

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
    numbers = hosts.share(range(len(inputs)))
    of_calls = {**options, "mesh": mesh}
    before, failure = _sample_path(pipe, inputs, numbers, of_calls, want, config.seed, progress)
    unet, params, gains = pipe.unet, pipe.params["unet"], pipe.params.get(GAINS, {})
    key = jax.random.fold_in(jax.random.key(config.seed), len(inputs))
    timesteps = jnp.asarray(schedule.table.timestep)
    before_loop = draw_places(key, math.ceil(config.rows / len(inputs)))
    temporal: Any = None
    calls = steps * len(inputs)
    rows = math.ceil(config.rows / calls)
    window = pipe.window(want.frames)
    paths = [*paths]
    seen: list[list[np.ndarray]] = []
    for place, number in enumerate(numbers):
        parts: dict[str, list[Statistics]] = {path: [] for path in paths}
        in_loop: set[str] = set()
        conditions = pipe.conditions([inputs[number]], want, config.seed, **more, indices=[number])
        if temporal is None:
            # They are the same for all inputs.
            steps_and_ids = (timesteps, conditions.added_ids)
            temporal, found = _observe(
                unet, params, steps_and_ids, None, method="temporal_features"
            )
            if number == 0:
                _add(parts, found, "the time embedding")
        context, found = _observe(
            unet, params, (conditions.context,), before_loop, method="context_features"
        )
        _add(parts, found, f"input {number + 1}")
        control = None
        if conditions.control is not None:
            shown = (conditions.control[:, :window],)
            control, found = _observe(unet, params, shown, before_loop, method="control_features")
            _add(parts, found, f"input {number + 1}")
        for step in range(min(steps, len(before))):
            call = number * steps + step
            progress("observing", place * steps + step, steps * len(numbers))
            scaled = schedule.table.model_in[step] * before[step][place, None, :window]
            latents = jnp.asarray(np.concatenate([scaled] * len(conditions.context)))
            latents = sampler.add_image(latents, conditions.image)
            feature = jax.tree.map(lambda leaf, step=step: leaf[step][None], temporal)
            places = draw_places(jax.random.fold_in(key, call), rows)
            scale = jax.tree.map(lambda s, step=step: s[step], conditions.control_scale)
            inside = (latents, feature, context, control, conditions.reference, scale)
            own = jax.tree.map(lambda gain, step=step: gain[step], gains)
            _, found = _observe(unet, params, inside, places, own, method="denoise")
            found = {path: thinned(one, call, calls, config.rows) for path, one in found.items()}
            _add(parts, found, f"step {step + 1} of {steps}, input {number + 1}")
            in_loop |= found.keys()
        seen.append(_to_arrays(parts, in_loop))
    if failure is not None:
        raise failure
    return _from_arrays(hosts.gather("observed", seen, len(inputs)), paths)


def _to_arrays(parts: Mapping[str, Sequence[Statistics]], in_loop: set[str]) -> list[np.ndarray]:
    """What was seen of one input: the paths of layers, and five arrays of each.

    These are the lowest and highest values of its channels, `[C]`, sampled rows, and the lowest and
    highest values at each step, `[S, C]`, of a layer in the loop.
    """
    paths = [path for path, found in parts.items() if found]
    arrays = [np.array(paths)]
    for path in paths:
        lower = np.array([one.lower for one in parts[path]])
        upper = np.array([one.upper for one in parts[path]])
        rows = np.concatenate([one.rows for one in parts[path]])
        steps = slice(None if path in in_loop else 0)
        arrays += [lower.min(0), upper.max(0), rows, lower[steps], upper[steps]]
    return arrays


def _fives(arrays: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    return (arrays[start : start + 5] for start in range(0, len(arrays), 5))


def _from_arrays(inputs: Sequence[Sequence[np.ndarray]], paths: Iterable[str]) -> Observed:
    """What was seen of all inputs, of which each is as `_to_arrays` makes it."""
    found: dict[str, list[Sequence[np.ndarray]]] = {path: [] for path in paths}
    for names, *arrays in inputs:
        for path, own in zip(names.tolist(), _fives(arrays), strict=True):
            found[path].append(own)
    joined, by_step = {}, {}
    for path, seen in found.items():
        if seen:
            lower, upper, rows, lowest, highest = zip(*seen, strict=True)
            whole = np.min(lower, 0), np.max(upper, 0), np.concatenate(rows), True
            joined[path] = Statistics(*map(jnp.asarray, whole))
            if lowest[0].size:
                by_step[path] = np.min(lowest, 0), np.max(highest, 0)
    return Observed(joined, by_step)


def _sample_path(
    pipe: VideoPipeline,
    inputs: Sequence[Any],
    numbers: Sequence[int],
    options: Mapping[str, Any],
    want: Any,
    seed: int,
    progress: Progress,
) -> tuple[list[np.ndarray], NotFiniteError | None]:
    """Latents `[B, F, h, w, C]` before each step; up to the one that gave none, and why."""
    if not numbers:
        return [], None
    noise = pipe.initial_noise(seed, numbers, _latents_shape(pipe, want))
    before = [np.asarray(noise) * pipe.schedule(want.steps).initial_scale]

    def keep(done: int, latents: Array) -> None:
        progress("sampling", done, want.steps)
        before.append(np.array(latents))

    try:
        pipe(
            [inputs[number] for number in numbers],
            **options,
            steps=want.steps,
            seed=seed,
            indices=numbers,
            latents=noise,
            output_type="latents",
            callback_on_step_end=keep,
        )
    except NotFiniteError as error:
        # The layer it began in is found by observing the steps up to there.
        return before, error
    return before, None


@functools.partial(jax.jit, static_argnames=("unet", "method"))
def _observe(
    unet: UNet3D,
    params: Params,
    arguments: tuple[Any, ...],
    places: Array | None,
    gains: Params | None = None,
    *,
    method: str,
) -> tuple[Any, dict[str, Statistics]]:
    variables = {"params": params, "quant": gains or {}}
    return observe(unet, variables, *arguments, method=method, places=places)


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
    """Defaults with what the options say of the video, and the options about something else.

    Raises:
      InputError: one is none that layers' inputs are observed with.
    """
    known = {field.name for field in fields(pipe.defaults)} - {"steps", "prompts"}
    told = inspect.signature(pipe.conditions).parameters.keys()
    more = told - {"inputs", "want", "seed", "negatives", "indices"}
    for name in options:
        if name in ("steps", "seed"):
            raise InputError(f"options: {name} is a field of CalibrationConfig")
        if name not in known | more:
            raise InputError(
                f"options: {name!r} has no meaning for a calibration; "
                f"{', '.join(sorted(known | more))} have"
            )
    video = {name: value for name, value in options.items() if name in known}
    others = {name: value for name, value in options.items() if name in more}
    return pipe.wanted(**video), others
