"""Writing files whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qvd_jax.errors import InputError, first_line


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raises `InputError` if no file can be written at `path`."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: no permission to write in {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; pass --overwrite to replace it")


def check_fillable(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Raises `InputError` if a folder, there or to be made, cannot take files of these names."""
    if not folder.exists():
        check_writable(folder, overwrite=overwrite)
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    for name in names:
        check_writable(folder / name, overwrite=overwrite)


def replace_when_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside `path`, and puts it there once it is whole.

    Args:
      path: its final place.
      write: writes the file it is given the place of, with the same suffix.

    Raises:
      InputError: it could not be written; a file that was there stays.
    """
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o644)
        partial.replace(path)
    # RuntimeError: what imageio raises when ffmpeg fails.
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} could not be written: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file.

    Raises:
      InputError: it could not be written; a file that was there stays.
    """
    replace_when_whole(path, lambda partial: partial.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8.

    Raises:
      InputError: it could not be written; a file that was there stays.
    """
    write_bytes(path, text.encode())
