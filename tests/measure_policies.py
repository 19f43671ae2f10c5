"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies.json`: float, QVD and minmax with three seeds for each prompt, the
others with one, and the controlled case (`rescaling.py`). The first `--fvd-videos` of each model
have FVD against float's, against rendered videos and, as its floor, float's of other seeds against
float's; on a CPU their features take about a second each. Thousands of videos take hours, and a
gigabyte while it runs; an interrupted run goes on where it was. What it has done counts for the
same code, model and machine alone, and the file is written when all is there, so that every row is
of one run. `python tests/tables.py README.md` shows it. It needs the packages of the extra
`metrics`.
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
from qvd_jax.evaluation.sets import PIXELS, Measures, compare_videos
from qvd_jax.files import read_arrays, replace_when_whole, write_text
from qvd_jax.pipelines.observation import collect
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.quantization import make_plan, solve, unet_layers
from qvd_jax.pipelines.widths import Target, choose_widths
from qvd_jax.quant.policy import Policy, named_policy
from qvd_jax.shapes.judge import held_out_cases, rendered_videos

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "docs/results/policies.json"
COMMAND = "python tests/measure_policies.py --out runs/policies"
MODEL = "shapes"
WIDTHS = ("w8a8", "w6a6", "w4a8")
ORDER = ("float", *WIDTHS, "w4a6", "w4a4", "w3a8", "w8a16", "budget")
MAIN = ("qvd", "minmax")
OTHERS = ("mse", "smoothquant", "qdiffusion", "qvd-scri", "qvd-htdq")
# What may be added to SCRI in a named policy, each by itself.
OPTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"rounding": "gptq"},
    "token": {"ranges": "token"},
    "learned": {"method": "learned"},
    "propagated": {"propagate": True},
    "rotation": {"rotation": 64},
    "low rank": {"low_rank": 8},
}
PROMPTS = EXAMPLES / "shapes.txt"
SIZE = ("steps", "frames", "height", "width")
PROTOCOL = "common-metrics"
BESIDE_FLOAT = (
    "against float, points",
    "Fréchet / float's",
    "PSNR dB",
    "latents SQNR dB",
    "of the median video",
    "LPIPS",
)
RENDERED = "rendered"


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, RESULTS, videos=128)
    args = parse(parser, argv)
    digest = run_digest(__file__)
    out = folder(args.out, digest)
    rescaled = rescaled_model(out)
    # With float inputs all policies are the same.
    main_policies = [f"{policy}-{width}" for width in WIDTHS for policy in MAIN] + ["qvd-w8a16"]
    others = [f"{policy}-{width}" for width in WIDTHS for policy in OTHERS]
    controlled = [f"{policy}-w8a8" for policy in (*MAIN, "smoothquant")]
    parts = {
        name: measure(out, name, model, policies, args.videos, seeds, args.fvd_videos)
        for name, model, policies, seeds in (
            ("main", MODEL, main_policies, 3),
            ("others", MODEL, others, 1),
            ("rescaled", str(rescaled), controlled, 1),
        )
    }
    store(args, COMMAND, parts)
    return 0


def make_parser(description: str | None, results: Path, videos: int) -> argparse.ArgumentParser:
    """Of what an experiment of policies is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="what an interrupted run has done")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument(
        "--videos",
        type=int,
        default=videos,
        help=f"prompts (%(default)s), up to {BATCH} or so many times",
    )
    parser.add_argument(
        "--fvd-videos",
        type=int,
        metavar="N",
        help="of each model the first N have FVD (--videos): fewer, or so many times for further "
        "seeds",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What an experiment is asked for."""
    args = parser.parse_args(argv)
    if args.videos > BATCH and args.videos % BATCH:
        parser.error(f"--videos {args.videos} is no multiple of {BATCH}")
    args.fvd_videos = args.fvd_videos or args.videos
    if args.fvd_videos > args.videos and args.fvd_videos % args.videos:
        parser.error(f"--fvd-videos {args.fvd_videos} is no multiple of --videos {args.videos}")
    return args


def store(args: argparse.Namespace, command: str, parts: dict[str, dict[str, Any]]) -> None:
    """Writes what an experiment found, and its table."""
    found = {
        "command": f"{command} {given(args)}",
        "parts": parts,
        "table": table(parts),
    }
    write_text(args.results, json.dumps(found, indent=1) + "\n")


def given(args: argparse.Namespace) -> str:
    """How many videos an experiment is asked for, as its command says it."""
    return " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name not in ("out", "results", "parts")
    )


def folder(out: Path, digest: str) -> Path:
    """Where a run keeps what it has done, not that of other code, models or machines."""
    place = out / digest[:8]
    place.mkdir(parents=True, exist_ok=True)
    return place


