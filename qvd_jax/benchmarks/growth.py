"""How the cost of sampling grows with frames, size and the number of videos."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tqdm

from qvd_jax import markdown
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.benchmarks.sampling import SampleCase, measure_cost

FRAMES = (8, 16, 32, 64)
SIDES = (1, 2, 4)
VIDEOS = (1, 2, 4)


def cases(base: SampleCase) -> list[tuple[str, int, SampleCase]]:
    """What grows, how large it is, and the case; all else is as in `base`.

    Args:
      base: of the smallest size; of one video.
    """
    sides = (replace(base, height=n * base.height, width=n * base.width) for n in SIDES)
    return [
        *(("frames", n, replace(base, frames=n)) for n in FRAMES),
        *(("pixels", case.height * case.width, case) for case in sides),
        *(("videos", n, replace(base, videos=n)) for n in VIDEOS),
    ]


def measure_costs(base: SampleCase, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Seconds and peak bytes of every case, each in a process of its own.

    A case that is of several curves is measured once.
    """
    # In the order of the cases, each once.
    distinct = dict.fromkeys((variant, case) for variant in variants for *_, case in cases(base))
    costs = {
        (variant, case): measure_cost(case, variant)
        for variant, case in tqdm.tqdm(distinct, desc="growth", unit="process")
    }
    return [
        {
            "checkpoint": variant.mode,
            "dtype": variant.dtype,
            "grows": grows,
            "value": value,
            **costs[variant, case],
        }
        for variant in variants
        for grows, value, case in cases(base)
    ]


def costs_table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    return markdown.table(
        [
            {
                "checkpoint": r["checkpoint"],
                "dtype": r["dtype"],
                "what grows": r["grows"],
                "to": str(r["value"]),
                "s": f"{r['seconds']:.2f}",
                "GB": f"{r['peak_bytes'] / 1e9:.2f}",
            }
            for r in results
        ]
    )


def plot(results: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the results: seconds above, memory below."""
    # A figure of its own: pyplot would choose a backend for the whole process.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["grows"] for r in results))
    variants = list(dict.fromkeys((r["checkpoint"], r["dtype"]) for r in results))
    figure = Figure(figsize=(4 * len(names), 6), layout="constrained", dpi=120)
    axes = figure.subplots(2, len(names), sharex="col", sharey="row", squeeze=False)
    for column, name in enumerate(names):
        of_name = [r for r in results if r["grows"] == name]
        for variant in variants:
            points = [r for r in of_name if (r["checkpoint"], r["dtype"]) == variant]
            values = [r["value"] for r in points]
            label = " ".join(variant)
            axes[0, column].plot(values, [r["seconds"] for r in points], "o-", label=label)
            axes[1, column].plot(values, [r["peak_bytes"] / 1e9 for r in points], "o-")
        axes[1, column].set_xlabel(name)
        axes[1, column].set_xticks(sorted({r["value"] for r in of_name}))
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GB")
    axes[0, 0].legend()
    for one in axes.flat:
        one.set_ylim(bottom=0)
        one.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
