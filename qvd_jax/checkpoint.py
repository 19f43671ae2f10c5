"""Checkpoints: a manifest, one Orbax item for each component, and the tokenizer's files.

    DIR/manifest.json      format version, family, configs of all components, scheduler, defaults
    DIR/unet/ vae/ ...     parameters, one Orbax item each
    DIR/tokenizer/         the tokenizer's own files
    DIR/layers.json        of a quantized checkpoint: what each layer was worth when calibrated
    DIR/policy.yaml        of a quantized checkpoint: a rule for each layer, to quantize so again

A checkpoint is written beside its place and moved there when it is whole.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import flax
import numpy as np

import qvd_jax
from qvd_jax import config as configs
from qvd_jax import files, items
from qvd_jax.axes import Params
from qvd_jax.errors import InputError, first_line

T = TypeVar("T")

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
LAYER_REPORTS = "layers.json"
LAYER_ARRAYS = "layers.npz"
POLICY = "policy.yaml"
# No part of a module path.
_BESIDE_PATH = ":"
TOKENIZER = "tokenizer"
ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, apart from arrays and the tokenizer.

    Attributes:
      family: which kind of model it is, such as "animatediff".
      components: the config of each component, by component name.
      scheduler: the config of the sampler.
      defaults: frames, size, steps and so on of a video nobody asked otherwise of.
      description: one line for people: where the weights came from.
      versions: of the packages that wrote the checkpoint.
      quantization: policy and layer specifications of a quantized UNet; None is float.
      checked: `shapes_digest` of what the networks were found to fit when this was written; None
        where nobody looked.
      format_version: of this layout.
    """

    family: str
    components: dict[str, Any]
    scheduler: dict[str, Any]
    defaults: dict[str, Any]
    description: str
    versions: dict[str, str]
    quantization: dict[str, Any] | None = None
    checked: str | None = None
    format_version: int = FORMAT_VERSION


