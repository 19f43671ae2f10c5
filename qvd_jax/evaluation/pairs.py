"""Videos of several models from the same inputs and noise, and what tells them apart."""

import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from qvd_jax import memory
from qvd_jax.axes import Array
from qvd_jax.environment import environment
from qvd_jax.errors import InputError, naming
from qvd_jax.evaluation.cases import Cases, Figures
from qvd_jax.meshes import MeshConfig
from qvd_jax.metrics import paired, temporal
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.progress import DECODER_COMPILATION, Part, Progress
from qvd_jax.quant.solve import LayerReport, sqnr

# Sampled together: enough to keep an accelerator busy.
BATCH = 16
_LARGEST_PSNR = 100.0


@dataclass
class Sampled:
    """What one model made of all inputs and seeds, seed by seed.

    Attributes:
      videos: uint8 `[N, F, H, W, 3]`.
      noise: squared error of the latents against the reference's after each step, `[S]`.
      signal: squared latents of the reference after each step, `[S]`.
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
    mesh: MeshConfig | None = None,
) -> Comparison:
    """Samples all cases with every model and measures what tells them apart.

    Args:
      models: by name; the first is the reference, whose solver all sample with.
      cases: what is sampled.
      want: steps, frames, size and guidance of all videos; None takes the reference's.
      seed: the first.
      seeds: videos of each case.
      layers: of each model, from `load_layer_reports`.
      mesh: of the pipelines' calls.

    Raises:
      InputError: the models or the videos cannot be compared.
    """
    reference = next(iter(models.values()))
    want = want or reference.defaults
    models = {
        name: pipe.with_scheduler(reference.scheduler.solver) for name, pipe in models.items()
    }
    layers = layers or {name: [] for name in models}
    check_comparable(models, cases, want)
    sampled = sample(models, cases, want, range(seed, seed + seeds), mesh)
    results = {
        **environment(),
        "backend": jax.default_backend(),
        "prompts": len(cases.inputs),
        "seeds": seeds,
        "scheduler": _scheduler(reference),
        **{name: getattr(want, name) for name in ("steps", "frames", "height", "width")},
        "guidance_scale": want.guidance_scale,
        "models": measure(models, sampled, cases, seed, layers),
    }
    videos = {name: found.videos for name, found in sampled.items()}
    return Comparison(results, videos, cases.titles, layers)


def _scheduler(pipe: VideoPipeline) -> str:
    """The solver and where its steps lie, in words."""
    config = pipe.scheduler
    levels = ["Karras"] if config.use_karras_sigmas else []
    spacing = [config.timestep_spacing] if config.timestep_spacing else []
    return " ".join([config.solver, *levels, *spacing])


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
    mesh: MeshConfig | None = None,
) -> dict[str, Sampled]:
    """Samples all inputs with every model, and shows how far it is.

    Args:
      models: by name; the first is the reference.
      cases: what is sampled.
      want: steps, frames, size and guidance of all videos.
      seeds: all inputs are sampled with each.
      mesh: of the pipelines' calls.

    Raises:
      InputError: a model failed; it is named.
    """
    videos: dict[str, list[np.ndarray]] = {name: [] for name in models}
    totals = {name: np.zeros((2, want.steps)) for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    compiled: set[tuple[str, int]] = set()
    with Progress(_plan([*models], cases, want, seeds)) as progress:
        for seed, start in _batches(cases, seeds):
            batch = cases.inputs[start : start + BATCH]
            reference: list[np.ndarray] = []
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
                if (name, len(batch)) in compiled:
                    seconds[name].append((time.perf_counter() - began) / len(batch))
                compiled.add((name, len(batch)))
                videos[name].append(pipe.decode(latents))
                progress.advance()
                reference = reference or path
                for step, (found, exact) in enumerate(zip(path, reference, strict=True)):
                    totals[name][:, step] += np.square(found - exact).sum(), np.square(exact).sum()
    return {
        name: Sampled(
            videos=np.concatenate(videos[name]),
            noise=totals[name][0],
            signal=totals[name][1],
            seconds=statistics.median(seconds[name]) if seconds[name] else None,
        )
        for name in models
    }


def _batches(cases: Cases, seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Seed and number of the first input of each batch."""
    return itertools.product(seeds, range(0, len(cases.inputs), BATCH))


def _plan(
    names: Sequence[str], cases: Cases, want: VideoDefaults, seeds: Sequence[int]
) -> list[Part]:
    """Every step of every model, and the decoding behind it, which counts as one more."""
    parts = []
    for (_, start), name in itertools.product(_batches(cases, seeds), names):
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
) -> list[Figures]:
    """The figures of every model, the reference's first.

    Args:
      models: by name.
      sampled: of each, from `sample`.
      cases: what was sampled.
      seed: of what the judge draws.
      layers: of each model, what calibration wrote.
    """
    reference = next(iter(sampled.values()))
    entries: list[Figures] = []
    for name, found in sampled.items():
        pipe = models[name]
        entry: dict[str, Any] = {
            "name": name,
            "policy": pipe.quantization.policy if pipe.quantization else "float",
            "unet_bytes": memory.tree_bytes(pipe.params["unet"]),
            "seconds_per_video": found.seconds,
            "flicker": float(temporal.flicker(found.videos).mean()),
        }
        if layers is not None:
            entry["layers"] = [report.figures() for report in layers[name]]
        if found is not reference:
            entry["latent_sqnr"] = [*map(sqnr, found.signal.tolist(), found.noise.tolist())]
            psnr = paired.psnr(reference.videos, found.videos)
            entry["psnr"] = float(np.minimum(psnr, _LARGEST_PSNR).mean())
            entry["ssim"] = float(paired.ssim(reference.videos, found.videos).mean())
        entries.append(entry)
    if cases.judge is not None:
        videos = {name: found.videos for name, found in sampled.items()}
        for entry, more in zip(entries, cases.judge.figures(videos, seed).values(), strict=True):
            entry |= more
    return entries
