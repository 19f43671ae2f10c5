"""A pipeline's whole sampler as an artifact that jax alone runs."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from qvd_jax import checkpoint, exported
from qvd_jax.errors import InputError
from qvd_jax.files import write_folder
from qvd_jax.kernels.attention_cuda import without_cudnn
from qvd_jax.pipelines.autoencoder import decoded_together
from qvd_jax.pipelines.export_stages import Stage, Structs, conditioning, stages, weights_of
from qvd_jax.pipelines.pipeline import VideoPipeline

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a sampler can be exported for, on any machine."""


def export(
    pipe: VideoPipeline[Any],
    path: str | os.PathLike[str],
    platforms: Sequence[str] = PLATFORMS,
    *,
    videos: int = 1,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    conditioning_frames: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the sampler of a pipeline for `exported.ExportedSampler`.

    Its programs are those the pipeline runs, so on the CPU its videos are the pipeline's, bit for
    bit; those for CUDA have no attention by cuDNN, so that they run where there is none. It has
    the shapes it is exported with; tokens, images, motion, seeds, guidance scales and whatever
    else a call of the pipeline weighs by a number are free.

    Args:
      pipe: the pipeline, float or quantized.
      path: the folder to make.
      platforms: of "cpu", "cuda", "tpu", for each of which there are programs.
      videos: B.
      frames: F; None takes the pipeline's default, as with the others.
      height: H in pixels.
      width: W in pixels.
      steps: S.
      guidance_scale: the one that is taken when none is asked; more than 1 is with guidance.
      conditioning_frames: how many images SparseCtrl is given; None is one. What frames they are
        of is free.
      overwrite: whether an artifact that is already there is replaced.

    Raises:
      InputError: the pipeline, a platform or a number does not fit, or `path` cannot be written.
    """
    if isinstance(platforms, str):
        raise InputError(f"platforms = {platforms!r}: a list is needed, such as ['cpu']")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(f"platforms: {platform!r} is none of {', '.join(PLATFORMS)}")
    if not platforms:
        raise InputError(f"platforms: at least one of {', '.join(PLATFORMS)} is needed")
    if videos < 1:
        raise InputError(f"videos = {videos}: at least 1 is needed")
    want = pipe.wanted(
        frames=frames, height=height, width=width, steps=steps, guidance_scale=guidance_scale
    )
    _, *of_frame = pipe.latents_shape(want.frames, want.height, want.width)
    schedule = pipe.schedule(want.steps)
    told = conditioning(pipe, want, videos, conditioning_frames)
    together = decoded_together(pipe.vae, pipe.params["vae"], (want.frames, *of_frame))
    with write_folder(Path(path), exported.INDEX, overwrite=overwrite) as folder:
        digests = {}

        def write(name: str, data: bytes) -> None:
            (folder / name).write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()

        for platform in platforms:
            programs = told.stages | stages(
                pipe, want, schedule, videos, told.conditions, together, platform
            )
            networks = {stage.reads for stage in programs.values() if stage.reads is not None}
            weights = {name: weights_of(pipe, name) for name in sorted(networks)}
            # An artifact is for machines and cuDNNs that this one does not know.
            with without_cudnn(platform == "cuda"):
                for name, stage in programs.items():
                    write(f"{name}-{platform}.jaxexport", _lower(stage, weights, platform))
        entries, data = _pack(weights | {exported.CONSTANTS: told.constants})
        write(exported.WEIGHTS, data)
        index = {
            "format_version": exported.FORMAT_VERSION,
            "description": pipe.description,
            "platforms": list(platforms),
            "videos": videos,
            **{name: getattr(want, name) for name in ("frames", "height", "width", "steps")},
            "guided": want.guided,
            "inputs": [_described(given) for given in told.inputs],
            "options": told.options,
            "conditions": _described(told.conditions),
            "decoded_together": together,
            "scaling_factor": pipe.vae.config.scaling_factor,
            "reads": {name: stage.reads for name, stage in programs.items()},
            "constants": sorted(told.constants),
            "weights": entries,
            "sha256": digests,
            "versions": checkpoint.package_versions(),
        }
        index[exported.DIGEST] = exported.index_digest(index)
        (folder / exported.INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
        (folder / "exported.py").write_bytes(Path(exported.__file__).read_bytes())


def _lower(stage: Stage, weights: Mapping[str, Any], platform: str) -> bytes:
    """A program of the leaves of its arguments, for jax alone knows no other trees."""
    arguments = stage.arguments if stage.reads is None else (weights[stage.reads], *stage.arguments)
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(stage.function(*jax.tree.unflatten(tree, leaves)))

    # Shapes alone: a program is for one device, on however many the weights lie.
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return bytes(jax.export.export(jax.jit(flat), platforms=[platform])(*structs).serialize())


def _described(structs: Structs) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(struct.shape), "dtype": str(struct.dtype)}
        for name, struct in structs.items()
    }


def _pack(trees: dict[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], bytes]:
    """All arrays one after the other, and where each is."""
    entries: dict[str, list[dict[str, Any]]] = {}
    parts: list[bytes] = []
    offset = 0
    for name, tree in trees.items():
        entries[name] = []
        for leaf in jax.tree.leaves(tree):
            values = np.asarray(leaf)
            found = {"dtype": str(values.dtype), "shape": list(values.shape), "offset": offset}
            entries[name].append(found)
            parts.append(values.tobytes())
            offset += values.nbytes
    return entries, b"".join(parts)
