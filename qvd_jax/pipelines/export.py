"""A pipeline's whole sampler as an artifact that jax alone runs."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from qvd_jax import checkpoint, exported
from qvd_jax.axes import Array, Params
from qvd_jax.config import did_you_mean
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions, Prepared
from qvd_jax.diffusion.solvers import Schedule
from qvd_jax.errors import InputError
from qvd_jax.files import write_folder
from qvd_jax.pipelines.autoencoder import decode_frames, decoded_together
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.text import encode_tokens
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a sampler can be exported for, on any machine."""

# The network of whose weights each stage's first arguments are.
_READS = {"encode": "text_encoder", "prepare": "unet", "sample": "unet", "decode": "vae"}


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
    overwrite: bool = False,
) -> None:
    """Writes the sampler of a text-to-video pipeline for `exported.ExportedSampler`.

    Its programs are those the pipeline runs, so on the CPU its videos are the pipeline's, bit for
    bit. It has the shapes it is exported with; tokens, seeds and guidance scales are free.

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
      overwrite: whether an artifact that is already there is replaced.

    Raises:
      InputError: the pipeline, a platform or a number does not fit, or `path` cannot be written.
    """
    for platform in platforms:
        if platform not in PLATFORMS:
            hint = did_you_mean(platform, PLATFORMS)
            raise InputError(f"platforms: {platform!r} is none of {', '.join(PLATFORMS)}{hint}")
    if not platforms:
        raise InputError(f"platforms: at least one of {', '.join(PLATFORMS)} is needed")
    if not isinstance(pipe, TextToVideoPipeline) or pipe.unet.config.controlnet is not None:
        raise InputError(
            f"export takes text-to-video models without a ControlNet; this one is of the family "
            f"{pipe.family!r}{'' if not pipe.unet.config.controlnet else ' with a ControlNet'}"
        )
    if videos < 1:
        raise InputError(f"videos = {videos}: at least 1 is needed")
    want = pipe.wanted(
        frames=frames, height=height, width=width, steps=steps, guidance_scale=guidance_scale
    )
    shape = pipe.latents_shape(want.frames, want.height, want.width)
    schedule = pipe.schedule(want.steps)
    together = decoded_together(pipe.vae, pipe.params["vae"], shape)
    with write_folder(Path(path), exported.INDEX, overwrite=overwrite) as folder:
        digests = {}

        def write(name: str, data: bytes) -> None:
            (folder / name).write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()

        for platform in platforms:
            stages = _stages(pipe, want, schedule, videos, shape, together, platform)
            for name, (function, arguments) in stages.items():
                flat, leaves = _flat(function, arguments)
                program = jax.export.export(jax.jit(flat), platforms=[platform])(*leaves)
                write(f"{name}-{platform}.jaxexport", bytes(program.serialize()))
        entries, data = _pack({name: _weights(pipe, name) for name in set(_READS.values())})
        write(exported.WEIGHTS, data)
        index = {
            "format_version": exported.FORMAT_VERSION,
            "description": pipe.description,
            "platforms": list(platforms),
            "videos": videos,
            "tokens": pipe.context_length,
            "channels": pipe.unet.config.context_dim,
            **{name: getattr(want, name) for name in ("frames", "height", "width", "steps")},
            "guidance_scale": want.guidance_scale,
            "decoded_together": together,
            "reads": {stage: _READS.get(stage) for stage in exported.STAGES},
            "weights": entries,
            "sha256": digests,
            "versions": checkpoint.package_versions(),
        }
        (folder / exported.INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
        (folder / "exported.py").write_bytes(Path(exported.__file__).read_bytes())


Stage = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of trees, and what it is called with."""


def _stages(
    pipe: TextToVideoPipeline,
    want: VideoDefaults,
    schedule: Schedule,
    videos: int,
    shape: tuple[int, ...],
    together: int,
    platform: str,
) -> dict[str, Stage]:
    """The programs a call of the pipeline runs, in their order."""
    rows = videos * (2 if want.guided else 1)
    unet, table = pipe.unet, jax.tree.map(jnp.asarray, schedule.table)
    config = pipe.sampler_config(want, schedule, on_cpu=platform == "cpu")
    weights = {name: _weights(pipe, name) for name in set(_READS.values())}

    def encode(params: Params, ids: Array) -> Array:
        return encode_tokens.jitted(pipe.text_encoder, params, ids)

    def noise(seed: Array) -> tuple[Array, Array]:
        drawn = sampler.initial_noise(seed, videos, shape)
        return sampler.video_keys(seed, videos), drawn * schedule.initial_scale

    def prepare(params: tuple[Params, Params], context: Array) -> Prepared:
        network, gains = params
        return sampler.prepare.jitted(unet, network, table.timestep, Conditions(context), gains)

    def sample(
        params: tuple[Params, Params],
        latents: Array,
        keys: Array,
        guidance: Array,
        prepared: Prepared,
    ) -> tuple[Array, Array]:
        state = sampler.initial_state(latents, table)
        start = jnp.int32(0)
        state, finite = sampler.sample_steps.jitted(
            unet, params[0], state, table, prepared, guidance, keys, start, config
        )
        return state.latents, finite

    def decode(params: Params, latents: Array) -> Array:
        return decode_frames.jitted(pipe.vae, params, latents)

    def struct(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    ids = struct(rows, pipe.context_length, dtype=jnp.int32)
    context = jax.eval_shape(encode, weights["text_encoder"], ids)
    keys, latents = jax.eval_shape(noise, struct(dtype=jnp.uint32))
    prepared = jax.eval_shape(prepare, weights["unet"], context)
    chunk = struct(1, together, *shape[1:])
    return {
        "encode": (encode, (weights["text_encoder"], ids)),
        "noise": (noise, (struct(dtype=jnp.uint32),)),
        "prepare": (prepare, (weights["unet"], context)),
        "sample": (sample, (weights["unet"], latents, keys, struct(want.frames), prepared)),
        "decode": (decode, (weights["vae"], chunk)),
    }


def _weights(pipe: VideoPipeline[Any], name: str) -> Any:
    """The arrays of a network; of the UNet, with its scales of steps."""
    if name != "unet":
        return pipe.params[name]
    # jax.export has no int2.
    unet = jax.tree.map(
        lambda leaf: leaf.astype(jnp.int4) if leaf.dtype == jnp.int2 else leaf, pipe.params["unet"]
    )
    return unet, pipe.params.get(GAINS)


def _flat(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """The function of leaves, and the leaves: jax alone knows no other trees."""
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    return flat, leaves


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
