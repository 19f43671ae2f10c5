"""Time and peak memory of calibrating AnimateDiff v2 at its real size.

    python tests/measure_calibration.py --out docs/results/calibration_cpu.json

Random weights (1.31 G parameters) whose channels have log-normal scales (`rescaling.py`), as those
of trained models are scattered; 16x16 latents, 8 frames, 2 prompts, 4 steps, QVD W8A8 or what
--policy says.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rescaling import rescale_channels
from timed import timed_python, write_record

import qvd_jax
from qvd_jax import checkpoint

POLICY = "qvd-w8a8"
PROMPTS = "a red circle moving left\na blue square growing\n"


def scatter(source: Path, out: Path) -> None:
    """Saves a model whose channels have other scales, of the same function."""
    pipe = qvd_jax.load(source, dtype="float32")
    unet = rescale_channels(pipe.params["unet"], np.random.default_rng(0))
    qvd_jax.save(replace(pipe, params={**pipe.params, "unet": unet}), out)


def measure(work: Path, policy: str) -> dict[str, object]:
    source, plain, model, int8 = (work / name for name in ("source", "plain", "model", "int8"))
    make = [sys.executable, str(Path(__file__).with_name("random_animatediff.py"))]
    subprocess.run([*make, str(source), "--size", "sd15", "--dtype", "bfloat16"], check=True)
    timed_python("-m", "convert", str(source), "--out", str(plain))
    # In a process of its own, which gives its memory back.
    scattering = multiprocessing.get_context("spawn").Process(target=scatter, args=(plain, model))
    scattering.start()
    scattering.join()
    if scattering.exitcode:
        sys.exit(scattering.exitcode)
    (work / "prompts.txt").write_text(PROMPTS)
    sizes = ["--frames", "8", "--height", "128", "--width", "128", "--steps", "4"]
    options = ["--checkpoint", str(model), "--out", str(int8), "--policy", policy, *sizes]
    calibration = timed_python(
        "-m", "qvd_jax.calibrate", *options, "--prompts-file", str(work / "prompts.txt")
    )
    print(calibration.printed)
    return {
        "calibration": {"seconds": calibration.seconds, "peak_bytes": calibration.peak_bytes},
        "unet_bytes_on_disk": {
            "float32": checkpoint.disk_bytes(model / "unet"),
            policy: checkpoint.disk_bytes(int8 / "unet"),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--keep", type=Path, help="a new folder for the 13 GB of checkpoints")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True)
        results = measure(args.keep, args.policy)
    else:
        with tempfile.TemporaryDirectory() as work:
            results = measure(Path(work), args.policy)
    command = f"python tests/measure_calibration.py --out {args.out}"
    command += f" --policy {args.policy}" if args.policy != POLICY else ""
    write_record(args.out, command, results)


if __name__ == "__main__":
    main()
