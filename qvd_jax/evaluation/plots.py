"""Plots of what quantization does: to latents, to layers, to channels and temporal features."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from qvd_jax.quant import htdq
from qvd_jax.quant.scri import ActivationQuantizer
from qvd_jax.quant.solve import LayerReport

_LINES = 22
"""Of small text that a plot is high."""


def plot_ranges(axes: Any, report: LayerReport) -> None:
    """Draws the channels' ranges, as they are and as the quantizer sees them, on two axes."""
    arrays = report.arrays
    order = np.argsort(arrays["upper"] - arrays["lower"])
    shift, factor, ends = map(
        jnp.asarray, (arrays["shift"], arrays["factor"], [arrays["lower"], arrays["upper"]])
    )
    after = np.asarray(ActivationQuantizer(shift, factor, jnp.ones(())).steps(ends, np.inf))
    place = np.arange(len(order))
    for one, (lower, upper), title in (
        (axes[0], (arrays["lower"], arrays["upper"]), "before"),
        (axes[1], after, "after"),
    ):
        one.fill_between(place, lower[order], upper[order], step="mid", linewidth=0)
        one.set(xlabel="channel", ylabel="range", title=title)
    axes[0].figure.suptitle(
        f"{report.path}\n{report.coverage_before:.0%} of the levels used, "
        f"then {report.coverage_after:.0%}",
        fontsize="medium",
    )


def plot_features(axes: Any, report: LayerReport) -> None:
    """Draws temporal features and their codes, steps by channels, on three axes."""
    arrays = report.arrays
    order = np.argsort(arrays["features"].mean(0))
    for one, name, title in (
        (axes[0], "features", "float"),
        (axes[1], "uniform", f"uniform codes,\n{report.merged_before:.0%} of steps merged"),
        (axes[2], "codes", f"{report.method} codes,\n{report.merged_after:.0%} of steps merged"),
    ):
        one.imshow(arrays[name][:, order], aspect="auto", interpolation="nearest")
        one.set(xlabel="channel")
        one.set_title(title, fontsize="small")
    axes[0].set_ylabel("step")
    axes[0].figure.suptitle(report.path, fontsize="medium")


def plot_steps_apart(axes: Any, report: LayerReport) -> None:
    """Draws d^ / d of each pair of steps, whose mean distance from 1 is what the TDScore lacks."""
    arrays = report.arrays
    features = arrays["features"]
    true = htdq.distances(features)
    apart = true > 0
    for codes, title, score in (
        (arrays["uniform"], "uniform", report.td_score_before),
        (arrays["codes"], report.method, report.td_score_after),
    ):
        codes = codes.astype(np.float64)
        # The step of the codes is what fits them to the features best.
        centered = codes - codes.mean()
        step = (centered * (features - features.mean())).sum() / (centered**2).sum()
        ratio = (step * htdq.distances(codes))[apart] / true[apart]
        axes.plot(true[apart], ratio, "o", markersize=3, label=f"{title}, TDScore {score:.4f}")
    axes.axhline(1, color="k", linestyle="--", linewidth=0.8, label="float")
    axes.set(
        xlabel="distance of two steps, d",
        ylabel="after quantization, d^ / d",
        title=report.path,
    )
    axes.legend()


def plot_latents(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draws the SQNR of the latents after each step, model by model."""
    for entry in entries:
        values = entry["latent_sqnr"]
        axes.plot(range(1, len(values) + 1), values, label=entry["name"])
    axes.set(xlabel="step", ylabel="SQNR of the latents, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which points no other one beats: none costs as little or less and is worth as much or more.

    Args:
      costs: of each point, less is better.
      values: of each point, more is better.
    """
    points = list(zip(costs, values, strict=True))
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )
        for point in points
    ]


def plot_tradeoff(axes: Any, points: Mapping[str, tuple[float, float]], cost: str) -> None:
    """Draws what models are worth against what they cost; those that no other beats are filled.

    Args:
      axes: to draw on.
      points: cost and SQNR of the last latents, in decibels, of each model by its name.
      cost: what it is, for the axis.
    """
    costs, values = zip(*points.values(), strict=True)
    unbeaten = pareto(costs, values)
    front = sorted(point for point, best in zip(points.values(), unbeaten, strict=True) if best)
    axes.plot(*zip(*front, strict=True), color="C0", linewidth=0.8)
    by_value = sorted(zip(points.items(), unbeaten, strict=True), key=lambda item: -item[0][1][1])
    apart, line = (max(costs) - min(costs)) / 4, (max(values) - min(values)) / _LINES
    labels: list[tuple[float, float]] = []
    for (name, (spent, value)), best in by_value:
        axes.plot(spent, value, "o", color="C0", fillstyle="full" if best else "none")
        beside = [height for place, height in labels if abs(place - spent) <= apart]
        labels.append((spent, min([value, *(height - line for height in beside)])))
        axes.annotate(
            name,
            labels[-1],
            (6, 0),
            textcoords="offset points",
            fontsize="x-small",
            verticalalignment="center",
        )
    axes.margins(x=0.2)
    axes.set(xlabel=cost, ylabel="SQNR of the last latents, dB")


def plot_layers(axes: Any, layers: Mapping[str, Sequence[LayerReport]]) -> None:
    """Draws the SQNR of the layers' outputs, model by model."""
    for model, reports in layers.items():
        axes.plot(sorted(min(report.sqnr, 100) for report in reports), label=model)
    axes.set(xlabel="layers, worst first", ylabel="SQNR of the output, dB")
    axes.legend()


def svg(draw: Callable[[Any], None], columns: int = 1) -> str:
    """A plot, or several side by side, as inline SVG."""
    text = render(draw, columns, "svg").decode()
    return text[text.index("<svg") :]


def render(draw: Callable[[Any], None], columns: int, format: Literal["svg", "png"]) -> bytes:
    """A plot as a picture.

    Args:
      draw: is given the axes, or an array of them.
      columns: how many axes.
      format: of the picture.
    """
    # Figures of their own: pyplot would keep them, and choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained", dpi=120)
    axes = figure.subplots(1, columns)
    draw(axes)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format)
    return buffer.getvalue()
