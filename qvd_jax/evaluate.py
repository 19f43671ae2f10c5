"""`python -m qvd_jax.evaluate --reference shapes --out DIR`: what a model's videos are worth."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from qvd_jax import checkpoint
from qvd_jax.cli import command, enable_compilation_cache, positive_int
from qvd_jax.data import moving_shapes, video_io
from qvd_jax.errors import InputError
from qvd_jax.metrics import frechet, temporal
from qvd_jax.metrics.prompt_accuracy import prompt_accuracy
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline, load

_SHEET_VIDEOS = 24
# Sampled together: enough to keep an accelerator busy.
_BATCH = 16
_FILES = ("results.json", "results.md", "contact-sheet.png")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes and prints the table."""
    args = _parser().parse_args(argv)
    if args.videos < 2:
        raise InputError(f"--videos {args.videos}: a distance between sets needs at least 2")
    for path in [args.out / name for name in _FILES] if args.out.exists() else [args.out]:
        video_io.check_writable(path, overwrite=args.overwrite)
    enable_compilation_cache()
    pipe = load(args.reference)
    scenes, prompts = held_out_prompts(args.videos, args.seed)
    videos = sample(pipe, prompts, args.seed)
    results = {
        "command": " ".join(["python -m qvd_jax.evaluate", *(argv or sys.argv[1:])]),
        "versions": checkpoint.package_versions(),
        "backend": jax.default_backend(),
        "videos": args.videos,
        "steps": pipe.defaults.steps,
        "guidance_scale": pipe.defaults.guidance_scale,
        "reference": measure(videos, scenes, args.seed),
    }
    args.out.mkdir(exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "results.md").write_text(table(results))
    video_io.write_contact_sheet(args.out / "contact-sheet.png", videos[:_SHEET_VIDEOS])
    print(table(results))


def held_out_prompts(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Scenes `[count, 5]` no model was trained on, each once before any twice, and prompts."""
    rng = np.random.default_rng([seed, count])
    scenes = moving_shapes.scenes("held_out")
    rounds = [scenes[rng.permutation(len(scenes))] for _ in range(-(-count // len(scenes)))]
    chosen = np.concatenate(rounds)[:count]
    return chosen, [moving_shapes.prompt(scene, rng) for scene in chosen]


def sample(pipe: TextToVideoPipeline, prompts: Sequence[str], seed: int) -> np.ndarray:
    """Videos uint8 `[N, F, H, W, 3]` of the prompts, with the model's own defaults."""
    videos = []
    for start in tqdm.trange(0, len(prompts), _BATCH, desc="sampling", unit="batch"):
        # Another seed for each batch: noise is numbered within a call.
        videos.append(pipe(prompts[start : start + _BATCH], seed=seed + start))
    return np.concatenate(videos)


def measure(videos: np.ndarray, scenes: np.ndarray, seed: int) -> dict[str, Any]:
    """Prompt accuracy, Frechet distance and flicker of videos of moving shapes.

    Args:
      videos: generated, uint8 `[N, F, H, W, 3]`.
      scenes: what their prompts asked for, `[N, 5]`.
      seed: of the rendered videos they are compared with: two sets of held-out scenes, drawn
        anew and of the same size.
    """
    expected = [moving_shapes.describe_scene(scene) for scene in scenes]
    accuracy = prompt_accuracy(videos, expected)
    classifier = frechet.load_classifier(checkpoint.ASSETS / "classifier")
    held_out = moving_shapes.scenes("held_out")
    real = []
    for part in range(2):
        rng = np.random.default_rng([seed, part])
        chosen = held_out[rng.integers(len(held_out), size=len(videos))]
        real.append(moving_shapes.render(chosen, rng))
    features = [frechet.video_features(*classifier, some) for some in (videos, *real)]
    return {
        "accuracy": {
            name: {"hits": p.hits, "value": p.value, "interval": p.interval()}
            for name, p in accuracy.items()
        },
        "frechet": frechet.frechet_distance(features[0], features[1]),
        "frechet_real": frechet.frechet_distance(features[1], features[2]),
        "flicker": float(temporal.flicker(videos).mean()),
        "flicker_real": float(temporal.flicker(real[0]).mean()),
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    found = results["reference"]
    lines = [
        f"{results['videos']} held-out prompts, {results['steps']} steps, guidance "
        f"{results['guidance_scale']:g}, {results['backend']}",
        "",
        "| | measured | 95% interval, or rendered videos |",
        "|---|---:|---:|",
    ]
    for name, entry in found["accuracy"].items():
        low, high = entry["interval"]
        lines.append(f"| {name} | {entry['value']:.1%} | {low:.1%} to {high:.1%} |")
    for name, title in (("frechet", "Fréchet distance"), ("flicker", "flicker")):
        lines.append(f"| {title} | {found[name]:.2f} | {found[f'{name}_real']:.2f} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.evaluate", description=__doc__)
    parser.add_argument("--reference", required=True, metavar="DIR|shapes")
    parser.add_argument("--videos", type=positive_int, default=128, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
