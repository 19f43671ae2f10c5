"""What all commands share: exit codes for errors, arguments, inputs, the compilation cache."""

import argparse
import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from qvd_jax import checkpoint, memory
from qvd_jax.data import video_io
from qvd_jax.diffusion.schedules import SOLVERS, SPACINGS, complete, switch
from qvd_jax.errors import InputError
from qvd_jax.files import check_file
from qvd_jax.pipelines.animation import check_motion
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline, check_image
from qvd_jax.pipelines.text import TextPipeline
from qvd_jax.pipelines.text_to_video import check_conditions


class Main(Protocol):
    """The entry point of a command; returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command with `argv`, or with the process's arguments."""


def command(main: Callable[[Sequence[str] | None], None]) -> Main:
    """Makes `main(argv)` return an exit code and print one line instead of a traceback.

    Input errors and failures of the file system end with 2, Ctrl-C and SIGTERM with 130;
    everything else is a defect and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        # Schedulers end a process so; what it was writing is to be cleared away all the same.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_interrupt_again, hook)
        try:
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


def _interrupt_again(otherwise: Callable[[Any], object], lost: Any) -> None:
    """Repeats an interruption that met JAX in the garbage collector, where nobody can catch it."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        otherwise(lost)


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """What runs the command again, quoted for a shell."""
    return f"python -m {module} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def enable_compilation_cache() -> str:
    """Keeps compiled programs between runs, where JAX_COMPILATION_CACHE_DIR says or at home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "qvd_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return place


def restoring(argv: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
    """For a command that loads checkpoints, to need less memory where the process is its own.

    A program that passes `argv` itself keeps its allocator as it is.
    """
    return memory.buffers_freed_at_once() if argv is None else contextlib.nullcontext()


def read_prompts(path: Path) -> list[str]:
    """One prompt for each line that is not blank.

    Raises:
      InputError: the file is missing, no UTF-8, or has no prompt.
    """
    check_file(path, "a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompts; one a line is expected")
    return prompts


class Inputs(NamedTuple):
    """What videos are made from.

    Attributes:
      values: prompts, or images uint8 `[H, W, 3]`.
      names: the prompts, or the names of the images' files.
    """

    values: list[Any]
    names: list[str]


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --prompts-file, --image, --condition and --motion-video."""
    parser.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt a line")
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
        metavar="IMAGE@FRAME",
        help="what a frame is to look like (0 is the first), of a model with SparseCtrl",
    )
    parser.add_argument(
        "--motion-video",
        type=Path,
        metavar="F",
        help="DensePose video, or folder of its frames, of a model that animates images",
    )


def read_conditions(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What --condition and --motion-video say, as arguments of the pipeline's call.

    They are checked before the checkpoint is loaded, which may take a minute.

    Raises:
      InputError: the checkpoint takes none, needs some, or one cannot be read or does not fit the
        videos.
    """
    manifest = checkpoint.read_manifest(path)
    if manifest.takes_motion_video != (args.motion_video is not None):
        raise InputError(
            f"{path} is told no motion; leave --motion-video out"
            if args.motion_video
            else f"{path} animates images; pass --motion-video FILE"
        )
    if manifest.takes_conditions != bool(args.condition):
        raise InputError(
            f"{path} has no SparseCtrl; leave --condition out"
            if args.condition
            else f"{path} has SparseCtrl; pass --condition IMAGE@FRAME"
        )
    if args.motion_video:
        motion = video_io.read_video(args.motion_video)
        check_motion(motion, _wanted(args, path, manifest))
        return {"motion_video": motion}
    if not args.condition:
        return {}
    images, indices = [], []
    for text in args.condition:
        name, _, frame = text.rpartition("@")
        if not name or not frame.isdecimal():
            raise InputError(f"--condition {text}: IMAGE@FRAME is expected, such as first.png@0")
        images.append(video_io.read_image(Path(name)))
        indices.append(int(frame))
    check_conditions(images, indices, _wanted(args, path, manifest))
    return {"conditioning_frames": images, "controlnet_frame_indices": indices}


def read_inputs(args: argparse.Namespace, path: Path) -> Inputs:
    """What the command line gives to a checkpoint, else the checkpoint's own prompts.

    Args:
      args: with `add_input_arguments`, perhaps with --prompt.
      path: the checkpoint's folder.

    Raises:
      InputError: it is none, needs the other kind of input, there is none, or one cannot be read
        or does not fit the videos.
    """
    manifest = checkpoint.read_manifest(path)
    prompts = list(getattr(args, "prompt", []))
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file)
    if manifest.takes_images:
        if prompts:
            raise InputError(f"{path} makes videos from images; pass --image FILE, not prompts")
        if not args.image:
            raise InputError(f"there are no images; {path} needs --image FILE")
        images = [video_io.read_image(file) for file in args.image]
        want = _wanted(args, path, manifest)
        for file, image in zip(args.image, images, strict=True):
            check_image(image, want.height, want.width, str(file))
        return Inputs(images, [file.stem for file in args.image])
    if args.image:
        raise InputError(f"{path} makes videos from prompts; leave --image out")
    prompts = prompts or manifest.example_prompts
    if not prompts:
        raise InputError(
            f"there are no prompts, and {path} has none of its own; pass --prompts-file FILE"
            + (" or --prompt TEXT" if hasattr(args, "prompt") else "")
        )
    return Inputs(prompts, prompts)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says of input errors which of several checkpoints they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _wanted(args: argparse.Namespace, path: Path, manifest: checkpoint.Manifest) -> VideoDefaults:
    """The checkpoint's defaults with the size that is asked for."""
    return replace(
        read_configs(path, manifest).defaults, **passed(args, "frames", "height", "width")
    )


def note_unknown_words(pipe: VideoPipeline, prompts: Sequence[str]) -> None:
    """Prints which words of the prompts a model of text does not know."""
    if isinstance(pipe, TextPipeline):
        for prompt in prompts:
            if unknown := pipe.unknown_words(prompt):
                words = ", ".join(map(repr, unknown))
                print(f"note: the model does not know {words} in {prompt!r}")


def check_same_inputs(names: Sequence[str]) -> None:
    """Refuses checkpoints, or names of the package's, that cannot be given the same inputs.

    Raises:
      InputError: one is no checkpoint, or takes others than the first.
    """
    manifests = [checkpoint.read_manifest(checkpoint.find(name)) for name in names]
    kinds = [(m.takes_images, m.takes_motion_video, m.takes_conditions) for m in manifests]
    for name, manifest, kind in zip(names, manifests, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(
                f"{names[0]} ({manifests[0].family}) and {name} ({manifest.family}) take other "
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


def check_scheduler(name: str, **asked: Any) -> None:
    """Checks what is asked of a checkpoint's scheduler before its arrays are loaded.

    Args:
      name: of the checkpoint.
      **asked: of `asked_scheduler`.

    Raises:
      InputError: the folder is no checkpoint, or what is asked for is not supported.
    """
    path = checkpoint.find(name)
    configs = read_configs(path, checkpoint.read_manifest(path))
    complete(switch(configs.scheduler, **asked))


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
