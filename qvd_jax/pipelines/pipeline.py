"""What every pipeline does: checks, noise, the sampling loop, the VAE's decoder."""

import abc
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import memory
from qvd_jax.axes import Array, Params
from qvd_jax.config import check_choice
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions, SamplerConfig, Videos
from qvd_jax.diffusion.schedules import SchedulerConfig, Solver, TimestepSpacing, switch
from qvd_jax.diffusion.solvers import Schedule, make_schedule
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.memory import tree_bytes
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL, to_bytes
from qvd_jax.pipelines.components import GAINS, ComponentConfigs
from qvd_jax.programs import program
from qvd_jax.quant.policy import Quantization

_logger = logging.getLogger(__name__)

OutputType = Literal["video", "latents"]
StepCallback = Callable[[int, Array], None]

# Frames that windows share, from which on neighbors blend into each other.
_SMOOTH_OVERLAP = 2

# Of all memory, what the decoder's values may take: more of one whose frames see each other, for
# they do not see beyond their chunk.
_DECODE_SHARE, _TEMPORAL_DECODE_SHARE = 0.25, 0.5


@dataclass(frozen=True)
class VideoDefaults:
    """What a video is like when nobody asks otherwise.

    Attributes:
      frames: F.
      height: H in pixels.
      width: W in pixels.
      steps: S.
      guidance_scale: of classifier-free guidance; 1 or less turns it off.
      fps: frames per second of the written file.
      prompts: examples.
    """

    frames: int = 16
    height: int = 512
    width: int = 512
    steps: int = 25
    guidance_scale: float = 7.5
    fps: int = 8
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ValueError(f"fps = {self.fps}: at least 1 is needed")

    @property
    def guided(self) -> bool:
        """Whether there is guidance."""
        return self.guidance_scale > 1


Defaults = TypeVar("Defaults", bound=VideoDefaults)


