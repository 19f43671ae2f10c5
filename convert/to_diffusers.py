"""The way back: a checkpoint as a pipeline folder of diffusers."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax
import numpy as np
from jax.typing import DTypeLike

from qvd_jax import checkpoint, files, items
from qvd_jax.axes import Params
from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.families import FAMILIES
from qvd_jax.pipelines.loading import CheckpointConfigs, load_tokenizer, read_configs

from . import companions, controlnet, model_index, names, positions, scheduler, svd
from . import diffusers_configs as written
from .configs import Json
from .converters import open_unet
from .dequantize import dequantized, dequantized_notes
from .diffusers_configs import Named
from .parts import Parts
from .pipeline import NAMES, BytesRead, counted
from .tensors import Tensors, write_safetensors

PIPELINES = {
    "animatediff": "AnimateDiffPipeline",
    "modelscope": "TextToVideoSDPipeline",
    "svd": "StableVideoDiffusionPipeline",
}
"""The classes of diffusers, by family."""

_WITH_SPARSECTRL = "AnimateDiffSparseControlNetPipeline"
_WITH_CONTROLNET = "AnimateDiffControlNetPipeline"

_CONTROLNET = "controlnet."

_FOLDED: names.Folded = (
    (r"(^|\.)(conv_shortcut|quant_conv|post_quant_conv|controlnet_mid_block)$", (1, 1)),
    (r"^controlnet\.controlnet_(down_blocks\.\d+|mid_block)$", (1, 1)),
)
# Of Stable Diffusion 1.5; in the other families these are linear layers.
_FOLDED_PROJECTIONS: names.Folded = ((r"\.attentions\.\d+\.proj_(in|out)$", (1, 1)),)

_BUILT_IN = ("resnet_norm_scope", "temporal_norm_scope", "down_eps", "mid_eps", "up_eps")
"""What diffusers' classes may have built in otherwise: the same weights, and other videos."""


class Network(NamedTuple):
    """A network as diffusers or transformers have it.

    Attributes:
      config: its `config.json`.
      tensors: by their names, none read.
    """

    config: Named
    tensors: Tensors

    @property
    def entry(self) -> tuple[str, str]:
        """Library and class, as in `model_index.json`."""
        if "architectures" in self.config:
            return "transformers", self.config["architectures"][0]
        return "diffusers", self.config["_class_name"]

    @property
    def weights_name(self) -> str:
        """The file of its weights."""
        stem = "diffusion_pytorch_model" if self.entry[0] == "diffusers" else "model"
        return f"{stem}.safetensors"


class PipelineFolder(NamedTuple):
    """A pipeline folder to be written: everything is known of it, no weight has been read.

    Attributes:
      networks: by component.
      others: the further components' entries in `model_index.json`.
      configs: the further files of JSON, by their path in the folder.
      tokenizer: the tokenizer's folder; None for a model without text.
      pipeline: its class.
      notes: what the user should know.
    """

    networks: dict[str, Network]
    others: dict[str, tuple[str | None, str | None]]
    configs: dict[str, Json]
    tokenizer: Path | None
    pipeline: str
    notes: tuple[str, ...]


def open_checkpoint(path: Path) -> PipelineFolder:
    """Opens a checkpoint, float or quantized.

    Args:
      path: its folder, or the name of a model of the package.

    Raises:
      InputError: it is damaged, or something that no class of diffusers computes.
    """
    path = checkpoint.find(path)
    found = read_configs(path)
    family = checkpoint.read_manifest(path).family
    if family not in PIPELINES:
        possible = ", ".join(FAMILIES[name].title for name in PIPELINES)
        raise InputError(
            f"{path} is {found.family.title}, of which diffusers has no pipeline; possible are "
            f"{possible}"
        )
    configs = found.components
    _check_class(configs.unet, path)
    stored = {name: items.StoredItem(path, name) for name in configs.items(found.quantization)}
    # Of the dtypes nothing is asked: every array is written in another, or may be.
    expected = configs.param_shapes("float32", found.quantization)
    for name, item in stored.items():
        item.check(expected[name])
    shapes = configs.param_shapes("float32")
    tensors = _tensors(stored, shapes, found)
    networks = _networks(path, family, tensors, found)
    notes = [
        *_read_back(path, family, networks, found),
        *_notes_on_calls(networks["unet"], found),
        *(dequantized_notes(found.quantization, shapes["unet"]) if found.quantization else ()),
    ]
    if family == "svd":
        notes.append(
            "weights of the attention to one image token that change nothing are not in the "
            "checkpoint; zeros stand for them"
        )
    own_scheduler = scheduler.to_json(found.scheduler)
    json: dict[str, Json] = {"scheduler/scheduler_config.json": own_scheduler}
    others: dict[str, tuple[str | None, str | None]] = {
        "scheduler": ("diffusers", own_scheduler["_class_name"])
    }
    tokenizer = None
    if configs.text_encoder is not None:
        tokenizer = path / checkpoint.TOKENIZER
        others["tokenizer"] = "transformers", type(load_tokenizer(tokenizer)).__name__
    if configs.image_encoder is not None:
        processor = written.image_processor(configs.image_encoder)
        others["feature_extractor"] = "transformers", processor["image_processor_type"]
        json["feature_extractor/preprocessor_config.json"] = processor
    elif family == "animatediff":
        others |= {"feature_extractor": (None, None), "image_encoder": (None, None)}
    return PipelineFolder(
        networks, others, json, tokenizer, _pipeline(family, configs.unet), tuple(notes)
    )


