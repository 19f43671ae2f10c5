"""What a user can get wrong when converting ends with one line that says so, and leaves nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_animatediff
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    SparseControlNetModel,
    UNetSpatioTemporalConditionModel,
)
from pytorch_sources import (
    Weights,
    edit_json,
    original_motion,
    original_names,
    read_weights,
    rewrite,
    split_motion,
    write_weights,
)
from refusals import assert_one_line_error

Tiny = tuple[Path, AnimateDiffPipeline]
Edit = Callable[[Path], list[object] | None]
"""Spoils the source folder; returns further arguments of the command."""

UNET = "unet/diffusion_pytorch_model.safetensors"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LORA = f"{ATTENTION}.processor.to_q_lora"
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")


def edit_unet(edit: Callable[[Weights], Any]) -> Edit:
    """An edit of the UNet's tensors in place."""

    def apply(source: Path) -> None:
        tensors = read_weights(source / "unet")
        edit(tensors)
        write_weights(source / "unet", tensors)

    return apply


def drop_motion(source: Path) -> None:
    shutil.rmtree(source / "motion_adapter")
    write_weights(source / "unet", split_motion(read_weights(source / "unet"))[0])


def shards(shard: str) -> Edit:
    def apply(source: Path) -> None:
        # The file is there, and good: only its place is wrong.
        shutil.copy(source / UNET, source / "evil.safetensors")
        rewrite(source / "unet", "sharded")
        index = source / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["conv_in.weight"] = shard.replace("SOURCE", str(source))
        index.write_text(json.dumps(data))

    return apply


def truncate(keep: float, layout: str | None = None) -> Edit:
    def apply(source: Path) -> None:
        file = source / UNET
        if layout is not None:
            rewrite(source / "unet", layout)
            file = file.with_suffix(".bin")
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data))])

    return apply


def motion(make: Callable[[Path], Path]) -> Edit:
    """Takes the source's motion modules away and names others by --motion."""

    def apply(source: Path) -> list[object]:
        adapter = make(source)
        if adapter != source / "motion_adapter":
            drop_motion(source)
        return ["--motion", adapter]

    return apply


def three_level_adapter(source: Path) -> Path:
    channels = {"block_out_channels": (32, 64, 64)}
    random_animatediff.make_adapter("v3", **channels).save_pretrained(source.parent / "sdxl")
    return source.parent / "sdxl"


def video_blocks(source: Path) -> Path:
    path = source.parent / "svd.ckpt"
    torch.save({"input_blocks.1.0.time_stack.in_layers.0.weight": torch.zeros(2)}, path)
    return path


def sparse_control(source: Path) -> Path:
    with torch.random.fork_rng():
        model = SparseControlNetModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=4,
            num_attention_heads=4,
            motion_num_attention_heads=4,
            conditioning_embedding_out_channels=(8, 8),
        )
    torch.save(model.state_dict(), source.parent / "sparse.ckpt")
    return source.parent / "sparse.ckpt"


def spatial_only(source: Path) -> Path:
    torch.save(split_motion(read_weights(source / "unet"))[0], source.parent / "mm.ckpt")
    return source.parent / "mm.ckpt"


def motion_lora(source: Path) -> Path:
    module = "mid_block.motion_modules.0.transformer_blocks.0.attn1.processor"
    weights = {f"{module}.to_q_lora.{side}.weight": torch.zeros(2, 2) for side in ("up", "down")}
    torch.save(weights, source.parent / "lora.ckpt")
    return source.parent / "lora.ckpt"


def lora(tensors: Weights, scale: str = "") -> Edit:
    def apply(source: Path) -> list[object]:
        torch.save(tensors, source.parent / "lora.ckpt")
        return ["--lora", f"{source.parent / 'lora.ckpt'}{scale}"]

    return apply


def pair(up: tuple[int, ...], down: tuple[int, ...]) -> Weights:
    return {f"{LORA}.up.weight": torch.zeros(up), f"{LORA}.down.weight": torch.zeros(down)}


def config(component: str, **changes: object) -> Edit:
    return lambda source: edit_json(source / component / "config.json", **changes)


