"""What makes a command of a function: exit codes for errors, notes, arguments of all kinds."""

import argparse
import contextlib
import functools
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import qvd_jax
from qvd_jax import memory
from qvd_jax.config import check_seed
from qvd_jax.errors import InputError
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


def passed(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the named arguments that were passed."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def seed_int(text: str) -> int:
    """An argparse type: a seed, of 32 bits."""
    value = int(text)
    try:
        return check_seed(value)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
