"""Draws what policies keep of the latents against the bytes and the time they take.

    python tests/plot_tradeoffs.py

makes `docs/tradeoff_bytes.png` and `docs/tradeoff_seconds.png` of `docs/results/low_bits.json`,
which `measure_low_bits.py` made, and `unet_policies_cpu.json`, which `benchmark unet` made.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from qvd_jax.evaluation import plots

DOCS = Path(__file__).parent.parent / "docs"


def main() -> int:
    parts = read("low_bits")["parts"]
    models = [
        model
        for name, part in parts.items()
        if name != "rescaled"
        for model in part["models"]
        # Of fewest bits QVD alone, for so many names would not lie beside their points.
        if "latent_sqnr" in model and (name != "fewer" or model["policy"].startswith("qvd"))
    ]
    kept = {model["policy"]: model["latent_sqnr"][-1] for model in models}
    megabytes = {model["policy"]: model["unet_bytes"] / 1e6 for model in models}
    # A budget's policy is the file that its calibration wrote.
    seconds = {
        timed["mode"].removesuffix(".yaml"): timed["median_s"]
        for timed in read("unet_policies_cpu")["results"]
    }
    for name, costs, title in (
        ("bytes", megabytes, "UNet, MB"),
        ("seconds", seconds, "one forward of the UNet, s"),
    ):
        points = {policy: (costs[policy], kept[policy]) for policy in kept if policy in costs}
        draw = functools.partial(plots.plot_tradeoff, points=points, cost=title)
        (DOCS / f"tradeoff_{name}.png").write_bytes(plots.render(draw, 1, "png"))
    return 0


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((DOCS / f"results/{name}.json").read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
