"""No key of a config is dropped in silence: it is obeyed, refused, named or known not to matter."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler
from parity import relative_error
from pytorch_sources import edit_json
from random_animatediff import (
    SCHEDULER,
    make_adapter,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet2d,
    make_vae,
    randomize,
)
from random_families import SCRIBBLE, make_modelscope, make_sparsectrl, make_svd
from transformers import CLIPTextModel

import qvd_jax
from convert import config_classes as classes
from convert import configs, converters, model_index
from convert.__main__ import main as convert
from convert.configs import ConfigClass
from convert.pipeline import Source, open_source
from qvd_jax.errors import InputError
from qvd_jax.pipelines.families import FAMILIES

BASE = {"_class_name", "model_type", "_name_or_path"}

# Each is a value that the class takes and that is not its default.
OTHER: dict[str, Any] = {
    "act_fn": "gelu",
    "hidden_act": "gelu",
    "attention_type": "gated",
    "down_block_types": ["AttnDownBlock2D"] * 2,
    "up_block_types": ["AttnUpBlock2D"] * 2,
    "controlnet_conditioning_channel_order": "bgr",
    "architectures": ["X"],
    "dtype": "float16",
    "problem_type": "regression",
    "transformers_version": "1",
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "fourier",
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def implementation(known: ConfigClass) -> type:
    """The class itself."""
    return getattr(diffusers, known.name, None) or getattr(transformers, known.name)


def defaults(known: ConfigClass) -> dict[str, Any]:
    """The keys that the class takes, and their defaults."""
    parameters = inspect.signature(implementation(known).__init__).parameters.values()
    return {
        p.name: p.default for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD
    }


@pytest.mark.parametrize("known", classes.CLASSES, ids=lambda known: known.name)
def test_every_key_of_a_class_is_in_a_table_that_knows_its_default(known):
    keys = defaults(known)
    assert not keys.keys() - known.keys - BASE
    for key, value in known.obeyed.items():
        assert np.array_equal(keys[key], value), key
    for key, value in known.ignored.items():
        if key in keys or known.name != classes.UNET_MOTION.name:
            assert keys[key] == value, key
    configs.read({key: keys[key] for key in known.only if key in keys}, known, "defaults")
    tables = [known.obeyed, known.irrelevant, known.ignored]
    assert sum(map(len, tables)) == len({key for table in tables for key in table})
    assert all(len(reason) > 10 for reason in known.irrelevant.values())


def test_every_component_of_the_pipelines_is_known():
    pipelines = ("AnimateDiff", "AnimateDiffSparseControlNet", "TextToVideoSD")
    pipelines += ("StableVideoDiffusion", "StableDiffusion")
    for name in pipelines:
        pipeline = getattr(diffusers, f"{name}Pipeline")
        keys = set(inspect.signature(pipeline.__init__).parameters) - {"self"}
        assert (
            not keys
            - model_index.CLASSES.keys()
            - model_index.IRRELEVANT.keys()
            - {*model_index.BY_OPTION}
        )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Path]]]:
    """A folder of each family, and what else is converted with it."""
    root = tmp_path_factory.mktemp("sources")
    make_pipeline(root / "animatediff")
    make_modelscope(root / "modelscope")
    make_svd(root / "svd")
    make_sparsectrl(SCRIBBLE, root)
    sd15 = root / "sd15"
    sd15.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (sd15 / part).symlink_to(root / "animatediff" / part)
    torch.manual_seed(0)
    make_unet2d().save_pretrained(sd15 / "unet")
    make_adapter("v2").save_pretrained(root / "adapter")
    return {
        "animatediff": (root / "animatediff", {"controlnet": root / SCRIBBLE}),
        "modelscope": (root / "modelscope", {}),
        "svd": (root / "svd", {}),
        "sd15": (sd15, {"motion": root / "adapter"}),
    }


PLACES = [
    ("animatediff", "unet", classes.UNET_MOTION),
    ("animatediff", "vae", classes.VAE),
    ("animatediff", "text_encoder", classes.CLIP_TEXT),
    ("animatediff", "../scribble", classes.SPARSE_CONTROLNET),
    ("sd15", "unet", classes.UNET_2D),
    ("sd15", "../adapter", classes.MOTION_ADAPTER),
    ("modelscope", "unet", classes.UNET_3D),
    ("svd", "unet", classes.UNET_SPATIO_TEMPORAL),
    ("svd", "vae", classes.VAE_TEMPORAL_DECODER),
    ("svd", "image_encoder", classes.CLIP_VISION),
]


def other_value(key: str, value: Any) -> Any:
    """Something else than a key's value."""
    if key in OTHER and value != OTHER[key]:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, list):
        return [other_value("", entry) for entry in value]
    return 3 if value is None else f"{value}x"


