"""Models one step on slices of TPUs by the blocks of the UNet, which `docs/scaling.md` shows.

python tests/measure_scaling.py [v5e v6e]

The compiler takes minutes for a whole UNet and seconds for a block: those that differ are compiled
once and count as often as they are run. Int8 alone: what eight chips make of float is the same
share of one chip's time. Takes minutes for each row that is not in its file yet.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from qvd_jax import markdown, meshes
from qvd_jax.benchmarks import chips, compiled, parts
from qvd_jax.benchmarks.compiled import Target
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.benchmarks.unet import OURS, Case
from qvd_jax.environment import environment
from qvd_jax.files import write_text

RESULTS = Path(__file__).parent.parent / "docs" / "results"
GRIDS = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
KINDS = ("resnet", "spatial", "spatio_temporal", "motion")
MODE = "qvd-w8a8"
STEPS = 25


class Sweep(NamedTuple):
    """Meshes for one kind of video.

    Attributes:
      title: what the document calls it.
      size: of `Case`.
      frames: F.
      height: H of the latents.
      width: W of the latents.
      meshes: the first is of one chip.
    """

    title: str
    size: str
    frames: int
    height: int
    width: int
    meshes: tuple[str, ...]


SWEEPS = (
    Sweep(
        "AnimateDiff v2, 16 frames of 512x512",
        "sd15",
        *(16, 64, 64),
        # Guidance first, then frames; in the end more chips than one video divides over.
        (
            "data=1",
            "guidance=2",
            *(f"guidance=2,frame={frames}" for frames in (2, 4, 8, 16)),
            "data=2,guidance=2,frame=16",
        ),
    ),
    # Its frames do not divide: the lowest resolution has 144 positions.
    Sweep(
        "Stable Video Diffusion, 25 frames of 1024x576",
        "svd",
        *(25, 72, 128),
        ("data=1", "guidance=2"),
    ),
    Sweep(
        "Stable Video Diffusion, 24 frames of 1024x576",
        "svd",
        *(24, 72, 128),
        (
            "data=1",
            *(f"guidance=2,frame={frames}" for frames in (2, 4, 8)),
        ),
    ),
)


def main(*names: str) -> None:
    for sweep, name in itertools.product(SWEEPS, names or ("v5e", "v6e")):
        file, rows = RESULTS / f"scaling_{name}.json", []
        if file.exists():
            rows = json.loads(file.read_text("utf-8"))["results"]
        there = {(row["video"], row["mesh"]) for row in rows}
        for mesh in map(meshes.parse, sweep.meshes):
            if (sweep.title, str(mesh)) not in there:
                rows.append(model(name, sweep, mesh))
                write(file, name, rows)


def model(name: str, sweep: Sweep, mesh: meshes.MeshConfig) -> dict[str, Any]:
    """A step on a slice."""
    case = Case(sweep.size, 2 * mesh.data, sweep.frames, sweep.height, sweep.width)
    target = Target(chips.find(f"{name}:{GRIDS[mesh.size]}"), mesh)
    variant, counts = Variant(OURS, MODE, "bfloat16"), blocks(case)
    kinds, sent = Counter[str](), 0
    found = compiled.compile_programs(case, target, list(counts), [variant])
    for one in found:
        for kind, spent in one["modelled_ms_by_kind"].items():
            kinds[kind] += counts[one["part"]] * spent
        for together in one.get("collectives", {}).values():
            sent += counts[one["part"]] * together["bytes"]
    return {
        "video": sweep.title,
        "chip": target.chip.name,
        "mesh": str(mesh),
        "chips": mesh.size,
        "videos": mesh.data,
        "mode": MODE,
        "dtype": variant.dtype,
        "modelled_ms": kinds.total(),
        "modelled_ms_by_kind": dict(kinds),
        "sent_bytes": sent,
        "blocks": {
            one["part"]: {"count": counts[one["part"]], "modelled_ms": one["modelled_ms"]}
            for one in found
        },
    }


def blocks(case: Case) -> dict[str, int]:
    """Those of a UNet's resnets and transformers that differ, with how often each is run."""
    first: dict[tuple[str, str], str] = {}
    counts = Counter[str]()
    for name in parts.names(case.config):
        kind = name.partition(".")[2]
        if kind in KINDS:
            inputs = str(parts.find(name, case, jnp.bfloat16).inputs)
            counts[first.setdefault((kind, inputs), name)] += parts.count(name, case.config)
    return dict(counts)


def write(file: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    record = {
        "command": f"python tests/measure_scaling.py {name}",
        **environment(f"{name}, compiled for, not run"),
        "results": rows,
        "table": table(name, rows),
    }
    write_text(file, json.dumps(record, indent=2) + "\n")


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of each kind of video."""
    texts = []
    for title in dict.fromkeys(row["video"] for row in rows):
        own = [row for row in rows if row["video"] == title]
        (alone,) = (row["modelled_ms"] for row in own if row["chips"] == 1)
        whole = wholes(name) if title == SWEEPS[0].title else {}
        shown = [_row(row, alone, whole) for row in own]
        layers = f"{own[0]['mode']} {own[0]['dtype']}"
        texts.append(f"{title}, {name}, {layers}:\n\n{markdown.table(shown)}")
    return "\n\n".join(texts)


def wholes(name: str) -> dict[str, float]:
    """The milliseconds of whole UNets of AnimateDiff that were compiled, by mesh."""
    files = (RESULTS / f"compiled_{name}.json", RESULTS / f"compiled_{name}_2x4.json")
    records = (json.loads(file.read_text("utf-8")) for file in files if file.exists())
    return {
        result.get("mesh", str(meshes.MeshConfig())): result["modelled_ms"]
        for record in records
        for result in record["results"]
        if result["part"] == parts.UNET and result["mode"] == MODE
    }


def _row(row: dict[str, Any], alone: float, whole: dict[str, float]) -> dict[str, str]:
    spent, chips_ms = row["modelled_ms"], row["chips"] * row["modelled_ms"] / row["videos"]
    known = whole.get(row["mesh"])
    compared = {"of a whole UNet's ms": f"{spent / known:.3f}" if known else ""} if whole else {}
    return {
        "chips": str(row["chips"]),
        "mesh": row["mesh"],
        "ms": f"{spent:.1f}",
        "speedup": f"{alone / spent:.2f}",
        "efficiency": f"{alone / chips_ms:.0%}",
        "exchanged ms": f"{row['modelled_ms_by_kind']['collectives']:.2f}",
        "sent MB": f"{row['sent_bytes'] / 1e6:.1f}",
        "steps a second": f"{1e3 * row['videos'] / spent:.1f}",
        f"chip hours, 1000 videos of {STEPS} steps": f"{STEPS * chips_ms / 3600:.2f}",
        **compared,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
