"""Sets of videos beside each other, whoever made them: distances of distributions, paired, alone.

Example:
    measures = Measures.load(["fvd", "lpips"])
    found = compare_videos({"float": Path("float"), "w8a8": Path("w8a8")}, measures, real="real")
    print(found.models[1].fvd_reference)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvd_jax.config import check_choice
from qvd_jax.errors import InputError
from qvd_jax.evaluation import networks
from qvd_jax.evaluation.clip import CLIP, load_clip
from qvd_jax.evaluation.distances import Distance, Estimate, distance, estimate
from qvd_jax.evaluation.features import Features, check_videos, video_features
from qvd_jax.evaluation.networks import Network
from qvd_jax.evaluation.videos import Source, VideoSet, open_videos
from qvd_jax.files import cache_folder, check_keepable
from qvd_jax.metrics import paired, similarity, temporal
from qvd_jax.metrics.fvd import PROTOCOLS, Protocol
from qvd_jax.metrics.lpips import LEAST_SIZE, Net
from qvd_jax.progress import Part, Progress

PAIRED = ("psnr", "ssim", "lpips")
"""Metrics of videos against the reference's of the same name."""

ALONE = ("flicker", "motion")
"""Metrics of each video alone."""

METRICS = ("fvd", *PAIRED, *ALONE, "clip")

REAL, OTHER_SEEDS = "real videos", "other seeds"
"""What messages call the sets that lie beside those that are measured."""

_LARGEST_PSNR = 100.0


@dataclass(frozen=True)
class Measures:
    """What is measured, and with what.

    Attributes:
      metrics: of `METRICS`.
      protocol: of FVD.
      i3d: whose features FVD compares; None where `metrics` has no "fvd".
      lpips: None where `metrics` has no "lpips".
      clip: None where `metrics` has no "clip".
      cache: folder in which features are kept by the videos' content; None keeps none.
    """

    metrics: tuple[str, ...] = ("psnr", "ssim", "flicker", "motion")
    protocol: Protocol = PROTOCOLS["stylegan-v"]
    i3d: Network | None = None
    lpips: Network | None = None
    clip: CLIP | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for metric, network in (("fvd", self.i3d), ("lpips", self.lpips), ("clip", self.clip)):
            if (metric in self.metrics) != (network is not None):
                raise ValueError(f"the metric {metric} and its network come together")

    @classmethod
    def load(
        cls,
        metrics: Sequence[str],
        protocol: str = "stylegan-v",
        *,
        frames: int | None = None,
        i3d: Path | None = None,
        lpips: str = "alex",
        clip: Path | None = None,
        cache: Path | None = None,
    ) -> "Measures":
        """Loads the networks that metrics need.

        Args:
          metrics: of `METRICS`.
          protocol: of `PROTOCOLS`.
          frames: of a clip, where the protocol's number is not wanted.
          i3d: folder of converted weights; None takes the package's.
          lpips: "alex" or "vgg" of the package, or a folder of converted weights.
          clip: folder of converted weights, which the metric "clip" needs.
          cache: where features are kept; None is in the user's cache folder.

        Raises:
          InputError: weights are missing or those of another network, there is no such protocol,
            or features cannot be kept.
        """
        if "clip" in metrics and clip is None:
            raise InputError(
                "the metric clip needs a folder of CLIP (--clip DIR): python -m qvd_jax.convert "
                "makes it of one of transformers"
            )
        check_choice("protocol", protocol, tuple(PROTOCOLS))
        chosen = PROTOCOLS[protocol]
        if frames is not None:
            chosen = dataclasses.replace(chosen, frames=frames)
        cache = cache or cache_folder() / "features"
        if "fvd" in metrics:
            check_keepable(cache)
        return cls(
            tuple(metrics),
            chosen,
            networks.load_i3d(i3d) if "fvd" in metrics else None,
            _load_lpips(lpips) if "lpips" in metrics else None,
            load_clip(clip) if "clip" in metrics and clip is not None else None,
            cache,
        )


PIXELS = Measures()
"""What needs no network, of several sets."""


def pixels(sets: int) -> Measures:
    """What needs no network and can be measured of so many sets."""
    return PIXELS if sets > 1 else dataclasses.replace(PIXELS, metrics=ALONE)


def _load_lpips(name: str) -> Network:
    nets: dict[str, Net] = {net: net for net in LEAST_SIZE}
    if name in nets:
        return networks.load_lpips(nets[name])
    return networks.load_lpips(folder=Path(name))


@dataclass(frozen=True)
class VideoFigures:
    """What was measured of one set; None is what was not.

    Attributes:
      name: of the set.
      fvd: to the real videos.
      fvd_reference: to the reference's own videos, of the same prompts and seeds.
      psnr: against the reference's, in decibels.
      ssim: the same.
      lpips: the same, the mean over frames.
      flicker: of the set alone.
      motion: the same.
      clip_score: how near frames are to their prompts, where there are prompts.
      frame_consistency: how near frames are to the next ones, in CLIP's space.
    """

    name: str
    fvd: Distance | None = None
    fvd_reference: Distance | None = None
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    lpips: Estimate | None = None
    flicker: Estimate | None = None
    motion: Estimate | None = None
    clip_score: Estimate | None = None
    frame_consistency: Estimate | None = None

    def figures(self) -> dict[str, Any]:
        """As JSON has it, without what was not measured."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name != "name" and value is not None
        }


@dataclass(frozen=True)
class VideoComparison:
    """Sets of videos beside each other.

    Attributes:
      models: of each set, the reference's first.
      fvd_floor_real: distance of one half of the real videos to the other: what a perfect model
        has at half their number.
      fvd_floor_reference: distance of the reference's videos to its own of other seeds.
      notes: what the user should know of the videos.
    """

    models: tuple[VideoFigures, ...]
    fvd_floor_real: Distance | None = None
    fvd_floor_reference: Distance | None = None
    notes: tuple[str, ...] = ()

    def floors(self) -> dict[str, Any]:
        """The floors as JSON has them, by the names of their attributes."""
        found = {
            "fvd_floor_real": self.fvd_floor_real,
            "fvd_floor_reference": self.fvd_floor_reference,
        }
        return {name: dataclasses.asdict(one) for name, one in found.items() if one is not None}


def compare_videos(
    sources: Mapping[str, Source],
    measures: Measures,
    *,
    real: Source | None = None,
    other_seeds: Source | None = None,
    prompts: Sequence[str] = (),
    seeds: int = 1,
) -> VideoComparison:
    """Measures sets of videos; everything is looked at before anything is computed.

    Args:
      sources: by name, arrays uint8 `[N, F, H, W, 3]` or folders; the first is the reference.
      measures: what is measured.
      real: videos of the distribution that FVD is taken to.
      other_seeds: videos of the reference from other seeds, for the floor of FVD against it.
      prompts: of the videos of one seed, for CLIP's score; none leaves it out.
      seeds: of each prompt, the videos seed by seed.

    Raises:
      InputError: videos cannot be read, or what is asked for cannot be measured of them.
    """
    sets, beside = check_sources(sources, measures, real=real, other_seeds=other_seeds)
    parts = [
        Part(f"{videos.name}, {task}", task, None, None, len(videos))
        for task, several in _plan(sets, measures, beside)
        for videos in several
    ]
    for videos in sets if prompts else ():
        if len(videos) != seeds * len(prompts):
            raise InputError(
                f"{videos.name} has {len(videos)} videos, for {len(prompts)} prompts and {seeds} "
                f"seeds"
            )
    with Progress(parts) as progress:
        return _measure(sets, measures, beside, prompts, seeds, progress.advance)


def check_sources(
    sources: Mapping[str, Source],
    measures: Measures,
    *,
    real: Source | None = None,
    other_seeds: Source | None = None,
) -> tuple[list[VideoSet], dict[str, VideoSet]]:
    """Looks at sets of videos, and refuses what cannot be measured.

    Args:
      sources: as of `compare_videos`, and so are the others.
      measures: what is measured.
      real: the real videos.
      other_seeds: those of the reference's other seeds.

    Returns:
      The sets, and those beside them by name.

    Raises:
      InputError: as of `compare_videos`.
    """
    sets = [open_videos(source, name) for name, source in sources.items()]
    beside = {
        name: open_videos(source, name)
        for name, source in ((REAL, real), (OTHER_SEEDS, other_seeds))
        if source is not None
    }
    check(sets, measures, beside)
    return sets, beside


def _plan(
    sets: Sequence[VideoSet], measures: Measures, beside: Mapping[str, VideoSet]
) -> list[tuple[str, Sequence[VideoSet]]]:
    """What is done with which sets, in this order."""
    plan: list[tuple[str, Sequence[VideoSet]]] = []
    if measures.i3d is not None:
        plan.append(("features", [*sets, *beside.values()]))
    if set(measures.metrics) - {"fvd"}:
        plan.append(("pixels", sets))
    return plan


def check(
    sets: Sequence[VideoSet], measures: Measures, beside: Mapping[str, VideoSet] | None = None
) -> None:
    """Refuses what cannot be measured.

    Raises:
      InputError: a metric does not fit the videos or there is nothing to compare them with.
    """
    beside = beside or {}
    if unknown := set(measures.metrics) - set(METRICS):
        raise InputError(f"unknown metrics {', '.join(sorted(unknown))}; {', '.join(METRICS)} are")
    reference, *others = sets
    if "fvd" in measures.metrics:
        if not others and REAL not in beside:
            raise InputError("FVD is a distance between sets: name real videos, or another model's")
        frames = {v.name: check_videos(v, measures.protocol) for v in (*sets, *beside.values())}
        if len(set(frames.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in frames.items())
            raise InputError(f"FVD compares clips of one number of frames: {shown}")
    elif beside:
        raise InputError(f"{', '.join(beside)} are for the metric fvd, which is not asked for")
    compared = [name for name in measures.metrics if name in PAIRED]
    if compared:
        if not others:
            raise InputError(
                f"{', '.join(compared)} compare videos with those of {reference.name}: name others "
                f"beside them, or other metrics"
            )
        for videos in others:
            _check_pairs(reference, videos, compared)
    least = {
        "flicker": temporal.FLICKER_FRAMES,
        "motion": temporal.MOTION_FRAMES,
        "clip": similarity.CONSISTENCY_FRAMES,
    }
    for metric in set(measures.metrics) & set(least):
        for videos in sets:
            videos.check_frames(least[metric], metric)
    sizes = {"ssim": paired.SSIM_WINDOW} if "ssim" in measures.metrics else {}
    if measures.lpips is not None:
        sizes["lpips"] = LEAST_SIZE[measures.lpips.module.config.net]
    for metric, size in sizes.items():
        for videos in sets:
            smallest = min(min(shape[1:]) for shape in videos.shapes)
            if smallest < size:
                raise InputError(
                    f"{metric} needs {size}x{size} pixels, {videos.name} has {smallest} on a side"
                )


def _check_pairs(reference: VideoSet, videos: VideoSet, metrics: Sequence[str]) -> None:
    """Raises `InputError` unless each video has one of its name and shape to compare it with."""
    who = f"{', '.join(metrics)} compare videos of one name"
    reference.check_names(who)
    videos.check_names(who)
    apart = sorted(set(reference.names) ^ set(videos.names))
    if apart:
        place = reference if apart[0] in reference.names else videos
        raise InputError(
            f"{who}: {len(apart)} of {reference.name} and {videos.name} have no other, such as "
            f"{apart[0]!r} of {place.name}"
        )
    shapes = dict(zip(videos.names, videos.shapes, strict=True))
    for name, shape in zip(reference.names, reference.shapes, strict=True):
        if shapes[name] != shape:
            raise InputError(
                f"{who} and size: {name!r} has frames, height and width {shape} in "
                f"{reference.name} and {shapes[name]} in {videos.name}"
            )


def _measure(
    sets: Sequence[VideoSet],
    measures: Measures,
    beside: Mapping[str, VideoSet],
    prompts: Sequence[str],
    seeds: int,
    advance: Callable[[], None],
) -> VideoComparison:
    reference = sets[0]
    texts = None
    if measures.clip is not None and prompts:
        texts = np.tile(measures.clip.embed_texts(prompts), (seeds, 1))
    features: dict[str, Features] = {}
    if measures.i3d is not None:
        for videos in (*sets, *beside.values()):
            features[videos.name] = video_features(
                measures.i3d, videos, measures.protocol, measures.cache, advance
            )

    def between(first: VideoSet, second: VideoSet) -> Distance | None:
        if not {first.name, second.name} <= set(features):
            return None
        counts = [len(v) // (1 if v.name == REAL else seeds) for v in (first, second)]
        sizes = dict.fromkeys((first.size, second.size))
        return _distance(
            measures, features[first.name], features[second.name], " against ".join(sizes), counts
        )

    def own(videos: VideoSet) -> VideoFigures:
        return VideoFigures(
            videos.name,
            fvd=None if real is None else between(videos, real),
            fvd_reference=None if videos is reference else between(videos, reference),
            **{
                name: estimate(values, seeds)
                for name, values in _pixels(videos, reference, measures, texts, advance).items()
            },
        )

    real, other = (beside.get(name) for name in (REAL, OTHER_SEEDS))
    return VideoComparison(
        tuple(map(own, sets)),
        None if real is None or not features else _halves(measures, features[real.name], real),
        None if other is None else between(other, reference),
        tuple(note for videos in (*sets, *beside.values()) for note in videos.notes),
    )


def _distance(
    measures: Measures,
    judged: Features,
    reference: Features,
    size: str,
    prompts: Sequence[int],
) -> Distance:
    assert measures.i3d is not None
    return distance(
        judged,
        reference,
        measures.protocol,
        size=size,
        weights=measures.i3d.description,
        prompts=prompts,
    )


def _halves(measures: Measures, features: Features, videos: VideoSet) -> Distance | None:
    """The distance of every other real video to the rest; None for fewer than four."""
    odd = features.videos % 2 == 1
    if min(odd.sum(), (~odd).sum()) < 2:
        return None
    first, second = (
        Features(features.values[part], features.videos[part] // 2, features.frames)
        for part in (odd, ~odd)
    )
    counts = [int(part.videos[-1]) + 1 for part in (first, second)]
    return _distance(measures, first, second, videos.size, counts)


def _pixels(
    videos: VideoSet,
    reference: VideoSet,
    measures: Measures,
    texts: np.ndarray | None,
    advance: Callable[[], None],
) -> dict[str, np.ndarray]:
    """The metrics of each video, `[N]`, in their order; `texts` are CLIP's embeddings `[N, C]`."""
    alone = {"flicker": temporal.flicker, "motion": temporal.motion}
    compared: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "psnr": lambda a, b: np.minimum(paired.psnr(a, b), _LARGEST_PSNR),
        "ssim": paired.ssim,
    }
    if measures.lpips is not None:
        network = measures.lpips
        compared["lpips"] = lambda a, b: networks.lpips_distance(network, a, b)
    wanted = [name for name in measures.metrics if name in alone]
    pairs = [name for name in measures.metrics if name in compared and videos is not reference]
    if not set(measures.metrics) - {"fvd"}:
        return {}
    numbers = {name: number for number, name in enumerate(reference.names)}
    found: dict[str, list[float]] = {}

    def add(metric: str, value: float) -> None:
        found.setdefault(metric, []).append(float(value))

    for number, name in enumerate(videos.names):
        if wanted or pairs or measures.clip is not None:
            video = videos.read(number)[None]
        for metric in wanted:
            add(metric, alone[metric](video)[0])
        if pairs:
            other = reference.read(numbers[name])[None]
            for metric in pairs:
                add(metric, compared[metric](other, video)[0])
        if measures.clip is not None:
            frames = measures.clip.embed_frames(video[0])
            add("frame_consistency", similarity.frame_consistency(frames))
            if texts is not None:
                add("clip_score", similarity.clip_score(frames, texts[number]))
        advance()
    return {metric: np.array(values) for metric, values in found.items()}