WORDS = {
    "attention_head_dim": "num_heads",
    "num_attention_heads": "num_heads|attention_head_dim",
    "motion_num_attention_heads": "temporal_heads",
    "norm_num_groups": "norm_groups",
    "hidden_act": "activation",
}
"""What the keys are called where their values do not fit."""


def effect(reference: Source, source: Path, options: dict[str, Path], key: str) -> str | None:
    """What a key's value has done to a source: refused, named or obeyed it; None for nothing."""
    try:
        found = open_source(source, **options)
    except InputError as error:
        return "refused" if re.search(f"{key}|{WORDS.get(key, key)}", str(error)) else None
    if any(f"{key} = " in note for note in found.notes):
        return "named"
    same = (found.configs, found.defaults) == (reference.configs, reference.defaults)
    return None if same and weights(found) == weights(reference) else "obeyed"


def weights(source: Source) -> list[tuple[str, Any]]:
    """The tensors' names, and the values of those that a config can replace."""
    tensors = [tensors for _, tensors in sorted(source.tensors.items())]
    return [
        (name, tensor.read().tolist() if "quant_conv" in name else None)
        for part in tensors
        for name, tensor in part.items()
    ]


@pytest.mark.parametrize(
    ("family", "part", "known"), PLACES, ids=lambda value: getattr(value, "name", value)
)
def test_another_value_of_any_key_is_obeyed_refused_or_named(sources, family, part, known):
    source, options = sources[family]
    file = (source / part / "config.json").resolve()
    text = file.read_text()
    saved = json.loads(text)
    reference = open_source(source, **options)
    assert not any("config.json says" in note or "is no key" in note for note in reference.notes)
    effects = {}
    try:
        for key in known.keys - known.irrelevant.keys() | {"new_key"}:
            usual = {key: allowed[0] for key, allowed in known.only.items()} | defaults(known)
            value = other_value(key, saved.get(key, usual.get(key)))
            file.write_text(json.dumps({**saved, key: value}))
            effects[key] = effect(reference, source, options, key)
    finally:
        file.write_text(text)
    assert effects.pop("new_key") == "named"
    assert not [key for key, done in effects.items() if done is None]
    assert all(effects[key] == "refused" for key in known.only)


@pytest.mark.parametrize(
    "key", sorted(defaults(classes.CLIP_TEXT).keys() & classes.CLIP_TEXT.irrelevant.keys())
)
def test_keys_called_irrelevant_do_not_change_the_text_embedding(key):
    torch.manual_seed(0)
    reference = make_text_encoder().eval()
    settings = reference.config.to_dict()
    settings = {k: v for k, v in settings.items() if k in defaults(classes.CLIP_TEXT)}
    changed = other_value(key, settings[key])
    config = transformers.CLIPTextConfig(**{**settings, key: changed})
    model = CLIPTextModel(config).eval().float()
    model.load_state_dict(reference.state_dict(), strict=False)
    tokens = torch.arange(16)[None] + 60
    with torch.no_grad():
        expected, found = (m(tokens, return_dict=True)[0] for m in (reference, model))
    assert torch.equal(found, expected)


PUBLISHED = [
    (
        classes.UNET_2D,
        """{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": false, "cross_attention_dim": 768, "down_block_types":
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types":
        ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}""",
    ),
    (
        classes.CLIP_TEXT,
        """{"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408}""",
    ),
    (
        classes.VAE,
        """{"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D",
        "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"], "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 256, "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D",
        "UpDecoderBlock2D", "UpDecoderBlock2D"]}""",
    ),
    (
        classes.MOTION_ADAPTER,
        """{"_class_name": "MotionAdapter", "_diffusers_version": "0.23.0.dev0",
        "block_out_channels": [320, 640, 1280, 1280], "motion_activation_fn": "geglu",
        "motion_attention_bias": false, "motion_cross_attention_dim": null,
        "motion_layers_per_block": 2, "motion_max_seq_length": 32,
        "motion_mid_block_layers_per_block": 1, "motion_norm_num_groups": 32,
        "motion_num_attention_heads": 8, "use_motion_mid_block": true}""",
    ),
]


