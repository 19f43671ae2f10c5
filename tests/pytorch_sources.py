"""The tiny pipeline's weights in the other layouts PyTorch checkpoints come in."""

import json
import re
import shutil
from pathlib import Path

import torch
from random_animatediff import make_unet2d
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
ORIGINAL_BLOCK = (
    ("attn1.", "attention_blocks.0."),
    ("attn2.", "attention_blocks.1."),
    ("norm1.", "norms.0."),
    ("norm2.", "norms.1."),
    ("norm3.", "ff_norm."),
)
"""Names from diffusers to the original code, below `transformer_blocks.0.`"""


def weights_file(folder: Path) -> Path:
    """The one safetensors file of a component folder."""
    (file,) = folder.glob("*.safetensors")
    return file


def read_weights(folder: Path) -> Weights:
    """The tensors of a component folder."""
    return load_file(weights_file(folder))


def write_weights(folder: Path, tensors: Weights) -> None:
    """Puts other tensors in their place."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights_file(folder))


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, layout: str) -> None:
    """Stores the weights of a component folder in another layout.

    Args:
      folder: of the component, with one safetensors file.
      layout: words out of "fp16", "sharded", "bin" and "old" (PyTorch's format before 1.6).
    """
    tensors = read_weights(folder)
    weights_file(folder).unlink()
    variant = ".fp16" if "fp16" in layout else ""
    if variant:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    pickled = "bin" in layout
    suffix = "bin" if pickled else "safetensors"
    stem = STEMS.get(folder.name, "pytorch_model" if pickled else "model")

    def save(part: Weights, file: Path) -> None:
        if pickled:
            torch.save(part, file, _use_new_zipfile_serialization="old" not in layout)
        else:
            save_file(part, file)

    if "sharded" not in layout:
        save(tensors, folder / f"{stem}{variant}.{suffix}")
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        file = folder / f"{stem}{variant}-{shard + 1:05}-of-00003.{suffix}"
        save({name: tensors[name] for name in names[shard::3]}, file)
        weight_map |= dict.fromkeys(names[shard::3], file.name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index{variant}.json").write_text(json.dumps(index))


def split_motion(tensors: Weights) -> tuple[Weights, Weights]:
    """Spatial weights and motion modules of a UNetMotionModel."""
    motion = {name: tensor for name, tensor in tensors.items() if ".motion_modules." in name}
    return {name: t for name, t in tensors.items() if name not in motion}, motion


def original_names(name: str) -> list[str]:
    """A motion tensor's names in the original code: two for the positions, one for the others."""
    module, rest = re.fullmatch(r"(.+\.motion_modules\.\d+)\.(.+)", name).groups()
    prefix = f"{module}.temporal_transformer."
    block = "transformer_blocks.0."
    if not rest.startswith(block):
        return [prefix + rest]
    rest = rest.removeprefix(block)
    if rest == "pos_embed.pe":
        return [f"{prefix}{block}attention_blocks.{i}.pos_encoder.pe" for i in range(2)]
    for new, old in ORIGINAL_BLOCK:
        if rest.startswith(new):
            rest = old + rest.removeprefix(new)
    return [prefix + block + rest]


def original_motion(tensors: Weights) -> Weights:
    """Motion modules as in the original `mm_*.ckpt`."""
    return {old: tensor for name, tensor in tensors.items() for old in original_names(name)}


def make_sd15(pipeline: Path, folder: Path) -> Path:
    """A Stable Diffusion 1.5 folder with a pipeline's spatial weights and no motion modules.

    Files are as published: PNDM, old names of the VAE's attention, prefixed names of the text
    encoder with its position ids, the tokenizer without `tokenizer.json`. The motion adapter is
    put beside the folder, as `adapter`.

    Args:
      pipeline: an AnimateDiff pipeline folder.
      folder: the folder to make.
    """
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("motion_adapter"))
    shutil.copytree(pipeline / "motion_adapter", folder.parent / "adapter", dirs_exist_ok=True)
    spatial, _ = split_motion(read_weights(folder / "unet"))
    write_weights(folder / "unet", spatial)
    make_unet2d().save_config(folder / "unet")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    vae = read_weights(folder / "vae")
    for new, name in old.items():
        vae = {
            re.sub(rf"(attentions\.0)\.{new}\.", rf"\1.{name}.", key): tensor
            for key, tensor in vae.items()
        }
    assert sum(".proj_attn." in key for key in vae) == 4
    write_weights(folder / "vae", vae)
    text = read_weights(folder / "text_encoder")
    text = {f"text_model.{name}": tensor for name, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    write_weights(folder / "text_encoder", text)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "num_train_timesteps": 1000,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "trained_betas": None,
                "clip_sample": False,
            }
        )
    )
    return folder


