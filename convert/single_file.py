"""Models that are one file: Stable Diffusion 1.5 and Stable Video Diffusion, and VAEs."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvd_jax import checkpoint
from qvd_jax.errors import InputError

from . import companions, configs, keys, kinds, ldm, svd
from . import config_classes as classes
from .configs import Json
from .tensors import LazyTensor, Tensors, Weights, open_file, read_json

CLIP_TOKENIZER = Path(__file__).parent / "clip_tokenizer"
"""The tokenizer of CLIP, whose vocabulary all models of Stable Diffusion 1.5 have."""

SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
    "text_encoder": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
}
"""The configs of Stable Diffusion 1.5 as published, as far as they are not their class's own."""

SVD_VISION = {"num_attention_heads": 16, "hidden_act": "gelu"}
"""What the image tower of Stable Video Diffusion has beside its class's own values."""

UNET_PREFIX = "model.diffusion_model."
"""What the names of a UNet begin with in the files of the original code."""

_SVD_PREFIXES = {
    "unet": UNET_PREFIX,
    "vae": "first_stage_model.",
    "image_encoder": "conditioner.embedders.0.open_clip.model.visual.",
}
_SD15_PREFIXES = {
    "unet": UNET_PREFIX,
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}

_IRRELEVANT: dict[str, str] = {
    "model_ema.": "averages of the weights beside those that sample",
    "first_stage_model.loss.": "judges images in training only",
    "first_stage_model.model_ema.": "averages of the weights beside those that sample",
    "loss.": "judges images in training only",
    "cond_stage_model.logit_scale": "compares texts with images",
    "cond_stage_model.text_projection": "compares texts with images",
    "safety_checker.": "looks at finished images",
    "conditioner.embedders.": "of the other conditions, which have no weights that sample",
    "logvar": "weighs the loss in training only",
    "lvlb_weights": "weighs the loss in training only",
    "global_step": "counts the training",
    "denoiser.": "the table of noise levels, which the schedule computes",
    "alphas_cumprod_prev": "follows from the betas",
    "sqrt_": "follows from the betas",
    "log_one_minus_alphas_cumprod": "follows from the betas",
    "posterior_": "follows from the betas",
}
"""What a file may hold beside its components, and why it does not matter."""

_TABLES = ("betas", "alphas_cumprod")


class OpenedFile(NamedTuple):
    """The components of a file.

    Attributes:
      tensors: by component, by diffusers' names.
      configs: their `config.json`, and the scheduler's; empty where there is none.
      tokenizer: the tokenizer's folder; None for a model without text.
      notes: what the user should know.
    """

    tensors: dict[str, Tensors]
    configs: dict[str, Json]
    tokenizer: Path | None
    notes: tuple[str, ...]


def open_model_file(path: Path, config: Path | None, *, needs_vae: bool) -> OpenedFile:
    """Opens a file of Stable Diffusion 1.5 or Stable Video Diffusion.

    Args:
      path: the file.
      config: a folder of diffusers whose configs and tokenizer the file's model has; None takes
        those of Stable Diffusion 1.5, or of a folder beside the file if only these fit.
      needs_vae: whether the file must hold the VAE.

    Raises:
      InputError: it is damaged, of another model, or its configs are not known.
    """
    found = open_file(path)
    kind = kinds.describe(found)
    if kind == kinds.SVD:
        if config is not None:
            raise InputError(f"{path} is {kind}, which has no use for --config")
        return _open_svd(path, found)
    if kind != kinds.SD15:
        raise InputError(
            f"{path} is {kind or 'no model that is known'}; one file may be Stable Diffusion 1.5 "
            f"or Stable Video Diffusion, other models are read from diffusers' folders"
        )
    return _open_sd15(path, found, config, needs_vae=needs_vae)


def open_vae(path: Path, like: Json | None) -> tuple[Tensors, Json, tuple[str, ...]]:
    """Opens a VAE's file, or the VAE in a model's file.

    Args:
      path: the file.
      like: the config of a VAE that it takes the place of.

    Returns:
      Its tensors by diffusers' names, its config, and notes.

    Raises:
      InputError: it is damaged, or holds no VAE of Stable Diffusion 1.5.
    """
    found = open_file(path)
    prefix = _SD15_PREFIXES["vae"]
    inside = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
    architecture = found.header.get("modelspec.architecture", "stable-diffusion-v1")
    kind = kinds.describe(found)
    of_another = inside and kind not in (kinds.SD15, kinds.SD2, kinds.VAE)
    if of_another or not architecture.startswith("stable-diffusion-v1"):
        what = f"is {kind}" if of_another else f"has modelspec.architecture = {architecture!r}"
        raise InputError(
            f"{path} {what}; a VAE of Stable Diffusion 1.5 is expected, others scale latents "
            f"otherwise"
        )
    tensors = _rename_vae(inside or found)
    candidates = [SD15["vae"]] if like is None else [like, SD15["vae"]]
    beside = path.parent / "config.json"
    if beside.is_file():
        candidates.insert(0, read_json(beside))
    fitting = (
        json
        for json in candidates
        if json.get("_class_name") == classes.VAE.name and _fits({"vae": tensors}, {"vae": json})
    )
    return tensors, next(fitting, SD15["vae"]), found.notes


