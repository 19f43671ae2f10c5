"""LoRAs and their relatives, merged into the weights of a UNet and a text encoder.

Every kind there is for these layers: AnimateDiff's motion LoRAs and domain adapter, AnimateLCM's,
kohya's, LyCORIS's, diffusers' and peft's. Additions to one layer are summed, so that the order of
files does not matter; DoRA, IA3 and replaced weights act on what the files before have made.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qvd_jax.errors import InputError

from . import adapters, lora_header, lora_names
from .adapters import Adapter
from .lora_names import Layers, Place
from .tensors import LazyTensor, Tensors, open_file


class Merged(NamedTuple):
    """A model with LoRAs in it.

    Attributes:
      tensors: by component and name.
      notes: what was merged, and what the user should know.
    """

    tensors: dict[str, Tensors]
    notes: tuple[str, ...]


def parse_lora(argument: str) -> tuple[Path, float]:
    """Splits PATH[:SCALE]; the scale defaults to 1.

    Raises:
      InputError: the scale is not finite.
    """
    path, colon, text = argument.rpartition(":")
    try:
        scale = float(text) if colon else None
    except ValueError:
        scale = None
    if scale is None:
        return Path(argument), 1.0
    if not math.isfinite(scale):
        raise InputError(f"--lora {argument}: the scale must be a finite number")
    return Path(path), scale


def merge_loras(components: Mapping[str, Tensors], loras: Sequence[tuple[Path, float]]) -> Merged:
    """Merges LoRAs into the weights of the layers they name, one after the other.

    Args:
      components: tensors of the UNet and the text encoder, by today's diffusers' names.
      loras: files and scales.

    Raises:
      InputError: with all that does not fit, of all files.
    """
    layers = lora_names.layers_of(components)
    tensors = {component: dict(of_it) for component, of_it in components.items()}
    said, problems = [], []
    for path, scale in loras:
        try:
            found, notes = _open(path, scale, layers, components)
        except InputError as error:
            problems.append(str(error))
            continue
        for place, adapter in found.items():
            layer = _layer(tensors, place)
            for leaf, tensor in adapters.merge(layer, adapter).items():
                tensors[place.component][f"{place.module}.{leaf}"] = tensor
        said += [f"merged {path.name} at scale {scale:g}", *(f"{path.name}: {n}" for n in notes)]
    if problems:
        raise InputError("\n".join(problems))
    return Merged(tensors, tuple(said))


def _open(
    path: Path, scale: float, layers: Layers, components: Mapping[str, Tensors]
) -> tuple[dict[Place, Adapter], tuple[str, ...]]:
    """Opens one file: what it does to which layer, and notes."""
    tensors = open_file(path)
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    try:
        header = lora_header.open_header(path, tensors.header)
        found = _assigned(tensors, layers, components, lora_header.hint(header))
        alphas = {
            place: _scalar("alpha", parts["alpha"])
            for place, parts in found.items()
            if "alpha" in parts
        }
        notes = lora_header.check_tensors(header, found, alphas)
        if not header.peft and any(key.startswith("base_model.model.") for key in tensors):
            notes += ("peft's adapter_config.json is not beside it; alpha is taken for the rank",)
        adapted = {
            place: Adapter(
                parts, lora_header.scaling(header, place, parts, alphas.get(place)), scale
            )
            for place, parts in found.items()
        }
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return adapted, notes


def _assigned(
    tensors: Tensors, layers: Layers, components: Mapping[str, Tensors], hint: str
) -> dict[Place, dict[str, LazyTensor]]:
    """The file's tensors by the layers of the model they are about, and their parts there."""
    unknown, missing, kinds = [], set(), set()
    found: dict[Place, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        split = lora_names.split_key(key)
        if split is None:
            unknown.append(key)
            continue
        name, part = split
        kinds.add(part)
        place = lora_names.find_layer(name, layers)
        if place is None:
            missing.add(name)
        elif part in found.setdefault(place, {}):
            raise InputError(f"{place.module} has {part} twice, the second time as {key}")
        else:
            found[place][part] = tensor
    if kinds and kinds <= adapters.WHOLE:
        raise InputError(
            f"whole weights, such as {next(iter(tensors))}, are no LoRA, which adds to a model's"
        )
    for parts in found.values():
        if "on_input" in parts and "weight" in parts:
            side = "ia3_input" if _scalar("on_input", parts.pop("on_input")) else "ia3_output"
            parts[side] = parts.pop("weight")
    problems = [
        f"{what} ({len(names)}): {', '.join(names)}"
        for what, names in (
            ("these keys are of no known kind", sorted(unknown)),
            ("it adds to layers that this model lacks", sorted(missing)),
        )
        if names
    ]
    problems += [
        f"{place.module} {reason}"
        for place, parts in found.items()
        if (reason := adapters.problem(parts, _layer(components, place)))
    ]
    if problems:
        raise InputError("; ".join(problems) + _family_hint(missing, layers) + hint)
    return found


def _layer(components: Mapping[str, Tensors], place: Place) -> dict[str, LazyTensor]:
    """The weight and the bias of a layer, as far as it has them."""
    tensors = components[place.component]
    return {
        leaf: tensors[name]
        for leaf in ("weight", "bias")
        if (name := f"{place.module}.{leaf}") in tensors
    }


def _scalar(part: str, tensor: LazyTensor) -> float:
    value = tensor.read()
    if value.size != 1 or not math.isfinite(value.astype(np.float64).item()):
        raise InputError(f"{part} is one finite number, not {value.tolist()}")
    return value.astype(np.float64).item()


def _family_hint(missing: Iterable[str], layers: Layers) -> str:
    """Which model the layers that are missing belong to, where that can be seen."""
    has_motion = any("_motion_modules_" in module for module in layers.modules["unet"])
    for name in missing:
        component, rest = lora_names.component_of(name)
        if component == "text_encoder_2":
            return "; a LoRA with two text encoders is one of Stable Diffusion XL"
        if "motion_modules" in rest and not has_motion:
            return "; it is a motion LoRA, and this model has no motion modules"
        if "motion_modules" in rest and rest.startswith("mid_block"):
            return (
                "; it is a motion LoRA of v2 motion modules, which have one in the mid block, "
                "this model's (v1 or v3) have none"
            )
    return ""
