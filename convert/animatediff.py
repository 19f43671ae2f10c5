"""AnimateDiff's UNet: its config read from the keys, and the original motion-module names."""

import re
from collections.abc import Mapping
from typing import Any

from convert import keys
from convert.tensors import Tensors
from qvd_jax.config import from_dict
from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig

PRESETS: dict[str, tuple[SchedulerConfig, dict[str, Any]]] = {
    "animatelcm": (schedules.ANIMATELCM, {"steps": 6, "guidance_scale": 2.0}),
    "lightning": (schedules.LIGHTNING, {"steps": 4, "guidance_scale": 1.0}),
}
"""Scheduler and defaults of motion modules distilled to few steps, which no tensor tells."""

ORIGINAL_MOTION = (
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
)
_POSITIONS = re.compile(r"\.(pos_embed|pos_encoder)\.pe$")

_OTHER_FAMILIES = (
    ("controlnet_cond_embedding", "a ControlNet or SparseCtrl"),
    ("temporal_res_block", "Stable Video Diffusion"),
    ("time_stack", "Stable Video Diffusion"),
    ("temp_convs", "ModelScope or ZeroScope"),
    ("transformer_in", "ModelScope or ZeroScope"),
    ("add_embedding", "Stable Diffusion XL"),
    ("_lora.", "a LoRA, which --lora takes"),
)


def rename_original(name: str) -> str:
    """A name (or its module part) of the original AnimateDiff code as diffusers has it."""
    name = f"{name.removeprefix('module.')}."
    for pattern, replacement in ORIGINAL_MOTION:
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")


def is_original(tensors: Tensors) -> bool:
    """Whether motion modules carry the original code's names."""
    return any(".temporal_transformer." in name for name in tensors)


def motion_tensors(tensors: Tensors, where: str) -> Tensors:
    """The motion modules of an adapter or an original checkpoint, by diffusers' names.

    MagicAnimate's checkpoint holds a whole UNet, whose other tensors come along; where its names
    begin with `unet.` only the motion modules are meant.

    Raises:
      InputError: the file holds something else.
    """
    renamed = {rename_original(name): tensor for name, tensor in tensors.items()}
    if any(name.startswith("unet.") for name in renamed):
        renamed = {
            name.removeprefix("unet."): tensor
            for name, tensor in renamed.items()
            if ".motion_modules." in name
        }
    strange = [name for name in renamed if ".motion_modules." not in name]
    other = _describe(tensors)
    is_whole = "conv_in.weight" in renamed and len(strange) < len(renamed)
    if other or not renamed or (strange and not is_whole):
        found = f"{len(strange)} other tensors, the first {strange[0]}" if strange else "no tensors"
        raise InputError(f"{where}: motion modules are expected, it holds {other or found}")
    return renamed


def version(tensors: Tensors) -> str:
    """Generation of the motion modules, from the keys and the positional tables alone."""
    if any(name.startswith("mid_block.motion_modules.") for name in tensors):
        return "v2"
    return "v1" if positions(tensors) == 24 else "v3"


def positions(tensors: Tensors) -> int | None:
    """Length of the positional tables, if they are stored."""
    tables = {name: t.shape for name, t in tensors.items() if _POSITIONS.search(name)}
    for name, shape in tables.items():
        if len(shape) != 3:
            raise InputError(f"{name} has shape {shape}; a table (1, frames, channels) is expected")
    lengths = {shape[1] for shape in tables.values()}
    if len(lengths) > 1:
        raise InputError(f"motion modules have positional tables of different lengths: {lengths}")
    return lengths.pop() if lengths else None


def without_positions(tensors: Tensors) -> Tensors:
    """The tensors less the positional tables, which are recomputed."""
    return {name: t for name, t in tensors.items() if not _POSITIONS.search(name)}


def check_family(tensors: Tensors, where: str) -> None:
    """Raises `InputError` if the names are not those of a Stable Diffusion 1.5 UNet."""
    other = _describe(tensors)
    if other or "conv_in.weight" not in tensors:
        raise InputError(
            f"{where} is {other or 'no UNet of the Stable Diffusion 1.5 family'}; an AnimateDiff "
            f"or Stable Diffusion 1.5 UNet is expected"
        )


def unet_config(
    tensors: Tensors,
    unet_json: Mapping[str, Any],
    motion_json: Mapping[str, Any],
    *,
    original_norms: bool,
    where: str,
) -> UNet3DConfig:
    """Reads the UNet's shape from its tensors.

    Only what tensors cannot tell, the numbers of heads and of norm groups, comes from the
    configs.

    Args:
      tensors: spatial weights and motion modules, by diffusers' names; of this family.
      unet_json: the UNet's `config.json`.
      motion_json: the motion adapter's, or the UNet's where they are one.
      original_norms: whether the norms follow the original code's scopes, not diffusers'.
      where: how messages name the checkpoint.

    Raises:
      InputError: tensors are missing, or a config value is missing or odd.
    """
    fields = keys.unet_fields(tensors, unet_json, where)
    levels = len(fields["block_channels"])
    motion_levels = keys.count(tensors, r"down_blocks\.(\d+)\.motion_modules\.")
    if motion_levels != levels:
        raise InputError(
            f"{where}: the UNet has {levels} levels, its motion modules have {motion_levels}; "
            f"were they made for another base model, such as Stable Diffusion XL?"
        )
    # Stable Diffusion 1.5 calls the number of heads attention_head_dim.
    heads = unet_json.get("num_attention_heads") or unet_json.get("attention_head_dim")
    generation = version(tensors)
    fields |= {
        "num_heads": keys.per_level(heads, levels, f"{where}: attention_head_dim"),
        "resnet_norm_scope": "joint" if original_norms and generation == "v1" else "frame",
        "temporal_norm_scope": "frame" if original_norms else "joint",
        "temporal_heads": keys.per_level(
            motion_json.get("motion_num_attention_heads", 8),
            levels,
            f"{where}: motion_num_attention_heads",
        ),
        "max_frames": positions(tensors)
        or keys.per_level(
            motion_json.get("motion_max_seq_length", 32), 1, f"{where}: motion_max_seq_length"
        )[0],
        "temporal_mid_block": generation == "v2",
    }
    return from_dict(UNet3DConfig, fields, where)


def _describe(tensors: Tensors) -> str | None:
    """Which other family's marks the names bear."""
    for mark, family in _OTHER_FAMILIES:
        if any(mark in name for name in tensors):
            return family
    return None