def _open_svd(path: Path, found: Weights) -> OpenedFile:
    tensors = _split(found, _SVD_PREFIXES)
    missing = [_SVD_PREFIXES[part] for part, held in tensors.items() if not held]
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
    known: dict[str, Json] = {"unet": {}, "vae": {}, "image_encoder": SVD_VISION, "scheduler": {}}
    return OpenedFile(tensors, known, None, found.notes + _left_notes(path, found, _SVD_PREFIXES))


def _open_sd15(path: Path, found: Weights, config: Path | None, *, needs_vae: bool) -> OpenedFile:
    _check_header(path, found.header)
    split = _split(found, _SD15_PREFIXES)
    tensors = {
        "unet": ldm.rename_unet(split["unet"]),
        "vae": _rename_vae(split["vae"]),
        "text_encoder": companions.rename_text(split["text_encoder"]),
    }
    missing = [
        _SD15_PREFIXES[part]
        for part, held in tensors.items()
        if not held and (part != "vae" or needs_vae)
    ]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)} of Stable Diffusion 1.5; use a file with text "
            f"encoder and VAE inside (--vae gives a VAE apart)"
        )
    tensors = {part: held for part, held in tensors.items() if held}
    inputs = keys.require(tensors["unet"], "conv_in.weight", str(path))[1]
    if inputs != 4:
        raise InputError(
            f"{path} is a model of inpainting or of edits: its UNet takes {inputs} channels, 4 of "
            f"latents are expected"
        )
    known, tokenizer, config_notes = _configs(path, tensors, config)
    known["unet"] = {**known["unet"], **_sample_size(found.header)}
    prediction = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    claimed = found.header.get("modelspec.prediction_type")
    if claimed is not None:
        if claimed not in prediction:
            raise InputError(
                f"{path}: its header says modelspec.prediction_type = {claimed!r}, which is not "
                f"supported; it must be 'epsilon' or 'v'"
            )
        known["scheduler"] = {**known["scheduler"], "prediction_type": prediction[claimed]}
    if "v_pred" in found:
        known["scheduler"] = {**known["scheduler"], "prediction_type": "v_prediction"}
    if "ztsnr" in found:
        known["scheduler"] = {**known["scheduler"], "rescale_betas_zero_snr": True}
    # As in a folder.
    text = known["text_encoder"]
    tensors["text_encoder"] = companions.first_layers(tensors["text_encoder"], text)
    notes = (
        *found.notes,
        *config_notes,
        *_header_notes(path, found.header),
        *companions.position_ids_note(split["text_encoder"], str(path)),
        *_schedule_notes(path, found, known["scheduler"]),
        *_left_notes(path, found, _SD15_PREFIXES),
    )
    return OpenedFile(tensors, known, tokenizer, notes)


def _split(found: Tensors, prefixes: Mapping[str, str]) -> dict[str, Tensors]:
    return {
        part: {
            name.removeprefix(prefix): tensor
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
        for part, prefix in prefixes.items()
    }


def _rename_vae(tensors: Tensors) -> Tensors:
    """The VAE's tensors, less what acts in training only, by diffusers' names."""
    used = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(("loss.", "model_ema."))
    }
    original = any(name.startswith(("encoder.mid.", "decoder.mid.")) for name in used)
    return ldm.rename_vae(used) if original else companions.rename_vae(used)


def _configs(
    path: Path, tensors: dict[str, Tensors], config: Path | None
) -> tuple[dict[str, Json], Path, tuple[str, ...]]:
    """The configs and the tokenizer of a file's model, which holds neither, and a note."""
    if config is not None:
        return _read_configs(config), config / "tokenizer", ()
    if _fits(tensors, SD15):
        return dict(SD15), CLIP_TOKENIZER, ()
    folders = [path.parent, *sorted(child for child in path.parent.iterdir() if child.is_dir())]
    read = {folder: _read_configs(folder) for folder in folders if _is_pipeline(folder)}
    fitting = {folder: known for folder, known in read.items() if _fits(tensors, known)}
    meanings = [_meaning(known) for known in fitting.values()]
    if not fitting or any(meaning != meanings[0] for meaning in meanings):
        widths = _facts(tensors)["unet"]["block_out_channels"]
        raise InputError(
            f"{path}: its UNet has {widths} channels, Stable Diffusion 1.5 has "
            f"{SD15['unet']['block_out_channels']}; --config DIR names the folder of diffusers "
            f"that has its configs and tokenizer"
            + (f", one of {', '.join(map(str, fitting))}" if fitting else "")
        )
    folder, known = next(iter(fitting.items()))
    return known, folder / "tokenizer", (f"configs and tokenizer are those of {folder}",)


def _is_pipeline(folder: Path) -> bool:
    """Whether a folder is one of Stable Diffusion 1.5."""
    parts = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
    if not all((folder / part).is_dir() for part in parts):
        return False
    unet = folder / "unet" / "config.json"
    return unet.is_file() and read_json(unet).get("_class_name") == classes.UNET_2D.name


