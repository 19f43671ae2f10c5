"""`python -m qvd_jax.evaluate --reference DIR [--candidate DIR ...] --out DIR`: side by side.

Every model samples the same prompts or images from the same noise. Without any the prompts are
held-out scenes of the moving shapes, and what they asked for is counted in the pixels.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from qvd_jax import checkpoint, memory, report
from qvd_jax.axes import Array
from qvd_jax.benchmarks.environment import environment
from qvd_jax.cli import (
    Inputs,
    add_input_arguments,
    add_size_arguments,
    command,
    enable_compilation_cache,
    passed,
    positive_int,
    read_conditions,
    read_inputs,
)
from qvd_jax.data import moving_shapes, video_io
from qvd_jax.errors import InputError
from qvd_jax.metrics import frechet, paired, temporal
from qvd_jax.metrics.prompt_accuracy import paired_difference, prompt_accuracy, prompt_hits
from qvd_jax.pipelines.loading import load
from qvd_jax.pipelines.pipeline import VideoPipeline

_FILES = ("results.json", "results.md", "report.html")
_SHEET_VIDEOS = 12
# Sampled together: enough to keep an accelerator busy.
_BATCH = 16
_BOOTSTRAPS = 200


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes the results, prints the table."""
    args = _parser().parse_args(argv)
    for path in [args.out / name for name in _FILES] if args.out.exists() else [args.out]:
        video_io.check_writable(path, overwrite=args.overwrite)
    names = [args.reference, *args.candidate]
    reference, *_ = [checkpoint.read_manifest(checkpoint.find(name)) for name in names]
    own = args.prompts_file or args.image or reference.takes_images
    cases = own_cases(args) if own else held_out_cases(args.videos, args.seed)
    if len(cases.inputs.values) < 2:
        raise InputError("intervals and distances need at least 2 prompts or images")
    enable_compilation_cache()

    models = {name: with_size(load(name), args) for name in dict.fromkeys(names)}
    small = min(min(pipe.defaults.height, pipe.defaults.width) for pipe in models.values())
    if small < paired.SSIM_WINDOW:
        raise InputError(
            f"videos of {small} pixels: comparing them needs at least {paired.SSIM_WINDOW}"
        )
    sampled = sample(models, cases, range(args.seed, args.seed + args.seeds))
    results = {
        "command": " ".join(["python -m qvd_jax.evaluate", *(argv or sys.argv[1:])]),
        **environment(),
        "backend": jax.default_backend(),
        "prompts": len(cases.inputs.values),
        "seeds": args.seeds,
        "models": measure(models, sampled, cases, args.seed),
    }
    results["table"] = report.markdown(results)
    args.out.mkdir(exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "results.md").write_text(results["table"])
    shown = {name: found.videos[:_SHEET_VIDEOS] for name, found in sampled.items()}
    (args.out / "report.html").write_text(report.html(results, shown, cases.inputs.names))
    for name, videos in shown.items():
        sheet = args.out / f"{Path(name).name}.png"
        video_io.write_contact_sheet(sheet, videos)
    print(results["table"])


def with_size(pipe: VideoPipeline, args: argparse.Namespace) -> VideoPipeline:
    """The pipeline with what the command line says of steps, frames and size as its defaults."""
    given = passed(args, "steps", "frames", "height", "width")
    return replace(pipe, defaults=replace(pipe.defaults, **given))


@dataclass(frozen=True)
class Cases:
    """What is sampled.

    Attributes:
      inputs: prompts or images.
      scenes: what they ask for, `[N, 5]`; None where nobody can tell.
      options: of the pipelines' calls, the same for all.
    """

    inputs: Inputs
    scenes: np.ndarray | None
    options: dict[str, Any] = field(default_factory=dict)


def own_cases(args: argparse.Namespace) -> Cases:
    """Prompts from a file or images, the first `--videos` of them."""
    path = checkpoint.find(args.reference)
    inputs = Inputs(*(part[: args.videos] for part in read_inputs(args, path)))
    return Cases(inputs, None, read_conditions(args, path))


