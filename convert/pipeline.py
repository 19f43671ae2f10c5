"""Conversion of a whole pipeline folder, component by component and tensor by tensor."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.typing import DTypeLike

from qvd_jax import checkpoint, items, memory
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.families import FAMILIES, Family
from qvd_jax.pipelines.loading import check_vocabulary, load_tokenizer, make_manifest
from qvd_jax.pipelines.pipeline import VideoDefaults

from . import animatediff, companions, keys, magicanimate, names, scheduler
from .configs import Json
from .controlnet import begin_controlnet, check_config, open_controlnet
from .converters import CONVERTERS, OpenedUNet, open_unet
from .embeddings import TABLE, add_embeddings, open_embedding
from .lora import merge_loras
from .names import Names
from .parts import Parts, open_parts
from .tensors import Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything is known of it, no tensor has been read.

    Attributes:
      configs: the components' configs.
      tensors: the components' tensors, by component name.
      tokenizer: of transformers, with the tokens that were added; None for a model without text.
      scheduler: noise schedule and solver.
      defaults: of a video.
      family: its name in `FAMILIES`.
      description: one line on what it is.
      notes: what the user should know, such as a config that the tensors contradict.
    """

    configs: ComponentConfigs
    tensors: dict[str, Tensors]
    tokenizer: Any
    scheduler: SchedulerConfig
    defaults: VideoDefaults
    family: str
    description: str
    notes: tuple[str, ...]


class BytesRead(NamedTuple):
    """How far a conversion is, for a progress bar.

    Attributes:
      component: the one at work.
      done: bytes of all components that have been read.
      total: bytes of all components.
    """

    component: str
    done: int
    total: int


def counted(total: int, on_progress: Callable[[BytesRead], None]) -> Callable[[str, int], None]:
    """What is called with a component and the bytes it read more, and passes on their sum.

    Args:
      total: bytes of all components.
      on_progress: called with each sum.
    """
    done = 0

    def add(component: str, count: int) -> None:
        nonlocal done
        done += count
        on_progress(BytesRead(component, done, total))

    return add


NAMES: dict[str, Names] = {
    "unet": names.UNET,
    "vae": names.VAE,
    "text_encoder": names.CLIP_TEXT,
    "image_encoder": names.CLIP_VISION,
}


