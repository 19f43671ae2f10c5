"""The files of a source, opened and split by component, all by today's diffusers' names."""

from pathlib import Path
from typing import NamedTuple

from qvd_jax import checkpoint
from qvd_jax.errors import InputError

from . import companions, kinds, ldm, model_index, single_file
from . import config_classes as classes
from .configs import Json
from .configs import read as read_config
from .tensors import (
    PICKLES,
    Tensors,
    Weights,
    open_file,
    open_folder,
    open_model,
    read_json,
)


class Parts(NamedTuple):
    """The components of a source.

    Attributes:
      tensors: by component: "unet", "vae" and "text_encoder" or "image_encoder".
      configs: their `config.json`, and the scheduler's; empty where there is none.
      places: where each of them lies, for messages.
      has_original_unet: whether the UNet comes from the original code, not from diffusers.
      tokenizer: the tokenizer's folder; None for a model without text.
      notes: what the user should know.
    """

    tensors: dict[str, Tensors]
    configs: dict[str, Json]
    places: dict[str, Path]
    has_original_unet: bool
    tokenizer: Path | None
    notes: tuple[str, ...]

    @property
    def encoder(self) -> str:
        """Which encoder there is."""
        return "text_encoder" if "text_encoder" in self.tensors else "image_encoder"


def open_parts(
    source: Path, unet: Path | None = None, vae: Path | None = None, config: Path | None = None
) -> Parts:
    """Opens a diffusers folder, or one file of Stable Diffusion 1.5 or Stable Video Diffusion.

    Args:
      source: the folder or file.
      unet: an original UNet in place of the folder's.
      vae: a VAE in place of the source's, a folder or a file.
      config: the folder of diffusers that has the configs and the tokenizer of a file.

    Raises:
      InputError: something is missing, damaged, or of another kind.
    """
    if not source.is_file():
        if config is not None:
            raise InputError(f"{source} has configs of its own; --config is for one file")
        return _open_folder(source, unet, vae)
    if unet is not None:
        raise InputError(f"{source} is a file; --unet replaces what is in a folder")
    opened = single_file.open_model_file(source, config, needs_vae=vae is None)
    parts = Parts(
        opened.tensors,
        opened.configs,
        dict.fromkeys(opened.configs, source),
        True,
        opened.tokenizer,
        opened.notes,
    )
    return parts if vae is None else _with_vae(parts, vae)


def _open_folder(source: Path, unet: Path | None, vae: Path | None) -> Parts:
    if not source.is_dir():
        raise InputError(f"{source} is no folder; a diffusers pipeline folder is expected")
    of_images = (source / "image_encoder").is_dir() and not (source / "text_encoder").is_dir()
    encoder = "image_encoder" if of_images else "text_encoder"
    needed = ["unet", "vae", encoder, *([] if of_images else ["tokenizer"]), "scheduler"]
    given = {"unet": unet, "vae": vae}
    index = source / model_index.NAME
    known = read_json(index) if index.is_file() else {}
    missing = [part for part in needed if not given.get(part) and not (source / part).is_dir()]
    if missing:
        raise InputError(
            f"{source} lacks the folders {', '.join(missing)} of a diffusers text-to-image, "
            f"text-to-video or image-to-video pipeline{_what_else(source, known)}"
        )
    notes = model_index.check(known, [part for part in given if given[part]], str(index))
    if not of_images:
        checkpoint.check_tokenizer(source / "tokenizer")
    places = {name: source / name for name in needed}
    configs: dict[str, Json] = {encoder: read_json(places[encoder] / "config.json")}
    weights = {encoder: open_folder(places[encoder], "model", "pytorch_model")}
    if unet is None:
        configs["unet"] = read_json(places["unet"] / "config.json")
        weights["unet"] = open_model(places["unet"])
    else:
        configs["unet"], places["unet"] = {}, unet
        weights["unet"] = _open_original_unet(unet)
    if (places["vae"] / "config.json").is_file() or vae is None:
        configs["vae"] = read_json(places["vae"] / "config.json")
    if vae is None:
        weights["vae"] = open_model(places["vae"])
    configs["scheduler"] = read_json(places["scheduler"] / "scheduler_config.json")
    rename = companions.without_position_ids if of_images else companions.rename_text
    tensors = {
        "unet": weights["unet"],
        encoder: companions.first_layers(rename(weights[encoder]), configs[encoder]),
    }
    if vae is None:
        renamed = companions.rename_vae(weights["vae"])
        tensors["vae"] = companions.with_quant_convs(renamed, configs["vae"])
    processor = source / "feature_extractor" / "preprocessor_config.json"
    if of_images and processor.is_file():
        read = read_config(read_json(processor), classes.IMAGE_PROCESSOR, str(processor.parent))
        notes += read.notes
    parts = Parts(
        tensors,
        configs,
        places,
        unet is not None,
        None if of_images else source / "tokenizer",
        (
            *notes,
            *(note for opened in weights.values() for note in opened.notes),
            *companions.position_ids_note(weights[encoder], str(places[encoder])),
        ),
    )
    return parts if vae is None else _with_vae(parts, vae)


def _with_vae(parts: Parts, path: Path) -> Parts:
    """The parts with another VAE."""
    if path.is_file():
        vae, config, notes = single_file.open_vae(path, parts.configs.get("vae"))
    else:
        opened = open_model(path)
        vae, notes = companions.rename_vae(opened), opened.notes
        config = read_json(path / "config.json")
    return parts._replace(
        tensors={**parts.tensors, "vae": companions.with_quant_convs(vae, config)},
        configs={**parts.configs, "vae": config},
        places={**parts.places, "vae": path},
        notes=(*parts.notes, *notes),
    )


def _what_else(source: Path, index: Json) -> str:
    """What a folder is that is none of the pipelines, as far as it tells."""
    if index.get("_class_name"):
        return f"; its model_index.json is of {index['_class_name']}"
    files = sorted(f.name for f in source.iterdir() if f.suffix in (".safetensors", *PICKLES))
    return f"; it holds {files[0]}: a model that is one file is named itself" if files else ""


def _open_original_unet(path: Path) -> Weights:
    found = open_file(path)
    prefix = single_file.UNET_PREFIX
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if not ldm.is_original(tensors):
        kind = kinds.describe(found)
        raise InputError(
            f"{path} holds no original UNet (no input_blocks.0.0.weight)"
            f"{f' but {kind}' if kind else ''}; --unet takes ModelScope's or ZeroScope's "
            f"text2video_pytorch_model.pth"
        )
    return Weights(ldm.rename_unet(tensors), found.header, found.notes)
