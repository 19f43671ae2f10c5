"""Sets of videos to be measured: arrays, files, folders; one is in memory at a time."""

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvd_jax.data import folders
from qvd_jax.errors import InputError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoSet:
    """Some videos.

    Attributes:
      name: for messages.
      names: of each; videos of one name in two sets are compared with each other.
      shapes: F, H, W of each, as far as their headers tell.
      read: gives one by its number, uint8 `[F, H, W, 3]`.
      digest: of the content of one by its number.
      notes: what the user should know.
    """

    name: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    read: Callable[[int], np.ndarray]
    digest: Callable[[int], bytes]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> str:
        """Height and width in words."""
        sizes = {shape[1:] for shape in self.shapes}
        return "x".join(map(str, *sizes)) if len(sizes) == 1 else "several sizes"

    def check_frames(self, least: int, why: str) -> None:
        """Raises `InputError`, which counts and names them, if videos are too short."""
        probes = [
            folders.Probe(Path(name), *shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        folders.check_frames(probes, least, f"{self.name}: {why}")

    def check_names(self, why: str) -> None:
        """Raises `InputError`, which counts and names them, if several videos have one name."""
        repeated = [repr(name) for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise InputError(
                f"{why}: {len(repeated)} names in {self.name} are of several videos, whose "
                f"suffixes do not count: {folders.some(repeated)}; keep one of each"
            )


Source = VideoSet | np.ndarray | Path | str | Sequence[Path | str]
"""Videos uint8 `[N, F, H, W, 3]`, or where they lie: folders of them, or they themselves."""


def planned(name: str, count: int, shape: tuple[int, int, int]) -> VideoSet:
    """Videos that are yet to be made, to be checked before they are.

    Args:
      name: of the set.
      count: N.
      shape: F, H, W.
    """

    def missing(number: int) -> Any:
        raise ValueError(f"{name}: video {number} is not made")

    return VideoSet(name, tuple(map(str, range(count))), count * (shape,), missing, missing)


def open_videos(source: Source, name: str) -> VideoSet:
    """Looks at all videos of a source; what is unequal among them is named in the log.

    Args:
      source: arrays or paths.
      name: of the set.

    Raises:
      InputError: there are none, or some cannot be read; these are counted and named.
    """
    if isinstance(source, VideoSet):
        return dataclasses.replace(source, name=name)
    if isinstance(source, np.ndarray):
        return _of_array(source, name)
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    found = folders.find_videos(paths)
    probes = found.probes
    notes = tuple(f"{name}: {note}" for note in found.notes)
    for note in notes:
        _logger.warning("%s", note)
    names = tuple(_name_within(probe.path, paths) for probe in probes)
    return VideoSet(
        name,
        names,
        tuple((probe.frames, probe.height, probe.width) for probe in probes),
        read=lambda number: folders.read(probes[number]),
        digest=functools.cache(lambda number: _digest_of_files(probes[number].path)),
        notes=notes,
    )


def _of_array(videos: np.ndarray, name: str) -> VideoSet:
    rank = 5
    if videos.ndim != rank or videos.shape[-1] != len("RGB") or videos.dtype != np.uint8:
        raise InputError(
            f"{name}: videos are uint8 [N, F, H, W, 3], not {videos.dtype} {list(videos.shape)}"
        )
    if 0 in videos.shape:
        raise InputError(f"{name}: an array {list(videos.shape)} holds no videos")
    count, *shape, _ = videos.shape
    frames, height, width = shape
    return VideoSet(
        name,
        tuple(map(str, range(count))),
        count * ((frames, height, width),),
        read=videos.__getitem__,
        digest=functools.cache(lambda number: hashlib.sha256(_shown(videos[number])).digest()),
    )


def _shown(video: np.ndarray) -> bytes:
    return str(video.shape).encode() + video.tobytes()


def _name_within(path: Path, roots: Sequence[Path]) -> str:
    """The path below the folder that was given, without its suffix."""
    root = next(root for root in roots if path == root or root in path.parents)
    place = Path(path.name) if path == root else path.relative_to(root)
    return place.as_posix() if path.is_dir() else place.with_suffix("").as_posix()


def _digest_of_files(path: Path) -> bytes:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.digest()
