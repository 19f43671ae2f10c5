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
"""CHECKPOINTS.md 1.3, from diffusers to the original code, below `transformer_blocks.0.`"""


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
