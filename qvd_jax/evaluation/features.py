"""I3D's features of videos: in batches, over all devices, kept by the videos' content."""

import functools
import hashlib
import importlib.metadata
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.evaluation.networks import Network
from qvd_jax.evaluation.videos import VideoSet
from qvd_jax.files import write_bytes
from qvd_jax.meshes import DATA, MeshConfig
from qvd_jax.metrics import i3d
from qvd_jax.metrics.fvd import Protocol, clips_of, prepare
from qvd_jax.programs import code_digest

_CLIPS_PER_DEVICE = 4

_CODE = (
    *("data/folders.py", "data/video_io.py", "evaluation/features.py", "evaluation/videos.py"),
    *("metrics/fvd.py", "metrics/i3d.py"),
)
"""What makes features of a file."""

_READERS = ("imageio", "imageio-ffmpeg", "pillow")
"""Packages that make pixels of it."""


class Features(NamedTuple):
    """Features of the clips of a set of videos.

    Attributes:
      values: `[N, C]`, clip by clip.
      videos: number of the video of each clip, `[N]`.
      frames: F of the clips.
    """

    values: np.ndarray
    videos: np.ndarray
    frames: int


def check_videos(videos: VideoSet, protocol: Protocol) -> int:
    """Refuses videos that a protocol cannot take, before anything is computed.

    Returns:
      The frames of a clip.

    Raises:
      InputError: there are fewer than two, they are too short, or of several lengths.
    """
    if len(videos) < 2:
        raise InputError(
            f"{videos.name} has {len(videos)} video; a distance of distributions needs at least 2, "
            f"and says something from about a thousand on"
        )
    lengths = sorted({shape[0] for shape in videos.shapes})
    if protocol.frames is None and len(lengths) > 1:
        raise InputError(
            f"{videos.name}: {protocol.name} takes whole videos, which have {lengths[0]} to "
            f"{lengths[-1]} frames; name the frames of a clip, or another protocol"
        )
    frames = protocol.frames or lengths[0]
    if frames < i3d.LEAST_FRAMES:
        raise InputError(f"I3D needs {i3d.LEAST_FRAMES} frames, {frames} are asked for")
    videos.check_frames(frames, f"the protocol {protocol.name}")
    return frames


def video_features(
    network: Network,
    videos: VideoSet,
    protocol: Protocol,
    cache: Path | None = None,
    on_video: Callable[[], None] = lambda: None,
) -> Features:
    """The features of all clips of a set of videos; those that are kept are not computed.

    Args:
      network: I3D.
      videos: that passed `check_videos`.
      protocol: which clips, and how they are resized.
      cache: folder in which the features of each video are kept; None keeps none.
      on_video: called after each video.
    """
    place = None if cache is None else cache / _key(network, protocol)
    found: dict[int, np.ndarray] = {}
    missing = []
    for number in range(len(videos)):
        kept = None if place is None else _read(_file(place, videos, number))
        if kept is None:
            missing.append(number)
        else:
            found[number] = kept
            on_video()
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    for number, values in _computed(network, videos, protocol, missing):
        found[number] = values
        if place is not None:
            write_bytes(_file(place, videos, number), _encoded(values))
        on_video()
    in_order = [found[number] for number in range(len(videos))]
    counts = [*map(len, in_order)]
    frames = protocol.frames or videos.shapes[0][0]
    return Features(np.concatenate(in_order), np.repeat(np.arange(len(videos)), counts), frames)


def _computed(
    network: Network, videos: VideoSet, protocol: Protocol, numbers: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Features of the videos of these numbers, each as soon as all of its clips have them."""
    devices = jax.local_devices()
    sharding = NamedSharding(MeshConfig(data=len(devices)).over(devices), PartitionSpec(DATA))
    params = jax.device_put(network.params, NamedSharding(sharding.mesh, PartitionSpec()))
    size = _CLIPS_PER_DEVICE * len(devices)
    counts: dict[int, int] = {}
    done: dict[int, list[np.ndarray]] = {}
    waiting: list[tuple[int, np.ndarray]] = []

    def flush() -> Iterator[tuple[int, np.ndarray]]:
        clips = [clip for _, clip in waiting]
        # Of one size for all, so that the network is compiled once.
        batch = np.stack([*clips, *(size - len(clips)) * clips[:1]])
        values = np.asarray(_logits(network.module, params, jax.device_put(batch, sharding)))
        for (number, _), value in zip(waiting, values, strict=False):
            done[number].append(value)
            if len(done[number]) == counts[number]:
                yield number, np.stack(done.pop(number))
        waiting.clear()

    for number in numbers:
        clips = clips_of(videos.read(number), protocol, videos.digest(number))
        counts[number], done[number] = len(clips), []
        for clip in clips:
            waiting.append((number, prepare(clip, protocol.resize)))
            if len(waiting) == size:
                yield from flush()
    if waiting:
        yield from flush()


@functools.partial(jax.jit, static_argnames="module")
def _logits(module: i3d.I3D, params: Params, clips: Array) -> Array:
    return module.apply({"params": params}, clips)


def _key(network: Network, protocol: Protocol) -> str:
    """Of all that features depend on besides the video."""
    readers = [importlib.metadata.version(package) for package in _READERS]
    told = network.digest, astuple(protocol)[1:4], protocol.gif, code_digest(*_CODE), readers
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _file(place: Path, videos: VideoSet, number: int) -> Path:
    return place / f"{videos.digest(number).hex()}.npy"


def _encoded(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def _read(file: Path) -> np.ndarray | None:
    """What is kept; None where nothing is, or it is damaged."""
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
