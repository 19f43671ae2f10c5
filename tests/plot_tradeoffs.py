"""Draws what policies are worth against what they cost, of figures that are there.

    python tests/plot_tradeoffs.py

makes `docs/tradeoff_bytes.png` and `docs/tradeoff_time.png` of `docs/results/low_bits.json`
(quality and bytes, as `measure_low_bits.py` found them) and of `unet_shapes_cpu.json` (a forward's
time, by `qvd_jax.benchmark unet`), all of the shapes model. Policies that were not timed are in the
picture of bytes alone.
"""

import functools
import json
import sys
from pathlib import Path

from qvd_jax.evaluation import plots

DOCS = Path(__file__).parent.parent / "docs"


def main() -> int:
    parts = json.loads((DOCS / "results/low_bits.json").read_text("utf-8"))["parts"]
    timed = json.loads((DOCS / "results/unet_shapes_cpu.json").read_text("utf-8"))["results"]
    found = {
        model["policy"]: (model["unet_bytes"] / 1e6, model["latent_sqnr"][-1])
        for name, part in parts.items()
        if name != "rescaled"
        for model in part["models"]
        if "latent_sqnr" in model
    }
    floating = next(one["median_s"] for one in timed if one["mode"] == "float")
    seconds = {one["mode"]: one["median_s"] / floating for one in timed}

    both = {
        policy: (seconds[policy], worth)
        for policy, (_, worth) in found.items()
        if policy in seconds
    }
    for name, points, cost in (
        ("bytes", found, "UNet, MB"),
        ("time", both, "time of a forward / float's"),
    ):
        draw = functools.partial(plots.plot_tradeoff, points=points, cost=cost)
        (DOCS / f"tradeoff_{name}.png").write_bytes(plots.render(draw, 1, "png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
