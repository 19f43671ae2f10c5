"""`python -m qvd_jax.benchmark unet --against diffusers`: speed, side by side in one run."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qvd_jax.benchmarks import peers, products, rounds, unet
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.cli import command, positive_int
from qvd_jax.data.video_io import check_writable
from qvd_jax.errors import InputError
from qvd_jax.quant.policy import named_policy

OURS = "qvd_jax"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints the table, writes the JSON."""
    args = _parser().parse_args(argv)
    for policy in args.policy:
        named_policy(policy)
    if args.out:
        check_writable(args.out, overwrite=args.overwrite)
    case = unet.Case(args.size, args.batch, args.frames, args.height // 8, args.width // 8)
    stride = 8 * case.config.stride
    if args.height % stride or args.width % stride:
        raise InputError(
            f"{args.height}x{args.width} pixels: both sides must be multiples of {stride}"
        )
    if args.what == "products":
        results = products.measure(case)
        print(products.table(results))
    else:
        variants = unet_variants(args.dtype, args.policy, installed(args.against))
        results = rounds.measure({OURS: unet.build, **peers.BUILDS}, case, variants, args.rounds)
        print(rounds.table(results, variants[0]))
    if args.out:
        record = {
            "command": f"python -m qvd_jax.benchmark {' '.join(argv or sys.argv[1:])}",
            "case": asdict(case),
            **rounds.environment(),
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def installed(names: Sequence[str]) -> list[str]:
    """Those of the peers whose packages are there; of the others it prints what would install them.

    Raises:
      InputError: none of several is there.
    """
    found = []
    for name in names:
        missing = [pkg for pkg in peers.REQUIRED[name] if importlib.util.find_spec(pkg) is None]
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            found.append(name)
    if names and not found:
        raise InputError(f"none of {', '.join(names)} is installed")
    return found


def unet_variants(
    dtypes: Sequence[str], policies: Sequence[str], against: Sequence[str]
) -> list[Variant]:
    """Every mode of ours and of the peers, in every dtype."""
    modes = {OURS: (unet.FLOAT_MODE, *policies), **{name: peers.MODES[name] for name in against}}
    return [
        Variant(framework, mode, dtype)
        for framework, names in modes.items()
        for mode in names
        for dtype in dtypes
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.benchmark", description=__doc__)
    parser.add_argument(
        "what",
        choices=["products", "unet"],
        help="every formulation of every product by shape, or one forward of the UNet",
    )
    parser.add_argument("--against", nargs="+", choices=peers.BUILDS, default=[])
    parser.add_argument("--policy", nargs="+", default=[], metavar="P", help="ours, quantized")
    parser.add_argument("--size", choices=unet.SIZES, default="sd15")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
    )
    for name, default in (("batch", 1), ("frames", 8), ("height", 128), ("width", 128)):
        parser.add_argument(f"--{name}", type=positive_int, default=default, metavar="N")
    parser.add_argument("--rounds", type=positive_int, default=9, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
