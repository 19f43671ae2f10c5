"""VAE and CLIP towers: configs read from the keys, and older names."""

import math
import re
from typing import TypeVar

import numpy as np

from qvd_jax.config import from_dict
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.vae import VAEConfig

from . import config_classes as classes
from . import configs, keys
from .configs import Json
from .tensors import LazyTensor, Tensors

T = TypeVar("T")
Read = tuple[T, tuple[str, ...]]
"""A config, and notes on it."""

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


def with_quant_convs(tensors: Tensors, json: Json) -> Tensors:
    """The VAE's tensors with identities for the convolutions its config leaves out."""
    tensors = dict(tensors)
    for key, name, like in (
        ("use_quant_conv", "quant_conv", "encoder.conv_out.weight"),
        ("use_post_quant_conv", "post_quant_conv", "decoder.conv_in.weight"),
    ):
        if json.get(key, True) is False and like in tensors:
            shape = tensors[like].shape
            tensors |= identity(name, shape[0] if name == "quant_conv" else shape[1])
    return tensors


def identity(name: str, width: int) -> Tensors:
    """A convolution that changes nothing."""
    return {
        f"{name}.weight": LazyTensor((width, width), lambda: np.eye(width, dtype=np.float32)),
        f"{name}.bias": LazyTensor((width,), lambda: np.zeros(width, dtype=np.float32)),
    }


def rename_text(tensors: Tensors) -> Tensors:
    """Names with or without the `text_model.` prefix, less what the text embedding does not need.

    That are the table of position ids and what brings pooled texts to the space of images.
    """
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in without_position_ids(tensors).items()
        if name not in ("text_projection.weight", "text_projection", "logit_scale")
    }


def without_position_ids(tensors: Tensors) -> Tensors:
    """The tensors of a CLIP tower less the table of position ids, which some files have."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def position_ids_note(tensors: Tensors, where: str) -> tuple[str, ...]:
    """A note if a tower's table of position ids is not 0, 1, 2, .. as tools that merge leave it."""
    tables = [t for name, t in tensors.items() if name.endswith("embeddings.position_ids")]
    if all(np.array_equal(t.read().reshape(-1), np.arange(math.prod(t.shape))) for t in tables):
        return ()
    return (f"{where}: its table of position ids is damaged; positions are counted anew",)


def vae_config(tensors: Tensors, json: Json, where: str) -> Read[VAEConfig]:
    """Reads the VAE's shape from its tensors, the rest from its `config.json`.

    Raises:
      InputError: the tensors are of another kind of VAE, or a config value is not supported.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no AutoencoderKL")

    levels = keys.count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    temporal = any(".temporal_res_block." in name for name in tensors)
    known = classes.VAE_TEMPORAL_DECODER if temporal else classes.VAE
    read = configs.read(json, known, where)
    fields = {
        "channels": shape("encoder.conv_in.weight")[1],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_channels": [
            shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)
        ],
        "layers_per_block": keys.count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_groups": read.values.get("norm_num_groups", 32),
        "scaling_factor": read.values["scaling_factor"],
        "temporal_decoder": temporal,
    }
    facts = {
        "in_channels": fields["channels"],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": fields["latent_channels"],
        "block_out_channels": fields["block_channels"],
        "layers_per_block": fields["layers_per_block"],
    }
    notes = (*read.notes, *configs.contradictions(json, facts, where))
    return from_dict(VAEConfig, fields, where), notes


def text_config(tensors: Tensors, json: Json, where: str) -> Read[CLIPTextConfig]:
    """Reads the text tower's shape from its tensors, the rest from its `config.json`.

    Raises:
      InputError: the tensors are no CLIP text tower, or a config value is not supported.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no CLIP text encoder")

    read = configs.read(json, classes.CLIP_TEXT, where)
    vocabulary, hidden = shape("embeddings.token_embedding.weight")[:2]
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_layers": keys.count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_heads": read.values["num_attention_heads"],
        "max_length": shape("embeddings.position_embedding.weight")[0],
        "activation": read.values["hidden_act"],
    }
    facts = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": fields["num_layers"],
        "max_position_embeddings": fields["max_length"],
    }
    notes = (*read.notes, *configs.contradictions(json, facts, where))
    return from_dict(CLIPTextConfig, fields, where), notes


def vision_config(tensors: Tensors, json: Json, where: str) -> Read[CLIPVisionConfig]:
    """Reads the image tower's shape from its tensors, the rest from its `config.json`.

    Raises:
      InputError: the tensors are no CLIP image tower with a projection, or a config value is not
        supported.
    """

    def shape(name: str) -> tuple[int, ...]:
        return keys.require(tensors, name, f"{where} is no CLIP image encoder with a projection")

    read = configs.read(json, classes.CLIP_VISION, where)
    patches = shape("vision_model.embeddings.patch_embedding.weight")
    fields = {
        "image_size": read.values["image_size"],
        "patch_size": patches[-1],
        "hidden_size": patches[0],
        "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_layers": keys.count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_heads": read.values["num_attention_heads"],
        "projection_size": shape("visual_projection.weight")[0],
        "activation": read.values["hidden_act"],
    }
    facts = {
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": fields["num_layers"],
        "patch_size": fields["patch_size"],
        "num_channels": patches[1],
        "projection_dim": fields["projection_size"],
    }
    notes = (*read.notes, *configs.contradictions(json, facts, where))
    return from_dict(CLIPVisionConfig, fields, where), notes


def first_layers(tensors: Tensors, json: Json) -> Tensors:
    """The tensors of a tower less the layers behind the last one that its config wants.

    transformers leaves them, too: so texts are encoded by a layer before the last.
    """
    wanted = json.get("num_hidden_layers")
    if not isinstance(wanted, int):
        return tensors
    layer = re.compile(r"(?:\w+\.)?encoder\.layers\.(\d+)\.")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (match := layer.match(name)) or int(match[1]) < wanted
    }
