"""The positional tables that motion modules store beside their weights."""

import math
import re

import numpy as np

from qvd_jax.axes import Positions
from qvd_jax.errors import InputError

from .tensors import LazyTensor, Tensors

# diffusers has one table for a block, the original code one for each of its attentions.
_TABLE = re.compile(r"(?P<block>.+)\.(?:pos_embed|attn(?P<number>\d)\.pos_encoder)\.pe")
_BLOCK = re.compile(r"(.+\.motion_modules\..+)\.attn(\d)\.to_q\.weight")
_STORED = re.compile(r".+\.motion_modules\..+\.positions\.\d")
_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def length(tensors: Tensors) -> int | None:
    """Length of the positional tables, if they are stored.

    Raises:
      InputError: they have different ones, or are no tables.
    """
    tables = {name: t.shape for name, t in tensors.items() if _TABLE.fullmatch(name)}
    for name, shape in tables.items():
        if len(shape) != 3:
            raise InputError(f"{name} has shape {shape}; a table (1, frames, channels) is expected")
    lengths = {shape[1] for shape in tables.values()}
    if len(lengths) > 1:
        raise InputError(f"motion modules have positional tables of different lengths: {lengths}")
    return lengths.pop() if lengths else None


def published_length(tensors: Tensors) -> int | None:
    """Length of the tables before they were made longer: that of the sinusoid they begin with."""
    name = next((name for name in tensors if _TABLE.fullmatch(name)), None)
    if name is None:
        return None
    table = tensors[name].read()[0]
    fits = np.isclose(table.astype(np.float64), _sinusoid(*table.shape), atol=_tolerance(table))
    wrong = np.flatnonzero(~fits.all(axis=-1))
    return int(wrong[0]) if len(wrong) and wrong[0] else len(table)


def without(tensors: Tensors) -> Tensors:
    """The tensors less the tables."""
    return {name: tensor for name, tensor in tensors.items() if not _TABLE.fullmatch(name)}


def take(tensors: Tensors) -> tuple[Tensors, Positions]:
    """The tensors less the tables if these are sinusoids, which are recomputed.

    Otherwise each attention's table, under the name `positions.N` of its block.
    """
    tables = {name: t for name, t in tensors.items() if _TABLE.fullmatch(name)}
    rest = without(tensors)
    if all(map(_is_sinusoid, tables.values())):
        return rest, "sinusoidal"
    frames = length(tensors)
    for block, attention in (m.groups() for m in map(_BLOCK.fullmatch, tensors) if m):
        names = (f"{block}.pos_embed.pe", f"{block}.attn{attention}.pos_encoder.pe")
        found = next((tables[name] for name in names if name in tables), None)
        width = tensors[f"{block}.attn{attention}.to_q.weight"].shape[1]
        rest[f"{block}.positions.{int(attention) - 1}"] = found or _computed(frames or 0, width)
    return rest, "stored"


def give(tensors: Tensors, frames: int) -> Tensors:
    """The tensors with diffusers' tables, one for each block: the way back of `take`.

    Args:
      tensors: with tables as `take` names them, or without any, which are sinusoids then.
      frames: length of sinusoids.

    Raises:
      InputError: attentions of one block have different tables.
    """
    given = {name: t for name, t in tensors.items() if not _STORED.fullmatch(name)}
    for block, number in (match.groups() for match in map(_BLOCK.fullmatch, tensors) if match):
        table, name = tensors.get(f"{block}.positions.{int(number) - 1}"), f"{block}.pos_embed.pe"
        if table is None:
            width = tensors[f"{block}.attn{number}.to_q.weight"].shape[1]
            table = _computed(frames, width)
        elif name in given and not np.array_equal(given[name].read(), table.read()):
            raise InputError(
                f"the attentions of {block} have different positional tables; diffusers has one "
                f"table for all of them"
            )
        given[name] = table
    return given


def _is_sinusoid(tensor: LazyTensor) -> bool:
    table = tensor.read()[0]
    return bool(
        np.abs(table.astype(np.float64) - _sinusoid(*table.shape)).max() <= _tolerance(table)
    )


def _tolerance(table: np.ndarray) -> float:
    """By how much a stored sinusoid differs: by rounding, and by that of its angles in float32."""
    return _ROUNDING.get(str(table.dtype), 1e-6 * len(table))


def _sinusoid(length: int, width: int) -> np.ndarray:
    angles = np.arange(length)[:, None] * np.exp(-np.log(1e4) * np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :width]


def _computed(length: int, width: int) -> LazyTensor:
    """The table of diffusers, bit for bit, which has its angles in float32."""

    def read() -> np.ndarray:
        import torch

        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        angles = torch.arange(length)[:, None] * rates
        table = torch.stack([angles.sin(), angles.cos()], dim=-1)
        return table.reshape(1, length, -1)[..., :width].numpy()

    return LazyTensor((1, length, width), read)
