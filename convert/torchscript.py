"""Reading the tensors of a TorchScript program without running it.

Its archive holds a pickle of modules, whose classes are TorchScript's own, and one file for each
storage. A module becomes the table of its attributes; a name that is none of those below refuses
the file.
"""

import functools
import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qvd_jax.errors import InputError, first_line

from .tensors import LazyTensor, Tensors

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}

_EPSILON = re.compile(
    # Of a scripted module, and of a traced one, where it follows the momentum.
    r"eps : Final\[float\] = ([\d.e+-]+)|torch\.batch_norm\([^()]*, [\d.e+-]+, ([\d.e+-]+), \w+\)"
)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load(path: Path) -> tuple[Tensors, float | None]:
    """The tensors of a program by their modules' names, and the epsilon of its batch norms.

    Raises:
      InputError: the file is damaged, holds something else, or batch norms of several epsilons.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/data.pkl"))[
                : -len("data.pkl")
            ]
            code = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")]
            program = _Unpickler(archive, root).load()
    except Exception as error:  # A damaged pickle can make the unpickler raise anything.
        raise InputError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error
    found = {float(a or b) for text in code for a, b in _EPSILON.findall(text)}
    if len(found) > 1:
        raise InputError(f"{path} has batch norms of epsilon {', '.join(map(str, sorted(found)))}")
    return dict(_tensors(program, "")), next(iter(found), None)


class _Module(dict[str, Any]):
    """A module as the table of its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, LazyTensor]]:
    for name, value in module.items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray):
            yield f"{prefix}{name}", LazyTensor(value.shape, functools.partial(np.asarray, value))


# The one of C sets aside memory for whatever number a damaged file names.
class _Unpickler(pickle._Unpickler):
    """Makes modules of tables and tensors of arrays, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
          UnpicklingError: for nothing that is known.
        """
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle":
            return _first
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage as a flat array."""
        _, dtype, key, *_ = pid
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype)


def _rebuild(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    needed = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and not 0 <= offset < needed <= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _first(value: Any, *_: Any) -> Any:
    """What lists are tagged with their types by."""
    return value
