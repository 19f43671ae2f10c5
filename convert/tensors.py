"""Named tensors of PyTorch files, read one at a time."""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from jax.typing import DTypeLike

from qvd_jax.errors import InputError
from qvd_jax.files import check_file

from . import pickles
from .kinds import weights_format


class LazyTensor(NamedTuple):
    """A tensor that is read when it is needed.

    Attributes:
      shape: its shape.
      read: gives the array; nothing of it stays in memory afterwards.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, LazyTensor]
"""Tensors by their PyTorch names."""


def zeros(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of zeros."""
    return LazyTensor(shape, lambda: np.zeros(shape, np.float32))


class Weights(Tensors):
    """The tensors of a file or folder, and what else it holds.

    Attributes:
      header: what the header of a .safetensors file says beside its tensors.
      notes: what the user should know, such as entries that were left.
    """

    def __init__(
        self, tensors: Tensors, header: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(tensors)
        self.header = dict(header or {})
        self.notes = notes


_DIFFUSERS = "diffusion_pytorch_model"

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What .safetensors files call them."""

PICKLES = (".bin", ".ckpt", ".pth", ".pt")


def open_model(path: Path) -> Weights:
    """Opens a diffusers model's folder, or one file of weights.

    Raises:
      InputError: there are no weights, or they cannot be read.
    """
    if path.is_dir():
        return open_folder(path, _DIFFUSERS, _DIFFUSERS)
    return open_file(path)


def open_folder(folder: Path, stem: str, pickle_stem: str) -> Weights:
    """Opens the weights of one component folder.

    Safetensors come before pickles. Of each the full precision comes first, whole or sharded, then
    the fp16 variant. Last come other variants, whatever stands between stem and suffix.

    Args:
      folder: of one component.
      stem: name of the safetensors file without suffix, such as "diffusion_pytorch_model".
      pickle_stem: the same for pickles.

    Raises:
      InputError: the folder holds no weights, or they cannot be read.
    """
    kinds = ((stem, "safetensors"), (pickle_stem, "bin"))
    found = [
        (variant not in ("", "fp16"), rank, variant != "", variant, file)
        for rank, (name, suffix) in enumerate(kinds)
        for variant, file in _variants(folder, name, suffix).items()
    ]
    if not found:
        names = ", ".join(f"{name}.{suffix}" for name, suffix in kinds)
        raise InputError(
            f"{folder} holds no weights; looked for {names}, with a variant (.fp16) before the "
            f"suffix, and their shards"
        )
    is_other, _, _, _, file = min(found)
    opened = _open_shards(file) if file.suffix == ".json" else open_file(file)
    others = [other.name for *_, other in sorted(found) if other != file]
    if not is_other or not others:
        return opened
    note = f"{file} is read; {', '.join(others)} lie beside it as other variants"
    return Weights(opened, opened.header, (*opened.notes, note))


def open_file(path: Path) -> Weights:
    """Opens a .safetensors file or a pickle of tensors, whatever its name says.

    Raises:
      InputError: the file is missing, truncated, of another kind, or holds code.
    """
    check_file(path)
    kind = weights_format(path)
    if kind == "safetensors" or (kind is None and path.suffix == ".safetensors"):
        return _open_safetensors(path)
    if kind == "pickle" or path.suffix in PICKLES:
        return _open_pickle(path)
    raise InputError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)}")


def write_safetensors(
    path: Path, tensors: Tensors, dtype: DTypeLike, on_bytes: Callable[[int], None]
) -> None:
    """Writes tensors as a .safetensors file, one at a time.

    The library's own writer takes all of them at once.

    Args:
      path: of the file.
      tensors: by the names they get.
      dtype: they get, float32 or bfloat16.
      on_bytes: called after each tensor with its bytes.
    """
    dtype = np.dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    # The data begin at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.read(), dtype)
            if array.size != math.prod(tensor.shape):
                raise ValueError(f"{name} has shape {array.shape}, not {tensor.shape}")
            array.tofile(file)
            on_bytes(array.nbytes)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: the file is missing or no JSON object.
    """
    check_file(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a JSON object is needed, got {type(data).__name__}")
    return data


def _variants(folder: Path, stem: str, suffix: str) -> dict[str, Path]:
    """The weights of a folder by their variant, "" for the one without: a file or shards' index."""
    found: dict[str, Path] = {}
    for file in folder.glob(f"{stem}*"):
        name = file.name.removeprefix(stem)
        # `x.safetensors.index.json`, and `x.bin.index.fp16.json` of the variant fp16.
        index = re.fullmatch(rf"\.{suffix}\.index(?:\.([^.]+))?\.json", name)
        whole = re.fullmatch(rf"(?:\.([^.]+))?\.{suffix}", name)
        if match := whole or index:
            found.setdefault(match[1] or "", file)
            if whole:
                found[match[1] or ""] = file
    return found


def _open_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no 'weight_map'")
    shards: dict[str, Weights] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise InputError(
                f"{index}: {name} is said to lie in {shard!r}; a shard is a file of the same folder"
            )
        if shard not in shards:
            shards[shard] = open_file(index.parent / shard)
        if name not in shards[shard]:
            raise InputError(f"{index}: {name} is not in {shard}")
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    return Weights(tensors, notes=tuple(note for shard in shards.values() for note in shard.notes))


def _open_safetensors(path: Path) -> Weights:
    def read(name: str) -> np.ndarray:
        # Opened anew for each tensor, so that the pages of the others are not kept mapped.
        with safetensors.safe_open(path, framework="np") as file:
            return np.asarray(file.get_tensor(name))

    def read_float8(name: str) -> np.ndarray:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor(name).float().numpy()

    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            # numpy has no such type.
            small = {name for name, part in slices.items() if part.get_dtype().startswith("F8")}
            header = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from error
    if header.get("format", "pt") not in ("pt", "np"):
        raise InputError(
            f"{path}: its header says format = {header['format']!r}; weights of PyTorch (pt) are "
            f"expected"
        )
    tensors = {
        name: LazyTensor(shape, functools.partial(read_float8 if name in small else read, name))
        for name, shape in shapes.items()
    }
    notes = tuple(
        f"{path}: its header says {key} = {value[:_SHOWN]!r}, which is not read"
        for key, value in header.items()
        if key not in _HEADER and not key.startswith(tuple(_HEADER_PREFIXES))
    )
    return Weights(tensors, header, notes)


def _open_pickle(path: Path) -> Weights:
    content = pickles.load(path)
    import torch

    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not named tensors")
    left: list[str] = []
    while not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        inner += [
            key
            for key, value in content.items()
            if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())
        ]
        if not inner:
            break
        left += [str(key) for key in content if key != inner[0]]
        content = content[inner[0]]

    def read(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()
        return tensor.numpy()

    tensors = {
        str(name): LazyTensor(tuple(value.shape), functools.partial(read, value))
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    left += [str(name) for name in content if str(name) not in tensors]
    named = [name for name in left if name not in _OF_TRAINING]
    note = f"{path}: beside the weights it holds {', '.join(named)}, which are not read"
    return Weights(tensors, notes=(note,) if named else ())


_WRAPPERS = ("state_dict", "controlnet", "model", "module", "params", "params_ema")
"""Entries of pickles that hold the weights, when they are not the content itself."""

_SHOWN = 80

_HEADER: dict[str, str] = {
    "format": "is checked on opening",
    "epoch": "counts the training",
    "step": "counts the training",
    "global_step": "counts the training",
    "prompt": "the workflow that saved the file",
    "workflow": "the workflow that saved the file",
    "sd_merge_models": "the models it was merged from",
    "sd_merge_recipe": "the models it was merged from",
    "total_size": "its own size",
    **dict.fromkeys(
        (
            "modelspec.architecture",
            "modelspec.encoder_layer",
            "modelspec.prediction_type",
            "modelspec.resolution",
        ),
        "read where a whole model or a VAE is one file",
    ),
    **dict.fromkeys(
        (
            "modelspec.author",
            "modelspec.date",
            "modelspec.description",
            "modelspec.hash_sha256",
            "modelspec.implementation",
            "modelspec.license",
            "modelspec.merged_from",
            "modelspec.sai_model_spec",
            "modelspec.tags",
            "modelspec.thumbnail",
            "modelspec.timestep_range",
            "modelspec.title",
            "modelspec.trigger_phrase",
            "modelspec.usage_hint",
        ),
        "what the model is called, who made it, of what, and for what",
    ),
}
"""Keys of the headers of .safetensors files, and why they do not change what the weights do."""

_HEADER_PREFIXES: dict[str, str] = {
    "ss_": "the record of a training by kohya's scripts",
    "sshs_": "hashes of the file by kohya's scripts",
}
"""The same of what keys begin with."""

_OF_TRAINING = frozenset(
    {
        "animatediff_config",
        "callbacks",
        "epoch",
        "global_step",
        "hparams_name",
        "hyper_parameters",
        "loops",
        "lr_schedulers",
        "optimizer",
        "optimizer_states",
        "pytorch-lightning_version",
        "step",
    }
)
"""Entries of pickles that a training goes on from, and that say nothing of what the weights do."""