def open_source(
    source: Path,
    motion: Path | None = None,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    embeddings: Sequence[tuple[Path, str | None]] = (),
    controlnet: Path | None = None,
    preset: str | None = None,
    unet: Path | None = None,
    vae: Path | None = None,
    appearance_encoder: Path | None = None,
    config: Path | None = None,
) -> Source:
    """Opens a diffusers folder of any family, or Stable Diffusion 1.5 and motion modules.

    Args:
      source: the folder, or one file of Stable Diffusion 1.5 or Stable Video Diffusion.
      motion: an adapter folder or an original `mm_*.ckpt`, for a source without motion modules.
      loras: files and scales of LoRAs of any kind, merged in this order.
      embeddings: files of textual inversions, and other names for their tokens.
      controlnet: a folder of diffusers or an original file, of a ControlNet or SparseCtrl.
      preset: of `animatediff.PRESETS`, for AnimateDiff with distilled motion modules.
      unet: an original UNet of ModelScope or ZeroScope in place of the folder's.
      vae: a VAE in place of the source's, a folder or a file.
      appearance_encoder: MagicAnimate's, a folder.
      config: the folder of diffusers that has the configs and the tokenizer of a file.

    Raises:
      InputError: something is missing, damaged, or of another family.
    """
    parts = open_parts(source, unet, vae, config)
    options = {
        "--motion": motion,
        "--controlnet": controlnet,
        "--appearance-encoder": appearance_encoder,
        "--preset": preset,
    }
    given = {name: value for name, value in options.items() if value is not None}
    family_name, opened = open_unet(source, parts, given)
    family = FAMILIES[family_name]
    tensors, notes = {**parts.tensors, "unet": opened.tensors}, [*parts.notes, *opened.notes]
    if loras:
        merged = merge_loras(
            {name: tensors[name] for name in ("unet", "text_encoder") if name in tensors}, loras
        )
        tensors |= merged.tensors
        notes += merged.notes
    tensors["unet"] = CONVERTERS[family_name].without_unused(tensors["unet"])
    if controlnet is not None:
        levels = keys.count(tensors["vae"], r"encoder\.down_blocks\.(\d+)\.")
        stride = 2 ** max(levels - 1, 0)
        begun = begin_controlnet(opened.tensors, opened.config, stride)
        found = open_controlnet(controlnet, begun)
        notes += check_config(found, opened.config, str(controlnet))
        tensors["unet"] |= {f"controlnet.{name}": t for name, t in found.tensors.items()}
        opened = opened._replace(config=replace(opened.config, controlnet=found.config))
        notes += [*found.notes, f"added {controlnet.name}"]
    if appearance_encoder is not None:
        encoder, encoder_notes = magicanimate.open_appearance_encoder(
            appearance_encoder, opened.config
        )
        notes += encoder_notes
        tensors["unet"] |= {f"appearance_encoder.{name}": t for name, t in encoder.items()}
        opened = opened._replace(config=magicanimate.unet_config(opened.config, str(source)))

    tokenizer = None if parts.tokenizer is None else load_tokenizer(parts.tokenizer)
    configs, config_notes = _component_configs(parts, opened.config)
    notes += config_notes
    if embeddings:
        if tokenizer is None or family.takes.inputs != "prompts":
            raise InputError(f"{source} is {family.title}, which reads no prompts")
        added = [open_embedding(*embedding) for embedding in embeddings]
        tensors["text_encoder"], added_notes = add_embeddings(
            tensors["text_encoder"], tokenizer, added
        )
        notes += added_notes
        assert configs.text_encoder is not None
        words = tensors["text_encoder"][TABLE].shape[0]
        configs = replace(configs, text_encoder=replace(configs.text_encoder, vocab_size=words))
    if tokenizer is not None and configs.text_encoder is not None:
        check_vocabulary(tokenizer, configs.text_encoder, str(source))
    if controlnet is not None:
        _check_condition(configs, controlnet)
    _check_widths(configs, source)
    own_scheduler, scheduler_notes = _open_scheduler(parts, family, opened, preset)
    defaults = _defaults(opened, configs)
    if preset is not None:
        defaults = replace(defaults, **animatediff.PRESETS[preset][1])
    return Source(
        configs=configs,
        tensors=tensors,
        tokenizer=tokenizer,
        scheduler=own_scheduler,
        defaults=defaults,
        family=family_name,
        description=opened.description,
        notes=(*notes, *scheduler_notes),
    )


def write_checkpoint(
    source: Source,
    out: Path,
    *,
    dtype: DTypeLike,
    overwrite: bool = False,
    on_progress: Callable[[BytesRead], None] = lambda progress: None,
) -> None:
    """Reads the tensors of a source and writes them as a checkpoint.

    Args:
      source: from `open_source`.
      out: the folder to make.
      dtype: of the written parameters.
      overwrite: whether a checkpoint already there is replaced.
      on_progress: called after each parameter.

    Raises:
      InputError: tensors are missing, extra or misshapen, `out` exists, or space is short.
    """
    shapes = source.configs.param_shapes(dtype)
    total = memory.tree_bytes(shapes)
    checkpoint.check_space(out.parent, total)
    for name, tensors in source.tensors.items():
        names.check_names(shapes[name], NAMES[name], tensors, name)
    with checkpoint.write_directory(out, overwrite=overwrite) as folder:
        on_bytes = counted(total, on_progress)
        for name, tensors in source.tensors.items():
            on_own = functools.partial(on_bytes, name)
            params = names.build_params(shapes[name], NAMES[name], tensors, dtype, on_own)
            items.save_params(folder, name, params)
            # Freed before the next component is read.
            jax.tree.map(lambda array: array.delete(), params)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder / checkpoint.TOKENIZER)
        manifest = make_manifest(
            source.configs,
            source.scheduler,
            source.defaults,
            shapes,
            family=source.family,
            description=source.description,
        )
        checkpoint.write_manifest(folder, manifest)


