"""Evaluates each option of quantized layers by itself, added to the paper's method.

    python tests/measure_options.py --out runs/options --videos 64

makes `docs/results/options.json` as `measure_policies.py` makes its own, whose rules hold here:
one run of one code, that goes on where it was interrupted.
"""

import sys
from collections.abc import Sequence

from measure_policies import (
    MODEL,
    OPTIONS,
    RESULTS,
    folder,
    make_parser,
    measure,
    parse,
    run_digest,
    store,
)

COMMAND = "python tests/measure_options.py --out runs/options"
# What a width leaves to gain: at 4 bits the rounding of weights, at 8 the ranges of inputs.
POLICIES = [
    f"{named}{option}"
    for named, options in (
        ("qvd-w4a8", OPTIONS),
        ("qvd-w8a8", ("token", "learned", "rotation")),
    )
    for option in ("", *(f"+{name}" for name in options))
]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_parser(__doc__, RESULTS.with_name("options.json"), videos=64), argv)
    out = folder(args.out, run_digest(__file__))
    found = measure(out, "options", MODEL, POLICIES, args.videos, 1, args.fvd_videos)
    store(args, COMMAND, {"options": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
