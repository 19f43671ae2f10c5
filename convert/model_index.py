"""The classes of the components in a pipeline's `model_index.json`."""

from collections.abc import Iterable

from qvd_jax.errors import InputError

from . import config_classes as classes
from .configs import BOOKKEEPING, Json

_UNETS = tuple(
    known.name
    for known in (
        classes.UNET_2D,
        classes.UNET_MOTION,
        classes.UNET_3D,
        classes.UNET_SPATIO_TEMPORAL,
    )
)
NAME = "model_index.json"

CLASSES: dict[str, tuple[str, ...]] = {
    "unet": _UNETS,
    "vae": (classes.VAE.name, classes.VAE_TEMPORAL_DECODER.name),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "motion_adapter": (classes.MOTION_ADAPTER.name,),
}
"""The classes of components in `model_index.json`."""

BY_OPTION: dict[str, str] = {"controlnet": "--controlnet"}
"""Components that an option of the command adds."""

IRRELEVANT: dict[str, str] = {
    "scheduler": "its own config says the class",
    "tokenizer": "its own config says the class",
    "feature_extractor": "its own config says the class",
    "safety_checker": "looks at finished images",
    "requires_safety_checker": "looks at finished images",
}
"""Keys of `model_index.json` that are not read, and why."""


def check(index: Json, replaced: Iterable[str], where: str) -> tuple[str, ...]:
    """Checks the classes of a `model_index.json`; returns notes.

    Args:
      index: its content.
      replaced: components that other options give.
      where: how messages name the file.

    Raises:
      InputError: a component is of a class that is not supported.
    """
    notes = []
    for key, value in index.items():
        if key in IRRELEVANT or key in BOOKKEEPING or key in replaced:
            continue
        name = value[-1] if isinstance(value, list) and value else value
        if name is None:
            continue
        if key in BY_OPTION:
            notes.append(f"{where}: {key} is read only where {BY_OPTION[key]} names its folder")
        elif key not in CLASSES:
            notes.append(f"{where}: {key} ({name}) is no part of these pipelines; left out")
        elif name not in CLASSES[key]:
            raise InputError(
                f"{where}: {key} is {name}, which is not supported; it must be "
                f"{' or '.join(CLASSES[key])}"
            )
    return tuple(notes)