def write(path: str, text: str) -> Edit:
    return lambda source: (source / path).write_text(text) and None


def case(edit: Edit, *parts: str, id: str) -> Any:
    return pytest.param(edit, parts, id=id)


FILES = [
    case(lambda source: shutil.rmtree(source), "source is no folder", id="source"),
    case(
        lambda source: [shutil.rmtree(source / name) for name in ("vae", "tokenizer")] and None,
        "source lacks the folders vae, tokenizer of a diffusers text-to-image, text-to-video",
        id="components",
    ),
    case(
        lambda source: (source / UNET).unlink(),
        "unet holds no weights; looked for diffusion_pytorch_model.safetensors, "
        "diffusion_pytorch_model.bin, with a variant (.fp16) before the suffix, and their shards",
        id="weights",
    ),
    case(
        lambda source: [file.unlink() for file in (source / "tokenizer").iterdir()] and None,
        "tokenizer holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, are needed",
        id="tokenizer files",
    ),
    case(
        # transformers makes a tokenizer of three tokens of the rest.
        lambda source: [(source / "tokenizer" / name).unlink() for name in VOCABULARY] and None,
        "/tokenizer ",
        "vocab.json",
        id="vocabulary",
    ),
    case(
        lambda source: (source / "vae" / "config.json").unlink(),
        "vae/config.json does not exist",
        id="config",
    ),
    case(truncate(0.5), f"{UNET} is truncated or no safetensors file: ", id="half safetensors"),
    case(truncate(0), f"{UNET} is truncated or no safetensors file: ", id="empty safetensors"),
    case(truncate(0.5, "bin"), ".bin is truncated or no pickle of tensors: ", id="half pickle"),
    case(truncate(0.5, "old bin"), ".bin is ", "truncated", id="half old pickle"),
    case(
        shards("../evil.safetensors"),
        "index.json: conv_in.weight is said to lie in '../evil.safetensors'; a shard is a file of "
        "the same folder",
        id="index with ..",
    ),
    case(
        shards("SOURCE/evil.safetensors"),
        "index.json: conv_in.weight is said to lie in '/",
        "a shard is a file of the same folder",
        id="index with absolute path",
    ),
    case(
        shards("lost.safetensors"), "unet/lost.safetensors does not exist", id="index, lost shard"
    ),
]

CONFIGS = [
    case(write("unet/config.json", '{"a":'), "unet/config.json is no JSON: ", id="half JSON"),
    case(
        write("vae/config.json", "[1]"),
        "vae/config.json: a JSON object is needed, got list",
        id="array",
    ),
    case(
        config("unet", norm_eps="a"),
        "unet: norm_eps: a positive number is needed, got 'a'",
        id="eps",
    ),
    case(
        config("unet", num_attention_heads=[4, 4, 4]),
        "attention_head_dim: one positive integer, or 2, are needed, got [4, 4, 4]",
        id="heads of three levels",
    ),
    case(
        config("unet", num_attention_heads=7), "num_heads = 7 does not divide the 32", id="7 heads"
    ),
    case(
        config("unet", norm_num_groups=7), "norm_groups = 7 does not divide the 32", id="7 groups"
    ),
    case(
        config("unet", resnet_time_scale_shift="scale_shift"),
        "unet: resnet_time_scale_shift = 'scale_shift' is not supported; it must be 'default'",
        id="unsupported option",
    ),
    case(config("vae", norm_num_groups=0), "norm_groups", "0", id="VAE of no groups"),
    case(config("text_encoder", num_attention_heads=0), "num_heads", "0", id="text of no heads"),
    case(
        config("text_encoder", hidden_act="relu"),
        "text_encoder.activation: unknown value 'relu'",
        id="activation",
    ),
    case(
        lambda source: (
            edit_unet(lambda t: [t.pop(k) for k in list(t) if k.endswith(".pe")])(source)
            or edit_json(source / "unet" / "config.json", motion_max_seq_length="32")
        ),
        "motion_max_seq_length",
        "'32'",
        id="text for a number",
    ),
    case(
        lambda source: edit_json(
            source / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"
        ),
        "scheduler_config.json.prediction_type: unknown value 'flow_prediction'",
        id="what is predicted",
    ),
]