def rescaled_model(out: Path) -> Path:
    """The controlled case: the same function of other numbers."""
    place = out / "rescaled"
    if not place.exists():
        pipe = qvd_jax.load(MODEL, dtype="float32")
        unet = rescale_channels(pipe.params["unet"], np.random.default_rng(0))
        qvd_jax.save(replace(pipe, params={**pipe.params, "unet": unet}), place)
    return place


def run_digest(script: str) -> str:
    """Of the code, the machine, the model and the prompts it is calibrated with."""
    machine = {name: found for name, found in environment().items() if name != "date"}
    digest = hashlib.sha256(json.dumps([machine, jax.default_backend()]).encode())
    code = sorted(Path(qvd_jax.__file__).parent.rglob("*.py"))
    model = sorted(path for path in checkpoint.find(MODEL).rglob("*") if path.is_file())
    for path in (*code, Path(script), Path(__file__), TESTS / "rescaling.py", PROMPTS, *model):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(
    out: Path,
    name: str,
    model: str,
    policies: list[str],
    videos: int,
    seeds: int,
    fvd_videos: int,
) -> dict[str, Any]:
    """Evaluates a model quantized by each policy against the shapes model."""
    measured = out / f"{name}-{videos}-{seeds}-{fvd_videos}.json"
    if measured.exists():
        return dict(json.loads(measured.read_text()))
    alike = Measures.load((*PIXELS.metrics, "lpips"))
    fvd = Measures.load(("fvd",), PROTOCOL, cache=out / "features")
    candidates = calibrated(out, model, policies)
    names = [MODEL, *([] if model == MODEL else [model]), *candidates]
    reference = qvd_jax.load(MODEL)
    solver, want = reference.scheduler.solver, reference.defaults
    models = {place: qvd_jax.load(place).with_scheduler(solver) for place in names}
    cases = held_out_cases(videos, 0)
    pairs.check_comparable(models, cases, want)
    place = out / f"{name}-{videos}"
    sampled = sample(place, models, cases, want, range(seeds))
    count = min(fvd_videos, seeds * videos)
    more = range(seeds, seeds + -(-count // videos))
    other_seeds = sample(place, {MODEL: reference}, cases, want, more, "floor-")[MODEL].videos
    entries = pairs.measure(models, sampled, cases, measures=alike)
    compared = compare_videos(
        {name: found.videos[:count] for name, found in sampled.items()}
        | {RENDERED: rendered_videos(count, 0, 1)},
        fvd,
        real=rendered_videos(count, 0, 0),
        other_seeds=other_seeds[:count],
        seeds=max(1, count // videos),
    )
    *distances, rendered = compared.models
    for entry, figures in zip(entries, distances, strict=True):
        entry |= figures.figures()
    entries[0] |= compared.floors()
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
        "rendered": rendered.figures(),
        "run": out.name,
        "models": entries,
    }
    write_text(measured, json.dumps(found))
    # The system gives a process so many maps of memory, and each compiled function takes some.
    jax.clear_caches()
    return found


def sample(
    place: Path,
    models: dict[str, VideoPipeline],
    cases: Cases,
    want: VideoDefaults,
    seeds: range,
    kept_as: str = "",
) -> dict[str, Sampled]:
    """As `pairs.sample`, batch by batch, each of which is kept in a file."""
    place.mkdir(exist_ok=True)
    prompts, files = cases.inputs, []
    batch = min(BATCH, len(prompts))
    starts = range(seeds.start * len(prompts), seeds.stop * len(prompts), batch)
    for start in tqdm.tqdm(starts, desc=f"{kept_as}{place.name}", unit="batch"):
        file = place / f"{kept_as}{start}.npz"
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
            *(
                np.concatenate([arrays[f"{kind} {number}"] for arrays in stored])
                for kind in ("videos", "noise", "signal")
            ),
            None,
        )
        for number, name in enumerate(models)
    }


def calibrated(out: Path, model: str, policies: list[str]) -> list[str]:
    """The model quantized by each policy, from one observation of its layers' inputs.

    A policy's name may end in the budget by which the bits of its weights are chosen, or in a plus
    and one of `OPTIONS`.
    """
    places = {policy: out / f"{Path(model).name}-{policy}" for policy in policies}
    missing = [policy for policy, place in places.items() if not place.exists()]
    if missing:
        pipe = qvd_jax.load(model)
        paths = [layer.path for layer in unet_layers(pipe)]
        prompts, config = read_prompts(PROMPTS), qvd_jax.CalibrationConfig()
        observed = collect(pipe, paths, prompts, config)
        for policy in tqdm.tqdm(missing, desc=f"quantizing {model}", unit="policy"):
            named, _, budget = policy.partition("-budget-")
            plan = make_plan(pipe, policy_of(named), config)
            if budget:
                target = Target(budget=float(budget))
                plan, _ = choose_widths(pipe, plan, observed, target, prompts, config)
            quantized, reports = solve(pipe, plan, observed, prompts, config)
            qvd_jax.save(quantized, places[policy], reports=reports)
        jax.clear_caches()
    return [str(place) for place in places.values()]


