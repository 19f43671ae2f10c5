"""Evaluates the policies of -plus, whose methods differ in the ranges of inputs alone, at few bits.

    python tests/measure_low_bits.py --out runs/low_bits --videos 128

makes `docs/results/low_bits.json` as `measure_policies.py` makes its own, whose rules hold here:
one run of one code, that goes on where it was interrupted. Every method has the same rounding by
GPTQ, clipping of weights and ranges of tokens; QVD without them stands beside, and so do bits
chosen layer by layer. QVD has three seeds for each prompt at the widths that are compared with
float, all others one. It takes hours, and writes its file once more after each part.
"""

import sys
from collections.abc import Sequence

from measure_policies import (
    MODEL,
    RESULTS,
    folder,
    make_parser,
    measure,
    parse,
    rescaled_model,
    run_digest,
    store,
)

LOW_BITS = RESULTS.with_name("low_bits.json")
COMMAND = "python tests/measure_low_bits.py --out runs/low_bits"
WIDTHS = ("w8a8", "w6a6", "w4a8")
PLUS = [f"qvd-plus-{width}" for width in WIDTHS]
METHODS = [
    "qvd-w4a8",
    *(f"qdiffusion-plus-{width}" for width in WIDTHS),
    "smoothquant-plus-w4a8",
    "minmax-plus-w4a8",
]
FEWER = [f"{of}-plus-{width}" for width in ("w4a6", "w4a4", "w3a8") for of in ("qvd", "minmax")]
# The first is what W4A8 holds of the float32 UNet's bytes.
BUDGETS = [f"qvd-plus-w8a8-budget-{share}" for share in (0.1443, 0.17)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_parser(__doc__, LOW_BITS, videos=128), argv)
    digest = run_digest(__file__)
    out = folder(args.out, digest)
    rescaled = str(rescaled_model(out))
    parts = {}
    for name, model, policies, seeds in (
        ("main", MODEL, PLUS, 3),
        ("methods", MODEL, METHODS, 1),
        ("fewer", MODEL, FEWER, 1),
        ("budgets", MODEL, BUDGETS, 1),
        ("rescaled", rescaled, PLUS, 1),
    ):
        parts[name] = measure(out, name, model, policies, args.videos, seeds, args.fvd_videos)
        store(args, COMMAND, digest, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