MOTION = [
    case(
        drop_motion,
        "unet has no motion modules; name a motion adapter folder or an original mm_*.ckpt with "
        "--motion",
        id="none",
    ),
    case(
        motion(lambda source: source.parent / "typo.ckpt"),
        "typo.ckpt does not exist",
        id="lost file",
    ),
    case(
        motion(lambda source: source / "motion_adapter"),
        "unet has motion modules of its own; leave --motion out",
        id="two",
    ),
    case(
        motion(three_level_adapter),
        "the UNet has 2 levels, its motion modules have 3; were they made for another base model, "
        "such as Stable Diffusion XL?",
        id="three levels",
    ),
    case(
        motion(sparse_control),
        "sparse.ckpt: motion modules are expected, it holds a ControlNet or SparseCtrl",
        id="SparseCtrl",
    ),
    case(
        motion(video_blocks),
        "svd.ckpt: motion modules are expected, it holds Stable Video Diffusion",
        id="Stable Video Diffusion",
    ),
    case(
        motion(spatial_only),
        "mm.ckpt: motion modules are expected, it holds a UNet",
        id="spatial weights",
    ),
    case(
        motion(motion_lora),
        "lora.ckpt: motion modules are expected, it holds a LoRA, which --lora takes",
        id="LoRA",
    ),
    case(
        motion(lambda source: source / "model_index.json"),
        'model_index.json is a text, not weights: \'{ "_class_name": "AnimateDiffPipeline"',
        id="no checkpoint",
    ),
]

LORAS = [
    case(
        lora({f"{ATTENTION}.to_q.oft_blocks": torch.zeros(4, 8, 8), "step": torch.zeros(1)}),
        f"lora.ckpt: these keys are of no known kind (2): {ATTENTION}.to_q.oft_blocks, step",
        id="foreign keys",
    ),
    case(
        lora({"lora_unet_down_blocks_9_proj_in.lora_down.weight": torch.zeros(4, 32)}),
        "lora.ckpt: it adds to layers that this model lacks (1): lora_unet_down_blocks_9_proj_in",
        id="layer of another model",
    ),
    case(lora({}), "lora.ckpt holds no tensors", id="empty"),
    case(
        lora({f"{LORA}.up.weight": torch.zeros(32, 4)}),
        f"lora.ckpt: {ATTENTION}.to_q has up, but not down",
        id="half",
    ),
    case(
        lora(pair((32, 4), (4, 64))),
        f"lora.ckpt: {ATTENTION}.to_q is (32, 32), which up (32, 4) x down (4, 64) does not fit",
        id="other width",
    ),
    case(lora(pair((32, 4), (2, 32))), "up (32, 4) x down (2, 32) does not fit", id="two ranks"),
    case(lora(pair((32,), (32,))), "up (32,) x down (32,) does not fit", id="vectors"),
    case(
        lora(pair((32, 4, 1, 1), (4, 32, 3, 3))),
        "up (32, 4, 1, 1) x down (4, 32, 3, 3) does not fit",
        id="convolutions",
    ),
    case(
        lora({key.replace("blocks.0", "blocks.7"): t for key, t in pair((32, 4), (4, 32)).items()}),
        "lora.ckpt: it adds to layers that this model lacks (1): down_blocks.7.",
        id="other block",
    ),
    case(lora(pair((32, 4), (4, 32)), ":nan"), "nan", id="scale of nan"),
    case(
        lambda source: ["--lora", source.parent],
        "is a folder; a file is expected",
        id="a folder",
    ),
    case(
        lambda source: ["--lora", source.parent / "typo.ckpt:0.5"],
        "typo.ckpt does not exist",
        id="lost file",
    ),
]


@pytest.mark.parametrize(("edit", "parts"), FILES)
def test_missing_and_damaged_files_are_named(source, run, edit, parts):
    edit(source)
    assert_one_line_error(run(source), *parts)