def _meaning(known: Mapping[str, Json]) -> list[Any]:
    """What configs say but for where they come from."""
    return [
        {key: value for key, value in known[part].items() if key not in configs.BOOKKEEPING}
        for part in sorted(known)
    ]


def _read_configs(folder: Path) -> dict[str, Json]:
    known: dict[str, Json] = {
        part: read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")
    }
    known["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    checkpoint.check_tokenizer(folder / "tokenizer")
    return known


def _facts(tensors: Mapping[str, Tensors]) -> dict[str, dict[str, Any]]:
    """What tells one model from another, by component, as the configs have it."""

    def shape(part: str, name: str) -> tuple[int, ...]:
        return keys.require(tensors[part], name, f"{part} of another model")

    facts: dict[str, dict[str, Any]] = {}
    if "unet" in tensors:
        unet = tensors["unet"]
        levels = range(keys.count(unet, r"down_blocks\.(\d+)\.resnets\."))
        text = next((t for n, t in unet.items() if n.endswith("attn2.to_v.weight")), None)
        facts["unet"] = {
            "block_out_channels": [
                shape("unet", f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels
            ],
            "cross_attention_dim": text.shape[1] if text else None,
        }
    if "vae" in tensors:
        levels = range(keys.count(tensors["vae"], r"encoder\.down_blocks\.(\d+)\."))
        facts["vae"] = {
            "block_out_channels": [
                shape("vae", f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels
            ]
        }
    if "text_encoder" in tensors:
        vocabulary, width = shape("text_encoder", "embeddings.token_embedding.weight")[:2]
        facts["text_encoder"] = {"hidden_size": width, "vocab_size": vocabulary}
    return facts


def _fits(tensors: Mapping[str, Tensors], known: Mapping[str, Json]) -> bool:
    return not any(
        configs.contradictions(known[part], facts, part) for part, facts in _facts(tensors).items()
    )


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    architecture = header.get("modelspec.architecture", "stable-diffusion-v1")
    if architecture not in ("stable-diffusion-v1", "stable-diffusion-v1-5"):
        raise InputError(
            f"{path}: its header says modelspec.architecture = {architecture!r}, but its tensors "
            f"are named as those of Stable Diffusion 1.5"
        )


def _sample_size(header: Mapping[str, str]) -> Json:
    """The size of the videos by default, from the header's "512x768", width and height."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", header.get("modelspec.resolution", ""))
    if found is None or any(int(side) % 8 for side in found.groups()):
        return {}
    width, height = (int(side) // 8 for side in found.groups())
    return {"sample_size": width if width == height else [height, width]}


def _header_notes(path: Path, header: Mapping[str, str]) -> tuple[str, ...]:
    """What a header says and is not obeyed."""
    notes = []
    size, layer = (header.get(f"modelspec.{name}") for name in ("resolution", "encoder_layer"))
    if size is not None and not _sample_size(header):
        notes.append(
            f"{path}: its header says modelspec.resolution = {size!r}, which is not read; "
            f"WIDTHxHEIGHT in multiples of 8 is"
        )
    if layer not in (None, "1"):
        notes.append(
            f"{path}: its header says modelspec.encoder_layer = {layer!r}, that it was trained "
            f"with another than the last layer of the text encoder; a folder for --config whose "
            f"text_encoder has as many num_hidden_layers is obeyed"
        )
    return tuple(notes)


def _schedule_notes(path: Path, found: Tensors, scheduler: Json) -> tuple[str, ...]:
    """A note if the schedule stored beside the weights is not the scheduler's."""
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    steps = scheduler.get("num_train_timesteps", 1000)
    betas = np.linspace(start, end, steps)
    if scheduler.get("beta_schedule") == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    tables = {"betas": betas, "alphas_cumprod": np.cumprod(1 - betas)}
    # Half precision rounds by 2^-11, bfloat16 by 2^-8.
    wrong = [
        name
        for name in _TABLES
        if name in found
        and not (
            found[name].shape == tables[name].shape
            and np.allclose(_read(found[name]), tables[name], rtol=2.0**-7)
        )
    ]
    if not wrong:
        return ()
    return (
        f"{path}: its tables {', '.join(wrong)} are not those of its scheduler's config, which "
        f"decides",
    )


def _read(tensor: LazyTensor) -> np.ndarray:
    return tensor.read().astype(np.float64)


def _left_notes(path: Path, found: Tensors, prefixes: Mapping[str, str]) -> tuple[str, ...]:
    known = (*prefixes.values(), *_IRRELEVANT)
    left = [
        name
        for name in found
        if not name.startswith(known) and name not in (*_TABLES, "v_pred", "ztsnr")
    ]
    return _names_note(path, left)


def _names_note(path: Path, left: Iterable[str]) -> tuple[str, ...]:
    names = sorted(left)
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (f"{path}: {', '.join(names[:3])}{more} belong to no component and are not read",)