def shapes_digest(manifest: Manifest, shapes: Mapping[str, Params]) -> str:
    """Of all that decides which arrays the networks need, and of the arrays' paths and shapes.

    Args:
      manifest: of the checkpoint.
      shapes: tree of what has a shape, of each item.
    """
    flat = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    described = {
        "components": manifest.components,
        "quantization": manifest.quantization,
        "shapes": {name: list(leaf.shape) for name, leaf in flat.items()},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    names = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
    others = {name: importlib.metadata.version(name) for name in names}
    return {"qvd_jax": qvd_jax.__version__, **others}


def write_directory(path: Path, *, overwrite: bool) -> AbstractContextManager[Path]:
    """Yields a folder to fill, which becomes the checkpoint `path` when the block ends well.

    Raises:
      InputError: as `check_replaceable`, or it could not be written.
    """
    return files.write_folder(path, MANIFEST, overwrite=overwrite)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raises `InputError` if no checkpoint can be written at `path`."""
    files.check_folder(path, MANIFEST, overwrite=overwrite)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_tokenizer(folder: Path) -> None:
    """Raises `InputError` if the folder holds no vocabulary.

    transformers would make an almost empty tokenizer of what is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; a tokenizer folder is expected")
    whole = (folder / "tokenizer.json").is_file()
    if not whole and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise InputError(
            f"{folder} holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, are needed"
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises `InputError` if the file system of `folder` has fewer free bytes than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: one of the package's own by its name, else the path given."""
    own = ASSETS / name
    return own if own.parent == ASSETS and own.is_dir() and not Path(name).exists() else Path(name)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `folder/manifest.json`."""
    text = json.dumps(configs.to_dict(manifest), indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks `path/manifest.json`.

    Raises:
      InputError: there is none, it is no JSON, of a newer format, or of other keys.
    """
    file = path / MANIFEST
    if not path.exists():
        known = [unet.parent.name for unet in sorted(ASSETS.glob("*/unet"))]
        hint = configs.did_you_mean(str(path), known)
        raise InputError(
            f"{path} does not exist; the folder of a checkpoint, or the name of a model of the "
            f"package, is expected{hint}"
        )
    if not file.is_file():
        hint = ""
        if any((path / name).exists() for name in ("model_index.json", "config.json")):
            hint = "; convert it first: python -m qvd_jax.convert"
        raise InputError(f"{path} is no qvd_jax checkpoint: it has no {MANIFEST}{hint}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version}, this qvd_jax reads up to {FORMAT_VERSION}; "
            f"install a newer qvd_jax"
        )
    if isinstance(version, int) and version < 4:
        _name_ranges(data)
    return configs.from_dict(Manifest, data, str(file))


def _name_ranges(data: dict[str, Any]) -> None:
    """Says `ranges` in the specs of a manifest before version 4, which say `step_aware`."""
    quantization = data.get("quantization")
    specs = quantization.get("specs") if isinstance(quantization, dict) else None
    for spec in specs.values() if isinstance(specs, dict) else ():
        if isinstance(spec, dict) and "step_aware" in spec:
            spec["ranges"] = "step" if spec.pop("step_aware") else "static"


def save_component(folder: Path, name: str, config: Any, params: Params, description: str) -> None:
    """Writes a checkpoint of one component alone, whose name is the family; replaces one there.

    Args:
      folder: the checkpoint.
      name: the component.
      config: the dataclass that shapes it.
      params: its parameters.
      description: where they came from.
    """
    manifest = Manifest(
        family=name,
        components={name: configs.to_dict(config)},
        scheduler={},
        defaults={},
        description=description,
        versions=package_versions(),
    )
    with write_directory(folder, overwrite=True) as partial:
        items.save_params(partial, name, params)
        write_manifest(partial, manifest)


def load_component(
    folder: Path, name: str, config_type: type[T], shapes: Callable[[T], Params]
) -> tuple[T, Params]:
    """Reads what `save_component` wrote.

    Args:
      folder: the checkpoint.
      name: the component.
      config_type: the class of its config.
      shapes: the tree of `jax.ShapeDtypeStruct` that a config asks for.

    Raises:
      InputError: the folder holds none, or a damaged one.
    """
    manifest = read_manifest(folder)
    if manifest.family != name:
        raise InputError(f"{folder} is of the family {manifest.family!r}; {name!r} is needed")
    where = f"{folder / MANIFEST}: {name}"
    config = configs.from_dict(config_type, manifest.components.get(name), where)
    return config, items.restore_params(folder, name, shapes(config))


def digest(path: Path) -> str:
    """Of all that a checkpoint makes videos from: its configs, arrays and tokenizer.

    Copies have the same, and so has what was converted twice from the same source.

    Raises:
      InputError: the folder is no checkpoint, or damaged.
    """
    manifest = configs.to_dict(read_manifest(path))
    # What was used to write it, and words.
    for name in ("versions", "description", "checked"):
        del manifest[name]
    told = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in items.stored_items(path):
        told.update(f"{name} {items.digest(path, name)}\n".encode())
    for file in sorted((path / TOKENIZER).glob("*")):
        told.update(file.name.encode() + file.read_bytes())
    return told.hexdigest()


def write_layer_reports(
    folder: Path, figures: Sequence[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]
) -> None:
    """Writes what the layers of a quantized model were worth.

    Args:
      folder: the checkpoint.
      figures: of every layer, with its `path`.
      arrays: for plots, by path and name.
    """
    (folder / LAYER_REPORTS).write_text(json.dumps(list(figures), indent=1) + "\n", "utf-8")
    flat = flax.traverse_util.flatten_dict(arrays, sep=_BESIDE_PATH)
    np.savez_compressed(folder / LAYER_ARRAYS, **flat)


def read_layer_reports(
    path: Path,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """What `write_layer_reports` wrote; nothing for a float checkpoint.

    Raises:
      InputError: a file is damaged.
    """
    file = path / LAYER_REPORTS
    if not file.is_file():
        return [], {}
    try:
        figures = list(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: {first_line(error)}") from error
    flat = files.read_arrays(path / LAYER_ARRAYS)
    return figures, flax.traverse_util.unflatten_dict(flat, sep=_BESIDE_PATH)
