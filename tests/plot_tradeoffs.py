"""Draws what policies keep of the latents against the bytes they take, of figures that are there.

    python tests/plot_tradeoffs.py

makes `docs/tradeoff_bytes.png` of `docs/results/low_bits.json`, which `measure_low_bits.py` made.
"""

import functools
import json
import sys
from pathlib import Path

from qvd_jax.evaluation import plots

DOCS = Path(__file__).parent.parent / "docs"


def main() -> int:
    parts = json.loads((DOCS / "results/low_bits.json").read_text("utf-8"))["parts"]
    points = {
        model["policy"]: (model["unet_bytes"] / 1e6, model["latent_sqnr"][-1])
        for name, part in parts.items()
        if name != "rescaled"
        for model in part["models"]
        if "latent_sqnr" in model
    }
    draw = functools.partial(plots.plot_tradeoff, points=points, cost="UNet, MB")
    (DOCS / "tradeoff_bytes.png").write_bytes(plots.render(draw, 1, "png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
