"""What is done with each key of each config class of the supported pipelines."""

from typing import Any

from .configs import ConfigClass

_TRAINING = "acts in training only"
_PRECISION = "concerns half precision; --dtype decides"
_QUANTIZED = {"quantization_config": (None,)}
_MAP = "a 1x1 convolution and a linear layer are the same map"
_TILING = "the size of tiles in diffusers"

_SHAPE = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "down_block_types",
    "up_block_types",
)
_SPATIAL_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "time_cond_proj_dim": (None,),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None, 1),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None,),
    **_QUANTIZED,
}
_NO_ADDED = "is read with addition_embed_type only"
_SPATIAL_IRRELEVANT = {
    "use_linear_projection": _MAP,
    "upcast_attention": _PRECISION,
    "addition_time_embed_dim": _NO_ADDED,
    "projection_class_embeddings_input_dim": _NO_ADDED,
    "addition_embed_type_num_heads": _NO_ADDED,
}
_IMAGE_ONLY: dict[str, tuple[Any, ...]] = {
    **_SPATIAL_ONLY,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
}

UNET_2D = ConfigClass(
    "UNet2DConditionModel",
    obeyed={
        "sample_size": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "attention_head_dim": 8,
        "num_attention_heads": None,
    },
    told=(*_SHAPE, "time_embedding_dim"),
    only={
        **_IMAGE_ONLY,
        "center_input_sample": (False,),
        "dual_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
    },
    irrelevant={**_SPATIAL_IRRELEVANT, "dropout": _TRAINING},
    ignored={"flip_sin_to_cos": True, "freq_shift": 0},
    aliases=("AppearanceEncoderModel",),
)
"""Of a UNet of images, which diffusers turns into a `UNetMotionModel`."""

UNET_MOTION = ConfigClass(
    "UNetMotionModel",
    obeyed={
        "sample_size": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "num_attention_heads": 8,
        "motion_num_attention_heads": 8,
        "motion_max_seq_length": 32,
    },
    told=(*_SHAPE, "use_motion_mid_block"),
    only={
        **UNET_2D.only,
        "transformer_layers_per_mid_block": (None, 1),
        "temporal_transformer_layers_per_block": (1,),
        "reverse_temporal_transformer_layers_per_block": (None, 1),
        "temporal_transformer_layers_per_mid_block": (None, 1),
        "mid_block_layers": (1,),
    },
    irrelevant=UNET_2D.irrelevant,
    ignored={**UNET_2D.ignored, "reverse_motion_num_attention_heads": None},
)
"""With the options of images at the one value they must have, which some files write out."""

MOTION_ADAPTER = ConfigClass(
    "MotionAdapter",
    obeyed={"motion_num_attention_heads": 8, "motion_max_seq_length": 32},
    told=("block_out_channels", "motion_layers_per_block", "use_motion_mid_block"),
    only={
        "motion_transformer_layers_per_block": (1,),
        "motion_mid_block_layers_per_block": (1,),
        "motion_transformer_layers_per_mid_block": (None, 1),
        "conv_in_channels": (None,),
        "motion_activation_fn": ("geglu",),
        "motion_attention_bias": (False,),
        "motion_cross_attention_dim": (None,),
        **_QUANTIZED,
    },
    irrelevant={"motion_norm_num_groups": "motion modules normalize in the UNet's groups"},
)
"""With the keys of diffusers before 0.24, which later ones leave out."""

UNET_3D = ConfigClass(
    "UNet3DConditionModel",
    obeyed={
        "sample_size": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "attention_head_dim": 64,
    },
    told=_SHAPE,
    only={
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "num_attention_heads": (None,),
        "time_cond_proj_dim": (None,),
        **_QUANTIZED,
    },
    irrelevant={},
)

UNET_SPATIO_TEMPORAL = ConfigClass(
    "UNetSpatioTemporalConditionModel",
    obeyed={"num_attention_heads": (5, 10, 20, 20), "num_frames": 25},
    told=(*_SHAPE, "projection_class_embeddings_input_dim"),
    only={
        "addition_time_embed_dim": (256,),
        "transformer_layers_per_block": (1,),
        **_QUANTIZED,
    },
    irrelevant={"sample_size": "is neither the height nor the width of the training"},
)

