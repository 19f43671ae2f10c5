"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies.json`: float, QVD and minmax with three seeds for each prompt, the
others with one, and the controlled case (`rescaling.py`). Thousands of videos take hours; what is
there already is taken, so that an interrupted run goes on.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rescaling import rescale_channels

import qvd_jax
from qvd_jax import calibrate, checkpoint, evaluate, markdown
from qvd_jax.data import moving_shapes
from qvd_jax.files import write_text

RESULTS = Path(__file__).parent.parent / "docs/results/policies.json"
MODEL = "shapes"
WIDTHS = ("w8a8", "w6a6", "w4a8")
MAIN = ("qvd", "minmax")
OTHERS = ("mse", "smoothquant", "qdiffusion", "qvd-scri", "qvd-htdq")
CALIBRATION_PROMPTS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=128)
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    check_model(out / "model.txt")
    train = moving_shapes.scenes("train")
    scenes = train[:: len(train) // CALIBRATION_PROMPTS][:CALIBRATION_PROMPTS]
    (out / "prompts.txt").write_text("\n".join(map(moving_shapes.prompt, scenes)) + "\n")

    rescaled = out / "rescaled"
    if not rescaled.exists():
        pipe = qvd_jax.load(MODEL, dtype="float32")
        unet = rescale_channels(pipe.params["unet"], np.random.default_rng(0))
        qvd_jax.save(replace(pipe, params={**pipe.params, "unet": unet}), rescaled)

    main_policies = {width: [f"{policy}-{width}" for policy in MAIN] for width in WIDTHS}
    # With float inputs all policies are the same.
    main_policies["w8a8"].append("qvd-w8a16")
    parts = [(f"main_{width}", MODEL, main_policies[width], 3) for width in WIDTHS]
    for width in WIDTHS:
        parts.append((f"others_{width}", MODEL, [f"{policy}-{width}" for policy in OTHERS], 1))
    controlled = [f"{policy}-w8a8" for policy in (*MAIN, *OTHERS)]
    parts.append(("rescaled", str(rescaled), controlled, 1))
    found = {}
    for name, model, policies, seeds in parts:
        found[name] = measure(out, name, model, policies, args.videos, seeds)
        # Written after each part: an interrupted run shows what it has.
        write_text(RESULTS, json.dumps(record(found), indent=1) + "\n")
    return 0


def check_model(record: Path) -> None:
    """Refuses a folder with results of another model."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.find(MODEL).rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    if record.exists() and record.read_text() != digest.hexdigest():
        sys.exit(f"{record.parent} holds results of another model; name a new folder")
    record.write_text(digest.hexdigest())


def measure(
    out: Path, name: str, model: str, policies: list[str], videos: int, seeds: int
) -> dict[str, Any]:
    """Evaluates a model quantized by each policy against the shapes model."""
    place = out / name
    if not (place / "results.json").exists():
        candidates = [calibrated(out, model, policy) for policy in policies]
        candidates = candidates if model == MODEL else [model, *candidates]
        options = ["--reference", MODEL, "--candidate", *candidates, "--out", str(place)]
        options.append("--overwrite")  # what an interruption may have left
        if evaluate.main([*options, "--videos", str(videos), "--seeds", str(seeds)]):
            sys.exit(2)
    found: dict[str, Any] = json.loads((place / "results.json").read_text())
    return found


def calibrated(out: Path, model: str, policy: str) -> str:
    place = out / f"{Path(model).name}-{policy}"
    if not place.exists():
        options = ["--checkpoint", model, "--policy", policy, "--out", str(place)]
        if calibrate.main([*options, "--prompts-file", str(out / "prompts.txt")]):
            sys.exit(2)
    return str(place)


def record(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All parts without the figures of single layers, and their table."""
    first = next(iter(parts.values()))
    shared = ("cpu", "cores", "python", "versions", "date", "backend", "steps")
    return {
        "command": " ".join(["python", *sys.argv]),
        **{key: first[key] for key in shared},
        "parts": {
            name: {
                **{key: part[key] for key in ("command", "prompts", "seeds")},
                "models": [
                    {key: value for key, value in model.items() if key != "layers"}
                    for model in part["models"]
                ],
            }
            for name, part in parts.items()
        },
        "table": table(parts),
    }


def table(parts: dict[str, dict[str, Any]]) -> str:
    """One line for each model and part, beside the float model of that part's videos."""
    first = next(iter(parts.values()))
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("qvd_jax", "jax", "flax"))
    rows = []
    for name, part in parts.items():
        for number, model in enumerate(part["models"]):
            policy = f"rescaled, {model['policy']}" if name == "rescaled" else model["policy"]
            row = {
                "policy": policy if number else "float",
                "videos": str(part["prompts"] * part["seeds"]),
                "all four": f"{model['accuracy']['all four']['value']:.1%}",
            }
            if number:
                row |= {
                    "against float, points": interval(model["accuracy_change"], 100, "+.1f"),
                    "Fréchet / float's": interval(model["frechet_ratio"], 1, ".3f"),
                    "PSNR dB": f"{model['psnr']:.1f}",
                    "latents SQNR dB": f"{model['latent_sqnr'][-1]:.1f}",
                }
            rows.append(row)
    return f"{first['steps']} steps; {versions}\n\n{markdown.table(rows)}\n"


def interval(found: dict[str, Any], factor: int, form: str) -> str:
    value, low, high = (
        format(factor * part, form) for part in (found["value"], *found["interval"])
    )
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
