"""Reading tensors from pickles without running anything that is in them.

A pickle names functions and classes that are called on loading. Here a name gives a tensor, a plain
container, or a stand-in that swallows whatever it is told; any other name refuses the file.
"""

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from qvd_jax.errors import InputError, first_line

_HARMLESS: dict[str, tuple[str, ...]] = {
    "_codecs": ("encode",),
    "argparse": ("Namespace",),
    "builtins": (
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
        *("object", "range", "set", "slice", "str", "tuple", "type"),
    ),
    "collections": ("Counter", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "torch": ("device",),
    "torch.serialization": ("_get_layout",),
    "types": ("SimpleNamespace",),
    "typing": ("Any",),
    "uuid": ("UUID",),
}
"""What training leaves beside weights: names of which a stand-in is made."""

_SAME = {
    "numpy._core.multiarray": "numpy.core.multiarray",
    "pathlib._local": "pathlib",
}
"""Names that modules have had in other versions."""

_HARMLESS_PACKAGES = (
    *("addict", "easydict", "lightning", "lightning_fabric", "ml_collections", "numpy.dtypes"),
    *("omegaconf", "pytorch_lightning", "yacs"),
)
"""Packages of settings and of training, all of whose names get stand-ins."""


class _StandIn:
    """Takes the place of an object beside the weights and of its class; keeps nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def __call__(self, *arguments: Any) -> "_StandIn":
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def update(self, items: Any) -> None: ...


class _Parameters(OrderedDict[str, Any]):
    """A `torch.nn.ParameterDict` of any version, as the plain table that it is."""


def load(path: Path) -> Any:
    """The content of a pickle of PyTorch; its tensors are mapped from the file where they can be.

    Raises:
      InputError: the file is truncated, no pickle of tensors, or holds code.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a pickle: pip install 'qvd_jax[convert]' to read it"
        ) from error

    module = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, load=_load)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": False}
    try:
        try:
            # PyTorch reads what is called so by another way.
            if path.suffix == ".safetensors":
                with path.open("rb") as file:
                    return torch.load(file, pickle_module=module, **options)
            return torch.load(path, pickle_module=module, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files of PyTorch before 1.6 cannot be mapped.
            return torch.load(path, pickle_module=module, **options)
    except _Refused as error:
        raise InputError(
            f"{path} is refused: it holds more than tensors, and code in it would run on loading "
            f"({error})"
        ) from error
    except Exception as error:  # A damaged pickle can make the unpickler raise anything.
        raise InputError(
            f"{path} is truncated or no pickle of tensors: {first_line(error)}"
        ) from error


class _Refused(pickle.UnpicklingError):
    """A name that is none of those known; the message is the name."""


# The one of C sets aside memory for whatever number a damaged file names.
class _Unpickler(pickle._Unpickler):
    """Resolves names by the tables above alone."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
          UnpicklingError: for nothing that is known.
        """
        import torch

        # Protocol 2 writes some names as Python 2 had them.
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.nn.modules.container", "ParameterDict"):
            return _Parameters
        if name == "UntypedStorage" and module in ("torch", "torch.storage"):
            return torch.UntypedStorage
        if module == "torch._utils" and name in _rebuilders():
            return _rebuilders()[name]
        module = _SAME.get(module, module)
        packages = (
            package for package in _HARMLESS_PACKAGES if f"{module}.".startswith(package + ".")
        )
        if name in _HARMLESS.get(module, ()) or any(packages):
            return _StandIn
        raise _Refused(f"{module}.{name}")

    def load_build(self) -> None:
        """Leaves an object's state out: of what is used only tables of parameters have one."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(found := self.stack[-1], _Parameters):  # type: ignore[attr-defined]
            found.update(state["_parameters"])

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _load(file: io.BufferedIOBase, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _rebuilders() -> dict[str, Callable[..., Any]]:
    """What makes tensors, as functions of its own for every name that is met.

    A pickle can set attributes of what it names; PyTorch's own functions stay out of its reach.
    """
    import torch

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def tensor_of_type(
        storage: Any,
        offset: int,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        *_: Any,
    ) -> Any:
        return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, {}, dtype)

    def parameter(data: Any, *rest: Any) -> Any:
        return data

    return {
        "_rebuild_tensor": tensor,
        "_rebuild_tensor_v2": tensor,
        "_rebuild_tensor_v3": tensor_of_type,
        "_rebuild_parameter": parameter,
        "_rebuild_parameter_with_state": parameter,
    }
