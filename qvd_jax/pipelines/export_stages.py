"""What an exported sampler consists of: its programs, what they read and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions, Prepared
from qvd_jax.diffusion.solvers import Schedule
from qvd_jax.errors import InputError
from qvd_jax.pipelines.animation import AnimationPipeline
from qvd_jax.pipelines.autoencoder import decode_frames, draw_latents, encode_images
from qvd_jax.pipelines.components import GAINS
from qvd_jax.pipelines.image_to_video import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    ImageToVideoDefaults,
    ImageToVideoPipeline,
    embed_image,
    resize_matrix,
)
from qvd_jax.pipelines.pipeline import VideoDefaults, VideoPipeline
from qvd_jax.pipelines.text import encode_tokens
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline, control_key

Structs = dict[str, jax.ShapeDtypeStruct]
"""Shapes by name."""


class Stage(NamedTuple):
    """A program.

    Attributes:
      reads: the network whose weights are its function's first argument; None reads none.
      function: of trees.
      arguments: shapes of its other arguments.
    """

    reads: str | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Conditioning:
    """How an exported sampler comes to what its UNet is told.

    Attributes:
      inputs: what a call gives: all of one of these.
      options: numbers a call may give, and what they are if it does not.
      conditions: shapes of what the UNet is told, in the order of `sampler.Conditions`.
      stages: the programs of it, by name.
      constants: arrays the loader needs for it, by name.
    """

    inputs: tuple[Structs, ...]
    options: dict[str, float]
    conditions: Structs
    stages: dict[str, Stage]
    constants: dict[str, np.ndarray] = field(default_factory=dict)


def weights_of(pipe: VideoPipeline[Any], network: str) -> Any:
    """The arrays of a network; of the UNet, with its scales of steps."""
    if network != "unet":
        return pipe.params[network]
    # jax.export has no int2.
    unet = jax.tree.map(
        lambda leaf: leaf.astype(jnp.int4) if leaf.dtype == jnp.int2 else leaf, pipe.params["unet"]
    )
    return unet, pipe.params.get(GAINS)


def conditioning(
    pipe: VideoPipeline[Any], want: VideoDefaults, videos: int, conditioning_frames: int | None
) -> Conditioning:
    """How the sampler of a pipeline comes to what its UNet is told.

    Args:
      pipe: the pipeline.
      want: what its videos are like.
      videos: B.
      conditioning_frames: how many SparseCtrl is given; None is one.

    Raises:
      InputError: the pipeline or the number does not fit.
    """
    controlnet = pipe.unet.config.controlnet
    is_sparse = controlnet is not None and controlnet.ignores_latents
    if conditioning_frames is not None and not is_sparse:
        raise InputError(
            f"conditioning_frames = {conditioning_frames}: the model has no SparseCtrl, which is "
            f"given images of some frames; leave it out"
        )
    if conditioning_frames is not None and not 1 <= conditioning_frames <= want.frames:
        raise InputError(
            f"conditioning_frames = {conditioning_frames}: 1 to {want.frames}, the frames of the "
            f"video, are needed"
        )
    match pipe:
        case ImageToVideoPipeline():
            assert isinstance(want, ImageToVideoDefaults)
            return _image_conditioning(pipe, want, videos)
        case AnimationPipeline():
            return _animation_conditioning(pipe, want, videos)
        case TextToVideoPipeline():
            return _text_conditioning(pipe, want, videos, conditioning_frames or 1)
    raise InputError(f"export knows no pipeline of the kind {type(pipe).__name__}")


def stages(
    pipe: VideoPipeline[Any],
    want: VideoDefaults,
    schedule: Schedule,
    videos: int,
    conditions: Structs,
    together: int,
    platform: str,
) -> dict[str, Stage]:
    """The programs a call of the pipeline runs once it has its conditions, in their order.

    Args:
      pipe: the pipeline.
      want: what its videos are like.
      schedule: of its steps.
      videos: B.
      conditions: as of `Conditioning`.
      together: how many frames are decoded at once.
      platform: that the programs are for.
    """
    unet, table = pipe.unet, jax.tree.map(jnp.asarray, schedule.table)
    shape = pipe.latents_shape(want.frames, want.height, want.width)
    config = pipe.sampler_config(want, schedule, on_cpu=platform == "cpu")

    def noise(seed: Array) -> tuple[Array, Array]:
        drawn = pipe.initial_noise(seed, videos, shape)
        return sampler.video_keys(seed, videos), drawn * schedule.initial_scale

    def prepare(params: tuple[Params, Params], conditions: Conditions) -> Prepared:
        network, gains = params
        return sampler.prepare.jitted(unet, network, table.timestep, conditions, gains)

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

    seed = _struct(dtype=jnp.uint32)
    keys, latents = jax.eval_shape(noise, seed)
    seen = Conditions._make(conditions.get(name) for name in Conditions._fields)
    prepared = jax.eval_shape(prepare, weights_of(pipe, "unet"), seen)
    return {
        "noise": Stage(None, noise, (seed,)),
        "prepare": Stage("unet", prepare, (seen,)),
        "sample": Stage("unet", sample, (latents, keys, _struct(shape[0]), prepared)),
        "decode": Stage("vae", decode, (_struct(1, together, *shape[1:]),)),
    }


def _text_conditioning(
    pipe: TextToVideoPipeline, want: VideoDefaults, videos: int, conditioning_frames: int
) -> Conditioning:
    def encode(params: Params, ids: Array) -> Array:
        return encode_tokens.jitted(pipe.text_encoder, params, ids)

    rows = videos * (2 if want.guided else 1)
    ids = _struct(rows, pipe.context_length, dtype=jnp.int32)
    context = jax.eval_shape(encode, pipe.params["text_encoder"], ids)
    signs = ("", "negative_") if want.guided else ("",)
    inputs = tuple(
        {f"{sign}{name}": _struct(videos, *x.shape[1:], dtype=x.dtype) for sign in signs}
        for name, x in (("tokens", ids), ("embeds", context))
    )
    options = {"guidance_scale": want.guidance_scale}
    programs = {"encode_text": Stage("text_encoder", encode, (ids,))}
    controlnet = pipe.unet.config.controlnet
    if controlnet is None:
        return Conditioning(inputs, options, {"context": context}, programs)
    options |= {
        "controlnet_conditioning_scale": 1.0,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
    }
    count = conditioning_frames if controlnet.ignores_latents else want.frames
    pixels = (count, want.height, want.width, 3)
    given = {"conditioning_frames": _struct(*pixels, dtype=jnp.uint8)}
    latents = pipe.latents_shape(want.frames, want.height, want.width)
    shape: tuple[int, ...] = (1, want.frames, want.height, want.width, 3)
    if controlnet.ignores_latents:
        given["controlnet_frame_indices"] = _struct(count, dtype=jnp.int32)
        shape = pipe.configs.control_shape(*latents[:3])
        if shape[2:4] == latents[1:3]:
            posterior = _struct(count, *latents[1:])
            programs |= {
                "encode_images": _encode_images(pipe, count, want),
                "draw": _draw(pipe, posterior),
            }
    steps = len(pipe.schedule(want.steps).table.timestep)
    conditions = {
        "context": context,
        "control": _struct(*shape),
        "control_scale": _struct(steps),
    }
    return Conditioning(tuple(one | given for one in inputs), options, conditions, programs)


def _image_conditioning(
    pipe: ImageToVideoPipeline, want: ImageToVideoDefaults, videos: int
) -> Conditioning:
    def embed(params: Params, pixels: Array) -> Array:
        return embed_image.jitted(pipe.image_encoder, params, pixels)

    def noise(keys: Array) -> Array:
        shape = want.height, want.width, 3
        # Stream 0 of each video's key, as in the pipeline.
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)

    size = pipe.image_encoder.config.image_size
    rows = videos * (2 if want.guided else 1)
    _, *of_frame = pipe.latents_shape(want.frames, want.height, want.width)
    return Conditioning(
        ({"images": _struct(videos, want.height, want.width, 3, dtype=jnp.uint8)},),
        {
            "guidance_scale": want.guidance_scale,
            "min_guidance_scale": want.min_guidance_scale,
            "fps": want.fps,
            "motion_bucket_id": want.motion_bucket_id,
            "noise_aug_strength": want.noise_aug_strength,
        },
        {
            "context": _struct(rows, 1, pipe.unet.config.context_dim),
            "image": _struct(rows, 1, *of_frame),
            "added_ids": _struct(1, 3),
        },
        {
            "embed_image": Stage("image_encoder", embed, (_struct(size, size, 3),)),
            "image_noise": Stage(None, noise, (_keys(videos),)),
            "encode_images": _encode_images(pipe, 1, want),
        },
        {
            "clip_rows": resize_matrix(want.height, size),
            "clip_columns": resize_matrix(want.width, size),
            "clip_mean": CLIP_MEAN,
            "clip_deviation": CLIP_DEVIATION,
        },
    )


def _animation_conditioning(
    pipe: AnimationPipeline, want: VideoDefaults, videos: int
) -> Conditioning:
    # The text is always the empty one: its encoder is not needed.
    empty = pipe.encode_text([""])
    rows = videos * (2 if want.guided else 1)
    frames, *of_frame = pipe.latents_shape(want.frames, want.height, want.width)
    pixels = want.height, want.width, 3
    return Conditioning(
        (
            {
                "images": _struct(videos, *pixels, dtype=jnp.uint8),
                "motion_video": _struct(want.frames, *pixels, dtype=jnp.uint8),
            },
        ),
        {"guidance_scale": want.guidance_scale},
        {
            "context": _struct(rows, *empty.shape[1:], dtype=empty.dtype),
            "control": _struct(1, frames, *pixels),
            "reference": _struct(videos, 1, *of_frame),
        },
        {"encode_images": _encode_images(pipe, 1, want)},
        {"context": np.asarray(empty)},
    )


def _encode_images(pipe: VideoPipeline[Any], count: int, want: VideoDefaults) -> Stage:
    """The posterior of the latents of images `[N, H, W, 3]`."""

    def encode(params: Params, images: Array) -> tuple[Array, Array]:
        return encode_images.jitted(pipe.vae, params, images)

    return Stage("vae", encode, (_struct(count, want.height, want.width, 3),))


def _draw(pipe: VideoPipeline[Any], posterior: jax.ShapeDtypeStruct) -> Stage:
    """Latents of SparseCtrl's images."""

    def draw(mean: Array, log_variance: Array, seed: Array) -> Array:
        scaling_factor = pipe.vae.config.scaling_factor
        return draw_latents.jitted(mean, log_variance, control_key(seed), scaling_factor)

    return Stage(None, draw, (posterior, posterior, _struct(dtype=jnp.uint32)))


def _struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _keys(videos: int) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: sampler.video_keys(0, videos))
