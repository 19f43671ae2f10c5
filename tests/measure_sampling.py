"""Times whole videos of checkpoints in turn, without the starts that `benchmark sample` times.

    python tests/measure_calibration.py --out plain.json --keep runs/sd15
    python tests/measure_calibration.py --policy qvd-plus-w4a8 --out plus.json --keep runs/plus
    python tests/measure_sampling.py runs/sd15/int8 runs/plus/int8 --out sample_plus_cpu.json

A start at the real size compiles for minutes, of which these figures have nothing: here checkpoints
are sampled once before any of them is timed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from timed import write_record

from qvd_jax.benchmarks import rounds, sampling, unet
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.pipelines.loading import read_configs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    args = parser.parse_args(argv)
    case = sampling.SampleCase(1, args.steps, args.frames, args.size, args.size)
    variants = [Variant(unet.OURS, place, "bfloat16") for place in args.checkpoint]
    timed = rounds.time_in_turn({unet.OURS: sampling.build}, case, variants, args.rounds)
    for one in timed:
        quantization = read_configs(one["mode"]).quantization
        one["mode"] = "float" if quantization is None else quantization.policy
    table = rounds.times_table(timed, replace(variants[0], mode=timed[0]["mode"]))
    numbers = (f"--{name} {vars(args)[name]}" for name in ("rounds", "steps", "frames", "size"))
    given = " ".join([*args.checkpoint, *numbers])
    command = f"python tests/measure_sampling.py {given} --out {args.out}"
    write_record(args.out, command, {"case": asdict(case), "models": timed}, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
