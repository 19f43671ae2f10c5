"""The configs that diffusers and transformers have for our networks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.pipeline import VideoDefaults

from . import config_classes as classes
from . import keys
from .tensors import Tensors

Named = dict[str, Any]
"""A config as JSON, with the name of its class."""


def motion_unet(
    configs: ComponentConfigs, tensors: Tensors, defaults: VideoDefaults, frames: int
) -> Named:
    """AnimateDiff's UNet; `frames` is the length of its positional tables."""
    unet = configs.unet
    return {
        "_class_name": classes.UNET_MOTION.name,
        **_shape(unet, tensors, "Motion"),
        **_norms(unet),
        "sample_size": _sample_size(configs, defaults),
        "num_attention_heads": _one(unet.num_heads),
        "motion_num_attention_heads": _one(unet.temporal_heads),
        "motion_max_seq_length": frames,
        "use_motion_mid_block": unet.temporal_mid_block,
    }


def motion_adapter(unet: UNet3DConfig, frames: int) -> Named:
    """The motion modules of AnimateDiff's UNet alone."""
    return {
        "_class_name": classes.MOTION_ADAPTER.name,
        "block_out_channels": list(unet.block_channels),
        "motion_layers_per_block": unet.layers_per_block,
        "motion_norm_num_groups": unet.norm_groups,
        "motion_num_attention_heads": _one(unet.temporal_heads),
        "motion_max_seq_length": frames,
        "use_motion_mid_block": unet.temporal_mid_block,
    }


def modelscope_unet(configs: ComponentConfigs, tensors: Tensors, defaults: VideoDefaults) -> Named:
    """ModelScope's UNet, which has the width of its heads."""
    unet = configs.unet
    return {
        "_class_name": classes.UNET_3D.name,
        **_shape(unet, tensors, "3D"),
        **_norms(unet),
        "sample_size": _sample_size(configs, defaults),
        "attention_head_dim": unet.block_channels[0] // unet.num_heads[0],
    }


def svd_unet(unet: UNet3DConfig, tensors: Tensors, defaults: VideoDefaults) -> Named:
    """Stable Video Diffusion's UNet, whose norms are the class's own."""
    return {
        "_class_name": classes.UNET_SPATIO_TEMPORAL.name,
        **_shape(unet, tensors, "SpatioTemporal"),
        "num_attention_heads": list(unet.num_heads),
        "num_frames": defaults.frames,
        "addition_time_embed_dim": _id_width(),
        "projection_class_embeddings_input_dim": _id_width() * unet.added_ids,
    }


def controlnet(unet: UNet3DConfig, tensors: Tensors, frames: int) -> Named:
    """The ControlNet or SparseCtrl beside a UNet; `frames` as of `motion_unet`."""
    config = unet.controlnet
    assert config is not None
    sparse = config.ignores_latents
    known = classes.SPARSE_CONTROLNET if sparse else classes.CONTROLNET
    shape = _shape(unet, tensors, "Motion" if sparse else "2D")
    return {
        "_class_name": known.name,
        **{key: value for key, value in shape.items() if key in known.keys},
        **_norms(unet),
        "in_channels": tensors["conv_in.weight"].shape[1],
        "attention_head_dim": _one(unet.num_heads),
        "conditioning_channels": config.condition_channels - sparse,
        **(
            {"conditioning_embedding_out_channels": list(config.embedding_channels)}
            if config.embedding_channels
            else {}
        ),
        **(
            {
                "motion_num_attention_heads": _one(unet.temporal_heads),
                "motion_max_seq_length": frames,
                "use_simplified_condition_embedding": not config.embedding_channels,
                "concat_conditioning_mask": True,
            }
            if sparse
            else {}
        ),
    }


def vae(config: VAEConfig) -> Named:
    """The VAE of images, or Stable Video Diffusion's."""
    levels = len(config.block_channels)
    common = {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "scaling_factor": config.scaling_factor,
    }
    if config.temporal_decoder:
        return {"_class_name": classes.VAE_TEMPORAL_DECODER.name, **common}
    return {
        "_class_name": classes.VAE.name,
        **common,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.norm_groups,
    }


def text_encoder(config: CLIPTextConfig, special_tokens: Mapping[str, int | None]) -> Named:
    """The text tower; with the tokenizer's special tokens, by name."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_tower(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        **{key: number for key, number in special_tokens.items() if number is not None},
    }


def image_encoder(config: CLIPVisionConfig) -> Named:
    """The image tower."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_tower(config),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "projection_dim": config.projection_size,
    }


def image_processor(config: CLIPVisionConfig) -> Named:
    """What brings images to the image tower."""
    size = config.image_size
    return {
        "image_processor_type": classes.IMAGE_PROCESSOR.name,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        **{key: list(values) for key, values in classes.IMAGE_PROCESSOR.only.items()},
    }


def _tower(config: CLIPTextConfig | CLIPVisionConfig) -> Named:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": config.activation,
        "layer_norm_eps": classes.CLIP_TEXT.only["layer_norm_eps"][0],
    }


def _shape(unet: UNet3DConfig, tensors: Tensors, suffix: str) -> Named:
    """What the tensors tell, too."""
    facts = keys.unet_facts(asdict(unet), tensors, suffix)
    # Four times the first level's channels in every class, of which one alone has the key.
    del facts["time_embedding_dim"]
    return {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items()}


def _norms(unet: UNet3DConfig) -> Named:
    return {"norm_num_groups": unet.norm_groups, "norm_eps": unet.out_eps}


def _sample_size(configs: ComponentConfigs, defaults: VideoDefaults) -> Any:
    return _one([size // configs.vae.stride for size in (defaults.height, defaults.width)])


def _id_width() -> int:
    (width,) = classes.UNET_SPATIO_TEMPORAL.only["addition_time_embed_dim"]
    return width


def _one(values: Sequence[int]) -> int | list[int]:
    """One number for all, where they are equal."""
    return values[0] if len(set(values)) == 1 else list(values)
