"""Post-training quantization of video diffusion models (QVD, arXiv 2407.11585) in JAX."""

from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError
from qvd_jax.models.clip import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
)
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL, VAEConfig
from qvd_jax.pipelines.animation import AnimationPipeline
from qvd_jax.pipelines.export import export
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults, ImageToVideoPipeline
from qvd_jax.pipelines.loading import devices_for, load, save
from qvd_jax.pipelines.observation import CalibrationConfig
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.quantization import quantize
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.quant.policy import LayerSpec, Policy, Rule

__all__ = [
    "FLOAT",
    "AnimationPipeline",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "CLIPVisionConfig",
    "CLIPVisionEncoder",
    "CalibrationConfig",
    "ImageToVideoDefaults",
    "ImageToVideoPipeline",
    "InputError",
    "LayerSet",
    "LayerSpec",
    "Policy",
    "Rule",
    "SchedulerConfig",
    "TextToVideoPipeline",
    "UNet3D",
    "UNet3DConfig",
    "VAEConfig",
    "VideoDefaults",
    "VideoPipeline",
    "devices_for",
    "export",
    "load",
    "quantize",
    "save",
]
