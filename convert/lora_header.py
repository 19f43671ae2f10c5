"""What a LoRA file says beside its tensors: peft's config, kohya's record of the training.

diffusers puts peft's config into the header of a safetensors file, for each component; peft puts
it into `adapter_config.json` beside the file; kohya's trainers write `ss_*` entries.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qvd_jax.errors import InputError

from . import adapters
from .lora_names import Place
from .tensors import LazyTensor, read_json

_METADATA = "lora_adapter_metadata"
_CONFIG = "adapter_config.json"

READ = frozenset(
    {"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"lora_bias", "bias", "target_modules", "fan_in_fan_out", "peft_type", "init_lora_weights"}
)
"""Keys of peft's configs that are obeyed, or held against the tensors."""

NO_MATTER = {
    "task_type": "what the model is for",
    "auto_mapping": "a class of the training code",
    "peft_version": "who wrote the file",
    "base_model_name_or_path": "where the base model was",
    "revision": "where the base model was",
    "inference_mode": "gradients",
    "lora_dropout": "training",
    "rank_dropout": "training",
    "rank_dropout_scale": "training",
    "module_dropout": "training",
    "exclude_modules": "the tensors say which layers are changed",
    "layers_to_transform": "the tensors say which layers are changed",
    "layers_pattern": "the tensors say which layers are changed",
    "modules_to_save": "the tensors say which layers are replaced",
    "ensure_weight_tying": "the tensors say which layers are replaced",
    "use_effective_conv2d": "the tensors say how they are factored",
    "decompose_both": "the tensors say how they are factored",
    "decompose_factor": "the tensors say how they are factored",
    "init_weights": "where training began",
    "megatron_config": "devices",
    "megatron_core": "devices",
    "runtime_config": "devices",
    "qalora_group_size": "use_qalora says whether it is used",
    "loftq_config": "init_lora_weights says whether it is used",
    "eva_config": "init_lora_weights says whether it is used",
    "corda_config": "init_lora_weights says whether it is used",
    "lora_ga_config": "init_lora_weights says whether it is used",
    "velora_config": "gradients",
}
"""Keys of peft's configs that change no result, and why."""

_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "lycoris")
"""Initialisations that leave the base model's weights as they are."""
_PEFT_DEFAULT = 8
"""Of rank and alpha."""
_TYPES = ("LORA", "LOHA", "LOKR")


class Header(NamedTuple):
    """What a file says beside its tensors.

    Attributes:
      peft: peft's configs by component; that of the empty name is of any.
      training: kohya's and other trainers' entries.
      place: where peft's configs are, for messages.
    """

    peft: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, str]
    place: str

    def config(self, component: str) -> Mapping[str, Any] | None:
        """The config of peft for a component, if there is one."""
        return self.peft.get(component, self.peft.get(""))


def open_header(path: Path, entries: Mapping[str, str]) -> Header:
    """Reads what a LoRA file says beside its tensors.

    Args:
      path: the file, beside which peft's config may lie.
      entries: of its header.

    Raises:
      InputError: it cannot be read, or asks for what is not supported.
    """
    beside = path.parent / _CONFIG
    peft: dict[str, Mapping[str, Any]] = {}
    place = f"its header's {_METADATA}"
    if _METADATA in entries:
        peft = _by_component(_parsed(entries[_METADATA], place))
    elif path.stem == "adapter_model" and beside.is_file():
        place = f"{_CONFIG} beside it"
        peft = {"": read_json(beside)}
    for config in peft.values():
        _check_config(config, place)
    return Header(peft, {k: v for k, v in entries.items() if k != _METADATA}, place)


def scaling(
    header: Header, place: Place, parts: Mapping[str, LazyTensor], alpha: float | None
) -> float:
    """The factor of a layer's product: alpha / rank, or what peft's config makes of it.

    Without any alpha it is one, as every reader has it.

    Args:
      header: the file's.
      place: the layer.
      parts: its tensors, by part.
      alpha: its own, if the file has it.

    Raises:
      InputError: the header contradicts the tensors.
    """
    rank, config = adapters.rank(parts), header.config(place.component)
    if config is None:
        if alpha is None:
            alpha = _training_alpha(header, parts)
        return 1.0 if alpha is None or rank is None else alpha / rank
    if not parts.keys() & {"down", "hada_w1_b", "lokr_w1", "lokr_w1_b"}:
        return 1.0
    said_rank = _of_pattern(config, "rank_pattern", place, "r")
    said_alpha = _of_pattern(config, "alpha_pattern", place, "lora_alpha", "alpha")
    if rank is not None and rank != said_rank:
        raise InputError(f"{header.place} says rank {said_rank} of {place.module}, it is {rank}")
    if alpha is not None and not math.isclose(alpha, said_alpha, rel_tol=1e-3):
        raise InputError(
            f"{header.place} says alpha {said_alpha} of {place.module}, its tensor {alpha:g}"
        )
    return said_alpha / (math.sqrt(said_rank) if config.get("use_rslora") else said_rank)


