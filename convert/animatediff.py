"""AnimateDiff's UNet: its config read from the keys, and the original motion-module names."""

import re
from typing import Any

from qvd_jax.config import from_dict
from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig

from . import config_classes as classes
from . import configs, keys, kinds, positions
from .configs import Json
from .tensors import Tensors

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

    MagicAnimate's checkpoint, and those of AnimateDiff's training, hold a whole UNet, whose other
    tensors come along; where its names begin with `unet.` only the motion modules are meant.

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
    kind = kinds.describe(tensors)
    if kind != kinds.MOTION or (strange and kinds.describe(strange) != kinds.UNET):
        found = f"{len(strange)} other tensors, the first {strange[0]}" if strange else "no tensors"
        other = kind if kind != kinds.MOTION else None
        raise InputError(f"{where}: motion modules are expected, it holds {other or found}")
    return renamed


def version(tensors: Tensors) -> str:
    """Generation of the motion modules, from the keys and the positional tables alone."""
    if any(name.startswith("mid_block.motion_modules.") for name in tensors):
        return "v2"
    length = positions.length(tensors)
    if length not in (None, 24, 32):
        length = positions.published_length(tensors)
    return "v1" if length == 24 else "v3"


def is_animatediff(tensors: Tensors) -> bool:
    """Whether a UNet is Stable Diffusion 1.5's, with motion modules or without."""
    return kinds.describe(tensors) in (kinds.UNET, kinds.MOTION) and "conv_in.weight" in tensors


def unet_config(
    tensors: Tensors,
    unet_json: Json,
    motion_json: Json | None,
    *,
    original_norms: bool,
    where: str,
) -> tuple[UNet3DConfig, tuple[str, ...]]:
    """Reads the UNet's shape from its tensors.

    Only what tensors cannot tell, the numbers of heads and of norm groups, comes from the
    configs.

    Args:
      tensors: spatial weights and motion modules, by diffusers' names; of this family.
      unet_json: the UNet's `config.json`.
      motion_json: the motion adapter's; None where the UNet holds the motion modules.
      original_norms: whether the norms follow the original code's scopes, not diffusers'.
      where: how messages name the checkpoint.

    Returns:
      The config, but for what the positional tables hold, and notes.

    Raises:
      InputError: tensors are missing, or a config value is missing or odd.
    """
    claimed = unet_json.get("_class_name", classes.UNET_MOTION.name if motion_json is None else "")
    of_videos = claimed == classes.UNET_MOTION.name
    known, suffix = (classes.UNET_MOTION, "Motion") if of_videos else (classes.UNET_2D, "2D")
    unet = configs.read(unet_json, known, where)
    if motion_json is None:
        motion = unet if of_videos else configs.read({}, classes.MOTION_ADAPTER, where)
        motion_json = unet_json
    else:
        motion = configs.read(motion_json, classes.MOTION_ADAPTER, where)
    fields = keys.unet_fields(tensors, unet.values, where)
    levels = len(fields["block_channels"])
    motion_levels = keys.count(tensors, r"down_blocks\.(\d+)\.motion_modules\.")
    if motion_levels != levels:
        raise InputError(
            f"{where}: the UNet has {levels} levels, its motion modules have {motion_levels}; "
            f"were they made for another base model, such as Stable Diffusion XL?"
        )
    # Stable Diffusion 1.5 calls the number of heads attention_head_dim.
    heads = unet.values["num_attention_heads"] or unet.values.get("attention_head_dim")
    generation = version(tensors)
    stored = positions.length(tensors)
    fields |= {
        "num_heads": keys.per_level(heads, levels, f"{where}: attention_head_dim"),
        "resnet_norm_scope": "joint" if original_norms and generation == "v1" else "frame",
        "temporal_norm_scope": "frame" if original_norms else "joint",
        "temporal_heads": keys.per_level(
            motion.values["motion_num_attention_heads"],
            levels,
            f"{where}: motion_num_attention_heads",
        ),
        "max_frames": stored
        or keys.per_level(
            motion.values["motion_max_seq_length"], 1, f"{where}: motion_max_seq_length"
        )[0],
        "temporal_mid_block": generation == "v2",
    }
    facts = {
        "use_motion_mid_block": fields["temporal_mid_block"],
        "motion_max_seq_length": fields["max_frames"],
        "motion_layers_per_block": fields["layers_per_block"],
    }
    if motion_json is not unet_json:
        facts["block_out_channels"] = fields["block_channels"]
    notes = (
        *unet.notes,
        *(motion.notes if motion is not unet else ()),
        *configs.contradictions(unet_json, keys.unet_facts(fields, tensors, suffix), where),
        *configs.contradictions(motion_json, facts, where),
    )
    return from_dict(UNet3DConfig, fields, where), notes
