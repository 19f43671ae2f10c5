"""ControlNet and SparseCtrl: their configs read from the keys, and original names."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from qvd_jax.errors import InputError
from qvd_jax.models.configs import ControlNetConfig, UNet3DConfig
from qvd_jax.models.stages import skip_widths

from . import animatediff, configs, keys, kinds, ldm, positions
from . import config_classes as classes
from .configs import Json
from .tensors import LazyTensor, Tensors, open_model, read_json, zeros

_ORIGINAL = "control_model."
_EMBEDDING = "controlnet_cond_embedding"
_EMBEDDING_WIDTHS = (16, 32, 96, 256)
_ENCODER = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.")
_OTHERS = {
    "lora_controlnet": "a Control-LoRA",
    "adapter.body.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
    "label_emb.": "a ControlNet of Stable Diffusion XL",
    "add_embedding.": "a ControlNet of Stable Diffusion XL",
}
"""Beginnings of names that other additions to a UNet have."""


class ControlNet(NamedTuple):
    """An opened ControlNet.

    Attributes:
      tensors: by diffusers' names.
      config: what differs from the UNet's encoder.
      notes: what the user should know.
      json: its `config.json`; empty where there is none.
      frames: length of its positional tables, if it has any.
    """

    tensors: Tensors
    config: ControlNetConfig
    notes: tuple[str, ...] = ()
    json: Json = MappingProxyType({})
    frames: int | None = None


def open_controlnet(path: Path, begun: Mapping[str, LazyTensor]) -> ControlNet:
    """Opens a folder of diffusers, or an original file.

    Args:
      path: the folder, `v3_sd15_sparsectrl_*.ckpt` or `control_*.pth`.
      begun: of `begin_controlnet`: what takes the place of tensors an original file lacks.

    Raises:
      InputError: it is missing, damaged, or something else.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; --controlnet names a folder or a checkpoint")
    tensors = open_model(path)
    for start, kind in _OTHERS.items():
        if any(name.removeprefix(_ORIGINAL).startswith(start) for name in tensors):
            raise InputError(f"{path} is {kind}; a ControlNet of Stable Diffusion 1.5 is expected")
    if path.is_file() and re.search(r"_shuffle(_fp16)?$", path.stem):
        # Its tensors do not say it; the original code goes by the name, too.
        raise InputError(
            f"{path}: global_pool_conditions = True, as of every ControlNet of this name, is not "
            f"supported; it averages what it adds over each frame"
        )
    if any(re.match(rf"({_ORIGINAL})?(input_blocks|zero_convs)\.", name) for name in tensors):
        renamed, notes = _open_original(tensors, begun, path)
    else:
        renamed = {animatediff.rename_original(name): tensor for name, tensor in tensors.items()}
        notes = ()
    if not any(name.startswith("controlnet_down_blocks.") for name in renamed):
        kind = kinds.describe(renamed) or "no ControlNet"
        raise InputError(f"{path} is {kind}: it has no controlnet_down_blocks")
    json = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    original = animatediff.is_original(tensors)
    found = read_controlnet(renamed, json, str(path), original_norms=original)
    return found._replace(notes=(*tensors.notes, *notes))


def read_controlnet(
    tensors: Tensors, json: Json, where: str, *, original_norms: bool = False
) -> ControlNet:
    """Reads a ControlNet's shape from its tensors.

    Args:
      tensors: by diffusers' names, the motion modules' positional tables among them.
      json: its `config.json`, which `check_config` compares; empty where there is none.
      where: how messages name it.
      original_norms: whether the norms follow the original code's scopes, not diffusers'.
    """
    rest, tables = positions.take(tensors)
    config = _config(rest, original_norms, where)
    return ControlNet(
        rest, replace(config, positions=tables), json=json, frames=positions.length(tensors)
    )


def check_config(controlnet: ControlNet, unet: UNet3DConfig, where: str) -> tuple[str, ...]:
    """Checks a ControlNet's `config.json`, if there is one; returns notes.

    Raises:
      InputError: a key has a value that is not supported, or that the UNet beside it does not have.
    """
    json, config = controlnet.json, controlnet.config
    if not json:
        return ()
    sparse = config.ignores_latents
    read = configs.read(json, classes.SPARSE_CONTROLNET if sparse else classes.CONTROLNET, where)
    configs.check_like(read.values, unet, where)
    blocks = ["CrossAttn" if has else "" for has in unet.attention_levels]
    facts = {
        "in_channels": keys.require(controlnet.tensors, "conv_in.weight", where)[1],
        "block_out_channels": unet.block_channels,
        "layers_per_block": unet.layers_per_block,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{kind}DownBlock{'Motion' if sparse else '2D'}" for kind in blocks],
        "conditioning_channels": config.condition_channels - sparse,
    }
    if config.embedding_channels:
        facts["conditioning_embedding_out_channels"] = config.embedding_channels
    if sparse:
        facts["use_simplified_condition_embedding"] = not config.embedding_channels
    if controlnet.frames is not None:
        facts["motion_max_seq_length"] = controlnet.frames
    return (*read.notes, *configs.contradictions(json, facts, where))


