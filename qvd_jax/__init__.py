"""Post-training quantization of video diffusion models (QVD, arXiv 2407.11585) in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvd_jax.diffusion.schedules import SchedulerConfig
    from qvd_jax.errors import InputError
    from qvd_jax.meshes import MeshConfig, replicated
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
    from qvd_jax.pipelines.loading import load, save
    from qvd_jax.pipelines.observation import CalibrationConfig
    from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
    from qvd_jax.pipelines.quantization import quantize
    from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
    from qvd_jax.quant.module import ModuleReport, QuantizedModule, quantize_module
    from qvd_jax.quant.nnx import from_nnx
    from qvd_jax.quant.policy import LayerSpec, Policy, Rule

__version__ = "0.1.0"

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
    "MeshConfig",
    "ModuleReport",
    "Policy",
    "QuantizedModule",
    "Rule",
    "SchedulerConfig",
    "TextToVideoPipeline",
    "UNet3D",
    "UNet3DConfig",
    "VAEConfig",
    "VideoDefaults",
    "VideoPipeline",
    "export",
    "from_nnx",
    "load",
    "quantize",
    "quantize_module",
    "replicated",
    "save",
]

_PLACES = {
    "diffusion.schedules": ("SchedulerConfig",),
    "errors": ("InputError",),
    "meshes": ("MeshConfig", "replicated"),
    "models.clip": ("CLIPTextConfig", "CLIPTextEncoder", "CLIPVisionConfig", "CLIPVisionEncoder"),
    "models.configs": ("UNet3DConfig",),
    "models.layers": ("FLOAT", "LayerSet"),
    "models.unet3d": ("UNet3D",),
    "models.vae": ("AutoencoderKL", "VAEConfig"),
    "pipelines.animation": ("AnimationPipeline",),
    "pipelines.export": ("export",),
    "pipelines.image_to_video": ("ImageToVideoDefaults", "ImageToVideoPipeline"),
    "pipelines.loading": ("load", "save"),
    "pipelines.observation": ("CalibrationConfig",),
    "pipelines.pipeline": ("VideoDefaults", "VideoPipeline"),
    "pipelines.quantization": ("quantize",),
    "pipelines.text_to_video": ("TextToVideoPipeline",),
    "quant.module": ("ModuleReport", "QuantizedModule", "quantize_module"),
    "quant.nnx": ("from_nnx",),
    "quant.policy": ("LayerSpec", "Policy", "Rule"),
}
"""The public names by the module they are defined in, which is imported when one is asked for."""


if not TYPE_CHECKING:  # To a type checker a name that is none of these is an error.

    def __getattr__(name: str) -> Any:
        """A public name. What needs few of them, such as `qvd --version`, imports little."""
        for place, names in _PLACES.items():
            if name in names:
                return getattr(importlib.import_module(f"qvd_jax.{place}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
