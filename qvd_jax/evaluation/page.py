"""Results as one self-contained HTML page, and the folder it stands in."""

import base64
import functools
import importlib.resources
import io
import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from qvd_jax.data import video_io
from qvd_jax.evaluation import plots
from qvd_jax.evaluation.cases import Figures
from qvd_jax.evaluation.pairs import Comparison
from qvd_jax.evaluation.tables import DIFFERENCES, OWN, Metric, conditions, measured, summary
from qvd_jax.files import write_folder
from qvd_jax.quant.solve import LayerReport, examples

PAGE = "report.html"
"""Name of the page; a folder that has one is one of results."""

_SHOWN_VIDEOS = 12
_CLIP_SIDE = 256
_CLIP_MILLISECONDS = 125
# Of the line between two videos: pixels and brightness.
_LINE, _GRAY = 2, 128


def write_comparison(
    comparison: Comparison, folder: Path, *, overwrite: bool = False, command: str = ""
) -> str:
    """Writes results.json, results.md, report.html and a sheet of frames of each model.

    Args:
      comparison: of `pairs.compare`.
      folder: to make.
      overwrite: whether earlier results are replaced.
      command: what made them, for those who want to make them again.

    Returns:
      What results.md says.

    Raises:
      InputError: the folder could not be written; one that was there stays.
    """
    results = {"command": command, **comparison.results}
    results["table"] = summary(results)
    shown = {name: videos[:_SHOWN_VIDEOS] for name, videos in comparison.videos.items()}
    texts = {
        PAGE: comparison_page(results, comparison.layers, shown, comparison.titles),
        "results.md": results["table"],
        "results.json": json.dumps(results, indent=1) + "\n",
    }
    with write_folder(folder, PAGE, overwrite=overwrite) as partial:
        for name, videos in shown.items():
            video_io.write_contact_sheet(partial / f"{file_name(name)}.png", videos)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
    return results["table"]


def file_name(model: str) -> str:
    """A name for the files about a model, as unique as its own."""
    return "-".join(part for part in Path(model).parts if part not in ("/", ".", ".."))


def comparison_page(
    results: Figures,
    layers: Mapping[str, Sequence[LayerReport]],
    videos: Mapping[str, np.ndarray],
    titles: Sequence[str],
) -> str:
    """The differences, the videos, the figures and the plots of all models.

    Args:
      results: of `pairs.compare`.
      layers: of each model, what calibration wrote.
      videos: some videos of each model, uint8 `[N, F, H, W, 3]`.
      titles: of these videos.
    """
    reference, *candidates = results["models"]
    said = [*map(escape, conditions(results).split("\n\n"))]
    said += [f"<code>{escape(results['command'])}</code>"] if results["command"] else []
    parts = [f"<p class='note'>{one}</p>" for one in said]
    if candidates:
        parts += [
            f"<h2>Differences from {escape(reference['name'])}</h2>",
            _figures_table(results, DIFFERENCES, candidates),
        ]
    parts += [
        "<h2>Videos</h2>",
        f"<p class='note'>From the left: {escape(', '.join(videos))}.</p>"
        if videos
        else "<p class='note'>They are of several sizes and not shown.</p>",
        _clips([*videos.values()], titles),
        "<h2>Each model by itself</h2>",
        _figures_table(results, OWN, results["models"]),
    ]
    detailed = {name: reports for name, reports in layers.items() if reports}
    sampled = [model for model in candidates if "latent_sqnr" in model]
    drawn = [functools.partial(plots.plot_latents, entries=sampled)] if sampled else []
    drawn += [functools.partial(plots.plot_layers, layers=detailed)] if detailed else []
    if drawn:
        parts += ["<h2>Signal to quantization noise</h2>", _grid(map(plots.svg, drawn))]
    parts += _tradeoffs(sampled)
    for name, reports in detailed.items():
        parts += [_layer_table(name, reports), *_examples(reports)]
    return _page("qvd_jax: evaluation", parts)


def _tradeoffs(models: Sequence[Figures]) -> list[str]:
    """Quality against bytes and time, where there are several models to choose from."""
    if len(models) < 2:
        return []

    drawn = []
    for name, cost, factor in (
        ("unet_bytes", "UNet, MB", 1e-6),
        ("seconds_per_video", "s per video", 1),
    ):
        points = {
            str(model["name"]): (factor * model[name], model["latent_sqnr"][-1])
            for model in models
            if model[name] is not None
        }
        if points:
            drawn.append(functools.partial(plots.plot_tradeoff, points=points, cost=cost))
    note = "Filled: no other model is as good at as little. Seconds are of this machine."
    return [
        "<h2>What quality costs</h2>",
        f"<p class='note'>{note}</p>",
        _grid(map(plots.svg, drawn)),
    ]


def write_calibration(folder: Path, policy: str, reports: Sequence[LayerReport]) -> None:
    """Writes what calibration found in each layer: report.html, ranges.png and steps.png.

    The pictures show the layer in which SCRI gained most coverage, and the one in which HTDQ gained
    most temporal discriminability; a policy that has none of these gets no picture.

    Args:
      folder: which is there.
      policy: its name.
      reports: of every quantized layer.
    """
    layers = functools.partial(plots.plot_layers, layers={policy: reports})
    parts = [plots.svg(layers), _layer_table(policy, reports, opened=True), *_examples(reports)]
    ranged, temporal = examples(reports)
    pictures = {}
    if ranged:
        draw = functools.partial(plots.plot_ranges, report=ranged[0])
        pictures["ranges.png"] = plots.render(draw, 2, "png")
    if temporal:
        draw = functools.partial(plots.plot_steps_apart, report=temporal[0])
        pictures["steps.png"] = plots.render(draw, 1, "png")
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    page = _page(f"qvd_jax: calibration, {policy}", parts)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _page(title: str, parts: Iterable[str]) -> str:
    place = importlib.resources.files("qvd_jax.evaluation") / "page.html"
    template = string.Template(place.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(parts))