def check_tensors(
    header: Header,
    found: Mapping[Place, Mapping[str, LazyTensor]],
    alphas: Mapping[Place, float],
) -> tuple[str, ...]:
    """Checks that the header says of the tensors what they are.

    Args:
      header: the file's.
      found: tensors by layer and part.
      alphas: by layer, where the file has them.

    Returns:
      What the user should know of the header.

    Raises:
      InputError: it contradicts them.
    """
    for component in {place.component for place in found}:
        config = header.config(component)
        if config is None:
            continue
        of_it = {place: parts for place, parts in found.items() if place.component == component}
        for key, part in (("use_dora", "magnitude"), ("lora_bias", "up_bias")):
            has = any(part in parts for parts in of_it.values())
            if bool(config.get(key, False)) != has:
                raise InputError(
                    f"{header.place} says {key} = {config.get(key, False)} of the {component}, "
                    f"whose tensors {'have' if has else 'lack'} it"
                )
        strange = [
            place.module
            for place, parts in of_it.items()
            if not parts.keys() <= adapters.WHOLE and not _is_target(config, place)
        ]
        if strange:
            raise InputError(
                f"{header.place} says target_modules = {config['target_modules']}, the tensors "
                f"also change {', '.join(strange)}"
            )
    ranks = {place: rank for place, parts in found.items() if (rank := adapters.rank(parts))}
    own = {alphas[place] for place in ranks if place in alphas}
    for key, values in (("ss_network_dim", {*ranks.values()}), ("ss_network_alpha", own)):
        said = _number(header.training.get(key)) if not _is_rslora(header) else None
        if said and values and not any(math.isclose(said, v, rel_tol=1e-3) for v in values):
            raise InputError(
                f"its header says {key} = {said:g}, its tensors have "
                f"{', '.join(f'{value:g}' for value in sorted(values))}"
            )
    idle = sorted(header.peft.keys() - {"", *(place.component for place in found)})
    notes = [f"{header.place} is also of {name}, of which it has no tensors" for name in idle]
    if _is_rslora(header):
        notes.append("its header says rs_lora; the alphas of its tensors decide, over the rank")
    return tuple(notes)


def hint(header: Header) -> str:
    """Which base model the header names, for a message on what does not fit."""
    for key in ("ss_base_model_version", "modelspec.architecture", "base_model_name_or_path"):
        said = header.training.get(key) or next(
            (config[key] for config in header.peft.values() if config.get(key)), None
        )
        if said:
            return f"; its header says {key} = {said}"
    return ""


def _by_component(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Entries as `unet.r` and `text_encoder.lora_alpha`, divided."""
    configs: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        component, dot, key = name.partition(".")
        configs.setdefault(component if dot else "", {})[key or name] = value
    return dict(configs)


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InputError(f"{place} is no JSON object")
    return entries


def _check_config(config: Mapping[str, Any], place: str) -> None:
    def fail(key: str, wanted: str) -> None:
        raise InputError(f"{place}: {key} = {config[key]!r} is not supported; {wanted}")

    for key, value in config.items():
        # What is empty or off changes nothing, whatever it is.
        if key not in READ and key not in NO_MATTER and value:
            fail(key, "leave it out if it changes no result")
    if str(config.get("peft_type") or "LORA").rpartition(".")[2] not in _TYPES:
        fail("peft_type", f"{', '.join(_TYPES)} are")
    if config.get("fan_in_fan_out"):
        fail("fan_in_fan_out", "weights are (outputs, inputs)")
    if config.get("init_lora_weights", True) not in (*_BASE_KEPT, None):
        fail(
            "init_lora_weights",
            "it changes the base model's weights; path_initial_model_for_weight_conversion of "
            "peft's save_pretrained makes an ordinary LoRA",
        )
    for key in ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        patterns = value if isinstance(value, dict) else {}
        values = [] if value in (None, {}) else [*patterns.values()] or [value]
        if not all(_is_number(number, positive="alpha" not in key) for number in values):
            fail(key, "finite numbers are, of ranks positive ones")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{place}: {key} has {pattern!r}, no pattern: {error}") from error


def _is_number(value: Any, *, positive: bool) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and (value > 0 or not positive)


def _of_pattern(config: Mapping[str, Any], patterns: str, place: Place, *keys: str) -> float:
    """The value of the first pattern that a module's name ends with, as peft looks for it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in _names(place)):
            return value
    given = (config[key] for key in keys if config.get(key) is not None)
    return next(given, _PEFT_DEFAULT)


def _is_target(config: Mapping[str, Any], place: Place) -> bool:
    """Whether peft's config means a layer to be changed: by an expression, or by ends of names."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets == "all-linear" or any(re.fullmatch(targets, n) for n in _names(place))
    if not isinstance(targets, list):
        return True
    return any(f".{n}".endswith(f".{target}") for n in _names(place) for target in targets)


def _names(place: Place) -> tuple[str, ...]:
    """A module's names; the text encoder's had a prefix before transformers 5."""
    if place.component == "text_encoder":
        return (place.module, f"text_model.{place.module}")
    return (place.module,)


def _training_alpha(header: Header, parts: Mapping[str, LazyTensor]) -> float | None:
    """The alpha of kohya's header, which has another one for kernels of several taps."""
    down = parts.get("down")
    has_taps = down is not None and math.prod(down.shape[2:]) > 1
    own = _number(_arguments(header).get("conv_alpha")) if has_taps else None
    # An alpha of zero stands for the rank.
    return own or _number(header.training.get("ss_network_alpha")) or None


def _arguments(header: Header) -> Mapping[str, Any]:
    """The arguments of kohya's network, which are JSON in a string."""
    try:
        arguments = json.loads(header.training.get("ss_network_args", "{}"))
    except json.JSONDecodeError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _is_rslora(header: Header) -> bool:
    return str(_arguments(header).get("rs_lora")).lower() == "true"


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