def write_folder(
    pipeline: PipelineFolder,
    out: Path,
    *,
    dtype: DTypeLike,
    overwrite: bool = False,
    on_progress: Callable[[BytesRead], None] = lambda progress: None,
) -> None:
    """Reads the weights of a checkpoint and writes them as a pipeline folder.

    Args:
      pipeline: from `open_checkpoint`.
      out: the folder to make.
      dtype: of the written weights, float32 or bfloat16.
      overwrite: whether a pipeline folder already there is replaced.
      on_progress: called after each tensor.

    Raises:
      InputError: an array is damaged, `out` exists, or space is short.
    """
    total = np.dtype(dtype).itemsize * sum(
        math.prod(tensor.shape)
        for network in pipeline.networks.values()
        for tensor in network.tensors.values()
    )
    checkpoint.check_space(out.parent, total)
    with files.write_folder(out, model_index.NAME, overwrite=overwrite) as folder:
        on_bytes = counted(total, on_progress)
        for name, network in pipeline.networks.items():
            (folder / name).mkdir()
            _write_json(folder / name / "config.json", network.config)
            place = folder / name / network.weights_name
            write_safetensors(place, network.tensors, dtype, functools.partial(on_bytes, name))
        for file, config in pipeline.configs.items():
            (folder / file).parent.mkdir()
            _write_json(folder / file, config)
        if pipeline.tokenizer is not None:
            shutil.copytree(pipeline.tokenizer, folder / checkpoint.TOKENIZER)
        entries = {name: network.entry for name, network in pipeline.networks.items()}
        index = {"_class_name": pipeline.pipeline, **entries, **pipeline.others}
        _write_json(folder / model_index.NAME, index)


def _write_json(file: Path, config: Json) -> None:
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pipeline(family: str, unet: UNet3DConfig) -> str:
    if unet.controlnet is None:
        return PIPELINES[family]
    return _WITH_SPARSECTRL if unet.controlnet.ignores_latents else _WITH_CONTROLNET


def _tensors(
    stored: dict[str, items.StoredItem], shapes: dict[str, Params], found: CheckpointConfigs
) -> dict[str, Tensors]:
    """All networks' tensors by the names that the converter reads."""
    configs = found.components
    folded = _FOLDED
    if configs.unet.temporal_op == "motion_module":
        folded += _FOLDED_PROJECTIONS
    if configs.image_encoder is not None:
        patch = configs.image_encoder.patch_size
        folded += ((r"\.patch_embedding$", (patch, patch)),)
    values: dict[str, Callable[[str], np.ndarray]] = {
        name: functools.lru_cache(1)(stored[name].value) for name in configs.networks
    }
    if found.quantization is not None:
        values["unet"] = dequantized(stored["unet"].value, found.quantization, shapes["unet"])
    return {
        name: names.split_params(shapes[name], NAMES[name], values[name], folded)
        for name in configs.networks
    }


