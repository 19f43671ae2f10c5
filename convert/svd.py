"""Stable Video Diffusion's UNet: its config read from the keys."""

import re
from collections.abc import Mapping
from typing import Any

from convert import keys
from convert.tensors import Tensors
from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.models.configs import STABLE_VIDEO_DIFFUSION, UNet3DConfig
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults

_HEAD_WIDTH = 64

# The attention to one token is one whatever these hold.
_DEAD = re.compile(r"transformer_blocks\.0\.(attn2\.to_[qk]|norm2)\.")


def is_svd(tensors: Tensors) -> bool:
    """Whether a UNet has Stable Video Diffusion's temporal resnets."""
    return any(".temporal_res_block." in name for name in tensors)


def without_dead(tensors: Tensors) -> Tensors:
    """The tensors less those of queries, keys and norm of the attention to a single token."""
    return {name: tensor for name, tensor in tensors.items() if not _DEAD.search(name)}


def unet_config(
    tensors: Tensors, unet_json: Mapping[str, Any], original_norms: bool, where: str
) -> UNet3DConfig:
    """Reads the UNet's shape from its tensors; only the heads are the config's.

    Args:
      tensors: by diffusers' names.
      unet_json: the UNet's `config.json`.
      original_norms: whether the resnets' epsilons are the original code's, not diffusers'.
      where: how messages name the checkpoint.

    Raises:
      InputError: tensors are missing, or a config value is missing or odd.
    """
    fields = keys.unet_fields(tensors, unet_json, where, resnet="spatial_res_block.")
    attention = fields["attention_levels"]
    heads = keys.per_level(
        unet_json.get("num_attention_heads", [w // _HEAD_WIDTH for w in fields["block_channels"]]),
        len(attention),
        f"{where}: num_attention_heads",
    )
    width = unet_json.get("addition_time_embed_dim", 256)
    taken = keys.require(tensors, "add_embedding.linear_1.weight", where)[1]
    if width != 256 or taken % width:
        raise InputError(
            f"{where}: addition_time_embed_dim = {width!r} and {taken} inputs of add_embedding: "
            f"256 for each number is supported"
        )
    if not original_norms:
        # diffusers' blocks have their epsilons built in.
        fields["down_eps"] = [1e-6 if has_attention else 1e-5 for has_attention in attention]
        fields["up_eps"] = [1e-6] * len(attention)
    return from_dict(
        UNet3DConfig,
        {
            **fields,
            "mid_eps": 1e-5,
            "num_heads": heads,
            "temporal_heads": heads,
            "temporal_op": STABLE_VIDEO_DIFFUSION.temporal_op,
            "max_frames": STABLE_VIDEO_DIFFUSION.max_frames,
            "added_ids": taken // width,
        },
        where,
    )


def defaults(unet_json: Mapping[str, Any], where: str) -> ImageToVideoDefaults:
    """Of the videos: 14 frames, or 25 of the model that was trained on these."""
    frames = keys.per_level(unet_json.get("num_frames", 14), 1, f"{where}: num_frames")[0]
    return ImageToVideoDefaults(frames=frames)
