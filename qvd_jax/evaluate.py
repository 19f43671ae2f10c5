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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from qvd_jax import checkpoint, memory, report
from qvd_jax.axes import Array
from qvd_jax.benchmarks.environment import environment
from qvd_jax.cli import (
    Inputs,
    add_input_arguments,
    add_sampler_arguments,
    add_size_arguments,
    asked_scheduler,
    check_same_inputs,
    check_videos,
    command,
    command_line,
    enable_compilation_cache,
    naming,
    note_unknown_words,
    positive_int,
    read_control,
    read_inputs,
    restoring,
    seed_int,
)
from qvd_jax.config import to_dict
from qvd_jax.data import moving_shapes, video_io
from qvd_jax.errors import InputError
from qvd_jax.files import check_folder, write_folder
from qvd_jax.metrics import frechet, paired, temporal
from qvd_jax.metrics.frechet import Classifier
from qvd_jax.metrics.intervals import jackknife
from qvd_jax.metrics.prompt_accuracy import paired_difference, prompt_accuracy, prompt_hits
from qvd_jax.pipelines.loading import devices_for, load, load_layer_reports, read_configs
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.quant.solve import LayerReport, sqnr

_SIZE = ("steps", "frames", "height", "width")
_SHEET_VIDEOS = 12
# Sampled together: enough to keep an accelerator busy.
_BATCH = 16


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes the results, prints the table."""
    args = _parser().parse_args(argv)
    names = list(dict.fromkeys([args.reference, *args.candidate]))
    check_folder(args.out, report.PAGE, overwrite=args.overwrite)
    check_same_inputs(names)
    solver = args.scheduler or read_configs(args.reference).scheduler.solver
    asked = asked_scheduler(args) | {"solver": solver}
    check_videos(names, args, args.reference, **asked)
    cases = read_cases(args)
    # A distance needs two videos, an interval one more, which is left out.
    needed = 2 if cases.shapes is None else 3
    if len(cases.inputs.values) < needed:
        raise InputError(
            f"intervals and distances need at least {needed} prompts or images, "
            f"there are {len(cases.inputs.values)}"
        )
    layers = {name: load_layer_reports(name) for name in names}
    enable_compilation_cache()

    sharding = devices_for(min(_BATCH, len(cases.inputs.values)))
    with restoring(argv):
        models = {name: load(name, sharding=sharding) for name in names}
    reference = models[names[0]]
    note_unknown_words(reference, cases.inputs.names)
    models = {name: pipe.with_scheduler(**asked) for name, pipe in models.items()}
    spacing = [args.timestep_spacing] if args.timestep_spacing else []
    defaults = to_dict(reference.defaults)
    size = {name: getattr(args, name) or defaults[name] for name in _SIZE}
    guidance = reference.defaults.guidance_scale
    check_comparable(models, size, cases.shapes)
    seeds = range(args.seed, args.seed + args.seeds)
    sampled = sample(models, cases, size, guidance, seeds)
    results = {
        "command": command_line("qvd_jax.evaluate", argv),
        **environment(),
        "backend": jax.default_backend(),
        "prompts": len(cases.inputs.values),
        "seeds": args.seeds,
        "scheduler": " ".join([solver, *(["Karras"] * bool(args.karras)), *spacing]),
        **size,
        "guidance_scale": guidance,
        "models": measure(models, layers, sampled, cases, args.seed),
    }
    results["table"] = report.summary(results)
    shown = {name: found.videos[:_SHEET_VIDEOS] for name, found in sampled.items()}
    page = report.html(results, layers, shown, cases.inputs.names)
    texts = {
        report.PAGE: page,
        "results.md": results["table"],
        "results.json": json.dumps(results, indent=1) + "\n",
    }
    with write_folder(args.out, report.PAGE, overwrite=args.overwrite) as folder:
        for name, videos in shown.items():
            video_io.write_contact_sheet(folder / f"{_file_name(name)}.png", videos)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    print(results["table"])


def _file_name(model: str) -> str:
    """A name for the files about a model, as unique as its own."""
    return "-".join(part for part in Path(model).parts if part not in ("/", ".", ".."))


class Shapes(NamedTuple):
    """What moving shapes are judged by.

    Attributes:
      scenes: what each prompt asks for, `[N, 5]`.
      classifier: whose features are compared.
    """

    scenes: np.ndarray
    classifier: Classifier


@dataclass(frozen=True)
class Cases:
    """What is sampled.

    Attributes:
      inputs: prompts or images.
      shapes: of prompts for moving shapes; None where nobody can tell what is asked for.
      options: of the pipelines' calls, the same for all.
    """

    inputs: Inputs
    shapes: Shapes | None
    options: dict[str, Any] = field(default_factory=dict)


def read_cases(args: argparse.Namespace) -> Cases:
    """What the command line gives, the first `--videos` of it; else held-out moving shapes.

    Raises:
      InputError: the reference is no model of moving shapes and nothing is given, or what is
        given does not fit it.
    """
    path = checkpoint.find(args.reference)
    options = read_control(args, path)
    prompts = read_configs(path).defaults.prompts
    plain = {moving_shapes.prompt(scene) for scene in moving_shapes.scenes("held_out")}
    asked = args.prompt or args.prompts_file or args.image
    if asked or not prompts or not plain.issuperset(prompts):
        given = read_inputs(args, path)
        if len(given.values) > args.videos:
            print(f"the first {args.videos} of {len(given.values)}; --videos N takes more")
        return Cases(Inputs(given.values[: args.videos], given.names[: args.videos]), None, options)
    return held_out_cases(args.videos, args.seed)


def held_out_cases(count: int, seed: int) -> Cases:
    """Scenes no model was trained on, each once before any twice, in random phrasings."""
    rng = np.random.default_rng([seed, count])
    held_out = moving_shapes.scenes("held_out")
    rounds = [held_out[rng.permutation(len(held_out))] for _ in range(-(-count // len(held_out)))]
    scenes = np.concatenate(rounds)[:count]
    prompts = [moving_shapes.prompt(scene, rng) for scene in scenes]
    classifier = frechet.load_classifier(checkpoint.ASSETS / "classifier")
    return Cases(Inputs(prompts, prompts), Shapes(scenes, classifier))


def check_comparable(
    models: Mapping[str, VideoPipeline], size: Mapping[str, int], shapes: Shapes | None
) -> None:
    """Refuses what could be sampled and not compared, before it is sampled.

    Args:
      models: the reference first.
      size: steps, frames, height and width of all videos.
      shapes: of the cases.

    Raises:
      InputError: the videos are too small or too short, or a model cannot make them.
    """
    small = min(size["height"], size["width"])
    if small < paired.SSIM_WINDOW or size["frames"] < temporal.FLICKER_FRAMES:
        raise InputError(
            f"{size['frames']} frames of {size['height']}x{size['width']}: comparing videos needs "
            f"at least {temporal.FLICKER_FRAMES} of {paired.SSIM_WINDOW}x{paired.SSIM_WINDOW}"
        )
    if shapes is not None:
        config, _ = shapes.classifier
        if (size["frames"], size["height"], size["width"]) != (config.frames, *2 * (config.size,)):
            raise InputError(
                f"held-out prompts are evaluated with {config.frames} frames of "
                f"{config.size}x{config.size}; pass --prompts-file FILE for others"
            )
    latents = {
        name: pipe.latents_shape(size["frames"], size["height"], size["width"])
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
        pipe.schedule(size["steps"])


@dataclass
class Sampled:
    """What one model made of all prompts and seeds, seed by seed.

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


