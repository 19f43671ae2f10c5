"""AnimateDiff pipelines with random weights, saved by diffusers in its own layout.

python tests/random_animatediff.py DIR [--size sd15] [--dtype bfloat16]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CHANNELS = (32, 64)
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over single characters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def randomize(module: torch.nn.Module) -> None:
    """Draws all parameters anew, norms and biases too, so that nothing is left at one or zero."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn_like(parameter) / fan_in**0.5
        else:
            offset = 1.0 if name.endswith("weight") else 0.0
            parameter.data = offset + 0.1 * torch.randn_like(parameter)


def make_unet2d(**options: Any) -> UNet2DConditionModel:
    """A Stable Diffusion 1.5 UNet with two levels."""
    return UNet2DConditionModel(
        **{
            "block_out_channels": CHANNELS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "sample_size": 8,
            **options,
        }
    )


def make_adapter(version: str, **options: Any) -> MotionAdapter:
    """Motion modules of a version for `make_unet2d`."""
    return MotionAdapter(
        **{
            "block_out_channels": CHANNELS,
            "motion_layers_per_block": 1,
            "motion_num_attention_heads": 4,
            "motion_norm_num_groups": 8,
            "motion_max_seq_length": 24 if version == "v1" else 32,
            "use_motion_mid_block": version == "v2",
            **options,
        }
    )


def make_vae() -> AutoencoderKL:
    """A VAE of stride 2."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
    )


def make_text_encoder() -> CLIPTextModel:
    """A text tower of two layers over the characters of `make_tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    )


def save(folder: Path, *modules: torch.nn.Module, dtype: torch.dtype) -> AnimateDiffPipeline:
    """Joins VAE, text encoder, UNet and adapter to a pipeline in `folder`."""
    vae, text, unet, adapter = (module.to(dtype).eval() for module in modules)
    pipe = AnimateDiffPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=make_tokenizer(folder / "tokenizer"),
        unet=unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False, steps_offset=1),
        feature_extractor=None,
        image_encoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def make_pipeline(folder: Path, version: str = "v2", seed: int = 0) -> AnimateDiffPipeline:
    """Builds and saves the smallest pipeline that has every kind of layer."""
    torch.manual_seed(seed)
    modules = (make_vae(), make_text_encoder(), make_unet2d(), make_adapter(version))
    for module in modules:
        randomize(module)
    return save(folder, *modules, dtype=torch.float32)


def make_sd15_pipeline(folder: Path, dtype: torch.dtype) -> None:
    """Builds and saves a pipeline of AnimateDiff v2's real size, as its classes initialise it."""
    modules = (
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072)),
        UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
        MotionAdapter(use_motion_mid_block=True),
    )
    save(folder, *modules, dtype=dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["tiny", "sd15"], default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.size == "tiny":
        make_pipeline(args.folder)
    else:
        make_sd15_pipeline(args.folder, getattr(torch, args.dtype))
    print(f"{args.folder}: a {args.size} AnimateDiff pipeline with random weights")
