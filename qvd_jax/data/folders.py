"""Folders of videos and of frames: what is in them, and whether it can be read, before it is."""

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageSequence

from qvd_jax.data import video_io
from qvd_jax.errors import InputError

CONTAINERS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".wmv"),
    *(".asf", ".flv", ".f4v", ".ogv", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".m2ts", ".mts"),
    *(".mxf", ".y4m"),
)
"""Suffixes of videos that ffmpeg reads."""

VIDEOS = (*CONTAINERS, *video_io.ANIMATED)
"""Suffixes of videos."""

_MAYBE_ANIMATED = (".png", ".webp", ".tif", ".tiff")
"""Suffixes of images of which one file may be a video; further images of a JPEG are its preview."""

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
      has_alpha: whether it is transparent, or in a container may be.
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
    """All videos in folders, at any depth, each of which is decoded to see that it is whole.

    A file of `VIDEOS` is a video, and so is an image of several frames. A folder that holds images
    and none of these is one, too: the images are its frames. Links to folders are followed.

    Args:
      paths: folders, or videos themselves.

    Raises:
      InputError: one is missing, there is no video, or some cannot be read; these are counted and
        named.
    """
    videos: list[Path] = []
    left_out: set[Path] = set()
    with ThreadPoolExecutor() as pool:
        for path in paths:
            if not path.exists():
                raise InputError(f"{path} does not exist; a folder of videos is expected")
            files = [*_files(path)]
            found = {*itertools.compress(files, pool.map(_is_video, files))}
            taken = {file.parent for file in found}
            frames = {f for f in files if _is_still(f) and f != path and f.parent not in taken}
            left_out |= {*files} - found - frames
            found |= {file.parent for file in frames}
            if not found:
                raise InputError(f"{path} holds no videos ({', '.join(VIDEOS)}) and no frames")
            videos += sorted(found, key=video_io.counted)
        videos = [*dict.fromkeys(videos)]
        probes = [*pool.map(_probe, videos)]
    faults = [probe for probe in probes if isinstance(probe, InputError)]
    if faults:
        raise InputError(
            f"{len(faults)} of {len(videos)} videos cannot be read; remove them, or encode them "
            f"anew: {some(map(str, faults), '; ')}"
        )
    good = [probe for probe in probes if isinstance(probe, Probe)]
    return Found(good, (*_left_out(left_out), *_unequal(good)))


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
      InputError: it cannot be read, or is not as long and large as it was.
    """
    video = video_io.read_video(probe.path, is_logged=False)
    found, known = video.shape[:3], (probe.frames, probe.height, probe.width)
    if found != known:
        raise InputError(
            f"{probe.path} has frames, height and width {found}, and had {known} when it was "
            f"looked at; leave videos as they are while they are measured"
        )
    return video


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files in a folder, at any depth, also behind links; a link to nothing is one, too."""
    if path.is_file() or not path.exists():
        yield path
    elif path.is_dir() and (place := path.resolve()) not in above:  # No link to where it lies.
        try:
            inside = [*path.iterdir()]
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        for one in inside:
            yield from _files(one, (*above, place))


def _is_video(file: Path) -> bool:
    """Whether a file is a video by itself."""
    suffix = file.suffix.lower()
    if suffix not in _MAYBE_ANIMATED:
        return suffix in VIDEOS
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # Pillow has many; what cannot be read is told once its folder is looked at.
        return False


def _is_still(file: Path) -> bool:
    return file.suffix.lower() in video_io.STILLS


def _left_out(files: Iterable[Path]) -> list[str]:
    """What files are neither videos nor frames, in words."""
    notes = []
    kinds = Counter(file.suffix.lower() or "without a suffix" for file in files)
    for what, is_still in (("images beside videos", True), ("files that are no videos", False)):
        shown = [
            f"{number} {kind}"
            for kind, number in sorted(kinds.items())
            if (kind in video_io.STILLS) == is_still
        ]
        if shown:
            notes.append(f"{what} are left out: {', '.join(shown)}")
    return notes


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
            return _probe_images(path)
        if path.stat().st_size == 0:
            return InputError(f"{path} is empty")
        if video_io.is_image(path):
            return _probe_images(path)
        return _probe_container(path)
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"{path} cannot be read: {error.strerror}")


def _probe_images(path: Path) -> Probe:
    """Of a folder of images, or an animated one, each decoded.

    Of an animated image the frames that are stored count, not those that a player would show.
    """
    sizes: Counter[tuple[int, ...]] = Counter()
    has_alpha, starts = False, [0.0]
    for file in video_io.frame_files(path) if path.is_dir() else [path]:
        with video_io.open_image(file) as image:
            for frame in [image] if path.is_dir() else ImageSequence.Iterator(image):
                sizes[video_io.to_rgb(frame, file, is_logged=False).shape[:2]] += 1
                has_alpha |= video_io.is_transparent(frame)
                starts.append(starts[-1] + video_io.milliseconds(frame))
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise InputError(f"{path} has frames of several sizes: {shown}")
    (((height, width), frames),) = sizes.items()
    is_variable = not path.is_dir() and _is_variable(starts[:-1], _GIF_TICK)
    return Probe(path, frames, height, width, is_variable, has_alpha)


_GIF_TICK = 10
"""Times in GIFs are multiples of so many milliseconds."""

_FAULT = re.compile(r"^(?:\[[^\]]*\] )*?\[(?:error|fatal|panic)\] (.+)$", re.MULTILINE)
_DIMENSIONS = re.compile(r"^#dimensions 0: (\d+)x(\d+)$", re.MULTILINE)
_TIME = re.compile(r"^0,\s*-?\d+,\s*(-?\d+),", re.MULTILINE)
_ALPHA = re.compile(
    # The pixel format that is decoded to, or the note of a VP8 or VP9 whose alpha is not decoded.
    r"Video: rawvideo(?: \([^)]*\))?, (?:rgba|bgra|argb|abgr|gbrap|yuva|ayuv|vuya|ya\d|yaf|pal8)"
    r"|^(?:\[info\])?\s+alpha_mode\s*: 1$",
    re.MULTILINE,
)


def _probe_container(path: Path) -> Probe:
    """Of all frames of a file of ffmpeg's, decoded; what ffmpeg would conceal is a fault."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats"]
    # By itself it goes on behind damage, and repeats frames up to a constant rate.
    command += ["-loglevel", "level+info", "-xerror", "-i", str(path), "-an", "-sn", "-dn"]
    command += ["-fps_mode", "passthrough", "-enc_time_base", "demux", "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    faults, times = _FAULT.findall(done.stderr), [*map(int, _TIME.findall(done.stdout))]
    size = _DIMENSIONS.search(done.stdout)
    if faults or done.returncode or size is None or not times:
        reason = [*faults, "it holds no frames"][0]
        raise InputError(f"{path} cannot be read as a video: {reason}")
    has_alpha = _ALPHA.search(done.stderr) is not None
    # Times are rounded to ticks.
    return Probe(path, len(times), int(size[2]), int(size[1]), _is_variable(times, 1), has_alpha)


def _is_variable(times: Sequence[float], tick: float) -> bool:
    """Whether the steps between times are unequal by more than rounding to ticks makes them."""
    steps = np.diff(sorted(times))
    return len(steps) > 0 and bool(steps.max() > max(1.5 * steps.min(), steps.min() + tick))
