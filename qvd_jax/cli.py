"""What all commands share: exit codes for errors, arguments, inputs, the compilation cache."""

import argparse
import contextlib
import functools
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

import qvd_jax
from qvd_jax import files, memory
from qvd_jax.data import video_io
from qvd_jax.data.prompts import read_prompts
from qvd_jax.diffusion.schedules import SOLVERS, SPACINGS, switch
from qvd_jax.errors import InputError, naming
from qvd_jax.pipelines.animation import check_motion
from qvd_jax.pipelines.images import check_image
from qvd_jax.pipelines.loading import CheckpointConfigs, read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.text import as_embeds
from qvd_jax.pipelines.text_to_video import (
    TextToVideoPipeline,
    check_control_images,
    check_control_video,
    check_scale,
)
from qvd_jax.quiet import libraries_quiet


class Main(Protocol):
    """The entry point of a command; returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command with `argv`, or with the process's arguments."""


def command(main: Callable[[Sequence[str] | None], None]) -> Main:
    """Makes `main(argv)` return an exit code and print one line instead of a traceback.

    Input errors and failures of the file system end with 2, Ctrl-C and SIGTERM with 130;
    everything else is a defect and keeps its traceback. What the library logs becomes notes, what
    others say of themselves is left out where the process is the command's own.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        # Schedulers end a process so; what it was writing is to be cleared away all the same.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_interrupt_again, hook)
        try:
            # A program that passes `argv` keeps its libraries as they are.
            with libraries_quiet() if argv is None else contextlib.nullcontext(), _notes():
                main(argv)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; nothing half-written is left", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.unraisablehook = hook
        return 0

    return wrapped


class _Notes(logging.Handler):
    """Prints what is logged, the same once: warnings as notes, errors where errors stand."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message that was not printed before."""
        message = record.getMessage()
        if message not in self._seen:
            self._seen.add(message)
            if record.levelno >= logging.ERROR:
                print(f"WARNING: {message}", file=sys.stderr)
            else:
                print(f"note: {message}")


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Prints what the library logs, here alone."""
    logger, handler = logging.getLogger("qvd_jax"), _Notes()
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _interrupt_again(otherwise: Callable[[Any], object], lost: Any) -> None:
    """Repeats an interruption that met JAX in the garbage collector, where nobody can catch it."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        otherwise(lost)


def program(module: str) -> str:
    """What a command is called: by `qvd`, which then names itself and its verb, or by Python."""
    called = sys.argv[0]
    return called if called.startswith("qvd ") else f"python -m {module}"


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, which can tell its version.

    Args:
      module: which Python can run as the command.
      description: what the command does.
    """
    parser = argparse.ArgumentParser(prog=program(module), description=description)
    parser.add_argument("--version", action="version", version=f"qvd_jax {qvd_jax.__version__}")
    return parser


def given_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *known: str
) -> list[str]:
    """The arguments that were passed, beyond those that are known.

    Args:
      parser: of the command.
      args: what it parsed.
      known: names of arguments in `args`.
    """
    return [
        action.option_strings[0] if action.option_strings else str(action.metavar)
        for action in parser._actions
        if action.dest not in (*known, "help", "version")
        and getattr(args, action.dest) != action.default
    ]


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """What runs the command again, quoted for a shell."""
    return f"{program(module)} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def restoring(argv: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
    """For a command that loads checkpoints, to need less memory where the process is its own.

    A program that passes `argv` itself keeps its allocator as it is.
    """
    return memory.buffers_freed_at_once() if argv is None else contextlib.nullcontext()


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


_CONTROL_SCALE = {
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}
"""How a ControlNet is weighed, with the defaults of the pipeline's call."""


_CONTROLS = {
    "images": "has SparseCtrl; pass --condition IMAGE@FRAME",
    "video": "has a ControlNet; pass --condition VIDEO",
    "motion": "animates images; pass --motion-video FILE",
}
"""What a checkpoint is, by what its videos follow, and how it is given that."""


