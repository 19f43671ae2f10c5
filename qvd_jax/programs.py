"""Programs that a machine traces once: kept beside what XLA compiled of them."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jax.sharding import SingleDeviceSharding

from qvd_jax.files import cache_folder, write_bytes

# What a module's code depends on besides this package's own files.
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
# And where they are installed: with them jax finds cuDNN.
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_OWN = frozenset({"qvd_jax", *_PACKAGES, "builtins"})
# jax.export refuses what another jax may call otherwise; a kept program is run by the one it is of.
_KEPT_CALLS = (jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax"),)


def enable_compilation_cache() -> str | None:
    """Keeps compiled programs between processes, unless jax's own settings say otherwise.

    They lie where `jax_compilation_cache_dir` says (JAX_COMPILATION_CACHE_DIR), else in the user's
    cache folder. JAX_ENABLE_COMPILATION_CACHE=false keeps none.

    Returns:
      The folder; None where nothing is kept.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return str(jax.config.values["jax_compilation_cache_dir"])


class Program:
    """A jitted function whose traces are kept between processes.

    JAX's persistent cache spares a process the compilation, but to look a program up the process
    has to trace it first, which for a UNet takes longer than to load the compiled program. So the
    traced program is exported (`jax.export`) to a folder in that cache, under a digest of all that
    a trace depends on: this package's code, versions, jax's settings, the kind and number of
    devices, the static arguments, the shapes of the others. Where any of it cannot be told, where
    `jax.export` does not take the program, where there is no cache, or where arrays lie on several
    devices, the function is `jax.jit` of itself.

    Attributes:
      jitted: the function under `jax.jit`.
      known: the programs of this process, by what they were made for and jax's settings.
    """

    def __init__(
        self, function: Callable[..., Any], static: Sequence[str], donated: Sequence[str] = ()
    ) -> None:
        """Takes a function and the names of its static and of its donated arguments."""
        functools.update_wrapper(self, function)
        self.jitted = jax.jit(function, static_argnames=static, donate_argnames=donated)
        self._function = function
        self._signature = inspect.signature(function)
        self._static, self._donated = tuple(static), tuple(donated)
        self.known: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        static = {name: bound.arguments.pop(name) for name in self._static}
        donated = {name: bound.arguments.pop(name) for name in self._donated}
        arrays = donated, dict(bound.arguments)
        leaves, tree = jax.tree.flatten(arrays)
        place = _folder()
        if place is None or not _lie_on_one_device(leaves):
            return self.jitted(*args, **kwargs)
        known = (*static.items(), tree, *map(_shape, leaves), place, _settings())
        if known not in self.known:
            self.known[known] = self._find(place, static, arrays)
        return self.known[known](*arrays)

    def _find(
        self, place: Path, static: Mapping[str, Any], arrays: tuple[Any, Any]
    ) -> Callable[..., Any]:
        """The program of these arguments, from the folder or into it."""

        def function(donated: Any, others: Any) -> Any:
            return self._function(**static, **donated, **others)

        function.__name__ = self._function.__name__
        traced = jax.jit(function, donate_argnums=0)
        try:
            file = place / f"{self._function.__name__}-{self._digest(static, arrays)}.jaxexport"
        except _UnknownError:
            return traced
        try:
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
        except Exception:  # None is there, or it is damaged.
            try:
                exported = jax.export.export(traced, disabled_checks=_KEPT_CALLS)(*arrays)
            except (ValueError, NotImplementedError):  # An operation that jax.export refuses.
                return traced
            _write(file, exported)

        def call(donated: Any, others: Any) -> Any:
            return exported.call(donated, others)

        call.__name__ = self._function.__name__
        return jax.jit(call, donate_argnums=0)

    def _digest(self, static: Mapping[str, Any], arrays: Any) -> str:
        leaves, tree = jax.tree.flatten(arrays)
        device = jax.local_devices()[0]
        told = [
            _describe(self._function),
            _describe(dict(static)),
            str(tree),
            *map(_shape, leaves),
            f"{device.platform} {device.device_kind} {jax.device_count()} {_cpu_features()}",
            *_settings(),
            code_digest(),
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def program(
    *, static: Sequence[str], donated: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Program]:
    """Decorates a function to be a `Program`."""
    return lambda function: Program(function, static, donated)


class _UnknownError(Exception):
    """What cannot be told apart from others of its kind in another process."""


def _folder() -> Path | None:
    place = jax.config.values["jax_compilation_cache_dir"]
    if not place or "://" in place or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return Path(place) / "programs"


def _shape(leaf: Any) -> str:
    aval = jax.typeof(leaf)
    return f"{aval.shape} {aval.dtype} {aval.weak_type}"


def _lie_on_one_device(leaves: Sequence[Any]) -> bool:
    """Whether these are arrays of the default device or of none, and no tracers."""
    return all(
        not isinstance(leaf, jax.core.Tracer)
        and isinstance(getattr(leaf, "sharding", None), SingleDeviceSharding | type(None))
        for leaf in leaves
    )


def _write(file: Path, exported: jax.export.Exported) -> None:
    """Keeps a program; one that cannot be kept is traced again by the next process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, bytes(exported.serialize()))
    except Exception:  # A full disk, a tree or an operation that jax.export does not write.
        return


def _settings() -> tuple[str, ...]:
    """The settings of jax here, but for those of its cache and its logs."""
    others = ("jax_compilation_cache", "jax_logging_level", "jax_log_compiles")
    values = sorted(jax.config.values.items())
    return tuple(f"{name} {value}" for name, value in values if not name.startswith(others))


@functools.cache
def _cpu_features() -> str:
    """What this CPU can do, by which int8 products are chosen."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def code_digest(*files: str) -> str:
    """Of the versions and this package's code.

    Args:
      files: those of the package that matter; none takes all.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    for name in _PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    digest = hashlib.sha256("\n".join(versions).encode())
    root = Path(__file__).parent
    for file in sorted(map(root.joinpath, files) if files else root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """A text that values have in common only if they are equal, in every process.

    Raises:
      _UnknownError: there is none.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, np.dtype):
        return f"dtype {value.name}"
    if isinstance(value, functools.partial):
        return f"partial({_describe([value.func, value.args, value.keywords])})"
    if isinstance(value, type) or inspect.isroutine(value):
        name = f"{value.__module__}.{value.__qualname__}"
        if name.split(".")[0] not in _OWN or "<" in name:
            raise _UnknownError(name)
        return name
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_describe(type(value))}({_describe(parts)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_describe, value))}]"
    raise _UnknownError(repr(value))
