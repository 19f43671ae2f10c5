"""Calibrates the shapes model with every policy and evaluates all of them beside float.

    python tests/measure_policies.py --out runs/policies

makes `docs/results/policies.json`: float, QVD and minmax with three seeds for each prompt, the
others with one, and the controlled case (`rescaling.py`). Thousands of videos take hours; parts
that the file has of the same model are taken, so that an interrupted run goes on.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from rescaling import rescale_channels

import qvd_jax
from qvd_jax import checkpoint, evaluate, markdown
from qvd_jax.cli import enable_compilation_cache, read_prompts
from qvd_jax.files import write_text
from qvd_jax.pipelines.quantization import collect, list_layers, quantize_observed
from qvd_jax.quant.policy import named_policy

RESULTS = Path(__file__).parent.parent / "docs/results/policies.json"
COMMAND = "python tests/measure_policies.py --out runs/policies"
MODEL = "shapes"
WIDTHS = ("w8a8", "w6a6", "w4a8")
ORDER = ("float", *WIDTHS, "w8a16")
MAIN = ("qvd", "minmax")
OTHERS = ("mse", "smoothquant", "qdiffusion", "qvd-scri", "qvd-htdq")
PROMPTS = Path(__file__).parent.parent / "configs/shapes_prompts.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=128)
    args = parser.parse_args()
    enable_compilation_cache()
    digest = model_digest()
    # Checkpoints of another model are not taken for this one's.
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
    found = earlier_parts(digest)
    for name, model, policies, seeds in (
        ("main", MODEL, main_policies, 3),
        ("others", MODEL, others, 1),
        ("rescaled", str(rescaled), controlled, 1),
    ):
        if name not in found:
            found[name] = measure(out, name, model, policies, args.videos, seeds)
            write_text(RESULTS, json.dumps(record(digest, found), indent=1) + "\n")
    return 0


def model_digest() -> str:
    """Of the model and the prompts it is calibrated with."""
    digest = hashlib.sha256(PROMPTS.read_bytes())
    for path in sorted(checkpoint.find(MODEL).rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def earlier_parts(digest: str) -> dict[str, dict[str, Any]]:
    """What an interrupted run measured of the same model."""
    if not RESULTS.exists():
        return {}
    earlier = json.loads(RESULTS.read_text())
    parts: dict[str, dict[str, Any]] = earlier["parts"] if earlier["model"] == digest else {}
    return parts


def measure(
    out: Path, name: str, model: str, policies: list[str], videos: int, seeds: int
) -> dict[str, Any]:
    """Evaluates a model quantized by each policy against the shapes model."""
    candidates = calibrated(out, model, policies)
    candidates = candidates if model == MODEL else [model, *candidates]
    place = out / f"{name}-results"
    options = ["--reference", MODEL, "--candidate", *candidates, "--out", str(place)]
    options.append("--overwrite")  # what an interruption may have left
    if evaluate.main([*options, "--videos", str(videos), "--seeds", str(seeds)]):
        sys.exit(2)
    found: dict[str, Any] = json.loads((place / "results.json").read_text())
    # The figures of single layers are many, and in the report; times are of a machine in use, and
    # so are folders.
    for measured in found["models"]:
        del measured["layers"], measured["seconds_per_video"]
        measured["name"] = Path(measured["name"]).name
    del found["table"], found["command"]
    return found


def calibrated(out: Path, model: str, policies: list[str]) -> list[str]:
    """The model quantized by each policy, from one observation of its layers' inputs."""
    places = {policy: out / f"{Path(model).name}-{policy}" for policy in policies}
    missing = [policy for policy, place in places.items() if not place.exists()]
    if missing:
        pipe = qvd_jax.load(model)
        paths = [layer.path for layer in list_layers(pipe)]
        prompts, config = read_prompts(PROMPTS), qvd_jax.CalibrationConfig()
        observed = collect(pipe, paths, prompts, config, {}, lambda *_: None)
        for policy in tqdm.tqdm(missing, desc=f"quantizing {model}", unit="policy"):
            quantized, reports = quantize_observed(pipe, named_policy(policy), observed, config)
            qvd_jax.save(quantized, places[policy], reports=reports)
    return [str(place) for place in places.values()]


def record(digest: str, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All parts and their table."""
    return {"command": COMMAND, "model": digest, "parts": parts, "table": table(parts)}


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
                    "PSNR dB": f"{model['psnr']:.1f}",
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