def policy_of(name: str) -> Policy:
    """A named policy, maybe with one of `OPTIONS` where it has SCRI: qvd-w4a8+gptq."""
    named, _, option = name.partition("+")
    found = named_policy(named)
    rules = tuple(
        replace(rule, spec=replace(rule.spec, **OPTIONS[option]))
        if option and rule.spec and rule.spec.method == "scri"
        else rule
        for rule in found.rules
    )
    return Policy(name, rules)


def table(parts: dict[str, dict[str, Any]]) -> str:
    """One line for each model, width by width, beside the float model's of the same videos."""
    first = next(iter(parts.values()))
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("qvd_jax", "jax", "flax"))
    keyed = []
    for name, part in parts.items():
        for number, model in enumerate(part["models"]):
            row = {
                "policy": f"rescaled, {model['policy']}" if name == "rescaled" else model["policy"],
                "UNet MB": f"{model['unet_bytes'] / 1e6:.1f}",
                "videos": str(part["prompts"] * part["seeds"]),
                "all four": f"{model['accuracy']['all four']['value']:.1%}",
            }
            row |= dict.fromkeys(BESIDE_FLOAT, "")
            if number:
                last = {
                    "value": model["latent_sqnr"][-1],
                    "interval": model["latent_sqnr_interval"],
                }
                found = (
                    interval(model["accuracy_change"], 100, "+.1f"),
                    interval(model["frechet_ratio"], 1, ".3f"),
                    f"{model['psnr']['value']:.1f}",
                    interval(last, 1, ".1f"),
                    f"{model['latent_sqnr_median']:.1f}",
                    interval(model["lpips"], 1, ".4f"),
                )
                row |= dict(zip(BESIDE_FLOAT, found, strict=True))
            elif name == "rescaled":
                continue  # the shapes model itself, which `others` has
            # Beside the distances of the others stands that of float's other seeds.
            to_float = model["fvd_reference" if number else "fvd_floor_reference"]
            row |= {"FVD of": f"{model['fvd']['clips']}"}
            row |= fvd_cells("float", to_float) | fvd_cells("rendered", model["fvd"])
            kinds = model["policy"].replace("+", "-").split("-")
            place = max(ORDER.index(kind) for kind in kinds if kind in ORDER)
            keyed.append((name == "rescaled", place, row))
    rows: list[dict[str, str]] = []
    # Stable: policies of one width stay in their order. Float's row is that of several parts.
    for *_, row in sorted(keyed, key=lambda item: item[:2]):
        rows += [] if row in rows else [row]
    said = f"{first['steps']} steps; {versions}\n\n{fvd_conditions(parts)}"
    return f"{said}\n\n{markdown.table(rows)}\n"


def fvd_cells(reference: str, found: dict[str, Any]) -> dict[str, str]:
    """A distance, and what it tends to as videos grow in number."""
    title = f"FVD to {reference}"
    unbiased = {"value": found["unbiased"], "interval": found["unbiased_interval"]}
    return {
        title: interval(found, 1, ".2f"),
        f"{title}, without bias": interval(unbiased, 1, ".2f"),
    }


def fvd_conditions(parts: dict[str, dict[str, Any]]) -> str:
    """What the distances depend on, and that of rendered videos to others at each number."""
    floors = {part["rendered"]["fvd"]["clips"]: part["rendered"]["fvd"] for part in parts.values()}
    one = next(iter(floors.values()))
    rendered = "; ".join(f"{interval(of, 1, '.1f')} of {count}" for count, of in floors.items())
    return (
        f"FVD between as many clips of each, protocol {one['protocol']}, {one['frames']} frames "
        f"of {one['size']}, {one['weights']}. Float's to float is that of its other seeds. Of "
        f"rendered videos to other rendered ones: {rendered}"
    )


def interval(found: dict[str, Any], factor: int, form: str) -> str:
    """A figure and its interval, as far as there are enough videos."""
    if found["value"] is None:
        return ""
    known = [found["value"], *(found["interval"] or ())]
    value, *ends = (format(factor * part, form) for part in known)
    return f"{value} ({' to '.join(ends)})" if ends else value


if __name__ == "__main__":
    sys.exit(main())
