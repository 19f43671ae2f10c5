"""Checkpoints to pipelines and back."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qvd_jax import accelerators, checkpoint, items
from qvd_jax.axes import Params
from qvd_jax.config import check_choice, from_dict, to_dict, to_yaml
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError, first_line, naming
from qvd_jax.memory import tree_bytes
from qvd_jax.meshes import Work
from qvd_jax.models.clip import CLIPTextConfig
from qvd_jax.pipelines.components import DTYPES, ComponentConfigs, in_dtype
from qvd_jax.pipelines.families import FAMILIES, Family, Takes
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline, schedule_for
from qvd_jax.pipelines.text import TextPipeline
from qvd_jax.programs import enable_compilation_cache
from qvd_jax.quant.policy import Quantization
from qvd_jax.quant.solve import LayerReport, examples

# Of transformers, by what a tokenizer's config calls them.
_TOKENIZERS = {
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}


def load(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> VideoPipeline:
    """Loads a checkpoint.

    What is compiled to sample with it is kept for other processes: see
    `programs.enable_compilation_cache`.

    Args:
      path: its folder, or the name of a model of the package ("shapes").
      dtype: float32 or bfloat16, for parameters and computation; None keeps the stored one.
      sharding: where parameters are put; None is the default device. With `replicated()` calls
        divide over all devices.

    Raises:
      InputError: the folder is no checkpoint, damaged, or does not fit its own configs.
    """
    asked = None if dtype is None else _known_dtype(dtype)
    enable_compilation_cache()
    path = checkpoint.find(path)
    manifest = checkpoint.read_manifest(path)
    family, configs, scheduler, defaults, quantization = parse_configs(path, manifest)
    tokenizer: dict[str, Any] = {}
    if configs.text_encoder is not None:
        tokenizer["tokenizer"] = load_tokenizer(path / checkpoint.TOKENIZER)
        check_vocabulary(tokenizer["tokenizer"], configs.text_encoder, str(path))
    stored = {name: items.StoredItem(path, name) for name in configs.items(quantization)}
    # The VAE is float in every checkpoint.
    dtype = asked or _known_dtype(jax.tree.leaves(stored["vae"].shapes)[0].dtype)
    accelerators.check_used()
    shapes = {name: item.shapes for name, item in stored.items()}
    if manifest.checked == checkpoint.shapes_digest(manifest, shapes):
        expected = in_dtype(shapes, dtype, quantization)
    else:
        with naming(str(path)):
            expected = configs.param_shapes(dtype, quantization)
        for name, item in stored.items():
            item.check(expected[name])
    params = {name: item.read(expected[name], sharding) for name, item in stored.items()}
    if quantization is not None:
        _check_finite(params["unet"], path)
    return family.pipeline(
        **configs.modules(dtype, quantization),
        **tokenizer,
        params=params,
        scheduler=scheduler,
        defaults=defaults,
        family=manifest.family,
        description=manifest.description,
        quantization=quantization,
    )


def _known_dtype(dtype: DTypeLike) -> np.dtype:
    """One of `DTYPES`, however it is written.

    Raises:
      InputError: it is another, or none at all.
    """
    try:
        name: Any = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    check_choice("dtype", name, tuple(DTYPES))
    return jnp.dtype(name)


class CheckpointConfigs(NamedTuple):
    """What a manifest says of a model.

    Attributes:
      family: which kind of model it is.
      components: shapes of all networks.
      scheduler: noise schedule and solver.
      defaults: what a call leaves open.
      quantization: how the UNet is quantized; None is float.
    """

    family: Family
    components: ComponentConfigs
    scheduler: SchedulerConfig
    defaults: VideoDefaults
    quantization: Quantization | None

    @property
    def takes(self) -> Takes:
        """What it makes videos from."""
        return self.family.takes_with(self.components.unet)

    def work(self, videos: int, want: VideoDefaults) -> Work:
        """What there is to divide of so many videos, as of `VideoPipeline.work`."""
        unet, pipeline = self.components.unet, self.family.pipeline
        window = pipeline.window_of(unet, self.defaults, want.frames)
        return self.components.work(videos, window, want.height, want.width, guided=want.guided)

    def check(self, want: VideoDefaults, scheduler: SchedulerConfig) -> None:
        """Checks what videos are to be like, before any array is loaded.

        Args:
          want: frames, size and steps.
          scheduler: this one, or what is asked for in its place.

        Raises:
          InputError: a number does not fit, or the scheduler asks for what is not supported.
        """
        self.components.latents_shape(want.frames, want.height, want.width)
        schedule_for(scheduler, want.steps, self.quantization)


def read_configs(path: str | os.PathLike[str]) -> CheckpointConfigs:
    """The configs of a checkpoint, without its arrays.

    Args:
      path: as of `load`.

    Raises:
      InputError: the folder is no checkpoint, the family is unknown, or a config is none of it.
    """
    path = checkpoint.find(path)
    return parse_configs(path, checkpoint.read_manifest(path))


def parse_configs(path: Path, manifest: checkpoint.Manifest) -> CheckpointConfigs:
    """The configs in the manifest of a checkpoint; errors as of `read_configs`."""
    if manifest.family not in FAMILIES:
        raise InputError(
            f"{path}: unknown family {manifest.family!r}; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[manifest.family]
    where = path / checkpoint.MANIFEST
    components = from_dict(ComponentConfigs, manifest.components, f"{where}: components")
    scheduler = from_dict(SchedulerConfig, manifest.scheduler, f"{where}: scheduler")
    defaults = from_dict(type(family.defaults), manifest.defaults, f"{where}: defaults")
    quantization = None
    if manifest.quantization is not None:
        quantization = from_dict(Quantization, manifest.quantization, f"{where}: quantization")
    if set(components.networks) != set(family.pipeline.networks):
        raise InputError(
            f"{where}: components are {', '.join(components.networks)}; "
            f"the family {manifest.family!r} has {', '.join(family.pipeline.networks)}"
        )
    return CheckpointConfigs(family, components, scheduler, defaults, quantization)


def save(
    pipe: VideoPipeline,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    reports: Sequence[LayerReport] = (),
) -> None:
    """Writes a pipeline as a checkpoint.

    Args:
      pipe: the pipeline.
      path: the folder to make.
      overwrite: whether a checkpoint already there is replaced.
      reports: of the layers of a quantized pipeline.

    Raises:
      InputError: the parameters do not fit the networks, the folder exists, its parent does not,
        or space is short.
    """
    with checkpoint.write_directory(Path(path), overwrite=overwrite) as folder:
        checkpoint.check_space(folder, tree_bytes(pipe.params))
        shapes = pipe.configs.param_shapes(pipe.vae.layers.dtype, pipe.quantization)
        items.check_tree(pipe.params, shapes, "the pipeline")
        manifest = make_manifest(
            pipe.configs,
            pipe.scheduler,
            pipe.defaults,
            shapes,
            family=pipe.family,
            description=pipe.description,
            quantization=pipe.quantization,
        )
        for name, params in pipe.params.items():
            items.save_params(folder, name, params)
        if isinstance(pipe, TextPipeline):
            pipe.tokenizer.save_pretrained(folder / checkpoint.TOKENIZER)
        if reports:
            arrays = {r.path: r.arrays for shown in examples(reports) for r in shown}
            figures = [report.figures() for report in reports]
            checkpoint.write_layer_reports(folder, figures, arrays)
        if pipe.quantization is not None:
            (folder / checkpoint.POLICY).write_text(to_yaml(pipe.quantization.rules()), "utf-8")
        checkpoint.write_manifest(folder, manifest)


def load_layer_reports(path: str | os.PathLike[str]) -> list[LayerReport]:
    """What calibration wrote of the layers of a quantized checkpoint; nothing for a float one.

    Raises:
      InputError: the reports are damaged.
    """
    path = checkpoint.find(path)
    figures, arrays = checkpoint.read_layer_reports(path)
    try:
        return [LayerReport(**layer, arrays=arrays.get(layer["path"], {})) for layer in figures]
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: the layers' reports are damaged: {error}") from error


def make_manifest(
    configs: ComponentConfigs,
    scheduler: SchedulerConfig,
    defaults: VideoDefaults,
    shapes: Mapping[str, Params],
    *,
    family: str,
    description: str,
    quantization: Quantization | None = None,
) -> checkpoint.Manifest:
    """The manifest of a pipeline's checkpoint, whose arrays have the shapes of `param_shapes`."""
    manifest = checkpoint.Manifest(
        family=family,
        components=to_dict(configs),
        scheduler=to_dict(scheduler),
        defaults=to_dict(defaults),
        description=description,
        versions=checkpoint.package_versions(),
        quantization=None if quantization is None else to_dict(quantization),
    )
    return replace(manifest, checked=checkpoint.shapes_digest(manifest, shapes))


def _check_finite(params: Params, path: Path) -> None:
    """Raises `InputError`: int8 codes would hide it, and the latents stay finite."""
    for keys, leaf in jax.tree.leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            name = "/".join(key.key for key in keys)
            raise InputError(f"{path}: unet/{name} is not finite; calibrate the checkpoint anew")


def check_vocabulary(tokenizer: Any, config: CLIPTextConfig, where: str) -> None:
    """Raises `InputError` if the tokenizer has tokens of which the text encoder has no vectors."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer knows {token!r} as token {number}, the text encoder has "
            f"{config.vocab_size} tokens; they do not belong together"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a folder.

    Raises:
      InputError: there is none, or it is damaged.
    """
    checkpoint.check_tokenizer(folder)
    import transformers

    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # The registry that finds any class imports torch, if it is there, and takes seconds.
        name = _TOKENIZERS.get(config.get("tokenizer_class"), "AutoTokenizer")
    except (OSError, ValueError, AttributeError):
        name = "AutoTokenizer"
    try:
        return getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # The tokenizers library raises a bare one.
        raise InputError(f"{folder} holds no tokenizer: {first_line(error)}") from error
