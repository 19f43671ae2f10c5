"""What all commands share: exit codes instead of tracebacks, and argument types."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

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


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