def sample(
    models: Mapping[str, VideoPipeline],
    cases: Cases,
    size: Mapping[str, int],
    guidance_scale: float,
    seeds: Sequence[int],
) -> dict[str, Sampled]:
    """Samples all inputs with every model; the first model is the reference.

    Args:
      models: by name.
      cases: what is sampled.
      size: steps, frames, height and width of all videos.
      guidance_scale: of all videos.
      seeds: all inputs are sampled with each.
    """
    inputs = cases.inputs.values
    videos: dict[str, list[np.ndarray]] = {name: [] for name in models}
    totals = {name: np.zeros((2, size["steps"])) for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    compiled: set[tuple[str, int]] = set()
    groups = [(seed, start) for seed in seeds for start in range(0, len(inputs), _BATCH)]
    for seed, start in tqdm.tqdm(groups, desc="sampling", unit="batch"):
        batch = inputs[start : start + _BATCH]
        reference: list[np.ndarray] = []
        for name, pipe in models.items():
            path: list[np.ndarray] = []
            began = time.perf_counter()
            with naming(name):
                latents = pipe(
                    batch,
                    **cases.options,
                    **dict[str, Any](size),
                    guidance_scale=guidance_scale,
                    # Noise is numbered within a call.
                    seed=seed * len(inputs) + start,
                    output_type="latents",
                    callback_on_step_end=functools.partial(_keep, path),
                )
            if (name, len(batch)) in compiled:
                seconds[name].append((time.perf_counter() - began) / len(batch))
            compiled.add((name, len(batch)))
            videos[name].append(pipe.decode(latents))
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


def _keep(path: list[np.ndarray], _: int, latents: Array) -> None:
    path.append(np.array(latents))


def measure(
    models: Mapping[str, VideoPipeline],
    layers: Mapping[str, list[LayerReport]],
    sampled: Mapping[str, Sampled],
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
            "flicker": float(temporal.flicker(found.videos).mean()),
            "layers": [report.figures() for report in layers[name]],
        }
        if found is not reference:
            entry["latent_sqnr"] = [*map(sqnr, found.signal.tolist(), found.noise.tolist())]
            psnr = paired.psnr(reference.videos, found.videos)
            entry["psnr"] = float(np.minimum(psnr, 100).mean())
            entry["ssim"] = float(paired.ssim(reference.videos, found.videos).mean())
        entries.append(entry)
    if cases.shapes is not None:
        _measure_shapes(entries, sampled, cases.shapes, seed)
    return entries


def _measure_shapes(
    entries: list[dict[str, Any]],
    sampled: Mapping[str, Sampled],
    shapes: Shapes,
    seed: int,
) -> None:
    """Adds prompt accuracy and Frechet distance, which only moving shapes have."""
    count = len(next(iter(sampled.values())).videos)
    rendered = [_rendered(count, [seed, part]) for part in range(2)]
    real = [frechet.video_features(*shapes.classifier, videos) for videos in rendered]
    expected = [moving_shapes.describe_scene(scene) for scene in shapes.scenes]
    seeds = count // len(expected)
    expected *= seeds
    reference_hits = reference_features = None
    for entry, found in zip(entries, sampled.values(), strict=True):
        hits = prompt_hits(found.videos, expected)
        features = frechet.video_features(*shapes.classifier, found.videos)
        entry["accuracy"] = {
            name: {"hits": p.hits, "value": p.value, "interval": p.interval()}
            for name, p in prompt_accuracy(hits, seeds).items()
        }
        entry["frechet"] = frechet.frechet_distance(features, real[0])
        entry["frechet_real"] = frechet.frechet_distance(real[1], real[0])
        entry["flicker_real"] = float(temporal.flicker(rendered[0]).mean())
        if reference_hits is None or reference_features is None:
            reference_hits, reference_features = hits, features
            continue
        change, interval = paired_difference(reference_hits[:, -1], hits[:, -1], seeds)
        entry["accuracy_change"] = {"value": change, "interval": interval}
        ratio, interval = frechet_ratio(reference_features, features, real[0], seeds)
        entry["frechet_ratio"] = {"value": ratio, "interval": interval}


def _rendered(count: int, seed: list[int]) -> np.ndarray:
    """Videos of held-out scenes as they should be, of other draws than the prompts'."""
    rng = np.random.default_rng(seed)
    held_out = moving_shapes.scenes("held_out")
    return moving_shapes.render(held_out[rng.integers(len(held_out), size=count)], rng)


def frechet_ratio(
    reference: np.ndarray, candidate: np.ndarray, real: np.ndarray, seeds: int
) -> tuple[float, tuple[float, float]]:
    """The candidate's Frechet distance over the reference's, and its 95% interval.

    Args:
      reference: features of its videos, `[N, C]`, seed by seed.
      candidate: of the same prompts and seeds, which are left out together.
      real: features of real videos.
      seeds: of each prompt.
    """

    def ratio(numbers: np.ndarray) -> float:
        found, exact = (
            frechet.frechet_distance(features[numbers], real) for features in (candidate, reference)
        )
        return found / exact

    return jackknife(ratio, len(reference) // seeds, seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--reference", required=True, metavar="DIR|NAME", help="what the others are compared with"
    )
    parser.add_argument(
        "--candidate", nargs="+", default=[], metavar="DIR|NAME", help="other checkpoints"
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--videos",
        type=positive_int,
        default=128,
        metavar="N",
        help="prompts or images (%(default)s)",
    )
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="K", help="of each prompt")
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="the first seed")
    add_sampler_arguments(parser, "the reference's")
    add_size_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results.json, report.html, sheets"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
