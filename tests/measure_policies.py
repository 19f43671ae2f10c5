"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies_*.json`: float, QVD and minmax with three seeds
for each prompt, the others with one, and the controlled case (`rescaling.py`). What is there
already is taken, so that an interrupted run goes on.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rescaling import rescale_channels

import qvd_jax
from qvd_jax import calibrate, evaluate
from qvd_jax.data import moving_shapes

DOCS = Path(__file__).parent.parent / "docs"
WIDTHS = ("w8a8", "w6a6", "w4a8", "w8a16")
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
    train = moving_shapes.scenes("train")
    scenes = train[:: len(train) // CALIBRATION_PROMPTS][:CALIBRATION_PROMPTS]
    (out / "prompts.txt").write_text("\n".join(map(moving_shapes.prompt, scenes)) + "\n")

    for width in WIDTHS:
        measure(out, f"main_{width}", "shapes", [f"{p}-{width}" for p in MAIN], args.videos, 3)
    # With float inputs all policies are the same.
    for width in WIDTHS[:3]:
        measure(out, f"others_{width}", "shapes", [f"{p}-{width}" for p in OTHERS], args.videos, 1)
    rescaled = out / "rescaled"
    if not rescaled.exists():
        pipe = qvd_jax.load("shapes", dtype="float32")
        unet = rescale_channels(pipe.params["unet"], np.random.default_rng(0))
        qvd_jax.save(replace(pipe, params={**pipe.params, "unet": unet}), rescaled)
    policies = [f"{policy}-w8a8" for policy in (*MAIN, *OTHERS)]
    measure(out, "rescaled_w8a8", str(rescaled), policies, args.videos, 1)

    return 0


def measure(out: Path, name: str, model: str, policies: list[str], videos: int, seeds: int) -> None:
    """Evaluates a model quantized by each policy against the shapes model."""
    place = out / name
    if not place.exists():
        candidates = [calibrated(out, model, policy) for policy in policies]
        candidates = candidates if model == "shapes" else [model, *candidates]
        options = ["--reference", "shapes", "--candidate", *candidates, "--out", str(place)]
        if evaluate.main([*options, "--videos", str(videos), "--seeds", str(seeds)]):
            sys.exit(2)
    shutil.copy(place / "results.json", DOCS / "results" / f"policies_{name}.json")


def calibrated(out: Path, model: str, policy: str) -> str:
    place = out / f"{Path(model).name}-{policy}"
    if not place.exists():
        options = ["--checkpoint", model, "--policy", policy, "--out", str(place)]
        if calibrate.main([*options, "--prompts-file", str(out / "prompts.txt")]):
            sys.exit(2)
    return str(place)


if __name__ == "__main__":
    sys.exit(main())
