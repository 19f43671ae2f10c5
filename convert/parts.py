"""The files of a source, opened and split by component, all by today's diffusers' names."""

from pathlib import Path
from typing import Any, NamedTuple

from convert import companions, ldm, svd
from convert.tensors import Tensors, open_file, open_folder, open_model, read_json
from qvd_jax import checkpoint
from qvd_jax.errors import InputError

_SVD_FILE = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "image_encoder": "conditioner.embedders.0.open_clip.model.visual.",
}
"""Where an original file of Stable Video Diffusion holds each component."""


class Parts(NamedTuple):
    """The components of a source.

    Attributes:
      tensors: by component: "unet", "vae" and "text_encoder" or "image_encoder".
      configs: their `config.json`, and the scheduler's; empty where there is none.
      places: where each of them lies, for messages.
      has_original_unet: whether the UNet comes from the original code, not from diffusers.
    """

    tensors: dict[str, Tensors]
    configs: dict[str, dict[str, Any]]
    places: dict[str, Path]
    has_original_unet: bool

    @property
    def encoder(self) -> str:
        """Which encoder there is."""
        return "text_encoder" if "text_encoder" in self.tensors else "image_encoder"


def open_parts(source: Path, unet: Path | None = None, vae: Path | None = None) -> Parts:
    """Opens a diffusers folder, or an original file of Stable Video Diffusion.

    Args:
      source: the folder or file.
      unet: an original UNet in place of the folder's.
      vae: the folder of a VAE in place of the folder's.

    Raises:
      InputError: something is missing, damaged, or of another kind.
    """
    if not source.is_file():
        return _open_folder(source, unet, vae)
    if unet is not None or vae is not None:
        raise InputError(f"{source} is a file; --unet and --vae replace what is in a folder")
    return _open_svd_file(source)


def _open_folder(source: Path, unet: Path | None, vae: Path | None) -> Parts:
    if not source.is_dir():
        raise InputError(f"{source} is no folder; a diffusers pipeline folder is expected")
    of_images = (source / "image_encoder").is_dir() and not (source / "text_encoder").is_dir()
    encoder = "image_encoder" if of_images else "text_encoder"
    needed = ["unet", "vae", encoder, *([] if of_images else ["tokenizer"]), "scheduler"]
    given = {"unet": unet, "vae": vae}
    missing = [part for part in needed if not given.get(part) and not (source / part).is_dir()]
    if missing:
        raise InputError(
            f"{source} lacks the folders {', '.join(missing)} of a diffusers text-to-image, "
            f"text-to-video or image-to-video pipeline"
        )
    if not of_images:
        checkpoint.check_tokenizer(source / "tokenizer")
    places = {name: source / name for name in needed}
    places["vae"] = vae or places["vae"]
    rename = companions.without_position_ids if of_images else companions.rename_text
    tensors = {
        "unet": _open_original_unet(unet) if unet else open_model(places["unet"]),
        "vae": companions.rename_vae(open_model(places["vae"])),
        encoder: rename(open_folder(source / encoder, "model", "pytorch_model")),
    }
    configs = {name: read_json(places[name] / "config.json") for name in (encoder, "vae")}
    configs["scheduler"] = read_json(source / "scheduler" / "scheduler_config.json")
    if unet is None:
        configs["unet"] = read_json(source / "unet" / "config.json")
        return Parts(tensors, configs, places, False)
    return Parts(tensors, configs | {"unet": {}}, places | {"unet": unet}, True)


def _open_original_unet(path: Path) -> Tensors:
    tensors = open_file(path)
    prefix = _SVD_FILE["unet"]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not ldm.is_original(tensors):
        raise InputError(
            f"{path} holds no original UNet (no input_blocks.0.0.weight); --unet takes "
            f"ModelScope's or ZeroScope's text2video_pytorch_model.pth"
        )
    return ldm.rename_unet(tensors)


def _open_svd_file(path: Path) -> Parts:
    found = open_file(path)
    tensors = {
        part: {
            name.removeprefix(prefix): tensor
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
        for part, prefix in _SVD_FILE.items()
    }
    missing = [_SVD_FILE[part] for part, held in tensors.items() if not held]
    if missing:
        raise InputError(
            f"{path} is no original file of Stable Video Diffusion, which holds "
            f"{', '.join(missing)}; other models are read from diffusers' folders"
        )
    tensors = {
        "unet": ldm.rename_unet(tensors["unet"]),
        "vae": ldm.rename_vae(tensors["vae"]),
        "image_encoder": ldm.rename_clip_vision(tensors["image_encoder"]),
    }
    if not svd.is_svd(tensors["unet"]):
        raise InputError(f"{path}: its UNet is not Stable Video Diffusion's, it mixes no frames")
    parts = (*tensors, "scheduler")
    return Parts(tensors, {part: {} for part in parts}, dict.fromkeys(parts, path), True)
