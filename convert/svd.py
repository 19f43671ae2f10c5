"""Stable Video Diffusion's UNet: its config read from the keys."""

import re

from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.models.configs import STABLE_VIDEO_DIFFUSION, UNet3DConfig
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults

from . import config_classes as classes
from . import configs, keys
from .configs import Json
from .tensors import Tensors, zeros

_HEAD_WIDTH = 64
_ID_WIDTH = 256

# The attention to one token is one whatever these hold.
_DEAD = re.compile(r"transformer_blocks\.0\.(attn2\.to_[qk]|norm2)\.")


def is_svd(tensors: Tensors) -> bool:
    """Whether a UNet has Stable Video Diffusion's temporal resnets."""
    return any(".temporal_res_block." in name for name in tensors)


def without_dead(tensors: Tensors) -> Tensors:
    """The tensors less those of queries, keys and norm of the attention to a single token."""
    return {name: tensor for name, tensor in tensors.items() if not _DEAD.search(name)}


def with_dead(tensors: Tensors) -> Tensors:
    """The tensors with others in the place of those that `without_dead` leaves out."""
    given = dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("transformer_blocks.0.attn2.to_v.weight"):
            continue
        block, (width, context) = name.removesuffix("attn2.to_v.weight"), tensor.shape
        given |= {
            f"{block}attn2.to_q.weight": zeros((width, width)),
            f"{block}attn2.to_k.weight": zeros((width, context)),
            f"{block}norm2.weight": zeros((width,)),
            f"{block}norm2.bias": zeros((width,)),
        }
    return given


def unet_config(
    tensors: Tensors, unet_json: Json, original_norms: bool, where: str
) -> tuple[UNet3DConfig, tuple[str, ...]]:
    """Reads the UNet's shape from its tensors; only the heads are the config's.

    Args:
      tensors: by diffusers' names.
      unet_json: the UNet's `config.json`.
      original_norms: whether the resnets' epsilons are the original code's, not diffusers'.
      where: how messages name the checkpoint.

    Returns:
      The config, and notes.

    Raises:
      InputError: tensors are missing, or a config value is missing or odd.
    """
    read = configs.read(unet_json, classes.UNET_SPATIO_TEMPORAL, where)
    fields = keys.unet_fields(tensors, {}, where, resnet="spatial_res_block.")
    attention = fields["attention_levels"]
    heads = keys.per_level(
        read.values["num_attention_heads"] if unet_json else _heads(fields["block_channels"]),
        len(attention),
        f"{where}: num_attention_heads",
    )
    taken = keys.require(tensors, "add_embedding.linear_1.weight", where)[1]
    added_ids = STABLE_VIDEO_DIFFUSION.added_ids
    if taken != added_ids * _ID_WIDTH:
        raise InputError(
            f"{where}: add_embedding takes {taken} inputs; {added_ids * _ID_WIDTH} are supported, "
            f"of frames a second, motion and noise"
        )
    if not original_norms:
        # diffusers' blocks have their epsilons built in.
        fields["down_eps"] = [1e-6 if has_attention else 1e-5 for has_attention in attention]
        fields["up_eps"] = [1e-6] * len(attention)
    config = from_dict(
        UNet3DConfig,
        {
            **fields,
            "mid_eps": 1e-5,
            "num_heads": heads,
            "temporal_heads": heads,
            "temporal_op": STABLE_VIDEO_DIFFUSION.temporal_op,
            "max_frames": STABLE_VIDEO_DIFFUSION.max_frames,
            "added_ids": added_ids,
        },
        where,
    )
    facts = {
        **keys.unet_facts(fields, tensors, "SpatioTemporal"),
        "projection_class_embeddings_input_dim": taken,
    }
    return config, (*read.notes, *configs.contradictions(unet_json, facts, where))


def _heads(widths: list[int]) -> list[int]:
    """Those of the original code, whose heads have one width."""
    return [width // _HEAD_WIDTH for width in widths]


def defaults(unet_json: Json, where: str) -> ImageToVideoDefaults:
    """Of the videos: the frames the config says, or 14 of an original file, which has none."""
    frames = configs.read(unet_json, classes.UNET_SPATIO_TEMPORAL, where).values["num_frames"]
    number = keys.per_level(frames if unet_json else 14, 1, f"{where}: num_frames")[0]
    return ImageToVideoDefaults(frames=number)
