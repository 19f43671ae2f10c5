"""The files of sampled videos: their names, and records that tell which of them are finished."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvd_jax import files
from qvd_jax.config import from_dict
from qvd_jax.data import video_io
from qvd_jax.errors import InputError


class Outputs(NamedTuple):
    """Files to write.

    Attributes:
      each: one video for each prompt.
      together: videos that show all prompts side by side.
      sheet: the contact sheet, if one is wanted.
    """

    each: tuple[Path, ...]
    together: tuple[Path, ...]
    sheet: Path | None

    def of(self, index: int) -> Path | None:
        """The file of one prompt's video; None where all are shown together."""
        return self.each[index] if self.each else None

    @property
    def shows_all(self) -> bool:
        """Whether a file shows all prompts together."""
        return bool(self.together) or self.sheet is not None

    def kept(self, videos: np.ndarray) -> np.ndarray:
        """What of one prompt's videos `[M, F, H, W, 3]` is needed to show all together."""
        return videos if self.together else video_io.shown_frames(videos)


def plan_outputs(out: Path | None, prompts: Sequence[str], *, contact_sheet: bool) -> Outputs:
    """Names the files to write.

    Args:
      out: a .mp4 or .gif for all prompts together, or a folder for one file each; None is
        everything there is for all together: video.mp4, video.gif and the contact sheet.
      prompts: for the names in a folder.
      contact_sheet: whether a sheet goes beside the file, or into the folder.

    Raises:
      InputError: the suffix is of no video format.
    """
    each: tuple[Path, ...] = ()
    together: tuple[Path, ...] = ()
    if out is None:
        together = tuple(Path("video").with_suffix(suffix) for suffix in video_io.VIDEO_SUFFIXES)
        sheet, contact_sheet = Path("video.png"), True
    elif out.suffix in video_io.VIDEO_SUFFIXES and not out.is_dir():
        together, sheet = (out,), out.with_suffix(".png")
    elif out.suffix and not out.is_dir():
        raise InputError(
            f"{out}: a file ends in {' or '.join(video_io.VIDEO_SUFFIXES)}, a folder in neither"
        )
    else:
        slugs = (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] for text in prompts)
        each = tuple(out / f"{i:03d}-{slug}.mp4" for i, slug in enumerate(slugs))
        sheet = out / "contact-sheet.png"
    return Outputs(each, together, sheet if contact_sheet else None)


@dataclass(frozen=True)
class Record:
    """What a finished video was made of, which stands in a file beside it.

    Attributes:
      input: the prompt, or the name of the image's or the embedding's file.
      index: of the video among those of its run.
      seed: of its noise.
      checkpoint: digest of what sampled it.
      settings: all else that it depends on, by name, as JSON has it.
    """

    input: str
    index: int
    seed: int
    checkpoint: str
    settings: dict[str, Any]

    @staticmethod
    def place(video: Path) -> Path:
        """Of the record of a video."""
        return video.with_suffix(".json")

    def write(self, video: Path) -> None:
        """Writes it, once its video is whole."""
        files.write_text(self.place(video), json.dumps(asdict(self), indent=1) + "\n")


def find_finished(folder: Path, planned: Mapping[Path, Record]) -> frozenset[Path]:
    """Those of the planned videos that are finished, after what was half-written is removed.

    Args:
      folder: of the videos.
      planned: the records that they are to have.

    Raises:
      InputError: the folder is of another run; what differs is named.
    """
    records = {Record.place(video): (video, record) for video, record in planned.items()}
    finished = []
    for file in sorted(folder.glob("*.json")):
        found = from_dict(Record, read_record(file, "video"), str(file))
        if file not in records:
            raise InputError(
                f"{folder} is of another run: it has {file.name}, of {found.input!r}, which this "
                f"one does not make; name another folder"
            )
        video, record = records[file]
        planned_now = json.loads(json.dumps(asdict(record)))
        remedy = "name another folder, or the same settings"
        check_same_run(file, asdict(found), planned_now, remedy)
        if video.exists():
            finished.append(video)
    files.remove_partial(folder)
    return frozenset(finished)


def read_record(file: Path, what: str) -> Any:
    """What a run has written of what it makes, as JSON.

    Raises:
      InputError: the file is no record of `what`.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no record of a {what}: {error}") from error


def check_same_run(
    where: Path, was: Mapping[str, Any], now: Mapping[str, Any], remedy: str
) -> None:
    """Raises `InputError`, which names what differs and a remedy, if two records do."""
    if changed := _differences(was, now):
        raise InputError(
            f"{where}: this run is not the one that --resume is to go on with: "
            f"{'; '.join(changed)}; {remedy}"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the records of two runs, in words."""
    changes: list[str] = []
    for name in dict.fromkeys([*was, *now]):
        before, after = was.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += _differences(before, after)
        elif before != after:
            changes.append(f"{name} was {json.dumps(before)}, is {json.dumps(after)}")
    return changes
