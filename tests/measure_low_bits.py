"""Evaluates the policies of -plus, whose methods differ in the ranges of inputs alone, at few bits.

    python tests/measure_low_bits.py --out runs/low_bits --videos 128

makes `docs/results/low_bits.json` as `measure_policies.py` makes its own, whose rules hold here:
a part is of one run of one code, that goes on where it was interrupted. Every method has the same
rounding by GPTQ, clipping of weights and ranges of tokens; QVD without them stands beside, and so
do bits chosen layer by layer. QVD has three seeds for each prompt at the widths that are compared
with float, and one beside the other methods, as they have. It takes hours, and writes its file once
more after each part; `--parts` measures some anew and leaves the others, which say of which run
they are.
"""

import json
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
# QVD once more, so that every row of this part is of one run.
METHODS = [
    *PLUS,
    "qvd-w4a8",
    *(f"qdiffusion-plus-{width}" for width in WIDTHS),
    "smoothquant-plus-w4a8",
    "mse-plus-w4a8",
    "minmax-plus-w4a8",
]
FEWER = [
    f"{of}-plus-{width}"
    for width in ("w4a6", "w4a4", "w3a8")
    for of in ("qvd", "qdiffusion", "smoothquant", "mse", "minmax")
]
# The first is what W4A8 holds of the float32 UNet's bytes.
BUDGETS = [f"qvd-plus-w8a8-budget-{share}" for share in (0.1443, 0.17)]

PARTS = {
    "main": (PLUS, 3),
    "methods": (METHODS, 1),
    "fewer": (FEWER, 1),
    "budgets": (BUDGETS, 1),
    "rescaled": (PLUS, 1),
}
"""Policies, and videos for each prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, LOW_BITS, videos=128)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parse(parser, argv)
    out = folder(args.out, run_digest(__file__))
    rescaled = str(rescaled_model(out))
    parts = {}
    if args.results.exists():
        parts = json.loads(args.results.read_text("utf-8"))["parts"]
    for name in args.parts:
        policies, seeds = PARTS[name]
        model = rescaled if name == "rescaled" else MODEL
        parts[name] = measure(out, name, model, policies, args.videos, seeds, args.fvd_videos)
        store(args, COMMAND, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
