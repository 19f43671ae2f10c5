"""Keeps from those who run a command what other libraries say about themselves.

Nothing that tells of a failure is among it. Who looks for PyTorch or for a TPU is told that there
is none; XLA alone cannot be told, and its remarks are left out of the standard error.
"""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from qvd_jax import accelerators, remarks

_ACCELERATORS = (*itertools.chain(*accelerators.DEVICES.values()), "nvidiactl", "kfd")
"""Under /dev, those of AMD's GPUs as well."""


@contextlib.contextmanager
def libraries_quiet() -> Iterator[None]:
    """For a process of a command's own, from before JAX has its backends."""
    # Of transformers the tokenizers alone are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms is None and _lacks_tpu(Path("/dev")):
        jax.config.update("jax_platforms", "cpu")
        # For processes that this one starts.
        os.environ["JAX_PLATFORMS"] = "cpu"
    with _remarks_left_out():
        yield


def _lacks_tpu(devices: Path) -> bool:
    """Whether libtpu would look for a TPU for seconds, and write pages on what it lacks."""
    if importlib.util.find_spec("libtpu") is None or not devices.is_dir():
        return False
    return not any(any(devices.glob(pattern)) for pattern in _ACCELERATORS)


@contextlib.contextmanager
def _remarks_left_out() -> Iterator[None]:
    """Sends what libraries write to file descriptor 2 through `remarks`, not what Python writes.

    That is a process of its own, so that the last words of one that crashes come through, too.
    """
    before, python_stderr = os.dup(2), sys.stderr
    filtering = subprocess.Popen(
        [sys.executable, "-I", "-S", remarks.__file__],
        stdin=subprocess.PIPE,
        stdout=before,
        # Ctrl-C is for the command alone.
        start_new_session=True,
    )
    assert filtering.stdin is not None
    os.dup2(filtering.stdin.fileno(), 2)
    filtering.stdin.close()
    with os.fdopen(before, "w", buffering=1, errors="backslashreplace") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = python_stderr
            os.dup2(before, 2)
            # Another process of this one's may hold the pipe for longer.
            with contextlib.suppress(subprocess.TimeoutExpired):
                filtering.wait(timeout=1)