@dataclass(frozen=True, kw_only=True)
class VideoPipeline(abc.ABC, Generic[Defaults]):
    """A video diffusion model, ready to sample.

    Attributes:
      unet: predicts the noise.
      vae: maps latents to pixels.
      params: the networks' parameters, by these names; with step-aware scales also theirs,
        "unet_gains", `[S]` for each layer.
      scheduler: noise schedule and solver.
      defaults: what a call leaves open.
      family: which kind of model it is, such as "animatediff".
      description: one line on where the weights came from.
      quantization: how the UNet is quantized; None is float.
    """

    unet: UNet3D
    vae: AutoencoderKL
    params: dict[str, Params] = field(repr=False)
    scheduler: SchedulerConfig
    defaults: Defaults
    family: str
    description: str
    quantization: Quantization | None = None

    networks: ClassVar[tuple[str, ...]]
    """Names of the networks a checkpoint of such a pipeline has."""

    closed_windows: ClassVar[bool] = False
    """Whether windows over long videos go on from the last frame to the first."""

    def with_scheduler(
        self,
        solver: Solver | None = None,
        *,
        karras: bool | None = None,
        timestep_spacing: TimestepSpacing | None = None,
    ) -> Self:
        """The pipeline with another solver, or other steps of it: see `schedules.switch`."""
        scheduler = switch(self.scheduler, solver, karras=karras, timestep_spacing=timestep_spacing)
        return replace(self, scheduler=scheduler)

    @abc.abstractmethod
    def __call__(
        self,
        inputs: Any,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        latents: Array | np.ndarray | None = None,
        output_type: OutputType = "video",
        callback_on_step_end: StepCallback | None = None,
        indices: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Samples one video for each input."""

    @abc.abstractmethod
    def conditions(
        self,
        inputs: Sequence[Any],
        want: Defaults,
        seed: int,
        *,
        indices: Sequence[int] | None = None,
    ) -> Conditions:
        """What the UNet sees of the inputs, with negatives if `want` asks for guidance."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """L of the UNet's context."""

    @property
    @abc.abstractmethod
    def configs(self) -> ComponentConfigs:
        """Of all networks."""

    def guidance(self, want: Defaults) -> np.ndarray:
        """Guidance scale of each frame, `[F]`."""
        return np.full(want.frames, want.guidance_scale, np.float32)

    def window(self, frames: int) -> int:
        """How many frames the UNet sees at once: all, or its default where these are too many."""
        limit = self.unet.config.max_frames
        return frames if limit is None or frames <= limit else min(self.defaults.frames, limit)

    def initial_noise(self, seed: int, videos: Videos, shape: tuple[int, ...]) -> Array:
        """Unit-normal noise `[B, *shape]` from which the videos are made."""
        return sampler.initial_noise(seed, videos, shape)

    def schedule(self, steps: int) -> Schedule:
        """The sampler's coefficients for a number of steps.

        Raises:
          InputError: the scheduler cannot take so many, or the checkpoint's scales are of others.
        """
        return schedule_for(self.scheduler, steps, self.quantization)

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape `[F, h, w, C]` of one video's latents while it is sampled.

        Raises:
          InputError: as of `ComponentConfigs.latents_shape`.
        """
        return self.configs.latents_shape(frames, height, width)

    def decode(self, latents: Array | np.ndarray) -> np.ndarray:
        """Pixels of latents.

        In chunks of as many frames as a quarter of the memory holds, which changes nothing; with a
        temporal decoder as half of it holds, which is as `decode_chunk_size` in diffusers.

        Args:
          latents: `[B, F, h, w, C]`.

        Returns:
          uint8 `[B, F, H, W, 3]`.
        """
        videos, frames, *_ = latents.shape
        weights, temporal = self.params["vae"], self.vae.config.temporal_decoder
        size = self.decoded_together(latents.shape[1:])
        # A decoder that looks at neighboring frames has the whole chunk on each device.
        mesh, place = _mesh(weights), None
        if mesh is not None:
            divides = not temporal and size % mesh.size == 0
            spec = PartitionSpec(None, mesh.axis_names) if divides else PartitionSpec()
            place = NamedSharding(mesh, spec)
        decoded = []
        for video in np.asarray(latents):
            for start in range(0, frames, size):
                # The last chunk is moved back to be as long as the others: one compilation.
                first = min(start, frames - size)
                chunk = video[None, first : first + size]
                if place is not None:
                    chunk = jax.device_put(chunk, place)
                part = decode_frames(self.vae, weights, chunk, place)
                decoded.append(np.asarray(part[0, start - first :]))
        result = np.concatenate(decoded)
        return result.reshape(videos, frames, *result.shape[1:])

    def decoded_together(self, latents_shape: Sequence[int]) -> int:
        """How many frames of a video, whose latents are `[F, h, w, C]`, are decoded at once."""
        frames, *of_frame = latents_shape
        weights, temporal = self.params["vae"], self.vae.config.temporal_decoder
        one = jax.ShapeDtypeStruct((1, 1, *of_frame), jnp.float32)
        decode_one = functools.partial(decode_frames, self.vae)
        needed = memory.peak_bytes(decode_one, weights, one) - tree_bytes(weights)
        share = _TEMPORAL_DECODE_SHARE if temporal else _DECODE_SHARE
        together = int(share * memory.total_bytes() // needed)
        chunks = math.ceil(frames / max(1, together))
        return math.ceil(frames / chunks)

    def encode(self, images: np.ndarray | Array) -> tuple[Array, Array]:
        """Posterior of the latents of images.

        Args:
          images: `[N, H, W, 3]` in [-1, 1].

        Returns:
          Mean and log-variance, each `[N, h, w, C]`, not yet multiplied by the scaling factor.
        """
        return _encode(self.vae, self.params["vae"], jnp.asarray(images, jnp.float32))

    def wanted(self, **asked: Any) -> Defaults:
        """What a video is to be like: the defaults with what was asked for.

        Raises:
          InputError: a number is not finite.
        """
        want = replace(self.defaults, **{k: v for k, v in asked.items() if v is not None})
        for name in asked:
            if not math.isfinite(getattr(want, name)):
                raise InputError(f"{name} = {getattr(want, name)}: it must be finite")
        return want

    def _generate(
        self,
        inputs: Sequence[Any],
        conditions: Callable[[], Conditions],
        want: Defaults,
        seed: int,
        latents: Array | np.ndarray | None,
        output_type: OutputType,
        callback: StepCallback | None,
        indices: Sequence[int] | None,
    ) -> np.ndarray:
        """Checks what every pipeline takes, computes the conditions, samples and decodes."""
        count = len(inputs)
        shape = self.latents_shape(want.frames, want.height, want.width)
        schedule = self.schedule(want.steps)
        check_choice("output_type", output_type, ("video", "latents"))
        videos: Videos = count if indices is None else check_indices(indices, count)
        if latents is None:
            noise = self.initial_noise(seed, videos, shape)
        else:
            noise = jnp.asarray(latents, jnp.float32)
            if noise.shape != (count, *shape):
                raise InputError(
                    f"latents of shape {noise.shape}: {(count, *shape)} is needed for {count} "
                    f"videos of {want.frames} frames, {want.height}x{want.width}"
                )
        self._note_windows(shape[0], want)
        noise = noise * schedule.initial_scale
        whole = replace(want, frames=shape[0])
        computed = conditions()
        _check_finite(computed)
        keys = sampler.video_keys(seed, videos)
        sampled = np.asarray(self._sample(noise, schedule, computed, whole, keys, callback))
        sampled = sampled[:, : want.frames]
        return sampled if output_type == "latents" else self.decode(sampled)

    def sampler_config(
        self, want: VideoDefaults, schedule: Schedule, *, on_cpu: bool
    ) -> SamplerConfig:
        """What the loop over all steps is compiled for."""
        return SamplerConfig(
            count=len(schedule.table.timestep),
            window=self.window(want.frames),
            guided=want.guided,
            closed=self.closed_windows,
            # A batch saves no time on the CPU, and its rounding would depend on its size.
            one_by_one=on_cpu,
            noisy=bool(schedule.table.to_noise.any()),
            clip=schedule.clip,
        )

    def _note_windows(self, frames: int, want: Defaults) -> None:
        """Says of windows over a long video what shows where they meet."""
        window = self.window(want.frames)
        shared = sampler.window_overlap(window)
        if frames > window and shared < _SMOOTH_OVERLAP:
            _logger.warning(
                "%d frames run in windows of %d, of which neighbors share %s: the video may jump "
                "where they meet; up to %d frames run as one",
                frames,
                window,
                "one frame" if shared else "none",
                window,
            )

    def _sample(
        self,
        latents: Array,
        schedule: Schedule,
        conditions: Conditions,
        want: Defaults,
        keys: Array,
        callback: StepCallback | None,
    ) -> Array:
        unet, params = self.unet, self.params["unet"]
        table = jax.tree.map(jnp.asarray, schedule.table)
        steps = len(table.timestep)
        count = steps if callback is None else 1
        mesh = _mesh(params)
        # Placed as the loop leaves them, so that its second call does not compile anew.
        place = conditions.context.sharding
        if mesh is not None:
            divides = len(latents) % mesh.size == 0
            spec = PartitionSpec(mesh.axis_names) if divides else PartitionSpec()
            place = NamedSharding(mesh, spec)
        latents = jax.device_put(latents, place)
        state = sampler.initial_state(latents, table)
        gains = self.params.get(GAINS)
        prepared = sampler.prepare(unet, params, table.timestep, conditions, gains)
        config = self.sampler_config(want, schedule, on_cpu=jax.default_backend() == "cpu")
        config = replace(config, count=count, mesh=mesh)
        for start in range(0, steps, count):
            state, finite = sampler.sample_steps(
                unet,
                params,
                state,
                table,
                prepared,
                jnp.asarray(self.guidance(want)),
                keys,
                jnp.int32(start),
                config,
            )
            finite = np.asarray(finite)
            if not finite.all():
                step = start + int(np.argmin(finite))
                raise NotFiniteError(
                    f"step {step + 1} of {steps} (timestep {schedule.table.timestep[step]:g}) "
                    f"gave latents that are not finite; try float32, or a lower guidance scale "
                    f"than {want.guidance_scale:g}; calibration names the layer they come from"
                )
            if callback is not None:
                callback(start + count, state.latents)
        return state.latents


def schedule_for(
    scheduler: SchedulerConfig, steps: int, quantization: Quantization | None
) -> Schedule:
    """The sampler's coefficients for a number of steps.

    Raises:
      InputError: the scheduler cannot take so many, or the checkpoint's scales are of others.
    """
    schedule = make_schedule(scheduler, steps)
    known = quantization.timesteps if quantization else None
    if known is not None and not np.array_equal(known, schedule.table.timestep):
        raise InputError(
            f"{steps} steps of {scheduler.solver}: the checkpoint's scales are one for "
            f"each of {len(known)} other steps, of timesteps {known[0]:g} to {known[-1]:g}"
        )
    return schedule


def _check_finite(conditions: Conditions) -> None:
    """Raises `NotFiniteError`: int8 codes would hide it, and the latents stay finite."""
    for name, value in conditions._asdict().items():
        if value is not None and not bool(jnp.isfinite(value).all()):
            raise NotFiniteError(
                f"{name}: what the encoders gave the UNet is not finite; try float32, or convert "
                f"the checkpoint anew"
            )


def _mesh(params: Params) -> Mesh | None:
    """The devices that hold the parameters, for `jax.shard_map`; None where there is only one."""
    if jax.device_count() == 1:
        return None
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else Mesh(np.array(list(sharding.device_set)), ("data",))


def check_indices(indices: Sequence[int], count: int) -> Sequence[int]:
    """The indices of so many videos.

    Raises:
      InputError: there are more or fewer, or one is negative.
    """
    if len(indices) != count or min(indices, default=0) < 0:
        raise InputError(f"indices = {list(indices)}: {count} that are not negative are needed")
    return indices


@program(static=("vae",))
def _encode(vae: AutoencoderKL, params: Params, images: Array) -> tuple[Array, Array]:
    mean, log_variance = vae.apply({"params": params}, images[:, None], method="encode")
    return mean[:, 0], log_variance[:, 0]


@program(static=("vae", "place"))
def decode_frames(
    vae: AutoencoderKL,
    params: Params,
    latents: Array,
    place: NamedSharding | None = None,
) -> Array:
    """Pixels of latents, on each of several devices those of its part of them."""

    def decode(params: Params, latents: Array) -> Array:
        latents = latents / vae.config.scaling_factor
        return to_bytes(vae.apply({"params": params}, latents, method="decode"))

    if place is not None:
        decode = jax.shard_map(
            decode,
            mesh=place.mesh,
            in_specs=(PartitionSpec(), place.spec),
            out_specs=place.spec,
            check_vma=False,
        )
    return decode(params, latents)