@pytest.mark.parametrize(("known", "text"), PUBLISHED, ids=lambda value: getattr(value, "name", ""))
def test_published_configs_give_no_notes(known, text):
    assert configs.read(json.loads(text), known, "published").notes == ()


def test_what_is_unusual_in_every_config_samples_as_in_diffusers(tmp_path):
    """Epsilons, groups, heads by level, trained positions, a cut text tower, a bare VAE."""
    torch.manual_seed(0)
    unet = make_unet2d(norm_eps=0.02, norm_num_groups=4, attention_head_dim=(2, 8))
    adapter = make_adapter("v3", motion_num_attention_heads=(2, 4), motion_max_seq_length=5)
    vae = AutoencoderKL(**{**make_vae().config, "use_quant_conv": False, "scaling_factor": 0.5})
    text = CLIPTextModel(
        transformers.CLIPTextConfig(
            **{
                **make_text_encoder().config.to_dict(),
                "num_attention_heads": 2,
                "hidden_act": "gelu",
            }
        )
    )
    for module in (unet, adapter, vae, text):
        randomize(module.eval())
    for name, table in adapter.named_buffers():
        if name.endswith(".pe"):
            table.normal_()
    pipe = AnimateDiffPipeline(
        vae=vae, text_encoder=text, tokenizer=make_tokenizer(tmp_path / "t"), unet=unet,
        motion_adapter=adapter, scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "source")
    edit_json(tmp_path / "source" / "text_encoder" / "config.json", num_hidden_layers=1)
    pipe.text_encoder = CLIPTextModel.from_pretrained(tmp_path / "source" / "text_encoder")
    assert convert([str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 0
    latents = np.random.default_rng(0).standard_normal((1, 3, 4, 4, 4), dtype=np.float32)
    expected = pipe(
        "a b", num_frames=3, height=8, width=8, num_inference_steps=2, guidance_scale=3.0,
        latents=torch.from_numpy(latents).permute(0, 4, 1, 2, 3), output_type="latent",
    ).frames.permute(0, 2, 3, 4, 1)  # fmt: skip
    converted = qvd_jax.load(tmp_path / "out")
    found = converted(
        "a b", frames=3, height=8, width=8, steps=2, guidance_scale=3.0, latents=latents,
        output_type="latents",
    )  # fmt: skip
    assert relative_error(found, expected) <= 1e-4
    assert converted.vae.config.scaling_factor == 0.5
    assert converted.unet.config.max_frames == 5


def test_classes_that_are_not_supported_are_named(tmp_path, sources):
    source, _ = sources["animatediff"]
    index = json.loads((source / "model_index.json").read_text())
    notes = model_index.check({**index, "text_encoder_2": ["transformers", "X"]}, (), "index")
    assert notes == ("index: text_encoder_2 (X) is no part of these pipelines; left out",)
    with pytest.raises(InputError, match="vae is AutoencoderTiny, which is not supported"):
        model_index.check({**index, "vae": ["diffusers", "AutoencoderTiny"]}, (), "index")
    model_index.check({**index, "vae": ["diffusers", "AutoencoderTiny"]}, ("vae",), "index")
    (note,) = model_index.check({**index, "controlnet": ["diffusers", "X"]}, (), "index")
    assert note == "index: controlnet is read only where --controlnet names its folder"


@pytest.mark.parametrize(
    ("sample_size", "expected"),
    [(24, (24, 24)), ([16, 32], (16, 32)), (None, (4, 8)), ([8], (4, 8)), ([8, 0], (4, 8))],
)
def test_sizes_of_training_are_read_from_one_number_or_two(sample_size, expected):
    defaults = replace(FAMILIES["animatediff"].defaults, height=32, width=64)
    assert converters._latent_size({"sample_size": sample_size}, defaults) == expected
    with pytest.raises(InputError, match=r"config\.json is of t5, which is not supported here"):
        configs.read({"model_type": "t5"}, classes.CLIP_TEXT, "text_encoder")
    with pytest.raises(InputError, match=r"quantization_config = .* is not supported"):
        configs.read({"quantization_config": {"bits": 4}}, classes.UNET_2D, "unet")


def test_a_network_beside_the_unet_must_be_like_it(sources):
    source, options = sources["animatediff"]
    file = options["controlnet"] / "config.json"
    text = file.read_text()
    try:
        edit_json(file, attention_head_dim=8)
        with pytest.raises(InputError, match=r"attention_head_dim = 8, but the UNet .* \(4, 4\)"):
            open_source(source, **options)
    finally:
        file.write_text(text)
