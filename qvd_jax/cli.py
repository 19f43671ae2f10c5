"""What all commands share: exit codes for errors, arguments, prompts, the compilation cache."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from qvd_jax.errors import InputError


class Main(Protocol):
    """The entry point of a command; returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command with `argv`, or with the process's arguments."""


def command(main: Callable[[Sequence[str] | None], None]) -> Main:
    """Makes `main(argv)` return an exit code and print one line instead of a traceback.

    Input errors and failures of the file system end with 2, Ctrl-C with 130; everything else is
    a defect and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; nothing half-written is left", file=sys.stderr)
            return 130
        return 0

    return wrapped


def enable_compilation_cache() -> str:
    """Keeps compiled programs between runs, where JAX_COMPILATION_CACHE_DIR says or at home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "qvd_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return place


def read_prompts(path: Path) -> list[str]:
    """One prompt for each line that is not blank.

    Raises:
      InputError: the file is missing, no UTF-8, or has no prompt.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; a text file with one prompt a line is expected")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompts; one a line is expected")
    return prompts


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --frames, --height and --width, None where the checkpoint decides."""
    parser.add_argument("--frames", type=positive_int, metavar="F")
    parser.add_argument("--height", type=positive_int, metavar="H", help="in pixels")
    parser.add_argument("--width", type=positive_int, metavar="W", help="in pixels")


def passed(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that were passed."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
