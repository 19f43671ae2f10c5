"""Writing files and folders whole or not at all, and reading arrays that may be damaged."""

import contextlib
import io
import itertools
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvd_jax.errors import InputError, first_line

_NPY = b"\x93NUMPY"
_PARTIAL = ".partial-"


def cache_folder() -> Path:
    """Where what can be made again is kept between processes: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvd_jax"


def check_file(path: Path, expected: str = "a file") -> None:
    """Raises `InputError` if there is no file to read at `path`."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {found}; {expected} is expected")


def check_readable(path: Path, expected: str) -> None:
    """Raises `InputError` if nothing can be read at `path`, a file or a pipe."""
    if path.is_dir() or not path.exists():
        check_file(path, expected)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raises `InputError` if no file can be written at `path`."""
    _check_parent(path)
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


def check_folder(path: Path, mark: str, *, overwrite: bool) -> None:
    """Raises `InputError` if `write_folder` cannot write at `path`.

    Args:
      path: of the folder; an empty one may be there.
      mark: name of a file that every folder of its kind has: no other kind is replaced.
      overwrite: whether one of its kind is replaced.
    """
    _check_parent(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise InputError(f"{path} is a file; name a folder")
    if not (path / mark).is_file():
        raise InputError(f"{path} holds other files and no {mark}; name another folder")
    if not overwrite:
        raise InputError(f"{path} exists already; pass --overwrite (overwrite=True) to replace it")


def check_apart(outputs: Mapping[str, Path]) -> None:
    """Raises `InputError` if one folder would lie in another, which replaces it or mixes with it.

    Args:
      outputs: folders to write, by the options that name them.
    """
    for (first, one), (second, other) in itertools.combinations(outputs.items(), 2):
        if _holds(one, other) or _holds(other, one):
            raise InputError(f"{first} {one} and {second} {other}: name folders apart")


def check_spared(output: str, folder: Path, inputs: Iterable[Path]) -> None:
    """Raises `InputError` if a folder that is replaced holds what is read.

    Args:
      output: the option that names the folder.
      folder: to write.
      inputs: files and folders to read.
    """
    for place in inputs:
        if _holds(folder, place):
            raise InputError(f"{output} {folder} would replace {place}; name another folder")


def _holds(folder: Path, place: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def check_keepable(folder: Path) -> None:
    """Raises `InputError` if nothing can be kept in a folder, there or to be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{folder} cannot be made: {there} is a file; name another folder")
    _check_permission(folder, there)


@contextlib.contextmanager
def write_folder(path: Path, mark: str, *, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `path` when the block ends without an error.

    Args:
      path: the final place.
      mark: as in `check_folder`.
      overwrite: whether a folder of its kind is replaced.

    Raises:
      InputError: as `check_folder`, or it could not be written; a folder that was there stays.
    """
    check_folder(path, mark, overwrite=overwrite)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if (path / mark).exists():
            _replace_folder(path, partial)
        else:
            partial.rename(path)
    except InputError as error:
        # Nobody knows the place it was written in.
        raise InputError(str(error).replace(str(partial), str(path))) from error
    except OSError as error:
        raise InputError(f"{path} could not be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Puts a folder in another's place; the other keeps its name if that fails."""
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    old = retired / path.name
    try:
        path.rename(old)
        new.rename(path)
    finally:
        if not path.exists():
            old.rename(path)
        shutil.rmtree(retired, ignore_errors=True)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
      InputError: it is missing or damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is damaged: {first_line(error)}") from error


def read_array(file: Path) -> np.ndarray:
    """The array of an .npy file, or the only one of a .safetensors file.

    Raises:
      InputError: it is missing, damaged, of another kind, or holds another number of arrays.
    """
    check_readable(file, "an .npy or .safetensors file")
    # What comes from a pipe has no suffix, and can be read once.
    data = file.read_bytes()
    if file.suffix == ".npy" or data.startswith(_NPY):
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file} is damaged: {first_line(error)}") from error
    if file.suffix != ".safetensors" and data[8:9] != b"{":
        raise InputError(f"{file}: arrays are read from .npy and .safetensors")
    import safetensors.numpy

    try:
        found = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is damaged: {first_line(error)}") from error
    if len(found) != 1:
        raise InputError(
            f"{file} holds {', '.join(sorted(found)) or 'nothing'}; one array is needed"
        )
    return next(iter(found.values()))


def replace_when_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside `path`, and puts it there once it is whole.

    Args:
      path: its final place.
      write: writes the file it is given the place of, with the same suffix.

    Raises:
      InputError: it could not be written; a file that was there stays.
    """
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        write(partial)
        partial.chmod(0o644)
        partial.replace(path)
    # RuntimeError: what imageio raises when ffmpeg fails.
    except (OSError, RuntimeError) as error:
        # The place of the file beside it is nothing the user gave.
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} could not be written: {reason}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Removes the files that a killed process was writing in a folder, where nobody else writes."""
    for file in folder.glob(f"{_PARTIAL}*"):
        file.unlink(missing_ok=True)


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


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first")
    _check_permission(path, path.parent)


def _check_permission(path: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: no permission to write in {folder}")