LDM_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
LDM_OUTSIDE = {
    "conv_in.": "input_blocks.0.0.",
    "transformer_in.": "input_blocks.0.1.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def ldm_unet(tensors: Weights, attention: tuple[bool, ...], layers: int) -> Weights:
    """A UNet of ModelScope or SVD by the original code's names.

    The blocks are counted in the order in which the original code's constructor appends them.

    Args:
      tensors: by diffusers' names.
      attention: which levels have transformers.
      layers: per level on the way down.
    """
    is_modelscope = any(".temp_convs." in name for name in tensors)
    kinds = ["attentions", "temp_attentions"][: 1 + is_modelscope]
    places = dict(LDM_OUTSIDE)

    def add(block: str, stage: str, layer: int, has_attention: bool) -> int:
        places[f"{stage}.resnets.{layer}."] = f"{block}.0."
        places[f"{stage}.temp_convs.{layer}."] = f"{block}.0.temopral_conv."
        parts = kinds if has_attention else []
        for part, kind in enumerate(parts):
            places[f"{stage}.{kind}.{layer}."] = f"{block}.{1 + part}."
        return 1 + len(parts)

    number = 1
    for level, has_attention in enumerate(attention):
        for layer in range(layers):
            add(f"input_blocks.{number}", f"down_blocks.{level}", layer, has_attention)
            number += 1
        if level < len(attention) - 1:
            sampler = f"input_blocks.{number}.{'' if is_modelscope else '0.'}op."
            places[f"down_blocks.{level}.downsamplers.0.conv."] = sampler
            number += 1
    number = 0
    for level, has_attention in enumerate(reversed(attention)):
        for layer in range(layers + 1):
            block = f"output_blocks.{number}"
            parts = add(block, f"up_blocks.{level}", layer, has_attention)
            number += 1
        if level < len(attention) - 1:
            places[f"up_blocks.{level}.upsamplers.0.conv."] = f"{block}.{parts}.conv."
    middle = ["resnets.0.", *(f"{kind}.0." for kind in kinds), "resnets.1."]
    for part, name in enumerate(middle):
        places[f"mid_block.{name}"] = f"middle_block.{part}."
    for layer, part in ((0, 0), (1, len(middle) - 1)):
        places[f"mid_block.temp_convs.{layer}."] = f"middle_block.{part}.temopral_conv."

    def rename(name: str) -> str:
        (start,) = (start for start in places if name.startswith(start))
        rest = name.removeprefix(start)
        if ".resnets." in start:
            rest = ldm_resnet(rest)
        elif "attentions." in start:
            rest = rest.replace("temporal_transformer_blocks.", "time_stack.")
            for linear in (1, 2):
                old = f"time_pos_embed.{2 * linear - 2}."
                rest = rest.replace(f"time_pos_embed.linear_{linear}.", old)
        return places[start] + rest

    return {rename(name): tensor for name, tensor in tensors.items()}


def ldm_resnet(rest: str) -> str:
    """A name within a UNet's resnet, or within the temporal one of SVD's VAE."""
    rest = rest.replace("temporal_res_block.", "time_stack.").replace("spatial_res_block.", "")
    for new, old in LDM_RESNET.items():
        rest = rest.replace(new, old)
    return rest


def svd_vae(tensors: Weights, levels: int) -> Weights:
    """The VAE of Stable Video Diffusion by the original code's names, without `quant_conv`."""

    def rename(name: str) -> str:
        for level in range(levels):
            name = name.replace(f"down_blocks.{level}.", f"down.{level}.")
            name = name.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        for block in range(2):
            name = name.replace(f"mid_block.resnets.{block}.", f"mid.block_{block + 1}.")
        for new, old in {
            ".resnets.": ".block.",
            "samplers.0.": "sample.",
            "mid_block.attentions.0.": "mid.attn_1.",
            "group_norm.": "norm.",
            "to_out.0.": "proj_out.",
            "to_q.": "q.",
            "to_k.": "k.",
            "to_v.": "v.",
            "conv_norm_out.": "norm_out.",
            "time_conv_out.": "conv_out.time_mix_conv.",
            "time_mixer.": "",
        }.items():
            name = name.replace(new, old)
        if "temporal_res_block." in name:
            return ldm_resnet(name)
        return name.replace("spatial_res_block.", "").replace("conv_shortcut.", "nin_shortcut.")

    return {rename(name): t for name, t in tensors.items() if not name.startswith("quant_conv.")}


def ldm_vae(tensors: Weights, levels: int) -> Weights:
    """The VAE of Stable Diffusion by the original code's names; its attention is convolutions."""
    renamed = svd_vae(tensors, levels)
    renamed |= {name: t for name, t in tensors.items() if name.startswith("quant_conv.")}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def open_clip_visual(tensors: Weights) -> Weights:
    """CLIP's image tower by open_clip's names below `visual.`."""
    renamed: Weights = {}
    for name, tensor in tensors.items():
        if name == "visual_projection.weight":
            renamed["proj"] = tensor.T
            continue
        for new, old in {
            "vision_model.": "",
            "embeddings.class_embedding": "class_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.patch_embedding.": "conv1.",
            "pre_layrnorm.": "ln_pre.",
            "post_layernorm.": "ln_post.",
            "encoder.layers.": "transformer.resblocks.",
            "layer_norm": "ln_",
            "self_attn.": "attn.",
            "mlp.fc1.": "mlp.c_fc.",
            "mlp.fc2.": "mlp.c_proj.",
        }.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed
