"""Frechet video distance by named protocols: which frames, how they are resized, what is divided.

FVD is the Frechet distance of I3D's logits (Unterthiner et al., arXiv 1812.01717). Published
implementations differ before the network and after it, and so do their numbers: two numbers compare
only at one protocol, N, frames, size of the videos and weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from qvd_jax.metrics.frechet import DegreesLost
from qvd_jax.metrics.i3d import SIZE

Resize = Literal["squash", "crop", "bicubic"]
Clips = Literal["all", "random", "sliding"]


@dataclass(frozen=True)
class Protocol:
    """How videos become the input of I3D, and its logits a distance.

    Attributes:
      name: of the implementation it follows.
      frames: F of a clip; None takes whole videos, which then have one length.
      clips: "all" is the video itself; "random" one place in it, drawn by its content; "sliding"
        every place but the last, which overlap.
      resize: to 224x224. "squash" is bilinear and keeps no aspect ratio, "crop" is bilinear of the
        shorter side and cuts the longer, neither smooths; "bicubic" squashes and smooths, as
        Pillow does.
      degrees_lost: of the covariances, as of `frechet_distance`.
      gif: whether clips go through the 256 colors of a GIF.
      faults: what is known to be wrong with it, for those who read the number.
    """

    name: str
    frames: int | None
    clips: Clips
    resize: Resize
    degrees_lost: DegreesLost
    gif: bool = False
    faults: str = ""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Skorokhodov et al., arXiv 2112.14683: `frechet_video_distance.py`, fvd2048_16f.
        Protocol("stylegan-v", 16, "random", "squash", degrees_lost=0),
        # `common_metrics_on_video_quality`, both of its modes.
        Protocol("common-metrics", None, "all", "crop", degrees_lost=1),
        # Ge et al., arXiv 2404.12391: `cdfvd` with its I3D.
        Protocol("cd-fvd", 16, "random", "squash", degrees_lost=0),
        # Wang et al., arXiv 2307.00040: `metric_center.py`, which MagicAnimate reports by.
        Protocol(
            "disco",
            16,
            "sliding",
            "bicubic",
            degrees_lost=1,
            gif=True,
            faults=(
                "clips overlap in all frames but one, so N counts almost equal videos; GIFs leave "
                "256 colors; some versions of ffmpeg repeat their frames, which is not done here"
            ),
        ),
    )
}


def clips_of(video: np.ndarray, protocol: Protocol, content: bytes = b"") -> list[np.ndarray]:
    """The clips that a protocol takes of a video.

    Args:
      video: uint8 `[F, H, W, 3]`, of at least the protocol's frames.
      protocol: which.
      content: what the place of a random clip is drawn by, so that a video has always the same.

    Returns:
      Each uint8 `[protocol.frames, H, W, 3]`, or the whole video.
    """
    frames = protocol.frames or len(video)
    places = len(video) - frames + 1
    if protocol.clips == "all":
        starts = [0]
    elif protocol.clips == "random":
        starts = [int(np.random.default_rng([*content]).integers(places))]
    else:
        starts = [*range(max(1, places - 1))]
    clips = [video[start : start + frames] for start in starts]
    return [_through_gif(clip) for clip in clips] if protocol.gif else clips


def clip_count(frames: int, protocol: Protocol) -> int:
    """How many clips `clips_of` takes of a video of so many frames."""
    if protocol.clips != "sliding":
        return 1
    return max(1, frames - (protocol.frames or frames))


def prepare(clip: np.ndarray, resize: Resize) -> np.ndarray:
    """A clip uint8 `[F, H, W, 3]` as I3D takes it, float32 `[F, 224, 224, 3]` around [-1, 1].

    In numpy: real videos come in any number of sizes, and JAX would compile for each.
    """
    height, width = clip.shape[1:3]
    size = (SIZE, SIZE)
    if resize == "crop":
        scale = SIZE / min(height, width)
        size = (
            (SIZE, math.ceil(width * scale))
            if height < width
            else (math.ceil(height * scale), SIZE)
        )
    rows, columns = (
        _band(_middle(_weights(before, after, resize)))
        for before, after in zip((height, width), size, strict=True)
    )
    resized = np.empty((len(clip), SIZE, SIZE, 3), np.float32)
    for frame, pixels in zip(resized, clip, strict=True):
        lines = _weighed(pixels, rows).swapaxes(0, 1)
        frame[:] = _weighed(lines, columns).swapaxes(0, 1)
    return resized / np.float32(127.5) - 1


def _weights(before: int, after: int, resize: Resize) -> np.ndarray:
    """What each new pixel of a line takes of each old one, float32 `[after, before]`."""
    smooths = resize == "bicubic"
    scale = before / after
    centers = (np.arange(after) + 0.5) * scale - 0.5
    if not smooths:
        centers = centers.clip(0, before - 1)
    x = np.abs(centers[:, None] - np.arange(before)) / (max(scale, 1) if smooths else 1)
    # Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -1/2.
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    cubic = np.select([x < 1, x < 2], [near, far], 0.0)
    weights = cubic if smooths else np.maximum(1 - x, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _band(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is not zero of weights `[after, before]`: which old pixels, and their shares of each.

    Returns:
      Both `[width, after]`.
    """
    used = weights != 0
    first, last = used.argmax(1), weights.shape[1] - 1 - used[:, ::-1].argmax(1)
    width = int((last - first).max()) + 1
    places = np.minimum(first, weights.shape[1] - width)[:, None] + np.arange(width)
    return places.T, np.take_along_axis(weights, places, 1).T


def _weighed(lines: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Lines `[before, L, 3]` as `_band` of weights mixes them, float32 `[after, L, 3]`."""
    places, shares = band
    found = np.zeros((places.shape[1], *lines.shape[1:]), np.float32)
    for place, share in zip(places, shares, strict=True):
        found += share[:, None, None] * lines[place]
    return found


def _middle(weights: np.ndarray) -> np.ndarray:
    """Those of the middle pixels of a line that is too long, `[224, before]`."""
    start = (len(weights) - SIZE) // 2
    return weights[start : start + SIZE]


def _through_gif(clip: np.ndarray) -> np.ndarray:
    """What a GIF of the clip shows: each frame in 256 colors of its own."""
    colors = (Image.fromarray(frame).quantize(256) for frame in clip)
    return np.stack([np.asarray(frame.convert("RGB")) for frame in colors])
