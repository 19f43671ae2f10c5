"""Frechet video distance by named protocols: which frames, how they are resized, what is divided.

FVD is the Frechet distance of I3D's logits (Unterthiner et al., arXiv 1812.01717). Published
implementations differ before the network and after it, and so do their numbers: two numbers compare
only at one protocol, N, frames, size of the videos and weights.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from qvd_jax.axes import Array
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


@functools.partial(jax.jit, static_argnames="resize")
def prepare(clip: Array, resize: Resize) -> Array:
    """A clip uint8 `[F, H, W, 3]` as I3D takes it, `[F, 224, 224, 3]` around [-1, 1]."""
    pixels = clip.astype(jnp.float32)
    frames, height, width, channels = pixels.shape
    size = (SIZE, SIZE)
    if resize == "crop":
        scale = SIZE / min(height, width)
        size = (
            (SIZE, math.ceil(width * scale))
            if height < width
            else (math.ceil(height * scale), SIZE)
        )
    resized = jax.image.resize(
        pixels,
        (frames, *size, channels),
        "cubic" if resize == "bicubic" else "linear",
        antialias=resize == "bicubic",
    )
    top, left = ((side - SIZE) // 2 for side in size)
    return resized[:, top : top + SIZE, left : left + SIZE] / 127.5 - 1


def _through_gif(clip: np.ndarray) -> np.ndarray:
    """What a GIF of the clip shows: each frame in 256 colors of its own."""
    colors = (Image.fromarray(frame).quantize(256) for frame in clip)
    return np.stack([np.asarray(frame.convert("RGB")) for frame in colors])
