"""MagicAnimate: AnimateDiff's UNet with an appearance encoder and a ControlNet of poses."""

from dataclasses import replace
from pathlib import Path

from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig

from . import config_classes as classes
from . import configs
from .tensors import Tensors, open_model, read_json


def open_appearance_encoder(folder: Path, unet: UNet3DConfig) -> tuple[Tensors, tuple[str, ...]]:
    """Opens the folder `appearance_encoder` of MagicAnimate.

    Args:
      folder: the folder.
      unet: of the UNet it stands beside, which it is like.

    Returns:
      Its tensors, and notes.

    Raises:
      InputError: it is missing, damaged, something else, or unlike the UNet.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --appearance-encoder names MagicAnimate's")
    tensors = open_model(folder)
    if "conv_in.weight" not in tensors or "conv_out.weight" in tensors:
        raise InputError(
            f"{folder} is no appearance encoder, which is a UNet of images without its last layers"
        )
    json = folder / "config.json"
    if not json.is_file():
        return tensors, tensors.notes
    read = configs.read(read_json(json), classes.UNET_2D, str(folder))
    configs.check_like(read.values, unet, str(folder))
    return tensors, (*tensors.notes, *read.notes)


def unet_config(config: UNet3DConfig, where: str) -> UNet3DConfig:
    """The config of AnimateDiff's UNet with the appearance encoder.

    Raises:
      InputError: what MagicAnimate needs beside it is missing.
    """
    if config.controlnet is None or config.controlnet.ignores_latents:
        raise InputError(
            f"{where} with --appearance-encoder is MagicAnimate, which needs --controlnet, its "
            f"densepose_controlnet"
        )
    if config.temporal_op != "motion_module":
        raise InputError(f"{where}: MagicAnimate needs a UNet with motion modules; pass --motion")
    if config.temporal_mid_block or config.resnet_norm_scope != "joint":
        raise InputError(
            f"{where}: --motion names other motion modules than MagicAnimate's, which are in its "
            f"temporal_attention.ckpt"
        )
    return replace(config, appearance_encoder=True)
