"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies.json`: float, QVD and minmax with three seeds for each prompt, the
others with one, and the controlled case (`rescaling.py`). Thousands of videos take hours, and a
gigabyte while it runs; an interrupted run goes on where it was. What it has done counts for the
same code, model and machine alone, and the file is written when all is there, so that every row is
of one run. `python tests/tables.py README.md` shows it.
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from rescaling import rescale_channels

import qvd_jax
from qvd_jax import checkpoint, markdown
from qvd_jax.data.prompts import EXAMPLES, read_prompts
from qvd_jax.environment import environment
from qvd_jax.evaluation import pairs
from qvd_jax.evaluation.cases import Cases
from qvd_jax.evaluation.pairs import BATCH, Sampled
from qvd_jax.files import read_arrays, replace_when_whole, write_text
from qvd_jax.pipelines.observation import collect
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.quantization import make_plan, solve, unet_layers
from qvd_jax.quant.policy import named_policy
from qvd_jax.shapes.judge import held_out_cases

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "docs/results/policies.json"
COMMAND = "python tests/measure_policies.py --out runs/policies"
MODEL = "shapes"
WIDTHS = ("w8a8", "w6a6", "w4a8")
ORDER = ("float", *WIDTHS, "w4a6", "w4a4", "w3a8", "w8a16")
MAIN = ("qvd", "minmax")
OTHERS = ("mse", "smoothquant", "qdiffusion", "qvd-scri", "qvd-htdq")
PROMPTS = EXAMPLES / "shapes.txt"
SIZE = ("steps", "frames", "height", "width")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="what an interrupted run has done")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--videos", type=int, default=128, help=f"up to {BATCH}, or so many times")
    args = parser.parse_args(argv)
    if args.videos > BATCH and args.videos % BATCH:
        parser.error(f"--videos {args.videos} is no multiple of {BATCH}")
    digest = run_digest()
    # What other code did, of another model or on another machine, is not taken for this run's.
    out = args.out / digest[:8]
    out.mkdir(parents=True, exist_ok=True)
    rescaled = out / "rescaled"
    if not rescaled.exists():
        pipe = qvd_jax.load(MODEL, dtype="float32")
        unet = rescale_channels(pipe.params["unet"], np.random.default_rng(0))
        qvd_jax.save(replace(pipe, params={**pipe.params, "unet": unet}), rescaled)

    # With float inputs all policies are the same.
    main_policies = [f"{policy}-{width}" for width in WIDTHS for policy in MAIN] + ["qvd-w8a16"]
    others = [f"{policy}-{width}" for width in WIDTHS for policy in OTHERS]
    controlled = [f"{policy}-w8a8" for policy in (*MAIN, "smoothquant")]
    parts = {
        name: measure(out, name, model, policies, args.videos, seeds)
        for name, model, policies, seeds in (
            ("main", MODEL, main_policies, 3),
            ("others", MODEL, others, 1),
            ("rescaled", str(rescaled), controlled, 1),
        )
    }
    found = {"command": COMMAND, "run": digest, "parts": parts, "table": table(parts)}
    write_text(args.results, json.dumps(found, indent=1) + "\n")
    return 0


def run_digest() -> str:
    """Of the code, the machine, the model and the prompts it is calibrated with."""
    machine = {name: found for name, found in environment().items() if name != "date"}
    digest = hashlib.sha256(json.dumps([machine, jax.default_backend()]).encode())
    code = sorted(Path(qvd_jax.__file__).parent.rglob("*.py"))
    model = sorted(path for path in checkpoint.find(MODEL).rglob("*") if path.is_file())
    for path in (*code, Path(__file__), TESTS / "rescaling.py", PROMPTS, *model):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(
    out: Path, name: str, model: str, policies: list[str], videos: int, seeds: int
) -> dict[str, Any]:
    """Evaluates a model quantized by each policy against the shapes model."""
    measured = out / f"{name}-{videos}.json"
    if measured.exists():
        return dict(json.loads(measured.read_text()))
    candidates = calibrated(out, model, policies)
    names = [MODEL, *([] if model == MODEL else [model]), *candidates]
    reference = qvd_jax.load(MODEL)
    solver, want = reference.scheduler.solver, reference.defaults
    models = {place: qvd_jax.load(place).with_scheduler(solver) for place in names}
    cases = held_out_cases(videos, 0)
    pairs.check_comparable(models, cases, want)
    sampled = sample(out / f"{name}-{videos}", models, cases, want, seeds)
    entries = pairs.measure(models, sampled, cases)
    for entry in entries:
        # Times are of a machine in use, and so are folders.
        del entry["seconds_per_video"]
        entry["name"] = Path(entry["name"]).name
    found = {
        **environment(),
        "backend": jax.default_backend(),
        "prompts": videos,
        "seeds": seeds,
        "scheduler": solver,
        **{part: getattr(want, part) for part in SIZE},
        "guidance_scale": want.guidance_scale,
        "models": entries,
    }
    write_text(measured, json.dumps(found))
    return found