def read_control(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What --condition and --motion-video say, as arguments of the pipeline's call.

    They are checked before the checkpoint is loaded, which may take a minute.

    Raises:
      InputError: the checkpoint takes none, needs some, or one cannot be read or does not fit the
        videos.
    """
    configs = read_configs(path)
    control = configs.takes.control
    if args.motion_video and control != "motion":
        raise InputError(f"{path} follows no --motion-video; leave it out")
    if args.condition and control not in ("images", "video"):
        raise InputError(f"{path} follows no --condition; leave it out")
    if control is not None and not args.motion_video and not args.condition:
        raise InputError(f"{path} {_CONTROLS[control]}")
    scale = passed(args, *_CONTROL_SCALE)
    if scale and not args.condition:
        option = next(iter(scale)).replace("_", "-")
        raise InputError(f"{path} follows no --condition; leave --{option} out")
    check_scale(*({**_CONTROL_SCALE, **scale}.values()))
    want = _wanted(args, configs)
    if control == "motion":
        motion = video_io.read_video(args.motion_video)
        check_motion(list(motion), want)
        return {"motion_video": _first_frames(motion, want, str(args.motion_video))}
    if control == "video":
        shown = _first_frames(_read_control_video(args.condition), want, " ".join(args.condition))
        check_control_video(list(shown), (), want)
        return {"conditioning_frames": shown, **scale}
    if not args.condition:
        return {}
    images, indices = [], []
    for text in args.condition:
        name, _, frame = text.rpartition("@")
        if not name or not frame.isdecimal():
            raise InputError(f"--condition {text}: IMAGE@FRAME is expected, such as first.png@0")
        images.append(video_io.read_image(Path(name)))
        indices.append(int(frame))
    check_control_images(images, indices, want)
    return {"conditioning_frames": images, "controlnet_frame_indices": indices, **scale}


def _read_control_video(names: Sequence[str]) -> np.ndarray:
    """Frames `[F, H, W, 3]`: of a video, of a folder of images, or images one by one."""
    paths = [Path(name) for name in names]
    for path in paths:
        file, _, frame = path.name.rpartition("@")
        if file and frame.isdecimal() and not path.exists():
            raise InputError(
                f"--condition {path}: @FRAME is for SparseCtrl; an ordinary ControlNet follows "
                f"every frame of a video, a folder or as many images"
            )
    if len(paths) == 1:
        return video_io.read_video(paths[0])
    images = [video_io.read_image(path) for path in paths]
    height, width = images[0].shape[:2]
    for path, image in zip(paths, images, strict=True):
        check_image(image, height, width, str(path))
    return np.stack(images)


def _first_frames(video: np.ndarray, want: VideoDefaults, name: str) -> np.ndarray:
    """As many frames as are wanted; what is left out is said."""
    if len(video) > want.frames:
        print(f"note: {name} has {len(video)} frames; the first {want.frames} are used")
    return video[: want.frames]


def control_fps(args: argparse.Namespace) -> float | None:
    """Frames per second of the video that is followed; None without one."""
    shown = [args.motion_video] if args.motion_video else args.condition
    path = Path(shown[0]) if len(shown) == 1 else None
    if path is not None and path.is_fifo():
        print(f"note: {path} is a pipe and read once: its frame rate is not taken; see --fps")
    return video_io.read_fps(path) if path is not None and path.is_file() else None


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
        want = _wanted(args, configs)
        for file, image in zip(args.image, images, strict=True):
            check_image(image, want.height, want.width, str(file))
        return Inputs(images, [file.stem for file in args.image])
    if args.image:
        raise InputError(f"{path} makes videos from prompts; leave --image out")
    if "prompt_embeds" in embeds:
        if prompts:
            raise InputError("--prompt-embeds stand in the place of prompts; leave these out")
        count = len(embeds["prompt_embeds"])
        return Inputs([], [f"{args.prompt_embeds.stem}-{i}" for i in range(count)], embeds)
    prompts = prompts or list(configs.defaults.prompts)
    if not prompts:
        raise InputError(
            f"there are no prompts, and {path} has none of its own; pass --prompt TEXT or "
            f"--prompts-file FILE"
        )
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


def _wanted(args: argparse.Namespace, configs: CheckpointConfigs) -> VideoDefaults:
    """The checkpoint's defaults with the size that is asked for."""
    return replace(configs.defaults, **passed(args, "frames", "height", "width"))


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


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --frames, --height and --width, None where the checkpoint decides."""
    parser.add_argument("--frames", type=positive_int, metavar="F", help="of a video")
    parser.add_argument("--height", type=positive_int, metavar="H", help="in pixels")
    parser.add_argument("--width", type=positive_int, metavar="W", help="in pixels")


def add_sampler_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --steps, --scheduler, --karras and --timestep-spacing, None for the checkpoint's."""
    parser.add_argument("--steps", type=positive_int, metavar="N", help=f"({default})")
    parser.add_argument("--scheduler", choices=SOLVERS, help=f"({default})")
    parser.add_argument(
        "--karras",
        action=argparse.BooleanOptionalAction,
        help="noise levels of Karras et al. (the checkpoint's own)",
    )
    parser.add_argument(
        "--timestep-spacing",
        choices=SPACINGS,
        help="how the steps lie over time (the checkpoint's own)",
    )


def asked_scheduler(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of the scheduler, as arguments of `with_scheduler`."""
    return {
        "solver": args.scheduler,
        "karras": args.karras,
        "timestep_spacing": args.timestep_spacing,
    }


def check_videos(
    names: Sequence[str], args: argparse.Namespace, like: str, **asked: Any
) -> VideoDefaults:
    """Checks sizes, steps and schedulers before the arrays of any checkpoint are loaded.

    Args:
      names: of the checkpoints.
      args: of `add_size_arguments` and `add_sampler_arguments`.
      like: the checkpoint whose defaults stand for what the command line does not say.
      **asked: of `asked_scheduler`.

    Returns:
      What all videos are to be like.

    Raises:
      InputError: a folder is no checkpoint, or what is asked for does not fit.
    """
    defaults = read_configs(like).defaults
    want = replace(defaults, **passed(args, "frames", "height", "width", "steps"))
    for name in names:
        with naming(name):
            configs = read_configs(name)
            configs.check(want, switch(configs.scheduler, **asked))
    return want


def passed(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that were passed."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def seed_int(text: str) -> int:
    """An argparse type: a seed, of 32 bits."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is no seed; 0 to {2**32 - 1} are")
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
