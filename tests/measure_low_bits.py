"""Evaluates the policies of -plus, whose methods differ in the ranges of inputs alone, at few bits.

    python tests/measure_low_bits.py --out runs/low_bits

makes `docs/results/low_bits.json` as `measure_policies.py` makes its own, whose rules hold here:
one run of one code, that goes on where it was interrupted. Every method has the same rounding by
GPTQ, clipping of weights, ranges of tokens and propagation; QVD without them stands beside.
"""

import json
import sys
from collections.abc import Sequence

from measure_policies import (
    MODEL,
    RESULTS,
    folder,
    given,
    make_parser,
    measure,
    parse,
    run_digest,
    table,
)

from qvd_jax.files import write_text

LOW_BITS = RESULTS.with_name("low_bits.json")
COMMAND = "python tests/measure_low_bits.py --out runs/low_bits"
WIDTHS = ("w8a8", "w6a6", "w4a8")
FEWER = ("w4a4",)
METHODS = ("qvd", "qvd-plus", "qdiffusion-plus")
OF_FEWER = ("qvd-plus", "minmax-plus")
MORE = ("minmax-plus-w4a8",)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, LOW_BITS, videos=64)
    parser.add_argument("--seeds", type=int, default=1, help="of each prompt (%(default)s)")
    args = parse(parser, argv)
    digest = run_digest(__file__)
    out = folder(args.out, digest)
    policies = [
        *(f"{method}-{width}" for width in WIDTHS for method in METHODS),
        *MORE,
        *(f"{method}-{width}" for width in FEWER for method in OF_FEWER),
    ]
    parts = {
        "plus": measure(out, "plus", MODEL, policies, args.videos, args.seeds, args.fvd_videos)
    }
    found = {
        "command": f"{COMMAND} {given(args)}",
        "run": digest,
        "parts": parts,
        "table": table(parts),
    }
    write_text(args.results, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
