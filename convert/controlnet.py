"""ControlNet and SparseCtrl: their configs read from the keys, SparseCtrl's original names."""

import re
from pathlib import Path

from convert import animatediff, keys
from convert.tensors import Tensors, open_model
from qvd_jax.errors import InputError
from qvd_jax.models.configs import ControlNetConfig


def open_controlnet(path: Path) -> tuple[Tensors, ControlNetConfig]:
    """Opens a folder of diffusers or an original `v3_sd15_sparsectrl_*.ckpt`.

    Returns:
      Its tensors by diffusers' names, and its config.

    Raises:
      InputError: it is missing, damaged, or something else.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; --controlnet names a folder or a checkpoint")
    tensors = open_model(path)
    renamed = {animatediff.rename_original(name): tensor for name, tensor in tensors.items()}
    renamed = animatediff.without_positions(renamed)
    if not any(name.startswith("controlnet_down_blocks.") for name in renamed):
        raise InputError(f"{path} is no ControlNet: it has no controlnet_down_blocks")
    return renamed, _config(renamed, animatediff.is_original(tensors), str(path))


def _config(tensors: Tensors, original_norms: bool, where: str) -> ControlNetConfig:
    embedding = "controlnet_cond_embedding"
    widths: tuple[int, ...] = ()
    first = f"{embedding}.weight"
    if first not in tensors:
        first = f"{embedding}.conv_in.weight"
        count = keys.count(tensors, rf"{embedding}\.blocks\.(\d+)\.")
        strided = (f"{embedding}.blocks.{i}.weight" for i in range(1, count, 2))
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