_CONTROLNET_ONLY = {
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "transformer_layers_per_block": (1,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "global_pool_conditions": (False,),
    "controlnet_conditioning_channel_order": ("rgb",),
    **_QUANTIZED,
}
_CONTROLNET_OBEYED = {
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "num_attention_heads": None,
}
_CONTROLNET_TOLD = (
    *(key for key in _SHAPE if key not in ("out_channels", "up_block_types")),
    "conditioning_channels",
    "conditioning_embedding_out_channels",
)

CONTROLNET = ConfigClass(
    "ControlNetModel",
    obeyed=_CONTROLNET_OBEYED,
    told=_CONTROLNET_TOLD,
    only={
        **_CONTROLNET_ONLY,
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
    },
    irrelevant=_SPATIAL_IRRELEVANT,
)

SPARSE_CONTROLNET = ConfigClass(
    "SparseControlNetModel",
    obeyed={**_CONTROLNET_OBEYED, "motion_num_attention_heads": 8},
    told=(*_CONTROLNET_TOLD, "motion_max_seq_length", "use_simplified_condition_embedding"),
    only={
        **_CONTROLNET_ONLY,
        "transformer_layers_per_mid_block": (None, 1),
        "temporal_transformer_layers_per_block": (1,),
        "concat_conditioning_mask": (True,),
    },
    irrelevant=_SPATIAL_IRRELEVANT,
)

_VAE_TOLD = ("in_channels", "out_channels", "latent_channels", "block_out_channels")
_VAE_IRRELEVANT = {"sample_size": _TILING, "force_upcast": _PRECISION}

VAE = ConfigClass(
    "AutoencoderKL",
    obeyed={
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    told=(*_VAE_TOLD, "layers_per_block"),
    only={
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        **_QUANTIZED,
    },
    irrelevant=_VAE_IRRELEVANT,
)

VAE_TEMPORAL_DECODER = ConfigClass(
    "AutoencoderKLTemporalDecoder",
    obeyed={"scaling_factor": 0.18215},
    told=(*_VAE_TOLD, "layers_per_block"),
    only={"down_block_types": ("DownEncoderBlock2D",), **_QUANTIZED},
    irrelevant=_VAE_IRRELEVANT,
)

_OF_GENERATION = "acts in the generation of text only"
_OF_OUTPUTS = "chooses outputs that are not used"
_OF_LABELS = "belongs to classification"
_TRANSFORMERS_IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(("attention_dropout", "dropout", "gradient_checkpointing"), _TRAINING),
    **dict.fromkeys(("initializer_factor", "initializer_range"), _TRAINING),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "return_dict", "use_cache"), _OF_OUTPUTS
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "use_bfloat16"), _PRECISION),
    **dict.fromkeys(
        ("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        _OF_LABELS,
    ),
    **dict.fromkeys(
        ("architectures", "transformers_version", "tokenizer_class", "attn_implementation"),
        "says who wrote the file, not what it holds",
    ),
    **dict.fromkeys(
        ("chunk_size_feed_forward", "torchscript", "tf_legacy_loss"),
        "how it is computed, not what",
    ),
    **dict.fromkeys(
        ("is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
         "tie_encoder_decoder", "tie_word_embeddings", "decoder_start_token_id", "prefix"),
        "belongs to models with a decoder",
    ),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
        "the tokenizer writes them, and the pooled output that looks for the last is not used",
    ),
    **dict.fromkeys(
        ("max_length", "min_length", "do_sample", "early_stopping", "num_beams",
         "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
         "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
         "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
         "output_scores", "return_dict_in_generate", "forced_bos_token_id",
         "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
         "suppress_tokens", "begin_suppress_tokens"),
        _OF_GENERATION,
    ),
}  # fmt: skip
"""Keys of the base class in transformers 4 and 5."""

_CLIP_ONLY: dict[str, tuple[Any, ...]] = {
    "layer_norm_eps": (1e-5,),
    "pruned_heads": ({},),
    **_QUANTIZED,
}

CLIP_TEXT = ConfigClass(
    "CLIPTextConfig",
    obeyed={"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu"},
    told=("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    only=_CLIP_ONLY,
    irrelevant={**_TRANSFORMERS_IRRELEVANT, "projection_dim": "of an output that is not used"},
    aliases=("clip_text_model",),
)

CLIP_VISION = ConfigClass(
    "CLIPVisionConfig",
    obeyed={
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    },
    told=("hidden_size", "intermediate_size", "patch_size", "num_channels", "projection_dim"),
    only=_CLIP_ONLY,
    irrelevant=_TRANSFORMERS_IRRELEVANT,
    aliases=("clip_vision_model",),
)

_BY_PIPELINE = "the pipeline resizes the image itself and switches this off"
IMAGE_PROCESSOR = ConfigClass(
    "CLIPImageProcessor",
    obeyed={},
    told=(),
    only={
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    irrelevant={
        **dict.fromkeys(
            ("crop_size", "size", "do_center_crop", "do_resize", "do_rescale", "do_normalize",
             "resample", "rescale_factor", "do_convert_rgb"),
            _BY_PIPELINE,
        ),
        **dict.fromkeys(
            ("feature_extractor_type", "image_processor_type", "processor_class",
             "_valid_processor_keys", "_valid_kwargs_names", "return_tensors", "data_format",
             "input_data_format", "device", "default_to_square", "disable_grouping", "do_pad",
             "pad_size", "image_seq_length"),
            "the call says it",
        ),
    },
)  # fmt: skip

CLASSES: tuple[ConfigClass, ...] = (
    UNET_2D,
    UNET_MOTION,
    MOTION_ADAPTER,
    UNET_3D,
    UNET_SPATIO_TEMPORAL,
    CONTROLNET,
    SPARSE_CONTROLNET,
    VAE,
    VAE_TEMPORAL_DECODER,
    CLIP_TEXT,
    CLIP_VISION,
)
