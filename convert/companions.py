"""VAE and CLIP towers: configs read from the keys, and older names."""

import re
from collections.abc import Mapping
from typing import Any

from convert import keys
from convert.tensors import Tensors
from qvd_jax.config import from_dict
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.vae import VAEConfig

_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_vae(tensors: Tensors) -> Tensors:
    """Names of diffusers before 0.18, still found in published files, as they are today."""

    def rename(name: str) -> str:
        return re.sub(
            r"(attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda match: f"{match[1]}{_OLD_VAE_ATTENTION[match[2]]}.",
            name,
        )

    return {rename(name): tensor for name, tensor in tensors.items()}


def rename_text(tensors: Tensors) -> Tensors:
    """Names with or without the `text_model.` prefix, less the table of position ids."""
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in without_position_ids(tensors).items()
    }


def without_position_ids(tensors: Tensors) -> Tensors:
    """The tensors of a CLIP tower less the table of position ids, which some files have."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def vae_config(tensors: Tensors, json: Mapping[str, Any], where: str) -> VAEConfig:
    """Reads the VAE's shape from its tensors, the rest from its `config.json`.

    Raises:
      InputError: the tensors are of another kind of VAE.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no AutoencoderKL")

    levels = keys.count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    fields = {
        "channels": shape("encoder.conv_in.weight")[1],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_channels": [
            shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)
        ],
        "layers_per_block": keys.count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_groups": json.get("norm_num_groups", 32),
        "scaling_factor": json.get("scaling_factor", 0.18215),
        "temporal_decoder": any(".temporal_res_block." in name for name in tensors),
    }
    return from_dict(VAEConfig, fields, where)


def text_config(tensors: Tensors, json: Mapping[str, Any], where: str) -> CLIPTextConfig:
    """Reads the text tower's shape from its tensors, heads and activation from `config.json`.

    Raises:
      InputError: the tensors are no CLIP text tower.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no CLIP text encoder")

    vocabulary, hidden = shape("embeddings.token_embedding.weight")[:2]
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_layers": keys.count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_heads": json.get("num_attention_heads", 12),
        "max_length": shape("embeddings.position_embedding.weight")[0],
        "activation": json.get("hidden_act", "quick_gelu"),
    }
    return from_dict(CLIPTextConfig, fields, where)


def vision_config(tensors: Tensors, json: Mapping[str, Any], where: str) -> CLIPVisionConfig:
    """Reads the image tower's shape from its tensors, the rest from its `config.json`.

    Raises:
      InputError: the tensors are no CLIP image tower with a projection.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no CLIP image encoder with a projection")

    patches = shape("vision_model.embeddings.patch_embedding.weight")
    fields = {
        "image_size": json.get("image_size", 224),
        "patch_size": patches[-1],
        "hidden_size": patches[0],
        "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_layers": keys.count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_heads": json.get("num_attention_heads", 16),
        "projection_size": shape("visual_projection.weight")[0],
        "activation": json.get("hidden_act", "gelu"),
    }
    return from_dict(CLIPVisionConfig, fields, where)
