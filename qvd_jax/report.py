"""The results of an evaluation as a Markdown table and as one self-contained HTML page."""

import base64
import functools
import html as escape
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as imageio
import numpy as np

from qvd_jax import markdown
from qvd_jax.data.video_io import tile
from qvd_jax.quant import htdq
from qvd_jax.quant.solve import LayerReport, examples

Results = Mapping[str, Any]

PAGE = "report.html"
"""Name of the page; a folder that has one is one of results."""

_GIF_WIDTH = 1024

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, CanvasText 20%, Canvas);
  --quiet: color-mix(in srgb, CanvasText 70%, Canvas); }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
code, figcaption {{ overflow-wrap: anywhere; }}
.scroll {{ overflow: auto; max-height: 36rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ white-space: normal; vertical-align: bottom; position: sticky; top: 0; background: Canvas; }}
th:first-child, td:first-child {{ text-align: left; }}
th button {{ all: unset; cursor: pointer; }} th button:focus-visible {{ outline: auto; }}
th[aria-sort=ascending] button::after {{ content: "\\a0▴"; }}
th[aria-sort=descending] button::after {{ content: "\\a0▾"; }}
td small {{ display: block; }}
.grid {{ display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }}
figure {{ margin: 0; }} svg, img {{ width: 100%; max-width: 48rem; height: auto; }}
svg {{ background: #fff; border-radius: .25rem; }} img {{ image-rendering: pixelated; }}
ol {{ columns: 22rem; column-gap: 3rem; }}
figcaption, small, .note {{ color: var(--quiet); font-size: .85rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
<script>
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {{
  const body = th.closest("table").tBodies[0], column = th.cellIndex;
  const order = th.ariaSort === "descending" ? "ascending" : "descending";
  th.closest("tr").querySelectorAll("th").forEach(other => other.ariaSort = null);
  th.ariaSort = order;
  const value = row => row.cells[column].dataset.value;
  const text = row => row.cells[column].textContent;
  // What has no figure stays below all that have one.
  [...body.rows].sort((a, b) => {{
    if (!text(a) || !text(b)) return !text(a) - !text(b);
    const rising = value(a) && value(b) ? value(a) - value(b) : text(a).localeCompare(text(b));
    return order === "descending" ? -rising : rising; }}).forEach(row => body.append(row));
}}));
</script></body></html>
"""


def summary(results: Results) -> str:
    """The figures of all models as a Markdown table."""
    rows = [_row(entry) for entry in results["models"]]
    return f"{_conditions(results)}\n\n{markdown.table(rows)}\n"


def html(
    results: Results,
    layers: Mapping[str, Sequence[LayerReport]],
    videos: Mapping[str, np.ndarray],
    prompts: Sequence[str],
) -> str:
    """The figures, plots and videos of all models as one page.

    Args:
      results: of `qvd_jax.evaluate`.
      layers: of each model, what calibration wrote.
      videos: some videos of each model, uint8 `[N, F, H, W, 3]`.
      prompts: of these videos.
    """
    models = results["models"]
    shown_count = len(next(iter(videos.values())))
    parts = [
        f"<p class='note'>{escape.escape(_conditions(results))}<br>"
        f"<code>{escape.escape(results['command'])}</code></p>",
        _table([_row(entry) for entry in models]),
        "<h2>Videos</h2>",
        _grid(_figure(name, shown) for name, shown in videos.items()),
        "<p class='note'>Row by row:</p><ol class='note'>"
        + "".join(f"<li>{escape.escape(prompt)}</li>" for prompt in prompts[:shown_count])
        + "</ol>",
    ]
    candidates = [entry for entry in models if "latent_sqnr" in entry]
    detailed = {name: reports for name, reports in layers.items() if reports}
    plots = [_plot_steps(candidates)] if candidates else []
    plots += [_plot_layers(detailed)] if detailed else []
    if plots:
        parts += ["<h2>Signal to quantization noise</h2>", _grid(plots)]
    for name, reports in detailed.items():
        parts += [_layer_table(name, reports), *_examples(reports)]
    return _PAGE.format(title="qvd_jax: evaluation", body="\n".join(parts))


def write_calibration(folder: Path, policy: str, reports: Sequence[LayerReport]) -> None:
    """Writes what calibration found in each layer: report.html, ranges.png and steps.png.

    The pictures show the layer in which SCRI gained most coverage, and the one in which HTDQ gained
    most temporal discriminability; a policy that has none of these gets no picture.

    Args:
      folder: which is there.
      policy: its name.
      reports: of every quantized layer.
    """
    parts = [_plot_layers({policy: reports}), _layer_table(policy, reports, opened=True)]
    title = f"qvd_jax: calibration, {escape.escape(policy)}"
    page = _PAGE.format(title=title, body="\n".join([*parts, *_examples(reports)]))
    ranged, temporal = examples(reports)
    pictures = {}
    if ranged:
        draw = functools.partial(plot_ranges, report=ranged[0])
        pictures["ranges.png"] = _plot(draw, 2, "png")
    if temporal:
        draw = functools.partial(plot_steps_apart, report=temporal[0])
        pictures["steps.png"] = _plot(draw, 1, "png")
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _examples(reports: Sequence[LayerReport]) -> list[str]:
    """Plots of the layers in which most was gained."""
    ranged, temporal = examples(reports)
    parts = []
    if ranged:
        parts.append("<h3>Channel ranges before and after, where most was gained</h3>")
        parts.append(_grid(_svg(functools.partial(plot_ranges, report=r), 2) for r in ranged))
    if temporal:
        parts.append("<h3>Temporal features, their codes, and how far apart steps are</h3>")
        plots = [
            plot
            for report in temporal
            for plot in (
                _svg(functools.partial(plot_features, report=report), 3),
                _svg(functools.partial(plot_steps_apart, report=report)),
            )
        ]
        parts.append(_grid(plots))
    return parts


def plot_ranges(axes: Any, report: LayerReport) -> None:
    """Draws the channels' ranges, as they are and as the quantizer sees them, on two axes."""
    arrays = report.arrays
    order = np.argsort(arrays["upper"] - arrays["lower"])
    after = [(arrays[end] - arrays["shift"]) / arrays["factor"] for end in ("lower", "upper")]
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


def _conditions(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = "" if results["seeds"] == 1 else f"{results['seeds']} videos each, "
    return (
        f"{results['prompts']} prompts, {seeds}{results['steps']} steps of {results['scheduler']}, "
        f"guidance {results['guidance_scale']:g}, {results['backend']}; {versions}"
    )


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    """A model's line of the table; absent figures are left out."""
    row = {"model": entry["name"], "policy": entry["policy"]}
    row["UNet MB"] = f"{entry['unet_bytes'] / 1e6:.1f}"
    if entry["seconds_per_video"] is not None:
        row["s per video"] = f"{entry['seconds_per_video']:.2f}"
    for name, found in entry.get("accuracy", {}).items():
        low, high = found["interval"]
        row[name] = f"{found['value']:.1%} ({low:.1%} to {high:.1%})"
    if "accuracy_change" in entry:
        change = entry["accuracy_change"]
        value, low, high = (100 * part for part in (change["value"], *change["interval"]))
        row["change of all four"] = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    if "frechet" in entry:
        row["Fréchet"] = f"{entry['frechet']:.1f}"
        row["Fréchet of rendered"] = f"{entry['frechet_real']:.1f}"
    if "frechet_ratio" in entry:
        low, high = entry["frechet_ratio"]["interval"]
        row["Fréchet / reference's"] = (
            f"{entry['frechet_ratio']['value']:.3f} ({low:.3f} to {high:.3f})"
        )
    for name, title, digits in (
        ("psnr", "PSNR dB", 1),
        ("ssim", "SSIM", 3),
        ("flicker", "flicker", 2),
        ("flicker_real", "flicker of rendered", 2),
    ):
        if name in entry:
            row[title] = f"{entry[name]:.{digits}f}"
    if "latent_sqnr" in entry:
        row["last latents SQNR dB"] = f"{entry['latent_sqnr'][-1]:.1f}"
    return row


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th><button>{escape.escape(name)}</button></th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name, "")) for name in columns) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _cell(text: str) -> str:
    """A figure, maybe with its interval, or words."""
    figure, _, interval = text.partition(" ")
    try:
        value = float(figure.rstrip("%"))
    except ValueError:
        return f"<td>{escape.escape(text)}</td>"
    below = f" <small>{escape.escape(interval)}</small>" if interval else ""
    return f"<td data-value='{value}'>{escape.escape(figure)}{below}</td>"


