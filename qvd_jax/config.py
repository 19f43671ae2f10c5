"""Frozen dataclasses from untrusted dictionaries, strictly."""

import dataclasses
import difflib
import math
import operator
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from qvd_jax.errors import InputError
from qvd_jax.files import check_readable

T = TypeVar("T")

_WORDS_SHOWN = 30


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Builds the dataclass `cls` from parsed JSON or YAML.

    Args:
      cls: a dataclass; fields may be scalars, literals, tuples, optionals and dataclasses.
      data: the mapping to read; lists stand for tuples.
      where: how messages name the place, for instance "DIR/manifest.json: unet".

    Raises:
      InputError: an unknown key (with the nearest known one), a missing one, or a value of
        another type.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: a mapping is needed, got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in data:
            raise InputError(f"{where}: key {name!r} is missing")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(value, hints[key], f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises `InputError` if an argument is none of its choices."""
    if value not in choices:
        raise InputError(f"{name} = {value!r}: it must be one of {', '.join(choices)}")


def check_integer(name: str, value: Any, low: int | None = None) -> int:
    """An argument as Python's integer.

    Args:
      name: of the argument.
      value: of any kind.
      low: the least it may be; None is no limit.

    Raises:
      InputError: it is no integer, or less.
    """
    # bool is a subclass of int, but `True` is no number here.
    number: Any = None if isinstance(value, bool) else value
    try:
        found = operator.index(number)
    except TypeError as error:
        raise InputError(f"{name} = {value!r}: an integer is needed") from error
    if low is not None and found < low:
        raise InputError(f"{name} = {found}: at least {low} is needed")
    return found


def check_finite(name: str, value: Any) -> None:
    """Raises `InputError` if an argument is no finite number."""
    try:
        finite = math.isfinite(value)
    except TypeError as error:
        raise InputError(f"{name} = {value!r}: a number is needed") from error
    if not finite:
        raise InputError(f"{name} = {value}: it must be finite")


def check_seed(seed: Any, count: int = 1, each: int = 1) -> int:
    """A seed as Python's integer; beyond 32 bits `jax.random.key` gives the key of another.

    Args:
      seed: the first.
      count: how many there are, one after the other.
      each: how many of 32 bits each of them is divided into.

    Raises:
      InputError: it, or one behind it, is none of 32 bits.
    """
    seed, last = check_integer("seed", seed), 2**32 // each - count
    if not 0 <= seed <= last:
        raise InputError(f"seed = {seed}: 0 to {last} is needed")
    return seed


def read_yaml(path: Path) -> Any:
    """Parses a YAML file.

    Raises:
      InputError: the file is missing, no YAML, or has a key of one mapping twice.
    """
    check_readable(path, "a YAML file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())[:300]}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping, of which PyYAML keeps the last and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                problem = f"key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def to_dict(config: Any) -> dict[str, Any]:
    """The dictionary `from_dict` reads back; tuples become lists, as in JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def to_yaml(config: Any) -> str:
    """The text from which `read_yaml` and `from_dict` make the dataclass again."""
    return str(
        yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=1000)
    )


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint naming the nearest known words, or all of them, unless they are many, if none is."""
    near = difflib.get_close_matches(word, list(known), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = list(known)[:_WORDS_SHOWN]
    rest = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"; known: {', '.join(shown)}{rest}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            names = [str(argument) for argument in arguments]
            raise InputError(f"{where}: unknown value {value!r}{did_you_mean(str(value), names)}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(value, hint, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: a list is needed, got {value!r}")
        hints = arguments
        if arguments[-1] is Ellipsis:
            hints = arguments[:1] * len(value)
        if len(value) != len(hints):
            raise InputError(f"{where}: {len(hints)} values are needed, got {value!r}")
        pairs = enumerate(zip(value, hints, strict=True))
        return tuple(_convert(item, hint, f"{where}[{i}]") for i, (item, hint) in pairs)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: a mapping is needed, got {value!r}")
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise InputError(f"{where}: a finite number is needed, got {value!r}")
        return float(value)
    # bool is a subclass of int, but `true` is no number here.
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{where}: {hint.__name__} is needed, got {value!r}")
    return value