def held_out_cases(count: int, seed: int) -> Cases:
    """Scenes no model was trained on, each once before any twice, in random phrasings."""
    rng = np.random.default_rng([seed, count])
    held_out = moving_shapes.scenes("held_out")
    rounds = [held_out[rng.permutation(len(held_out))] for _ in range(-(-count // len(held_out)))]
    scenes = np.concatenate(rounds)[:count]
    prompts = [moving_shapes.prompt(scene, rng) for scene in scenes]
    return Cases(Inputs(prompts, prompts), scenes)


@dataclass
class Sampled:
    """What one model made of all prompts and seeds, seed by seed.

    Attributes:
      videos: uint8 `[N, F, H, W, 3]`.
      noise: squared error of the latents against the reference's after each step, `[S]`.
      signal: squared latents of the reference after each step, `[S]`.
      seconds: for each video, of sampling without decoding; the median of the batches.
    """

    videos: np.ndarray
    noise: np.ndarray
    signal: np.ndarray
    seconds: float


def sample(
    models: dict[str, VideoPipeline], cases: Cases, seeds: Sequence[int]
) -> dict[str, Sampled]:
    """Samples all inputs with every model; the first model is the reference."""
    inputs = cases.inputs.values
    videos: dict[str, list[np.ndarray]] = {name: [] for name in models}
    totals = {name: np.zeros((2, pipe.defaults.steps)) for name, pipe in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    groups = [(seed, start) for seed in seeds for start in range(0, len(inputs), _BATCH)]
    for seed, start in tqdm.tqdm(groups, desc="sampling", unit="batch"):
        batch = inputs[start : start + _BATCH]
        reference: list[np.ndarray] = []
        for name, pipe in models.items():
            path: list[np.ndarray] = []
            began = time.perf_counter()
            latents = pipe(
                batch,
                **cases.options,
                # Noise is numbered within a call.
                seed=seed * len(inputs) + start,
                output_type="latents",
                callback_on_step_end=functools.partial(_keep, path),
            )
            seconds[name].append((time.perf_counter() - began) / len(batch))
            videos[name].append(pipe.decode(latents))
            reference = reference or path
            for step, (found, exact) in enumerate(zip(path, reference, strict=True)):
                totals[name][:, step] += np.square(found - exact).sum(), np.square(exact).sum()
    # The median leaves out what compiled.
    return {
        name: Sampled(
            videos=np.concatenate(videos[name]),
            noise=totals[name][0],
            signal=totals[name][1],
            seconds=statistics.median(seconds[name]),
        )
        for name in models
    }


def _keep(path: list[np.ndarray], _: int, latents: Array) -> None:
    path.append(np.array(latents))


def measure(
    models: dict[str, VideoPipeline],
    sampled: dict[str, Sampled],
    cases: Cases,
    seed: int,
) -> list[dict[str, Any]]:
    """The figures of every model, the reference's first."""
    reference = next(iter(sampled.values()))
    entries = []
    for name, found in sampled.items():
        pipe = models[name]
        entry: dict[str, Any] = {
            "name": name,
            "policy": pipe.quantization.policy if pipe.quantization else "float",
            "unet_bytes": memory.tree_bytes(pipe.params["unet"]),
            "seconds_per_video": found.seconds,
            "steps": pipe.defaults.steps,
            "guidance_scale": pipe.defaults.guidance_scale,
            "flicker": float(temporal.flicker(found.videos).mean()),
            "layers": checkpoint.read_layer_reports(checkpoint.find(name)),
        }
        if found is not reference:
            with np.errstate(divide="ignore"):
                latent_sqnr = 10 * np.log10(found.signal / found.noise)
            entry["latent_sqnr"] = latent_sqnr.tolist()
            psnr = paired.psnr(reference.videos, found.videos)
            entry["psnr"] = float(np.minimum(psnr, 100).mean())
            entry["ssim"] = float(paired.ssim(reference.videos, found.videos).mean())
        entries.append(entry)
    if cases.scenes is not None:
        _measure_shapes(entries, sampled, cases.scenes, seed)
    return entries


def _measure_shapes(
    entries: list[dict[str, Any]], sampled: dict[str, Sampled], scenes: np.ndarray, seed: int
) -> None:
    """Adds prompt accuracy and Frechet distance, which only moving shapes have."""
    classifier = frechet.load_classifier(checkpoint.ASSETS / "classifier")
    count = len(next(iter(sampled.values())).videos)
    rendered = [_rendered(count, [seed, part]) for part in range(2)]
    real = [frechet.video_features(*classifier, videos) for videos in rendered]
    expected = [moving_shapes.describe_scene(scene) for scene in scenes]
    expected *= count // len(expected)
    reference_hits = reference_features = None
    for entry, found in zip(entries, sampled.values(), strict=True):
        hits = prompt_hits(found.videos, expected)
        features = frechet.video_features(*classifier, found.videos)
        entry["accuracy"] = {
            name: {"hits": p.hits, "value": p.value, "interval": p.interval()}
            for name, p in prompt_accuracy(hits).items()
        }
        entry["frechet"] = frechet.frechet_distance(features, real[0])
        entry["frechet_real"] = frechet.frechet_distance(real[1], real[0])
        entry["flicker_real"] = float(temporal.flicker(rendered[0]).mean())
        if reference_hits is None or reference_features is None:
            reference_hits, reference_features = hits, features
            continue
        change, spread = paired_difference(reference_hits[:, -1], hits[:, -1])
        entry["accuracy_change"] = {"value": change, "interval": [change - spread, change + spread]}
        entry["frechet_ratio"] = {
            "value": entry["frechet"] / entries[0]["frechet"],
            "interval": _ratio_interval(reference_features, features, real[0]),
        }


def _rendered(count: int, seed: list[int]) -> np.ndarray:
    """Videos of held-out scenes as they should be, of other draws than the prompts'."""
    rng = np.random.default_rng(seed)
    held_out = moving_shapes.scenes("held_out")
    return moving_shapes.render(held_out[rng.integers(len(held_out), size=count)], rng)


def _ratio_interval(
    reference: np.ndarray, candidate: np.ndarray, real: np.ndarray
) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of two Frechet distances, pairs resampled together."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(_BOOTSTRAPS):
        rows = rng.integers(len(reference), size=len(reference))
        distances = [frechet.frechet_distance(x[rows], real) for x in (candidate, reference)]
        ratios.append(distances[0] / distances[1])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.evaluate", description=__doc__)
    parser.add_argument("--reference", required=True, metavar="DIR|NAME")
    parser.add_argument("--candidate", nargs="+", default=[], metavar="DIR|NAME")
    add_input_arguments(parser)
    parser.add_argument("--videos", type=positive_int, default=128, metavar="N", help="prompts")
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="K", help="of each prompt")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--steps", type=positive_int, metavar="N")
    add_size_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