def _figures_table(results: Figures, metrics: Sequence[Metric], models: Sequence[Figures]) -> str:
    """A line for each metric, with what it says, and a column for each model."""
    counts = {name: results[name] for name in ("prompts", "inputs")}
    counts["videos"] = results["prompts"] * results["seeds"]
    policy = "<small>policy</small>" if any("policy" in model for model in models) else ""
    head = "".join(
        f"<th>{_path(model['name'])}<small>{escape(model.get('policy', ''))}</small></th>"
        for model in models
    )
    body = "".join(
        f"<tr><th>{escape(metric.title)}<small>{escape(metric.meaning.format(**counts))}</small>"
        f"</th>{''.join(_cell(metric.cell(model)) for model in models)}</tr>"
        for metric in measured(metrics, models)
    )
    table = f"<table class='figures'><thead><tr><th>{policy}</th>{head}</tr></thead>"
    return f"<div class='scroll'>{table}<tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    """A figure, maybe with its interval, or words."""
    figure, _, interval = text.partition(" ")
    try:
        value = float(figure.rstrip("%"))
    except ValueError:
        return f"<td>{_path(text)}</td>"
    below = f" <small>{escape(interval)}</small>" if interval else ""
    return f"<td data-value='{value}'>{escape(figure)}{below}</td>"


def _path(text: str) -> str:
    """A path, which breaks where it has parts."""
    return escape(text).replace("/", "/<wbr>")


def _grid(parts: Iterable[str]) -> str:
    """Parts beside each other, as many as the page is wide."""
    return f"<div class='grid'>{''.join(parts)}</div>"


def _layer_table(model: str, reports: Sequence[LayerReport], opened: bool = False) -> str:
    """The layers, those of the least SQNR first; other columns can be sorted by."""
    worst_first = sorted(reports, key=lambda report: report.sqnr)
    columns = [
        name
        for name in worst_first[0].figures()
        if any(report.figures()[name] is not None for report in reports)
    ]
    head = "".join(
        f"<th{' aria-sort=ascending' if name == 'sqnr' else ''}>"
        f"<button>{escape(name.replace('_', ' '))}</button></th>"
        for name in columns
    )
    body = "".join(
        f"<tr>{''.join(_cell(_written(report.figures()[name])) for name in columns)}</tr>"
        for report in worst_first
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    title = escape(f"{model}: {len(reports)} quantized layers, worst first")
    return (
        f"<details{' open' if opened else ''}><summary>{title}</summary>"
        f"<div class='scroll'>{table}</div></details>"
    )


def _written(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _examples(reports: Sequence[LayerReport]) -> list[str]:
    """Plots of the layers in which most was gained."""
    ranged, temporal = examples(reports)
    parts = []
    if ranged:
        parts.append("<h3>Channel ranges before and after, where most was gained</h3>")
        draw = [functools.partial(plots.plot_ranges, report=report) for report in ranged]
        parts.append(_grid(plots.svg(one, 2) for one in draw))
    if temporal:
        parts.append("<h3>Temporal features, their codes, and how far apart steps are</h3>")
        drawn = [
            plot
            for report in temporal
            for plot in (
                plots.svg(functools.partial(plots.plot_features, report=report), 3),
                plots.svg(functools.partial(plots.plot_steps_apart, report=report)),
            )
        ]
        parts.append(_grid(drawn))
    return parts


def _clips(videos: Sequence[np.ndarray], titles: Sequence[str]) -> str:
    """A clip for each case, in which all models' videos run side by side and so in step.

    Args:
      videos: of each model, uint8 `[N, F, H, W, 3]`.
      titles: of the cases; more videos are of further seeds.
    """
    figures = []
    for number, of_case in enumerate(zip(*videos, strict=True)):
        title = escape(titles[number % len(titles)])
        first, *others = map(_resized, of_case)
        line = np.full_like(first[:, :, :_LINE], _GRAY)
        between = [part for video in others for part in (line, video)]
        data = base64.b64encode(_animated(np.concatenate([first, *between], axis=2))).decode()
        figures.append(
            f"<figure><img alt='videos of {title}' src='data:image/webp;base64,{data}'>"
            f"<figcaption>{title}</figcaption></figure>"
        )
    # So wide that each video of a clip has its share.
    return (
        f"<div class='grid clips' style='--clip: {8.5 * len(videos)}rem'>{''.join(figures)}</div>"
    )


def _resized(video: np.ndarray) -> np.ndarray:
    """A video whose longer side has about `_CLIP_SIDE` pixels, by whole factors.

    Large ones would make a page that no browser likes; in small ones the encoder would spare color.
    """
    _, height, width, _ = video.shape
    longer = max(height, width)
    larger, smaller = max(1, _CLIP_SIDE // longer), math.ceil(longer / _CLIP_SIDE)
    kept = video[:, : height // smaller * smaller, : width // smaller * smaller]
    blocks = kept.reshape(len(kept), height // smaller, smaller, width // smaller, smaller, 3)
    return blocks.mean((2, 4)).astype(np.uint8).repeat(larger, 1).repeat(larger, 2)


def _animated(video: np.ndarray) -> bytes:
    """A video uint8 `[F, H, W, 3]` as an endless animated WebP."""
    first, *rest = map(Image.fromarray, video)
    file = io.BytesIO()
    first.save(
        file,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=_CLIP_MILLISECONDS,
        loop=0,
        quality=90,
    )
    return file.getvalue()