def sample(
    place: Path,
    models: dict[str, VideoPipeline],
    cases: Cases,
    want: VideoDefaults,
    seeds: int,
) -> dict[str, Sampled]:
    """As `pairs.sample`, batch by batch, each of which is kept in a file."""
    place.mkdir(exist_ok=True)
    prompts, files = cases.inputs, []
    batch = min(BATCH, len(prompts))
    starts = range(0, seeds * len(prompts), batch)
    for start in tqdm.tqdm(starts, desc=place.name, unit="batch"):
        file = place / f"{start}.npz"
        files.append(file)
        if file.exists():
            continue
        shown = slice(start % len(prompts), start % len(prompts) + batch)
        # Noise is numbered over all prompts and seeds.
        part = replace(cases, inputs=prompts[shown])
        found = pairs.sample(models, part, want, [start // batch])
        arrays = {
            f"{kind} {number}": getattr(sampled, kind)
            for number, sampled in enumerate(found.values())
            for kind in ("videos", "noise", "signal")
        }
        replace_when_whole(file, functools.partial(np.savez, **arrays))
    stored = [read_arrays(file) for file in files]
    return {
        name: Sampled(
            np.concatenate([arrays[f"videos {number}"] for arrays in stored]),
            np.sum([arrays[f"noise {number}"] for arrays in stored], 0),
            np.sum([arrays[f"signal {number}"] for arrays in stored], 0),
            None,
        )
        for number, name in enumerate(models)
    }


def calibrated(out: Path, model: str, policies: list[str]) -> list[str]:
    """The model quantized by each policy, from one observation of its layers' inputs."""
    places = {policy: out / f"{Path(model).name}-{policy}" for policy in policies}
    missing = [policy for policy, place in places.items() if not place.exists()]
    if missing:
        pipe = qvd_jax.load(model)
        paths = [layer.path for layer in unet_layers(pipe)]
        prompts, config = read_prompts(PROMPTS), qvd_jax.CalibrationConfig()
        observed = collect(pipe, paths, prompts, config)
        for policy in tqdm.tqdm(missing, desc=f"quantizing {model}", unit="policy"):
            plan = make_plan(pipe, named_policy(policy), config)
            quantized, reports = solve(pipe, plan, observed, prompts, config)
            qvd_jax.save(quantized, places[policy], reports=reports)
    return [str(place) for place in places.values()]


def table(parts: dict[str, dict[str, Any]]) -> str:
    """One line for each model, width by width, beside the float model's of the same videos."""
    first = next(iter(parts.values()))
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("qvd_jax", "jax", "flax"))
    keyed = []
    for name, part in parts.items():
        for number, model in enumerate(part["models"]):
            row = {
                "policy": f"rescaled, {model['policy']}" if name == "rescaled" else model["policy"],
                "videos": str(part["prompts"] * part["seeds"]),
                "all four": f"{model['accuracy']['all four']['value']:.1%}",
            }
            if number:
                row |= {
                    "against float, points": interval(model["accuracy_change"], 100, "+.1f"),
                    "Fréchet / float's": interval(model["frechet_ratio"], 1, ".3f"),
                    "PSNR dB": f"{model['psnr']['value']:.1f}",
                    "latents SQNR dB": f"{model['latent_sqnr'][-1]:.1f}",
                }
            elif name == "rescaled":
                continue  # the shapes model itself, which `others` has
            width = model["policy"].rpartition("-")[2]
            keyed.append((name == "rescaled", ORDER.index(width), row))
    # Stable: policies of one width stay in their order.
    rows = [row for *_, row in sorted(keyed, key=lambda item: item[:2])]
    return f"{first['steps']} steps; {versions}\n\n{markdown.table(rows)}\n"


def interval(found: dict[str, Any], factor: int, form: str) -> str:
    value, low, high = (
        format(factor * part, form) for part in (found["value"], *found["interval"])
    )
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
