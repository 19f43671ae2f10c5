"""Videos of several models from the same inputs and noise, and what tells them apart."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from qvd_jax import memory
from qvd_jax.axes import Array
from qvd_jax.config import check_seed
from qvd_jax.environment import environment
from qvd_jax.errors import InputError, naming
from qvd_jax.evaluation.batches import NONE_KEPT, Batches
from qvd_jax.evaluation.cases import Cases, Figures
from qvd_jax.evaluation.intervals import jackknife
from qvd_jax.evaluation.sets import REAL, Measures, check, compare_videos, pixels
from qvd_jax.evaluation.videos import Source, VideoSet, open_videos, planned
from qvd_jax.hosts import ALONE, Hosts
from qvd_jax.meshes import MeshConfig
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.progress import DECODER_COMPILATION, Part, Progress
from qvd_jax.quant.solve import LayerReport, sqnr

# Sampled together: enough to keep an accelerator busy.
BATCH = 16


@dataclass
class Sampled:
    """What one model made of all inputs and seeds, seed by seed.

    Attributes:
      videos: uint8 `[N, F, H, W, 3]`.
      noise: squared error of the latents against the reference's after each step, `[N, S]`.
      signal: squared latents of the reference after each step, `[N, S]`.
      seconds: for each video, of sampling without decoding; the median of the batches, without
        the first of each size, which compile. None if there was no other.
    """

    videos: np.ndarray
    noise: np.ndarray
    signal: np.ndarray
    seconds: float | None


class Comparison(NamedTuple):
    """Models beside each other.

    Attributes:
      results: what was measured, and all that it depends on, as JSON has it.
      videos: of each model, uint8 `[N, F, H, W, 3]`, seed by seed; the reference's first.
      titles: of the cases.
      layers: of each model, what calibration wrote.
    """

    results: Figures
    videos: dict[str, np.ndarray]
    titles: list[str]
    layers: Mapping[str, Sequence[LayerReport]]


def compare(
    models: Mapping[str, VideoPipeline],
    cases: Cases,
    want: VideoDefaults | None = None,
    *,
    seed: int = 0,
    seeds: int = 1,
    layers: Mapping[str, Sequence[LayerReport]] | None = None,
    measures: Measures | None = None,
    real: Source | None = None,
    has_floor: bool = False,
    hosts: Hosts = ALONE,
    kept: Batches = NONE_KEPT,
    mesh: MeshConfig | None = None,
) -> Comparison:
    """Samples all cases with every model and measures what tells them apart.

    Args:
      models: by name; the first is the reference, whose solver and steps all sample with.
      cases: what is sampled.
      want: steps, frames, size and guidance of all videos; None takes the reference's.
      seed: the first.
      seeds: videos of each case.
      layers: of each model, from `load_layer_reports`.
      measures: what is measured of the videos; None takes what needs no network.
      real: the videos that FVD is taken to; None takes the judge's, if there is one.
      has_floor: whether the reference samples other seeds too, for the floor of FVD against it.
      hosts: among which the cases are shared out; elsewhere than at the first there are no
        results.
      kept: what an earlier run has sampled, to which this one adds.
      mesh: of the pipelines' calls.

    Raises:
      InputError: the models or the videos cannot be compared.
    """
    reference = next(iter(models.values()))
    want = want or reference.defaults
    models = {name: pipe.walking_as(reference.scheduler) for name, pipe in models.items()}
    layers = layers or {name: [] for name in models}
    measures = measures or pixels(len(models))
    real = check_measures([*models], cases, want, seeds, measures, real)
    check_comparable(models, cases, want)
    check_seed(seed, seeds * (2 if has_floor else 1), len(cases.inputs))
    sampled = sample(models, cases, want, range(seed, seed + seeds), hosts, kept, mesh=mesh)
    others = None
    if has_floor:
        name = next(iter(models))
        more = range(seed + seeds, seed + 2 * seeds)
        floor = sample({name: models[name]}, cases, want, more, hosts, kept, "floor", mesh)
        others = floor[name].videos if hosts.first else None
    if not hosts.first:
        return Comparison({}, {}, cases.titles, layers)
    results = {
        **environment(),
        "backend": jax.default_backend(),
        "prompts": len(cases.inputs),
        "inputs": cases.kind,
        "seeds": seeds,
        "scheduler": _scheduler(reference),
        **{name: getattr(want, name) for name in ("steps", "frames", "height", "width")},
        "guidance_scale": want.guidance_scale,
        "notes": [] if real is None else list(real.notes),
        "models": measure(models, sampled, cases, seed, layers, measures, real, others),
    }
    videos = {name: found.videos for name, found in sampled.items()}
    return Comparison(results, videos, cases.titles, layers)


def _scheduler(pipe: VideoPipeline) -> str:
    """The solver and where its steps lie, in words."""
    config = pipe.scheduler
    levels = ["Karras"] if config.use_karras_sigmas else []
    spacing = [config.timestep_spacing] if config.timestep_spacing else []
    return " ".join([config.solver, *levels, *spacing])


def check_measures(
    names: Sequence[str],
    cases: Cases,
    want: VideoDefaults,
    seeds: int,
    measures: Measures,
    real: Source | None,
) -> VideoSet | None:
    """Refuses what could be sampled and not measured, before it is sampled.

    Args:
      names: of the models.
      cases: what is sampled.
      want: frames and size of all videos.
      seeds: of each case.
      measures: what is measured.
      real: the videos that FVD is taken to.

    Returns:
      These videos, looked at.

    Raises:
      InputError: the videos are too few, too small or too short, or the real ones do not fit.
    """
    count, shape = seeds * len(cases.inputs), (want.frames, want.height, want.width)
    sets = [planned(name, count, shape) for name in names]
    opened = None if real is None else open_videos(real, REAL)
    beside = {} if opened is None else {REAL: opened}
    if opened is None and cases.judge is not None and "fvd" in measures.metrics:
        beside[REAL] = planned(REAL, count, shape)
    cases.check(want)
    check(sets, measures, beside)
    return opened


def check_comparable(
    models: Mapping[str, VideoPipeline], cases: Cases, want: VideoDefaults
) -> None:
    """Refuses what could be sampled and not compared, before it is sampled.

    Args:
      models: the reference first.
      cases: what is sampled.
      want: steps, frames and size of all videos.

    Raises:
      InputError: the videos are too few, too small or too short, or a model cannot make them.
    """
    cases.check(want)
    latents = {
        name: pipe.latents_shape(want.frames, want.height, want.width)
        for name, pipe in models.items()
    }
    first = next(iter(latents))
    for name, shape in latents.items():
        if shape != latents[first]:
            raise InputError(
                f"latents of {first} are {latents[first]}, of {name} {shape}: they cannot be "
                f"compared"
            )
    for pipe in models.values():
        pipe.schedule(want.steps)


def sample(
    models: Mapping[str, VideoPipeline],
    cases: Cases,
    want: VideoDefaults,
    seeds: Sequence[int] = (0,),
    hosts: Hosts = ALONE,
    kept: Batches = NONE_KEPT,
    part: str = "cases",
    mesh: MeshConfig | None = None,
) -> dict[str, Sampled]:
    """Samples all inputs with every model, and shows how far it is.

    Args:
      models: by name; the first is the reference.
      cases: what is sampled.
      want: steps, frames, size and guidance of all videos.
      seeds: all inputs are sampled with each.
      hosts: among which the batches are shared out.
      kept: as of `compare`.
      part: what tells this call from others of a run.
      mesh: of the pipelines' calls.

    Returns:
      What each model made, at the first host; nothing elsewhere.

    Raises:
      InputError: a model failed; it is named.
    """
    batches = [*itertools.product(seeds, range(0, len(cases.inputs), BATCH))]
    own, kept = hosts.share(range(len(batches))), kept.of(part)
    made = {number: kept.get(number) for number in own}
    todo = [number for number in own if made[number] is None]
    compiled: set[tuple[str, int]] = set()
    plan = _plan([*models], cases, want, [batches[number] for number in todo])
    with Progress(plan) as progress:
        for number in todo:
            seed, start = batches[number]
            batch = cases.inputs[start : start + BATCH]
            reference: list[np.ndarray] = []
            arrays: list[np.ndarray] = []
            for name, pipe in models.items():
                path: list[np.ndarray] = []
                began = time.perf_counter()
                with naming(name):
                    latents = pipe(
                        batch,
                        **cases.options,
                        steps=want.steps,
                        frames=want.frames,
                        height=want.height,
                        width=want.width,
                        guidance_scale=want.guidance_scale,
                        # Noise is numbered within a call.
                        seed=seed * len(cases.inputs) + start,
                        output_type="latents",
                        callback_on_step_end=functools.partial(_keep, path, progress),
                        mesh=mesh,
                    )
                seconds = (time.perf_counter() - began) / len(batch)
                seconds = seconds if (name, len(batch)) in compiled else math.nan
                compiled.add((name, len(batch)))
                videos = pipe.decode(latents)
                progress.advance()
                reference = reference or path
                energies = [
                    (_energies(found - exact), _energies(exact))
                    for found, exact in zip(path, reference, strict=True)
                ]
                arrays += [videos, np.array(energies).T, np.array(seconds)]
            kept.put(number, arrays)
            made[number] = arrays
    gathered = hosts.gather(part, [made[number] or [] for number in own], len(batches))
    return _join([*models], gathered) if gathered else {}


def _join(names: Sequence[str], batches: Sequence[Sequence[np.ndarray]]) -> dict[str, Sampled]:
    """What each model made, from batches of three arrays of each.

    These are its videos, the energies of noise and signal after each step, `[B, 2, S]`, and the
    seconds of a video, NaN where it was compiled meanwhile.
    """
    found = {}
    for number, name in enumerate(names):
        videos, energies, times = zip(
            *(b[3 * number : 3 * number + 3] for b in batches), strict=True
        )
        seconds = [float(one) for one in times if not np.isnan(one)]
        noise, signal = np.moveaxis(np.concatenate(energies), 1, 0)
        median = statistics.median(seconds) if seconds else None
        found[name] = Sampled(np.concatenate(videos), noise, signal, median)
    return found


def _energies(latents: np.ndarray) -> np.ndarray:
    """Of latents `[B, ...]`, `[B]`."""
    return np.square(latents).reshape(len(latents), -1).sum(1).astype(np.float64)


def _plan(
    names: Sequence[str], cases: Cases, want: VideoDefaults, batches: Sequence[tuple[int, int]]
) -> list[Part]:
    """Every step of every model, and the decoding behind it, which counts as one more."""
    parts = []
    for (_, start), name in itertools.product(batches, names):
        count = len(cases.inputs[start : start + BATCH])
        parts += [
            Part(name, "sampling", name, count, want.steps, work=count),
            Part(
                f"{name}, decoding",
                "decoding",
                name,
                count,
                work=count,
                compilation=DECODER_COMPILATION,
            ),
        ]
    return parts


def _keep(path: list[np.ndarray], progress: Progress, _: int, latents: Array) -> None:
    path.append(np.array(latents))
    progress.advance()


def measure(
    models: Mapping[str, VideoPipeline],
    sampled: Mapping[str, Sampled],
    cases: Cases,
    seed: int = 0,
    layers: Mapping[str, Sequence[LayerReport]] | None = None,
    measures: Measures | None = None,
    real: Source | None = None,
    other_seeds: Source | None = None,
) -> list[Figures]:
    """The figures of every model, the reference's first.

    Args:
      models: by name.
      sampled: of each, from `sample`.
      cases: what was sampled.
      seed: of what the judge draws.
      layers: of each model, what calibration wrote.
      measures: what is measured of the videos; None takes what needs no network.
      real: the videos that FVD is taken to; None takes the judge's, if there is one.
      other_seeds: videos of the reference from other seeds.
    """
    reference, measures = next(iter(sampled.values())), measures or pixels(len(sampled))
    videos = {name: found.videos for name, found in sampled.items()}
    count = len(reference.videos)
    if real is None and cases.judge is not None and "fvd" in measures.metrics:
        real = cases.judge.real(count, seed)
    compared = compare_videos(
        videos,
        measures,
        real=real,
        other_seeds=other_seeds,
        prompts=[x for x in cases.inputs if isinstance(x, str)],
        seeds=count // len(cases.inputs),
    )
    entries: list[Figures] = []
    for (name, found), figures in zip(sampled.items(), compared.models, strict=True):
        pipe = models[name]
        entry: dict[str, Any] = {
            "name": name,
            "policy": pipe.quantization.policy if pipe.quantization else "float",
            "unet_bytes": memory.tree_bytes(pipe.params["unet"]),
            "seconds_per_video": found.seconds,
            **figures.figures(),
        }
        if layers is not None:
            entry["layers"] = [report.figures() for report in layers[name]]
        if found is not reference:
            entry |= latent_figures(found.signal, found.noise, len(cases.inputs))
        entries.append(entry)
    entries[0] |= compared.floors()
    if cases.judge is not None:
        for entry, more in zip(entries, cases.judge.figures(videos, seed).values(), strict=True):
            entry |= more
    return entries


def latent_figures(signal: np.ndarray, noise: np.ndarray, prompts: int) -> Figures:
    """How near latents are to the reference's, in decibels.

    Of all videos together, as of one signal, and of the video in the middle: where the sampling of
    a few goes another way than the reference's, their error is most of the first.

    Args:
      signal: of each video after each step, `[N, S]`, seed by seed.
      noise: of the same shape.
      prompts: how many have these videos.

    Returns:
      SQNR after each step, and after the last one its 95% interval and the median over videos.
    """

    def ratio(numbers: np.ndarray) -> float:
        return 10 ** (sqnr(signal[numbers, -1].sum(), noise[numbers, -1].sum()) / 10)

    _, interval = jackknife(ratio, prompts, len(signal) // prompts)
    of_videos = map(sqnr, signal[:, -1].tolist(), noise[:, -1].tolist())
    return {
        "latent_sqnr": [*map(sqnr, signal.sum(0).tolist(), noise.sum(0).tolist())],
        "latent_sqnr_interval": [10 * math.log10(end) for end in interval],
        "latent_sqnr_median": statistics.median(of_videos),
    }
