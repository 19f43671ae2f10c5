"""What tensors' names and shapes tell of the network they belong to."""

import re
from collections.abc import Mapping
from typing import Any

from qvd_jax.errors import InputError

from .kinds import describe
from .tensors import Tensors


def require(tensors: Tensors, name: str, problem: str) -> tuple[int, ...]:
    """The shape of a matrix or a kernel.

    Raises:
      InputError: `problem` and the name, if it is missing or neither.
    """
    if name not in tensors:
        kind = describe(tensors)
        raise InputError(
            f"{problem}: the tensor {name} is missing" + (f"; it is {kind}" if kind else "")
        )
    shape = tuple(tensors[name].shape)
    if len(shape) < 2:
        raise InputError(f"{problem}: the tensor {name} has the shape {shape}")
    return shape


def numbers(tensors: Tensors, pattern: str) -> set[int]:
    """The numbers that the pattern's group has among the names."""
    return {int(match[1]) for name in tensors if (match := re.match(pattern, name))}


def count(tensors: Tensors, pattern: str) -> int:
    """How many different ones there are."""
    return len(numbers(tensors, pattern))


def unet_fields(
    tensors: Tensors, values: Mapping[str, Any], where: str, resnet: str = ""
) -> dict[str, Any]:
    """Fields of a `UNet3DConfig` that are read in the same way in every family.

    Args:
      tensors: the UNet's, by diffusers' names.
      values: of its `config.json`.
      where: how messages name the checkpoint.
      resnet: prefix of the convolutions within a resnet.

    Raises:
      InputError: tensors are missing, or a config value cannot be.
    """

    def conv(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != 4:
            raise InputError(f"{where}: the convolution {name} is missing")
        return tensors[name].shape

    levels = count(tensors, r"down_blocks\.(\d+)\.resnets\.")
    context = next(
        (
            t.shape[1]
            for name, t in tensors.items()
            if name.endswith("attn2.to_v.weight") and ".attentions." in name
        ),
        None,
    )
    if context is None or not levels:
        raise InputError(f"{where}: there is no attention to a text")
    epsilon = _positive(values.get("norm_eps", 1e-5), f"{where}: norm_eps")
    return {
        "in_channels": conv("conv_in.weight")[1],
        "out_channels": conv("conv_out.weight")[0],
        "block_channels": [
            conv(f"down_blocks.{i}.resnets.0.{resnet}conv1.weight")[0] for i in range(levels)
        ],
        "layers_per_block": count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."),
        "attention_levels": [
            count(tensors, rf"down_blocks\.{i}\.attentions\.(\d+)\.") > 0 for i in range(levels)
        ],
        "context_dim": context,
        "norm_groups": values.get("norm_num_groups", 32),
        "down_eps": [epsilon] * levels,
        "mid_eps": epsilon,
        "up_eps": [epsilon] * levels,
        "out_eps": epsilon,
    }


def unet_facts(fields: Mapping[str, Any], tensors: Tensors, suffix: str) -> dict[str, Any]:
    """What `unet_fields` tells, by the keys of a `config.json`.

    Args:
      fields: from `unet_fields`.
      tensors: the UNet's.
      suffix: of the names of block types, such as "2D".
    """
    attention = fields["attention_levels"]
    blocks = [("CrossAttn" if has else "", suffix) for has in attention]
    return {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "block_out_channels": fields["block_channels"],
        "layers_per_block": fields["layers_per_block"],
        "cross_attention_dim": fields["context_dim"],
        "down_block_types": [f"{kind}DownBlock{end}" for kind, end in blocks],
        "up_block_types": [f"{kind}UpBlock{end}" for kind, end in reversed(blocks)],
        "time_embedding_dim": require(tensors, "time_embedding.linear_1.weight", "UNet")[0],
    }


def per_level(value: Any, levels: int, where: str) -> tuple[int, ...]:
    """A positive integer for each level, from one for all or from one for each.

    Raises:
      InputError: it is neither.
    """
    values = list(value) if isinstance(value, list | tuple) else [value] * levels
    good = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
    if not good or len(values) != levels:
        raise InputError(f"{where}: one positive integer, or {levels}, are needed, got {value!r}")
    return tuple(values)


def _positive(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{where}: a positive number is needed, got {value!r}")
    return float(value)