def begin_controlnet(unet: Tensors, config: UNet3DConfig, stride: int) -> Tensors:
    """What the training of a ControlNet begins from (arXiv 2302.05543, section 3.1).

    That is the UNet's encoder, and zeros in the convolutions that bring the condition in and add
    to the skips.

    Args:
      unet: its tensors, by diffusers' names.
      config: the UNet's.
      stride: pixels of the condition for each position of the latents.
    """
    encoder = {
        name: tensor
        for name, tensor in unet.items()
        if name.startswith(_ENCODER) and ".motion_modules." not in name
    }
    widths = _EMBEDDING_WIDTHS[: stride.bit_length()]
    convs = {f"{_EMBEDDING}.conv_in": (widths[0], 3, 3, 3)}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        convs[f"{_EMBEDDING}.blocks.{2 * i}"] = (before, before, 3, 3)
        convs[f"{_EMBEDDING}.blocks.{2 * i + 1}"] = (after, before, 3, 3)
    convs[f"{_EMBEDDING}.conv_out"] = (config.block_channels[0], widths[-1], 3, 3)
    for i, width in enumerate(skip_widths(config)):
        convs[f"controlnet_down_blocks.{i}"] = (width, width, 1, 1)
    last = config.block_channels[-1]
    convs["controlnet_mid_block"] = (last, last, 1, 1)
    added = {f"{name}.weight": zeros(shape) for name, shape in convs.items()}
    added |= {f"{name}.bias": zeros(shape[:1]) for name, shape in convs.items()}
    return encoder | added


def _open_original(
    tensors: Tensors, begun: Mapping[str, LazyTensor], path: Path
) -> tuple[Tensors, tuple[str, ...]]:
    """Tensors of the original code by diffusers' names, and notes.

    A file may hold the model it was trained beside, whose UNet and VAE are not read, or what
    training changed alone. What it lacks is as before training: the original code, too, loads
    such files over a model that has the rest.
    """
    own = {name for name in tensors if name.startswith(_ORIGINAL)} or tensors.keys()
    found = {name.removeprefix(_ORIGINAL): tensors[name] for name in own}
    notes = []
    if len(own) < len(tensors):
        notes.append(f"of {path} the ControlNet is read, not the model beside it")
    if found.pop("difference", None) is not None:
        notes.append(f"{path} holds differences, which are added to the UNet's weights")
        found = {
            name: _sum(begun[name], tensor) if name.startswith(_ENCODER) else tensor
            for name, tensor in ldm.rename_controlnet(found).items()
        }
    else:
        found = ldm.rename_controlnet(found)
    # The embedding of the condition is its own, and of other widths, if there is any of it.
    has_embedding = any(name.startswith(f"{_EMBEDDING}.") for name in found)
    lacking = [
        name
        for name in begun
        if name not in found and not (has_embedding and name.startswith(f"{_EMBEDDING}."))
    ]
    if lacking:
        notes.append(
            f"{path} lacks {len(lacking)} tensors of a ControlNet, the first {lacking[0]}; they "
            f"are as before its training: the UNet's own, and zeros in what it adds"
        )
    return found | {name: begun[name] for name in lacking}, tuple(notes)


def _sum(base: LazyTensor, difference: LazyTensor) -> LazyTensor:
    return LazyTensor(
        difference.shape,
        lambda: base.read().astype(np.float32) + difference.read().astype(np.float32),
    )


def _config(tensors: Tensors, original_norms: bool, where: str) -> ControlNetConfig:
    widths: tuple[int, ...] = ()
    first = f"{_EMBEDDING}.weight"
    if first not in tensors:
        first = f"{_EMBEDDING}.conv_in.weight"
        count = keys.count(tensors, rf"{_EMBEDDING}\.blocks\.(\d+)\.")
        strided = (f"{_EMBEDDING}.blocks.{i}.weight" for i in range(1, count, 2))
        widths = tuple(keys.require(tensors, name, where)[0] for name in (first, *strided))
    found = (re.search(r"motion_modules\..*\.(attn\d)\.", name) for name in tensors)
    attentions = {match[1] for match in found if match}
    return ControlNetConfig(
        condition_channels=keys.require(tensors, first, where)[1],
        embedding_channels=widths,
        motion_attentions=len(attentions),
        temporal_norm_scope="frame" if original_norms else "joint",
        # Motion modules are SparseCtrl's, which was trained on zeros in the latents' place.
        ignores_latents=bool(attentions),
    )