def _grid(parts: Iterable[str]) -> str:
    """Parts beside each other, as many as the page is wide."""
    return f"<div class='grid'>{''.join(parts)}</div>"


def _layer_table(model: str, reports: Sequence[LayerReport], opened: bool = False) -> str:
    rows = [
        {
            name.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in report.figures().items()
            if value is not None
        }
        for report in reports
    ]
    title = escape.escape(f"{model}: {len(rows)} quantized layers")
    state = " open" if opened else ""
    return f"<details{state}><summary>{title}</summary>{_table(rows)}</details>"


def _figure(name: str, videos: np.ndarray) -> str:
    shown = tile(videos)
    # Large videos would make a page that no browser likes.
    factor = -(-shown.shape[2] // _GIF_WIDTH)
    frames, height, width = len(shown), shown.shape[1] // factor, shown.shape[2] // factor
    blocks = shown[:, : height * factor, : width * factor].reshape(
        frames, height, factor, width, factor, 3
    )
    shown = blocks.mean((2, 4)).astype(np.uint8)
    data = imageio.imwrite(
        "<bytes>", shown, plugin="pillow", extension=".gif", duration=125, loop=0
    )
    encoded = base64.b64encode(data).decode()
    caption = escape.escape(name)
    return (
        f"<figure><img alt='videos of {caption}' src='data:image/gif;base64,{encoded}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _plot_steps(entries: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        for entry in entries:
            values = entry["latent_sqnr"]
            axes.plot(range(1, len(values) + 1), values, label=entry["name"])
        axes.set(xlabel="step", ylabel="SQNR of the latents, dB")
        axes.legend()

    return _svg(draw)


def _plot_layers(layers: Mapping[str, Sequence[LayerReport]]) -> str:
    def draw(axes: Any) -> None:
        for model, reports in layers.items():
            axes.plot(sorted(min(report.sqnr, 100) for report in reports), label=model)
        axes.set(xlabel="layers, worst first", ylabel="SQNR of the output, dB")
        axes.legend()

    return _svg(draw)


def _svg(draw: Any, columns: int = 1) -> str:
    """A plot, or several side by side, as inline SVG."""
    text = _plot(draw, columns, "svg").decode()
    return text[text.index("<svg") :]


def _plot(draw: Any, columns: int, format: Literal["svg", "png"]) -> bytes:
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
