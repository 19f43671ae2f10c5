"""Between pixels and latents: in parts for which there is memory, on all devices that have the VAE.

A VAE takes every frame alone, and frames divide over devices whatever videos they are of. Only
Stable Video Diffusion's decoder looks at neighboring frames: there videos divide, and the frames of
each as in the UNet.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import memory, meshes
from qvd_jax.axes import Array, Params
from qvd_jax.memory import tree_bytes
from qvd_jax.meshes import DATA, FRAME, GUIDANCE, MeshConfig, Work
from qvd_jax.models.vae import AutoencoderKL, to_bytes
from qvd_jax.programs import program

# Of all memory, what the decoder's values may take: more of one whose frames see each other, for
# they do not see beyond their chunk.
_DECODE_SHARE, _TEMPORAL_DECODE_SHARE = 0.25, 0.5


def decode(vae: AutoencoderKL, params: Params, latents: Array | np.ndarray) -> np.ndarray:
    """Pixels of latents.

    In chunks of as many frames as a quarter of the memory holds, which changes nothing; with a
    temporal decoder as half of it holds, which is as `decode_chunk_size` in diffusers.

    Args:
      vae: the VAE.
      params: its parameters.
      latents: `[B, F, h, w, C]`.

    Returns:
      uint8 `[B, F, H, W, 3]`.
    """
    latents = np.asarray(latents)
    videos, frames, height, width, _ = latents.shape
    devices = meshes.devices_of(params)
    config, rows = MeshConfig(), 1
    parts = latents
    if len(devices) == 1:
        length = decoded_together(vae, params, latents.shape[1:])
    elif vae.config.temporal_decoder:
        whole = {GUIDANCE: "a decoder has none"}
        work = Work(videos, frames, (height * width,), whole)
        config = work.choose(len(devices))
        rows = config.data
        length = decoded_together(vae, params, latents.shape[1:], config.frame)
    else:
        config, length = MeshConfig(data=len(devices)), 1
        parts = latents.reshape(-1, 1, *latents.shape[2:])
        own = math.ceil(len(parts) / config.data)
        rows = config.data * decoded_together(vae, params, (own, *latents.shape[2:]))
    mesh = config.over(devices) if jax.device_count() > 1 else None
    placed = params if mesh is None else meshes.replicate(params, mesh)
    decoded = []
    for first in range(0, len(parts), rows):
        row = parts[first : first + rows]
        chunks = []
        for start in range(0, parts.shape[1], length):
            # The last chunk is moved back to be as long as the others: one compilation.
            begin = min(start, parts.shape[1] - length)
            chunk = meshes.padded(row[:, begin : begin + length], rows)
            if mesh is not None:
                chunk = jax.device_put(chunk, NamedSharding(mesh, PartitionSpec(DATA, FRAME)))
            pixels = decode_frames(vae, placed, chunk, mesh)
            chunks.append(meshes.to_host(pixels)[: len(row), start - begin :])
        decoded.append(np.concatenate(chunks, axis=1))
    result = np.concatenate(decoded)
    return result.reshape(videos, frames, *result.shape[2:])


def decoded_together(
    vae: AutoencoderKL, params: Params, latents_shape: Sequence[int], parts: int = 1
) -> int:
    """How many of some frames are decoded at once.

    Args:
      vae: the VAE.
      params: its parameters.
      latents_shape: of the frames, `[F, h, w, C]`.
      parts: into which each chunk of frames divides; a divisor of F.
    """
    frames, *of_frame = latents_shape
    one = jax.ShapeDtypeStruct((1, 1, *of_frame), jnp.float32)
    needed = memory.peak_bytes(functools.partial(decode_frames, vae), params, one)
    needed -= tree_bytes(params)
    share = _TEMPORAL_DECODE_SHARE if vae.config.temporal_decoder else _DECODE_SHARE
    together = max(1, int(share * memory.total_bytes() // needed))
    own = frames // parts
    chunks = math.ceil(own / together)
    return parts * math.ceil(own / chunks)


def encode(vae: AutoencoderKL, params: Params, images: Array) -> tuple[Array, Array]:
    """Posterior of the latents of images.

    Args:
      vae: the VAE.
      params: its parameters.
      images: `[N, H, W, 3]` in [-1, 1].

    Returns:
      Mean and log-variance, each `[N, h, w, C]`, not yet multiplied by the scaling factor.
    """
    devices = meshes.devices_of(params)
    if jax.device_count() == 1:
        return encode_images(vae, params, images)
    mesh = MeshConfig(data=len(devices)).over(devices)
    place = NamedSharding(mesh, PartitionSpec(DATA))
    given = jax.device_put(meshes.padded(images, len(devices)), place)
    found = meshes.replicate(encode_images(vae, meshes.replicate(params, mesh), given, mesh), mesh)
    mean, log_variance = (values[: len(images)] for values in found)
    return mean, log_variance


def encode_each(vae: AutoencoderKL, params: Params, images: Sequence[Array]) -> Array:
    """Means of the latents of images, `[N, h, w, C]`, each the only one on its device.

    They then do not depend on each other, even in rounding.

    Args:
      vae: the VAE.
      params: its parameters.
      images: `[H, W, 3]` in [-1, 1].
    """
    together = len(meshes.devices_of(params))
    groups = (images[first : first + together] for first in range(0, len(images), together))
    return jnp.concatenate([encode(vae, params, jnp.stack(group))[0] for group in groups])


@program(static=("vae", "mesh"))
def encode_images(
    vae: AutoencoderKL, params: Params, images: Array, mesh: Mesh | None = None
) -> tuple[Array, Array]:
    """Posterior of images `[N, H, W, 3]`, of several devices on each that of its part of them."""

    def encode(params: Params, images: Array) -> tuple[Array, Array]:
        mean, log_variance = vae.apply({"params": params}, images[:, None], method="encode")
        return mean[:, 0], log_variance[:, 0]

    if mesh is not None:
        spec = PartitionSpec(DATA)
        encode = jax.shard_map(
            encode,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=(spec, spec),
            check_vma=False,
        )
    return encode(params, images)


@program(static=("scaling_factor",))
def draw_latents(mean: Array, log_variance: Array, key: Array, scaling_factor: float) -> Array:
    """Latents `[N, h, w, C]` drawn from their posterior, as a UNet sees them."""
    noise = jax.random.normal(key, mean.shape)
    return (mean + jnp.exp(log_variance / 2) * noise) * scaling_factor


@program(static=("vae", "mesh"))
def decode_frames(
    vae: AutoencoderKL, params: Params, latents: Array, mesh: Mesh | None = None
) -> Array:
    """Pixels of latents `[B, F, h, w, C]`, of several devices on each those of its part of them."""
    if mesh is not None and vae.config.temporal_decoder and mesh.shape[FRAME] > 1:
        vae = vae.clone(layers=replace(vae.layers, frame_axis=FRAME))

    def decode(params: Params, latents: Array) -> Array:
        latents = latents / vae.config.scaling_factor
        return to_bytes(vae.apply({"params": params}, latents, method="decode"))

    if mesh is not None:
        spec = PartitionSpec(DATA, FRAME)
        decode = jax.shard_map(
            decode,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
            check_vma=False,
        )
    return decode(params, latents)