def _networks(
    path: Path, family: str, tensors: dict[str, Tensors], found: CheckpointConfigs
) -> dict[str, Network]:
    configs, defaults = found.components, found.defaults
    beside = {
        name.removeprefix(_CONTROLNET): tensor
        for name, tensor in tensors["unet"].items()
        if name.startswith(_CONTROLNET)
    }
    unet = {name: t for name, t in tensors["unet"].items() if not name.startswith(_CONTROLNET)}
    networks = {}
    if family == "animatediff":
        frames = configs.unet.max_frames or 0
        unet = positions.give(unet, frames)
        config = written.motion_unet(configs, unet, defaults, frames)
        networks["unet"] = Network(config, unet)
        motion = {name: tensor for name, tensor in unet.items() if ".motion_modules." in name}
        networks["motion_adapter"] = Network(written.motion_adapter(configs.unet, frames), motion)
        if configs.unet.controlnet is not None:
            beside = positions.give(beside, frames)
            frames = positions.length(beside) or frames
            config = written.controlnet(configs.unet, beside, frames)
            networks["controlnet"] = Network(config, beside)
    elif family == "modelscope":
        networks["unet"] = Network(written.modelscope_unet(configs, unet, defaults), unet)
    else:
        unet = svd.with_dead(unet)
        networks["unet"] = Network(written.svd_unet(configs.unet, unet, defaults), unet)
    networks["vae"] = Network(written.vae(configs.vae), tensors["vae"])
    if configs.text_encoder is not None:
        # As published; later versions of transformers write, and read, names without it, too.
        texts = {f"text_model.{name}": t for name, t in tensors["text_encoder"].items()}
        tokenizer = load_tokenizer(path / checkpoint.TOKENIZER)
        special = {
            key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        config = written.text_encoder(configs.text_encoder, special)
        networks["text_encoder"] = Network(config, texts)
    if configs.image_encoder is not None:
        config = written.image_encoder(configs.image_encoder)
        networks["image_encoder"] = Network(config, tensors["image_encoder"])
    return networks


def _check_class(unet: UNet3DConfig, path: Path) -> None:
    """Raises `InputError` where the classes of diffusers have one shape, and this is another.

    Those are shapes that no config of theirs says, and that the converter takes as they are.
    """
    facts = {"motion_attentions": (unet.motion_attentions, 2)}
    if unet.temporal_op == "conv_transformer":
        wanted = 8 * unet.block_channels[0] // unet.num_heads[0]
        facts = {"input_transformer_channels": (unet.input_transformer_channels or 0, wanted)}
    if unet.controlnet is not None:
        wanted = int(unet.controlnet.ignores_latents)
        facts["controlnet.motion_attentions"] = unet.controlnet.motion_attentions, wanted
    for name, (have, wanted) in facts.items():
        if have != wanted:
            raise InputError(f"{path}: {name} = {have}; diffusers' class has {wanted}")


def _read_back(
    path: Path, family: str, networks: dict[str, Network], found: CheckpointConfigs
) -> tuple[str, ...]:
    """Reads what is to be written as the converter would, and compares it with the checkpoint.

    Returns:
      Notes on what diffusers' classes have built in otherwise.

    Raises:
      InputError: a config is not the checkpoint's, so none of theirs says it.
    """
    configs = found.components
    tensors = {name: network.tensors for name, network in networks.items()}
    json: dict[str, Json] = {name: network.config for name, network in networks.items()}
    if "text_encoder" in tensors:
        tensors["text_encoder"] = companions.rename_text(tensors["text_encoder"])
    parts = Parts(tensors, json, dict.fromkeys(networks, path), False, None, ())
    read_as, opened = open_unet(path, parts, {})
    if read_as != family:
        raise InputError(f"{path} is {FAMILIES[family].title}, but its UNet {opened.description}")
    unet = opened.config
    if configs.unet.controlnet is not None:
        where = f"{path}: controlnet"
        beside = controlnet.read_controlnet(tensors["controlnet"], json["controlnet"], where)
        controlnet.check_config(beside, configs.unet, where)
        unet = replace(unet, controlnet=beside.config)
    read: dict[str, Any] = {"unet": unet}
    for name, config in (
        ("vae", companions.vae_config),
        ("text_encoder", companions.text_config),
        ("image_encoder", companions.vision_config),
    ):
        if name in networks:
            read[name], _ = config(tensors[name], json[name], f"{path}: {name}")
    other = {
        key: (value, theirs[key])
        for key, value in _fields(configs).items()
        if (theirs := _fields(replace(configs, **read)))[key] != value
    }
    for key, (value, theirs_) in other.items():
        if key.rpartition(".")[2] not in _BUILT_IN:
            raise InputError(f"{path}: {key} = {value!r}; diffusers' class has {theirs_!r}")
    return tuple(
        f"diffusers' class has {key} = {theirs_!r} built in, the checkpoint has {value!r}: with "
        f"the same weights their videos differ"
        for key, (value, theirs_) in other.items()
    )


def _fields(configs: ComponentConfigs) -> dict[str, Any]:
    """The values of all configs, by their dotted names."""
    return flax.traverse_util.flatten_dict(asdict(configs), sep=".")


def _notes_on_calls(unet: Network, found: CheckpointConfigs) -> tuple[str, ...]:
    """What a pipeline folder does not say, and a call of the pipeline is to be given."""
    size = unet.config.get("sample_size", 0)
    kept = {"prompts"} | ({"num_frames"} & unet.config.keys() and {"frames"})
    values = {key: value for key, value in asdict(found.defaults).items() if key not in kept}
    if isinstance(size, int) and size:
        del values["height"], values["width"]
    said = ", ".join(f"{key} = {value}" for key, value in values.items())
    return (f"a pipeline folder does not say, so pass to the pipeline's call: {said}",)
