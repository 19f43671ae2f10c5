"""Tiny random checkpoints of the other families, in the layouts they are published in."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    SparseControlNetModel,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from original_norms import original_norms
from pytorch_sources import (
    Weights,
    ldm_unet,
    make_sd15,
    open_clip_visual,
    original_motion,
    split_motion,
    svd_vae,
)
from random_animatediff import (
    CHANNELS,
    make_adapter,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet2d,
    make_vae,
    randomize,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

RGB, SCRIBBLE = "rgb", "scribble"

LAST = "up_blocks.{}.attentions.{}.transformer_blocks.0."
LOST = ("attn1.", "norm2.", "attn2.", "norm3.", "ff.")


def make_modelscope_unet() -> UNet3DConditionModel:
    """ModelScope's UNet."""
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=16,
    )


def make_modelscope(folder: Path) -> TextToVideoSDPipeline:
    """ModelScope, as diffusers saves it."""
    torch.manual_seed(0)
    modules = make_modelscope_unet(), make_vae(), make_text_encoder()
    for module in modules:
        randomize(module)
    unet, vae, text_encoder = (module.eval() for module in modules)
    pipe = TextToVideoSDPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(folder / "tokenizer"),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def original_modelscope(pipe: TextToVideoSDPipeline) -> Weights:
    """What `text2video_pytorch_model.pth` holds."""
    weights = ldm_unet(pipe.unet.state_dict(), (True, False), 1)
    # Projections over time are 1-D convolutions there.
    return {
        name: tensor[..., None] if re.search(r"(\.2|blocks\.0\.1)\.proj_.*weight", name) else tensor
        for name, tensor in weights.items()
    }


def make_svd_unet() -> UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion's UNet."""
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(2, 4),
        num_frames=3,
    )


def make_svd(folder: Path) -> StableVideoDiffusionPipeline:
    """Stable Video Diffusion, as diffusers saves it."""
    torch.manual_seed(0)
    modules = (
        make_svd_unet(),
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            layers_per_block=2,
        ),
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=16,
                image_size=224,
                patch_size=56,
                projection_dim=24,
                hidden_act="gelu",
            )
        ),
    )
    for module in modules:
        randomize(module)
    unet, vae, image_encoder = (module.eval() for module in modules)
    # The original code has no such layer.
    torch.nn.init.dirac_(vae.quant_conv.weight)
    torch.nn.init.zeros_(vae.quant_conv.bias)
    pipe = StableVideoDiffusionPipeline(
        unet=unet,
        vae=vae,
        image_encoder=image_encoder,
        feature_extractor=CLIPImageProcessor(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def original_svd(pipe: StableVideoDiffusionPipeline) -> Weights:
    """What `svd.safetensors` holds."""
    parts = {
        "model.diffusion_model.": ldm_unet(pipe.unet.state_dict(), (True, False), 1),
        "first_stage_model.": svd_vae(pipe.vae.state_dict(), 2),
        "conditioner.embedders.0.open_clip.model.visual.": open_clip_visual(
            pipe.image_encoder.state_dict()
        ),
        # Of no use here, as in the published file.
        "conditioner.embedders.3.encoder.": {"quant_conv.weight": torch.zeros(1)},
    }
    return {
        prefix + name: tensor.contiguous()
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def make_sparsectrl_module(kind: str) -> SparseControlNetModel:
    """A tiny SparseCtrl for `random_animatediff`'s UNet; its VAE halves the sides once."""
    torch.manual_seed(1)
    module = SparseControlNetModel(
        conditioning_channels=4 if kind == RGB else 3,
        use_simplified_condition_embedding=kind == RGB,
        conditioning_embedding_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        motion_num_attention_heads=4,
    )
    randomize(module)
    return module.eval()


def to_original(name: str) -> str:
    """The original code's name of a tensor of diffusers' SparseCtrl."""
    if ".motion_modules." in name:
        name = name.replace(".attn1.", ".attention_blocks.0.").replace(".norm1.", ".norms.0.")
        name = name.replace(".norm3.", ".ff_norm.").replace(
            ".pos_embed.", ".attention_blocks.0.pos_encoder."
        )
        head, _, tail = name.partition(".motion_modules.")
        number, _, rest = tail.partition(".")
        name = f"{head}.motion_modules.{number}.temporal_transformer.{rest}"
    return f"module.{name}"


def make_sparsectrl(kind: str, root: Path) -> None:
    """SparseCtrl as `root/kind`, a folder of diffusers, and as `root/kind.ckpt`, an original."""
    module = make_sparsectrl_module(kind)
    module.save_pretrained(root / kind)
    original = {to_original(name): t.clone() for name, t in module.state_dict().items()}
    torch.save({"controlnet": original, "epoch": 3}, root / f"{kind}.ckpt")


class MagicAnimate(NamedTuple):
    """What it is made of, in PyTorch."""

    unet: UNetMotionModel
    appearance: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL
    pipe: Any


def appearance_weights(
    weights: dict[str, torch.Tensor], level: int, layer: int
) -> dict[str, torch.Tensor]:
    """Those of a UNet that the appearance encoder has, up to its last self-attention."""
    block = LAST.format(level, layer)
    lost = ("conv_norm_out.", "conv_out.", *(block + part for part in LOST))
    lost += (block.replace("transformer_blocks.0.", "proj_out."),)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}


def make_controlnet() -> ControlNetModel:
    """An ordinary ControlNet for `random_animatediff`'s UNet, such as MagicAnimate's."""
    return ControlNetModel(
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(4, 8),
    )


def make_magicanimate(root: Path, window: int) -> MagicAnimate:
    """All that is converted, in `root`; the networks normalize like the original.

    Args:
      root: the folder that gets them.
      window: frames the UNet is called with.
    """
    pipe = make_pipeline(root / "v1", "v1")
    make_sd15(root / "v1", root / "sd15")
    torch.manual_seed(1)
    parts = (
        # The checkpoint does not tell the heads of the motion modules, 8 in all published ones.
        UNetMotionModel.from_unet2d(
            make_unet2d(),
            make_adapter("v1", motion_num_attention_heads=8),
        ),
        make_unet2d(),
        make_controlnet(),
        make_vae(),
    )
    for part in parts:
        # The UNet, too: all of it is in the checkpoint of the motion modules.
        randomize(part.eval())
    unet, appearance, controlnet, vae = parts
    vae.save_pretrained(root / "vae")
    controlnet.save_pretrained(root / "controlnet")
    appearance.save_pretrained(root / "appearance_encoder")
    (root / "appearance_encoder" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        appearance_weights(appearance.state_dict(), 1, 1),
        root / "appearance_encoder" / "diffusion_pytorch_model.bin",
    )
    spatial, motion = split_motion(unet.state_dict())
    content = {f"module.{name}": t for name, t in {**spatial, **original_motion(motion)}.items()}
    torch.save({"state_dict": content}, root / "temporal_attention.ckpt")
    original_norms(unet, "v1", window)
    return MagicAnimate(unet, appearance, controlnet, vae, pipe)
