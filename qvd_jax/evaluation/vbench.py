"""Videos in the files that VBench reads (Huang et al., arXiv 2311.17982): `PROMPT-INDEX.mp4`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qvd_jax.data import video_io
from qvd_jax.errors import InputError
from qvd_jax.files import write_folder

PROMPTS = "prompts.json"
"""Name of the file that says which prompt each video has; a folder that has one is of videos."""

_LONGEST_NAME = 255  # bytes, of most file systems


def file_names(prompts: Sequence[str], seeds: int) -> list[str]:
    """The name of each video, seed by seed; a prompt that comes again counts on.

    Raises:
      InputError: a prompt cannot be a file's name; VBench takes the prompt from it.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in seeds * list(prompts):
        name = f"{prompt}-{seen[prompt]}.mp4"
        seen[prompt] += 1
        if "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
            raise InputError(
                f"VBench takes prompts from files' names, and {name!r} cannot be one: it has a "
                f"slash, or more than {_LONGEST_NAME} bytes"
            )
        names.append(name)
    return names


def write_videos(
    folder: Path,
    videos: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    fps: float,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the videos of models, each in a folder of its own.

    Args:
      folder: to make.
      videos: of each model by the name of its folder, uint8 `[N, F, H, W, 3]`, seed by seed.
      prompts: of the videos of one seed.
      fps: frames per second.
      overwrite: whether such a folder is replaced.

    Raises:
      InputError: a prompt cannot be a file's name, or the folder could not be written.
    """
    said = {}
    with write_folder(folder, PROMPTS, overwrite=overwrite) as partial:
        for model, shown in videos.items():
            (partial / model).mkdir()
            seeds = len(shown) // len(prompts)
            names = file_names(prompts, seeds)
            for name, video, prompt in zip(names, shown, seeds * list(prompts), strict=True):
                video_io.write_video(partial / model / name, video, fps)
                said[f"{model}/{name}"] = prompt
        (partial / PROMPTS).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
