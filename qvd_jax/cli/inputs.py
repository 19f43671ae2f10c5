"""The prompts, embeddings and images that commands are given."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qvd_jax import files
from qvd_jax.cli.videos import wanted
from qvd_jax.data import video_io
from qvd_jax.data.prompts import read_prompts
from qvd_jax.errors import InputError
from qvd_jax.pipelines.images import check_image
from qvd_jax.pipelines.loading import CheckpointConfigs, read_configs
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.pipelines.text import as_embeds
from qvd_jax.pipelines.text_to_video import (
    TextToVideoPipeline,
)


class Inputs(NamedTuple):
    """What videos are made from.

    Attributes:
      values: prompts, or images uint8 `[H, W, 3]`; none where text embeddings are given.
      names: the prompts, or the names of the images' or the embeddings' files.
      options: embeddings, as arguments of the pipeline's call.
    """

    values: list[Any]
    names: list[str]
    options: Mapping[str, np.ndarray] = MappingProxyType({})

    def take(self, indices: Sequence[int]) -> "Inputs":
        """Those of some indices; an embedding that is for all goes with each."""
        options = {
            name: rows if len(rows) == 1 else rows[[*indices]]
            for name, rows in self.options.items()
        }
        values = [self.values[i] for i in indices] if self.values else []
        return Inputs(values, [self.names[i] for i in indices], options)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --prompt, --prompts-file, --image, --condition and --motion-video."""
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="one video each")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="F|NAME",
        help="one prompt a line; the small model was calibrated with the package's (shapes)",
    )
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        metavar="F",
        help="one video each, of a model that makes videos from images",
    )
    parser.add_argument(
        "--condition",
        nargs="+",
        default=[],
        metavar="IMAGE@FRAME|VIDEO",
        help="of a model with SparseCtrl what a frame is to look like (0 is the first); with an "
        "ordinary ControlNet the video, folder or images that its frames follow",
    )
    parser.add_argument(
        "--controlnet-conditioning-scale",
        type=float,
        metavar="X",
        help="factor of what the ControlNet adds (1)",
    )
    parser.add_argument(
        "--control-guidance-start",
        type=float,
        metavar="X",
        help="share of the steps before it begins to add (0)",
    )
    parser.add_argument(
        "--control-guidance-end",
        type=float,
        metavar="X",
        help="share of the steps after which it no longer adds (1)",
    )
    parser.add_argument(
        "--motion-video",
        type=Path,
        metavar="F",
        help="DensePose video, or folder of its frames, of a model that animates images",
    )


def read_inputs(args: argparse.Namespace, path: Path) -> Inputs:
    """What the command line gives to a checkpoint, else the checkpoint's own prompts.

    Args:
      args: of `add_input_arguments`.
      path: the checkpoint's folder.

    Raises:
      InputError: it is none, needs the other kind of input, there is none, or one cannot be read
        or does not fit the videos.
    """
    configs = read_configs(path)
    embeds = _read_embeds(args, path, configs)
    prompts = list(args.prompt)
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file)
    if configs.takes.inputs == "images":
        if prompts:
            raise InputError(f"{path} makes videos from images; pass --image FILE, not prompts")
        if not args.image:
            raise InputError(f"there are no images; {path} needs --image FILE")
        images = [video_io.read_image(file) for file in args.image]
        want = wanted(args, configs)
        for file, image in zip(args.image, images, strict=True):
            check_image(image, want.height, want.width, str(file))
        return Inputs(images, [file.stem for file in args.image])
    if args.image:
        raise InputError(f"{path} makes videos from prompts; leave --image out")
    if "prompt_embeds" in embeds:
        if prompts:
            raise InputError("--prompt-embeds stand in the place of prompts; leave these out")
        count = len(embeds["prompt_embeds"])
        _check_negatives(embeds, count)
        return Inputs([], [f"{args.prompt_embeds.stem}-{i}" for i in range(count)], embeds)
    prompts = prompts or list(configs.defaults.prompts)
    if not prompts:
        raise InputError(
            f"there are no prompts, and {path} has none of its own; pass --prompt TEXT or "
            f"--prompts-file FILE"
        )
    _check_negatives(embeds, len(prompts))
    return Inputs(prompts, prompts, embeds)


def _read_embeds(
    args: argparse.Namespace, path: Path, configs: CheckpointConfigs
) -> dict[str, np.ndarray]:
    """Text embeddings `[B, L, C]` of files, by their name in the pipeline's call."""
    found = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        file = getattr(args, name, None)
        if file is not None:
            option = f"--{name.replace('_', '-')}"
            if configs.takes.inputs == "images":
                raise InputError(f"{path} makes videos from images; leave {option} out")
            width = configs.components.unet.context_dim
            found[name] = as_embeds(files.read_array(file), f"{option} {file}", width)
    if "negative_prompt_embeds" in found and args.negative_prompts:
        raise InputError("--negative-prompt-embeds stand in the place of --negative-prompt")
    return found


def _check_negatives(embeds: Mapping[str, np.ndarray], count: int) -> None:
    """Raises `InputError` unless there is none, one for all, or one for each of so many videos."""
    negatives = embeds.get("negative_prompt_embeds")
    if negatives is not None and len(negatives) not in (1, count):
        raise InputError(
            f"--negative-prompt-embeds holds {len(negatives)} for {count} videos: one, or one for "
            f"each is needed"
        )


def note_unknown_words(pipe: VideoPipeline, prompts: Sequence[str]) -> None:
    """Prints which words of its prompts a model does not know, and which it cuts."""
    if isinstance(pipe, TextToVideoPipeline) and prompts:
        for prompt in prompts:
            if unknown := pipe.unknown_words(prompt):
                words = ", ".join(map(repr, unknown))
                print(f"note: the model does not know {words} in {prompt!r}")
        pipe.token_ids(prompts)


def check_same_inputs(names: Sequence[str]) -> None:
    """Refuses checkpoints, or names of the package's, that cannot be given the same inputs.

    Raises:
      InputError: one is no checkpoint, or takes others than the first.
    """
    first, *others = (read_configs(name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        if other.takes != first.takes:
            raise InputError(
                f"{names[0]} ({first.family.title}) and {name} ({other.family.title}) take other "
                f"inputs; they cannot be shown side by side"
            )
