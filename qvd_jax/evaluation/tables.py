"""The figures as tables, and what each of them says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvd_jax import markdown
from qvd_jax.evaluation.cases import Figures


@dataclass(frozen=True)
class Metric:
    """A figure of a model.

    Attributes:
      title: short.
      meaning: what is good, and what it depends on; `{videos}` and `{prompts}` are how
        many, `{inputs}` is what was given: prompts, images, or videos.
      cell: how it is written, with its interval in brackets; "" where a model has none.
    """

    title: str
    meaning: str
    cell: Callable[[Figures], str]


def _number(name: str, form: str, factor: float = 1.0) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        value = figures.get(name)
        return "" if value is None else format(factor * value, form)

    return cell


def _mean(name: str, form: str) -> Callable[[Figures], str]:
    """A mean over videos without its interval."""

    def cell(figures: Figures) -> str:
        return format(figures[name]["value"], form) if name in figures else ""

    return cell


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return format(value, form)
    low, high = (format(end, form) for end in interval)
    return f"{value:{form}} ({low} to {high})"


def _estimated(name: str, form: str, factor: float = 1.0) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        if name not in figures:
            return ""
        interval = figures[name]["interval"]
        scaled = None if interval is None else [factor * end for end in interval]
        return _with_interval(factor * figures[name]["value"], scaled, form)

    return cell


def _unbiased(name: str) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        found = figures.get(name)
        if found is None or found["unbiased"] is None:
            return ""
        return _with_interval(found["unbiased"], found["unbiased_interval"], ".1f")

    return cell


def _accuracy(name: str) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        found = figures.get("accuracy", {}).get(name)
        return "" if found is None else _with_interval(found["value"], found["interval"], ".1%")

    return cell


def _last_sqnr(figures: Figures) -> str:
    if "latent_sqnr" not in figures:
        return ""
    return _with_interval(figures["latent_sqnr"][-1], figures["latent_sqnr_interval"], ".1f")


_FVD_TITLES = {"fvd_reference": "FVD to the reference's", "fvd": "FVD"}

DIFFERENCES = (
    Metric(
        _FVD_TITLES["fvd_reference"],
        "Distance to the reference's own videos of the same prompts and seeds: lower is better, 0 "
        "is the same distribution. It compares at one protocol and number of videos alone, here "
        "{videos}.",
        _estimated("fvd_reference", ".1f"),
    ),
    Metric(
        "LPIPS",
        "How far frames are from the reference's in the features of a network: lower is better, 0 "
        "where they are equal. A mean over {videos} videos.",
        _estimated("lpips", ".4f"),
    ),
    Metric(
        "PSNR dB",
        "How near the pixels are to the reference's from the same noise: higher is better, 100 "
        "stands for equal videos. A mean over {videos} videos, for this scheduler and number of "
        "steps alone.",
        _mean("psnr", ".1f"),
    ),
    Metric(
        "SSIM",
        "How alike the structure is, 1 where videos are equal: higher is better. A mean over "
        "{videos} videos, nearer to 1 the plainer their backgrounds.",
        _mean("ssim", ".3f"),
    ),
    Metric(
        "last latents SQNR dB",
        "Power of the reference's latents over that of their error, after the last step: higher is "
        "better, 10 dB more is a tenth of the error's power. Over {videos} videos, for this "
        "scheduler and number of steps alone.",
        _last_sqnr,
    ),
    Metric(
        "median latents SQNR dB",
        "The same of the video in the middle of {videos}: higher is better. It lies above that of "
        "all together where a few, whose sampling went another way, have most of the error.",
        _number("latent_sqnr_median", ".1f"),
    ),
    Metric(
        "change of all four",
        "Points of accuracy more than the reference's from the same noise: 0 is as good, and an "
        "interval (95%) around 0 says that no change was seen. It narrows with the root of the "
        "number of {inputs}, here {prompts}.",
        _estimated("accuracy_change", "+.1f", 100),
    ),
    Metric(
        "Fréchet / reference's",
        "Distance to rendered videos as a multiple of the reference's: 1 is as near, less is "
        "nearer. Both grow as videos get fewer, so it compares at one number alone, here {videos}.",
        _estimated("frechet_ratio", ".3f"),
    ),
)
"""What tells a model from the reference, which has none of them."""

OWN = (
    Metric(
        "UNet MB",
        "Of its parameters in memory, in millions of bytes: it depends on the policy alone.",
        _number("unet_bytes", ".1f", 1e-6),
    ),
    Metric(
        "s per video",
        "Sampling without decoding, the median of the batches after those that compile: less is "
        "better. Of this machine, this size and number of steps.",
        _number("seconds_per_video", ".2f"),
    ),
    *(
        Metric(
            name,
            f"Share of the videos that show {what}: higher is better. The interval (95%) narrows "
            "with the root of the number of {inputs}, here {prompts}.",
            _accuracy(name),
        )
        for name, what in (
            ("color", "the color asked for"),
            ("shape", "the shape asked for"),
            ("motion", "the motion asked for"),
            ("background", "the background asked for"),
            ("all four", "all of these"),
        )
    ),
    Metric(
        _FVD_TITLES["fvd"],
        "Distance to real videos in the features of I3D: lower is better. It falls as videos grow "
        "in number, and compares at one protocol and number alone, here {videos}.",
        _estimated("fvd", ".1f"),
    ),
    Metric(
        "FVD without bias",
        "What it tends to as videos grow in number, estimated from parts of the {videos}; rough "
        "for fewer than a thousand.",
        _unbiased("fvd"),
    ),
    Metric(
        "FVD of real",
        "Of one half of the real videos to the other: what a perfect model would have at their "
        "number, if that is near the {videos} of each model.",
        _estimated("fvd_floor_real", ".1f"),
    ),
    Metric(
        "FVD of other seeds",
        "Of the reference's {videos} videos to as many of its own from other seeds: below it no "
        "difference from the reference is seen.",
        _estimated("fvd_floor_reference", ".1f"),
    ),
    Metric(
        "Fréchet",
        "Distance to rendered videos in a classifier's features: lower is better. It grows as "
        "videos get fewer, so it compares at one number alone, here {videos}.",
        _number("frechet", ".1f"),
    ),
    Metric(
        "Fréchet of rendered",
        "The same of rendered videos themselves: what a perfect model would have at {videos} "
        "videos.",
        _number("frechet_real", ".1f"),
    ),
    Metric(
        "flicker",
        "Mean second difference over time, of 0 to 255: as much as the reference's is good, for "
        "motion has some too. A mean over {videos} videos.",
        _mean("flicker", ".2f"),
    ),
    Metric(
        "flicker of rendered",
        "The same of {videos} rendered videos.",
        _number("flicker_real", ".2f"),
    ),
    Metric(
        "motion magnitude",
        "Mean change from frame to frame, of 0 to 255: as much as the reference's is good. A mean "
        "over {videos} videos.",
        _mean("motion", ".2f"),
    ),
    Metric(
        "CLIP score",
        "How near frames are to their prompts in CLIP's space, 100 times the cosine: higher is "
        "better. A mean over {videos} videos.",
        _estimated("clip_score", ".2f"),
    ),
    Metric(
        "frame consistency",
        "How near frames are to the next ones in CLIP's space, 100 times the cosine: higher is "
        "steadier, and a still has 100. A mean over {videos} videos.",
        _estimated("frame_consistency", ".2f"),
    ),
)
"""What a model has by itself."""


def measured(metrics: Sequence[Metric], models: Sequence[Figures]) -> list[Metric]:
    """Those metrics that some model has."""
    return [metric for metric in metrics if any(map(metric.cell, models))]


def summary(results: Figures) -> str:
    """The figures of all models as a Markdown table, the differences first."""
    models = results["models"]
    metrics = measured((*DIFFERENCES, *OWN), models)
    rows = [
        {"model": model["name"]}
        | ({"policy": model["policy"]} if "policy" in model else {})
        | {metric.title: metric.cell(model) for metric in metrics}
        for model in models
    ]
    return f"{conditions(results)}\n\n{markdown.table(rows)}\n"


def conditions(results: Figures) -> str:
    """What all figures depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = "" if results["seeds"] == 1 else f"{results['seeds']} videos each, "
    if "steps" in results:
        made = (
            f"{results['prompts']} {results['inputs']}, {seeds}{results['frames']} frames of "
            f"{results['height']}x{results['width']}, {results['steps']} steps of "
            f"{results['scheduler']}, guidance {results['guidance_scale']:g}"
        )
    else:
        made = f"{results['prompts']} videos made elsewhere"
    made = f"{made}, {results['backend']}; {versions}"
    cells = (metric.cell(model) for metric in (*DIFFERENCES, *OWN) for model in results["models"])
    intervals = ["In brackets: intervals of 95%"] if any("(" in cell for cell in cells) else []
    return "\n\n".join([made, *distances(results), *intervals, *results["notes"]])


def distances(results: Figures) -> list[str]:
    """What another FVD must share with those of the results to be compared, and their faults."""
    found = [
        (title, model[name])
        for name, title in _FVD_TITLES.items()
        for model in results["models"]
        if name in model
    ]
    shared = [
        f"{title} by the protocol {one['protocol']}: {one['clips']} clips against "
        f"{one['reference_clips']}, {one['frames']} frames, videos of {one['size']}, weights of "
        f"{one['weights']}"
        for title, one in found
    ]
    faults = [one["warning"] for _, one in found if one["warning"]]
    return [*dict.fromkeys([*shared, *faults])]