@pytest.mark.parametrize(("edit", "parts"), CONFIGS)
def test_config_values_that_cannot_be_are_named(source, run, edit, parts):
    edit(source)
    assert_one_line_error(run(source), *parts)


@pytest.mark.parametrize(("edit", "parts"), MOTION)
def test_motion_modules_must_come_from_one_place_and_fit(source, run, edit, parts):
    assert_one_line_error(run(source, *(edit(source) or ())), *parts)


@pytest.mark.parametrize(("edit", "parts"), LORAS)
def test_lora_must_fit_the_model(source, run, edit, parts):
    assert_one_line_error(run(source, *edit(source)), *parts)


def test_motion_lora_of_v2_is_refused_by_v3_which_has_no_mid_block_module(tmp_path, tiny, run):
    random_animatediff.make_pipeline(tmp_path / "v3", "v3")
    tensors = {}
    for name, tensor in split_motion(tiny[1].unet.state_dict())[1].items():
        if name.endswith("to_q.weight"):
            stem = original_names(name)[0].replace(".to_q.weight", ".processor.to_q_lora")
            width = tensor.shape[0]
            tensors[f"{stem}.up.weight"] = torch.zeros(width, 4)
            tensors[f"{stem}.down.weight"] = torch.zeros(4, width)
    torch.save(tensors, tmp_path / "v2_lora.ckpt")
    assert_one_line_error(
        run(tmp_path / "v3", "--lora", tmp_path / "v2_lora.ckpt"),
        "v2_lora.ckpt: it adds to layers that this model lacks (2): mid_block.motion_modules.",
        "it is a motion LoRA of v2 motion modules, which have one in the mid block",
    )


def stable_video_diffusion() -> torch.nn.Module:
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=24,
        num_attention_heads=(4, 4),
        layers_per_block=1,
    )


def control_net() -> torch.nn.Module:
    return ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        layers_per_block=1,
        conditioning_embedding_out_channels=(8, 8),
    )


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (
            stable_video_diffusion,
            "Stable Video Diffusion, beside which image_encoder is needed, not text_encoder",
        ),
        (
            control_net,
            "a ControlNet or SparseCtrl; an AnimateDiff or Stable Diffusion 1.5 UNet is expected",
        ),
    ],
)
@pytest.mark.parametrize("with_motion", [False, True], ids=["alone", "with --motion"])
def test_other_families_are_called_by_name(source, tmp_path, run, make, family, with_motion):
    arguments = []
    if with_motion:
        torch.save(
            original_motion(split_motion(read_weights(source / "unet"))[1]), tmp_path / "mm.ckpt"
        )
        arguments = ["--motion", tmp_path / "mm.ckpt"]
    shutil.rmtree(source / "motion_adapter")
    write_weights(source / "unet", make().state_dict())
    assert_one_line_error(
        run(source, *arguments),
        f" is {family}",
    )


def test_missing_extra_and_misshapen_tensors_are_listed_at_once(source, run):
    lost, extra = "mid_block.resnets.0.conv1.bias", "mid_block.odd.weight"
    wide, vector, long = (
        "mid_block.resnets.0.time_emb_proj.weight",
        "mid_block.resnets.1.time_emb_proj.weight",
        "mid_block.resnets.1.norm2.weight",
    )

    def edit(tensors: Weights) -> None:
        del tensors[lost]
        tensors[extra] = torch.zeros(3, 5)
        tensors[wide] = tensors[wide].T
        tensors[vector] = tensors[vector].flatten()
        tensors[long] = torch.ones(65)

    edit_unet(edit)(source)
    outcome = run(source)
    assert outcome.code == 2
    head, *lines = outcome.message.splitlines()
    assert head == ("error: unet does not fit (5 tensors; - missing, + extra, ! other shape):")
    assert [line.split(":")[0].strip() for line in lines] == [
        f"! {wide} (128, 64)",
        f"! {long} (65,)",
        f"! {vector} (8192,)",
        f"+ {extra} (3, 5)",
        f"- {lost}",
    ]
