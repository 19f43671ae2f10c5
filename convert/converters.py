"""How the UNet of each family is recognized and opened, by the family's name in `FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.pipelines.families import FAMILIES
from qvd_jax.pipelines.pipeline import VideoDefaults

from . import animatediff, kinds, modelscope, positions, svd
from . import config_classes as classes
from .configs import Json
from .parts import Parts
from .tensors import Tensors, Weights, open_model, read_json


class OpenedUNet(NamedTuple):
    """A UNet of which everything is known, and no tensor has been read.

    Attributes:
      tensors: by diffusers' names.
      config: its shape, without what other sources add.
      defaults: of its videos.
      latent_size: height and width of the latents it was trained with; None leaves the defaults.
      description: one line on what it is.
      has_own_scheduler: whether the folder's scheduler is the UNet's.
      notes: what the user should know.
    """

    tensors: Tensors
    config: UNet3DConfig
    defaults: VideoDefaults
    latent_size: tuple[int, int] | None
    description: str
    has_own_scheduler: bool = True
    notes: tuple[str, ...] = ()


def _all_used(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Converter:
    """How a family's UNet becomes ours.

    Attributes:
      is_it: whether tensors by diffusers' names are of such a UNet, given the command's options.
      open: opens it, given the source, its parts and --motion.
      options: of the command, that are about such a UNet.
      without_unused: its tensors less those that change nothing, whatever was merged into them.
    """

    is_it: Callable[[Tensors, Mapping[str, Any]], bool]
    open: Callable[[Path, Parts, Path | None], OpenedUNet]
    options: tuple[str, ...] = ()
    without_unused: Callable[[Tensors], Tensors] = _all_used


def open_unet(source: Path, parts: Parts, options: Mapping[str, Any]) -> tuple[str, OpenedUNet]:
    """Opens the UNet of a source by the converter of its family.

    Args:
      source: for messages, and for a motion adapter inside of it.
      parts: of the source.
      options: of the command, those that were given.

    Returns:
      The family's name, and the UNet.

    Raises:
      InputError: it is of no family, or something is missing, damaged, or has no such option.
    """
    tensors, _, place = _unet_of(parts)
    name = next((name for name, it in CONVERTERS.items() if it.is_it(tensors, options)), None)
    if name is None:
        other = kinds.describe(tensors) or "no UNet of the Stable Diffusion 1.5 family"
        raise InputError(
            f"{place} is {other}; an AnimateDiff or Stable Diffusion 1.5 UNet is expected"
        )
    converter, family = CONVERTERS[name], FAMILIES[name]
    if parts.encoder not in family.pipeline.networks:
        (needed,) = set(family.pipeline.networks) - {"unet", "vae"}
        raise InputError(
            f"{place} is {family.title}, beside which {needed} is needed, not {parts.encoder}"
        )
    for option in options:
        if option not in converter.options:
            raise InputError(f"{source} is {family.title}, which has no {option}")
    return name, converter.open(source, parts, options.get("--motion"))


def _open_svd(_: Path, parts: Parts, __: Path | None) -> OpenedUNet:
    tensors, json, where = _unet_of(parts)
    original = parts.has_original_unet
    config, notes = svd.unet_config(tensors, json, original, where)
    if original:
        notes += ("14 frames by default; a model trained on 25 says so in its name (xt)",)
    # Its sample_size is neither the height nor the width it was trained at.
    defaults = svd.defaults(json, where)
    return OpenedUNet(tensors, config, defaults, None, FAMILIES["svd"].title, notes=notes)


def _open_modelscope(_: Path, parts: Parts, __: Path | None) -> OpenedUNet:
    tensors, json, where = _unet_of(parts)
    config, notes = modelscope.unet_config(tensors, json, where)
    family = FAMILIES["modelscope"]
    size = _latent_size(json, family.defaults)
    return OpenedUNet(tensors, config, family.defaults, size, family.title, notes=notes)


def _open_animatediff(
    source: Path, parts: Parts, motion: Path | None, *, takes_whole_unets: bool = False
) -> OpenedUNet:
    tensors, unet_json, place = _unet_of(parts)
    where = place
    has_motion = any(".motion_modules." in name for name in tensors)
    if has_motion and motion is not None:
        raise InputError(f"{place} has motion modules of its own; leave --motion out")
    original = False
    motion_json = None
    notes: tuple[str, ...] = ()
    if not has_motion:
        if motion is not None and not motion.exists():
            raise InputError(f"{motion} does not exist; --motion names an adapter or a checkpoint")
        adapter_folder = motion or source / "motion_adapter"
        if not adapter_folder.exists():
            raise InputError(
                f"{place} has no motion modules; name a motion adapter folder or an original "
                f"mm_*.ckpt with --motion"
            )
        adapter, motion_json = _open_motion(adapter_folder)
        notes = adapter.notes
        original = animatediff.is_original(adapter)
        added = animatediff.motion_tensors(adapter, str(adapter_folder))
        modules = {name: added[name] for name in added if ".motion_modules." in name}
        if len(modules) < len(added) and not takes_whole_unets:
            notes = (
                *notes,
                f"of {adapter_folder} the motion modules are read, not the {len(added)} tensors of "
                f"a UNet in which they are; those of {place} stay",
            )
            added = modules
        tensors = {**tensors, **added}
        where = f"{place} with {adapter_folder}"
    config, more = animatediff.unet_config(
        tensors, unet_json, motion_json, original_norms=original, where=where
    )
    version = animatediff.version(tensors)
    tensors, tables = positions.take(tensors)
    norms = "original" if original else "diffusers"
    defaults = FAMILIES["animatediff"].defaults
    return OpenedUNet(
        tensors,
        replace(config, positions=tables),
        defaults,
        _latent_size(unet_json, defaults),
        f"AnimateDiff {version}, GroupNorm scopes of {norms} AnimateDiff",
        has_own_scheduler=motion is None,
        notes=(*notes, *more),
    )


def _open_magicanimate(source: Path, parts: Parts, motion: Path | None) -> OpenedUNet:
    """AnimateDiff's, beside which the command names MagicAnimate's other networks.

    The file of its motion modules has all of the UNet that it was trained with.
    """
    opened = _open_animatediff(source, parts, motion, takes_whole_unets=True)
    return opened._replace(description=FAMILIES["magicanimate"].title)


def _open_motion(motion: Path) -> tuple[Weights, Json]:
    beside = (motion if motion.is_dir() else motion.parent) / "config.json"
    if motion.is_dir():
        return open_model(motion), read_json(beside)
    # A file of an adapter's folder has its config beside it, an original file has none.
    config = read_json(beside) if beside.is_file() else {}
    is_adapter = config.get("_class_name") == classes.MOTION_ADAPTER.name
    return open_model(motion), config if is_adapter else {}


def _unet_of(parts: Parts) -> tuple[Tensors, Json, str]:
    """Tensors, config and place of the UNet."""
    return parts.tensors["unet"], parts.configs["unet"], str(parts.places["unet"])


def _latent_size(unet_json: Json, defaults: VideoDefaults) -> tuple[int, int]:
    """What a config says, one number or two, or as many as the defaults have with 8 pixels each."""
    found = unet_json.get("sample_size")
    sizes: list[Any] = found if isinstance(found, list) else [found, found]
    if len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    return defaults.height // 8, defaults.width // 8


CONVERTERS = {
    "modelscope": Converter(lambda tensors, _: modelscope.is_modelscope(tensors), _open_modelscope),
    "svd": Converter(
        lambda tensors, _: svd.is_svd(tensors), _open_svd, without_unused=svd.without_dead
    ),
    "magicanimate": Converter(
        lambda tensors, options: (
            "--appearance-encoder" in options and animatediff.is_animatediff(tensors)
        ),
        _open_magicanimate,
        ("--motion", "--controlnet", "--appearance-encoder"),
    ),
    "animatediff": Converter(
        lambda tensors, _: animatediff.is_animatediff(tensors),
        _open_animatediff,
        ("--motion", "--controlnet", "--preset"),
    ),
}
"""By the family's name; the first that takes a UNet for its own opens it."""
