"""Folders of videos and of frames: what is in them, and whether it can be read, before it is."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
from PIL import Image

from qvd_jax.data import video_io
from qvd_jax.errors import InputError

CONTAINERS = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".gif"),
)
"""Suffixes of videos."""

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of images that are frames of the video that their folder is."""

_NAMED = 5
"""Of many files with one fault so many are named."""


class Probe(NamedTuple):
    """What is known of a video before its pixels are read.

    Attributes:
      path: a file, or a folder of frames.
      frames: F.
      height: H.
      width: W.
      is_variable: whether its frames are shown for unequal times.
      has_alpha: whether it may be transparent.
    """

    path: Path
    frames: int
    height: int
    width: int
    is_variable: bool = False
    has_alpha: bool = False


class Found(NamedTuple):
    """The videos of some folders.

    Attributes:
      probes: of each, in the order of their names.
      notes: what the user should know, such as files that are no videos.
    """

    probes: list[Probe]
    notes: tuple[str, ...]


def find_videos(paths: Sequence[Path]) -> Found:
    """All videos in folders, at any depth, which are looked at one by one.

    A file of `CONTAINERS` is a video, and so is a folder that holds images: its frames.

    Args:
      paths: folders, or videos themselves.

    Raises:
      InputError: one is missing, there is no video, or some cannot be read; these are counted and
        named.
    """
    videos: list[Path] = []
    others: Counter[str] = Counter()
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; a folder of videos is expected")
        files = [path] if path.is_file() else [*path.rglob("*")]
        kinds = Counter(_kind(file) for file in files if file.is_file())
        found = {file for file in files if file.suffix.lower() in CONTAINERS and file.is_file()}
        found |= {f.parent for f in files if f.suffix.lower() in FRAMES and f.is_file()}
        if not found:
            raise InputError(f"{path} holds no videos ({', '.join(CONTAINERS)}) and no frames")
        videos += sorted(found, key=video_io.counted)
        others += Counter({kind: number for kind, number in kinds.items() if kind is not None})
    videos = [*dict.fromkeys(videos)]
    with ThreadPoolExecutor() as pool:
        probes = [*pool.map(_probe, videos)]
    faults = [probe for probe in probes if isinstance(probe, InputError)]
    if faults:
        raise InputError(
            f"{len(faults)} of {len(videos)} videos cannot be read; remove or replace them: "
            f"{some(map(str, faults), '; ')}"
        )
    good = [probe for probe in probes if isinstance(probe, Probe)]
    return Found(good, (*_other_files(others), *_unequal(good)))


def check_frames(probes: Sequence[Probe], least: int, why: str) -> None:
    """Raises `InputError`, which counts and names them, if videos are too short.

    Args:
      probes: of the videos.
      least: frames they need.
      why: what needs them.
    """
    short = [f"{probe.path} has {probe.frames}" for probe in probes if probe.frames < least]
    if short:
        raise InputError(
            f"{why} needs {least} frames, {len(short)} of {len(probes)} videos have fewer: "
            f"{some(short)}"
        )


def read(probe: Probe) -> np.ndarray:
    """The frames of a video, uint8 `[F, H, W, 3]`.

    Raises:
      InputError: it cannot be read, or has another number of frames than it said.
    """
    video = video_io.read_video(probe.path, is_logged=False)
    if len(video) != probe.frames:
        raise InputError(
            f"{probe.path} holds {probe.frames} frames, of which {len(video)} can be decoded; "
            f"encode it anew"
        )
    return video


def _kind(file: Path) -> str | None:
    """The suffix of a file that is neither a video nor a frame."""
    suffix = file.suffix.lower()
    return None if suffix in CONTAINERS or suffix in FRAMES else suffix or "without a suffix"


def _other_files(others: Counter[str]) -> list[str]:
    if not others:
        return []
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
    return [f"files that are no videos are left out: {kinds}"]


def _unequal(probes: Sequence[Probe]) -> list[str]:
    """What is unequal among videos, or within them."""
    notes = []
    variable = [str(probe.path) for probe in probes if probe.is_variable]
    if variable:
        notes.append(
            f"{len(variable)} of {len(probes)} videos have a variable frame rate, each stored "
            f"frame is taken once: {some(variable)}"
        )
    transparent = [str(probe.path) for probe in probes if probe.has_alpha]
    if transparent:
        notes.append(
            f"{len(transparent)} of {len(probes)} videos may be transparent, the color beneath is "
            f"taken: {some(transparent)}"
        )
    for what, values in (
        ("sizes", [f"{probe.height}x{probe.width}" for probe in probes]),
        ("lengths", [f"{probe.frames} frames" for probe in probes]),
    ):
        counted = Counter(values).most_common()
        if len(counted) > 1:
            shown = some(f"{number} of {value}" for value, number in counted)
            notes.append(f"{len(probes)} videos have {len(counted)} {what}: {shown}")
    return notes


def some(texts: Iterable[str], between: str = ", ") -> str:
    """The first of some texts, and how many more there are."""
    texts = [*texts]
    more = len(texts) - _NAMED
    return between.join(texts[:_NAMED]) + (f"{between}and {more} more" if more > 0 else "")


def _probe(path: Path) -> Probe | InputError:
    """What is known of a video, or what is wrong with it."""
    try:
        if path.is_dir():
            return _probe_frames(path)
        if path.stat().st_size == 0:
            return InputError(f"{path} is empty")
        # Of a GIF the frames that are stored count, not those that a player would show.
        if path.suffix.lower() == ".gif":
            frames, height, width, _ = video_io.read_video(path, is_logged=False).shape
            return Probe(path, frames, height, width)
        return _probe_packets(path)
    except InputError as error:
        return error


def _probe_frames(folder: Path) -> Probe:
    files = video_io.frame_files(folder)
    sizes, has_alpha = set(), False
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.add(image.size)
                has_alpha |= image.has_transparency_data
        except Exception as error:  # Pillow has many.
            raise InputError(f"{file} is no image: {error}") from error
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for width, height in sorted(sizes))
        raise InputError(f"{folder} has frames of several sizes: {shown}")
    ((width, height),) = sizes
    return Probe(folder, len(files), height, width, has_alpha=has_alpha)


_DIMENSIONS = re.compile(r"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
_PACKET = re.compile(r"^0,\s*-?\d+,\s*(-?\d+),", re.MULTILINE)


def _probe_packets(path: Path) -> Probe:
    """Of the packets that a container holds, none of which is decoded."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-map", "0:v:0"]
    command += ["-c", "copy", "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    size, times = _DIMENSIONS.search(done.stdout), [*map(int, _PACKET.findall(done.stdout))]
    if done.returncode or size is None or not times:
        reason = (done.stderr.strip().splitlines() or ["it holds no video"])[-1]
        raise InputError(f"{path} cannot be read as a video: {reason}")
    steps = np.diff(sorted(times))
    # Times are rounded to ticks, so equal steps may differ by one.
    is_variable = len(steps) > 0 and int(steps.max()) > max(1.5 * int(steps.min()), steps.min() + 1)
    return Probe(path, len(times), int(size[2]), int(size[1]), is_variable)
