"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies_*.json` and the README's table: float, QVD and minmax with three seeds
for each prompt, the others with one. Checkpoints that are there already are taken.
"""

import argparse
import shutil
import sys
from pathlib import Path

from qvd_jax import calibrate, evaluate
from qvd_jax.data import moving_shapes

RESULTS = Path(__file__).parent.parent / "docs" / "results"
WIDTHS = ("w8a8", "w6a6", "w4a8", "w8a16")
MAIN = ("qvd", "minmax")
OTHERS = ("mse", "smoothquant", "qdiffusion", "qvd-scri", "qvd-htdq")
CALIBRATION_PROMPTS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    prompts = args.out / "calibration-prompts.txt"
    scenes = moving_shapes.scenes("train")[:: 4493 // CALIBRATION_PROMPTS][:CALIBRATION_PROMPTS]
    prompts.write_text("\n".join(map(moving_shapes.prompt, scenes)) + "\n")
    for width in WIDTHS:
        for policy in (*MAIN, *(OTHERS if width != "w8a16" else ())):
            place = args.out / f"{policy}-{width}"
            if not place.exists():
                options = ["--out", str(place), "--policy", place.name]
                if calibrate.main([*options, "--prompts-file", str(prompts)]):
                    return 2
    for title, policies, seeds in (("main", MAIN, 3), ("others", OTHERS, 1)):
        for width in WIDTHS if title == "main" else WIDTHS[:3]:
            place = args.out / f"evaluation-{title}-{width}"
            if not place.exists():
                candidates = [str(args.out / f"{policy}-{width}") for policy in policies]
                options = ["--reference", "shapes", "--candidate", *candidates]
                options += ["--videos", str(args.videos), "--seeds", str(seeds)]
                if evaluate.main([*options, "--out", str(place)]):
                    return 2
            shutil.copy(place / "results.json", RESULTS / f"policies_{title}_{width}.json")
            print((place / "results.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