def _component_configs(
    parts: Parts, unet: UNet3DConfig
) -> tuple[ComponentConfigs, tuple[str, ...]]:
    def read(name: str, config: Callable[[Tensors, Json, str], companions.Read[T]]) -> T:
        found, more = config(parts.tensors[name], parts.configs[name], str(parts.places[name]))
        notes.extend(more)
        return found

    notes: list[str] = []
    vae = read("vae", companions.vae_config)
    if parts.encoder == "text_encoder":
        text_encoder = read("text_encoder", companions.text_config)
        return ComponentConfigs(unet, vae, text_encoder=text_encoder), tuple(notes)
    image_encoder = read("image_encoder", companions.vision_config)
    return ComponentConfigs(unet, vae, image_encoder=image_encoder), tuple(notes)


def _open_scheduler(
    parts: Parts, family: Family, unet: OpenedUNet, preset: str | None
) -> tuple[SchedulerConfig, tuple[str, ...]]:
    """The folder's scheduler, or what takes its place, and what the user should know of that."""
    data = parts.configs["scheduler"]
    found = scheduler.read(data, str(parts.places["scheduler"] / "scheduler_config.json"))
    if preset is not None:
        target, _ = animatediff.PRESETS[preset]
        config, text = scheduler.replaced(found, target, scheduler.KEPT_BY_PRESET)
        note = f"scheduler, steps and guidance set to those of {preset}{text}"
        return config, (*found.notes, note)
    if not data:
        return family.scheduler, ()
    if unet.has_own_scheduler and found.problem is None:
        return found.config(), found.notes
    reason, kept = found.problem, None
    if not unet.has_own_scheduler:
        reason = "motion modules were trained with linear betas, Stable Diffusion's are scaled"
        kept = tuple(found.given.keys() - set(scheduler.REPLACED_BY_MOTION))
    config, text = scheduler.replaced(found, family.scheduler, kept)
    name = scheduler.CLASSES[config.solver]
    note = f"scheduler set to {family.title}'s {name}: {reason}{text}"
    return config, (*found.notes, note)


def _defaults(unet: OpenedUNet, configs: ComponentConfigs) -> VideoDefaults:
    defaults = unet.defaults
    if unet.latent_size is not None:
        height, width = (size * configs.vae.stride for size in unet.latent_size)
        defaults = replace(defaults, height=height, width=width)
    return replace(
        defaults, frames=min(defaults.frames, configs.unet.max_frames or defaults.frames)
    )


def _check_widths(configs: ComponentConfigs, source: Path) -> None:
    latents, unet = configs.vae.latent_channels, configs.unet
    has_image = configs.image_encoder is not None
    encoder = (
        configs.image_encoder.projection_size
        if configs.image_encoder
        else (configs.text_encoder.hidden_size if configs.text_encoder else 0)
    )
    for what, have, want in (
        ("image" if has_image else "text", encoder, unet.context_dim),
        ("latents", latents * (1 + has_image), unet.in_channels),
        ("prediction", unet.out_channels, latents),
    ):
        if have != want:
            raise InputError(
                f"{source}: components do not belong together: the {what} has {have} channels, "
                f"{want} are needed"
            )


def _check_condition(configs: ComponentConfigs, path: Path) -> None:
    """Raises `InputError` if images of the video's size do not fit a ControlNet."""
    config, stride = configs.unet.controlnet, configs.vae.stride
    assert config is not None
    if config.embedding_channels and 2 ** (len(config.embedding_channels) - 1) != stride:
        raise InputError(
            f"{path} brings its condition to 1/{2 ** (len(config.embedding_channels) - 1)} of its "
            f"size, the VAE to 1/{stride}; they do not belong together"
        )
    if not config.ignores_latents and config.condition_channels != len("RGB"):
        raise InputError(
            f"{path} takes conditions of {config.condition_channels} channels; images have 3"
        )
