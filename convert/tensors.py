"""Named tensors of PyTorch files, read one at a time."""

import functools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from qvd_jax.errors import InputError, first_line
from qvd_jax.files import check_file


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

_DIFFUSERS = "diffusion_pytorch_model"

PICKLES = (".bin", ".ckpt", ".pth", ".pt")


def open_model(path: Path) -> Tensors:
    """Opens a diffusers model's folder, or one file of weights.

    Raises:
      InputError: there are no weights, or they cannot be read.
    """
    if path.is_dir():
        return open_folder(path, _DIFFUSERS, _DIFFUSERS)
    return open_file(path)


def open_folder(folder: Path, stem: str, pickle_stem: str) -> Tensors:
    """Opens the weights of one component folder.

    The full-precision safetensors come first, whole or sharded, then the fp16 variant, then
    pickles in the same order.

    Args:
      folder: of one component.
      stem: name of the safetensors file without suffix, such as "diffusion_pytorch_model".
      pickle_stem: the same for pickles.

    Raises:
      InputError: the folder holds no weights, or they cannot be read.
    """
    names = [
        f"{name}{variant}{suffix}"
        for name, suffix in ((stem, ".safetensors"), (pickle_stem, ".bin"))
        for variant in ("", ".fp16")
    ]
    for name in names:
        index = folder / _index_name(name)
        if (folder / name).is_file():
            return open_file(folder / name)
        if index.is_file():
            return _open_shards(index)
    raise InputError(f"{folder} holds no weights; looked for {', '.join(names)} and their shards")


def open_file(path: Path) -> Tensors:
    """Opens a .safetensors file or a pickle of tensors.

    Raises:
      InputError: the file is missing, truncated, of another kind, or holds code.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise InputError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)}")


def read_header(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says beside its tensors; nothing of other files.

    Raises:
      InputError: the file is missing, truncated, or of another kind.
    """
    check_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from error


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


def _index_name(name: str) -> str:
    """`x.safetensors -> x.safetensors.index.json`, `x.fp16.bin -> x.bin.index.fp16.json`."""
    stem, _, suffix = name.rpartition(".")
    if stem.endswith(".fp16"):
        return f"{stem.removesuffix('.fp16')}.{suffix}.index.fp16.json"
    return f"{name}.index.json"


def _open_shards(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no 'weight_map'")
    shards: dict[str, Tensors] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise InputError(
                f"{index}: {name} is said to lie in {shard!r}; a shard is a file of the same folder"
            )
        if shard not in shards:
            shards[shard] = open_file(index.parent / shard)
        if name not in shards[shard]:
            raise InputError(f"{index}: {name} is not in {shard}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_safetensors(path: Path) -> Tensors:
    def read(name: str) -> np.ndarray:
        # Opened anew for each tensor, so that the pages of the others are not kept mapped.
        with safetensors.safe_open(path, framework="np") as file:
            return np.asarray(file.get_tensor(name))

    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}") from error
    return {
        name: LazyTensor(shape, functools.partial(read, name)) for name, shape in shapes.items()
    }


def _open_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a pickle: pip install 'qvd_jax[convert]' to read it"
        ) from error

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files of PyTorch before 1.6 cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it is damaged or holds more than tensors, and code in it would "
            f"run on loading{_culprit(error)}"
        ) from error
    except Exception as error:  # A damaged pickle can make the unpickler raise anything.
        raise InputError(
            f"{path} is truncated or no pickle of tensors: {first_line(error)}"
        ) from error
    for wrapper in ("state_dict", "controlnet"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not named tensors")

    def read(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        str(name): LazyTensor(tuple(value.shape), functools.partial(read, value))
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _culprit(error: Exception) -> str:
    """The global a refused pickle asks for, such as " (os.system)"."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({match[1]})" if match else ""
