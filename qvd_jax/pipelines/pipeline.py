"""What every pipeline does: checks, noise, the sampling loop, the VAE's decoder."""

import abc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import meshes
from qvd_jax.axes import Array, Params
from qvd_jax.config import check_choice, check_finite, check_integer, check_seed
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions, SamplerConfig, Videos
from qvd_jax.diffusion.schedules import (
    SchedulerConfig,
    Solver,
    TimestepSpacing,
    switch,
    walked_as,
)
from qvd_jax.diffusion.solvers import Schedule, make_schedule
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.meshes import DATA, MeshConfig, Work
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.models.vae import AutoencoderKL
from qvd_jax.pipelines import autoencoder
from qvd_jax.pipelines.components import GAINS, ComponentConfigs
from qvd_jax.quant.policy import Quantization

_logger = logging.getLogger(__name__)

OutputType = Literal["video", "latents"]
StepCallback = Callable[[int, Array], None]

# Frames that windows share, from which on neighbors blend into each other.
_SMOOTH_OVERLAP = 2


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

    def walking_as(self, scheduler: SchedulerConfig) -> Self:
        """The pipeline at another's steps, by its solver: see `schedules.walked_as`."""
        return replace(self, scheduler=walked_as(self.scheduler, scheduler))

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
        mesh: MeshConfig | None = None,
    ) -> np.ndarray:
        """Samples one video for each input.

        The work divides over the devices that hold the parameters, as `mesh` says or else as
        `meshes.Work.choose` chooses; where only one holds them, a mesh is of all there are.
        """

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

    @classmethod
    def window_of(cls, unet: UNet3DConfig, defaults: VideoDefaults, frames: int) -> int:
        """How many frames a UNet sees at once: all, or its default where these are too many."""
        limit = unet.max_frames
        return frames if limit is None or frames <= limit else min(defaults.frames, limit)

    def window(self, frames: int) -> int:
        """How many frames the UNet sees at once, as in `window_of`."""
        return self.window_of(self.unet.config, self.defaults, frames)

    def work(self, videos: int, want: VideoDefaults) -> Work:
        """What there is to divide of so many videos."""
        window = self.window(want.frames)
        return self.configs.work(videos, window, want.height, want.width, guided=want.guided)

    def initial_noise(self, seed: int | Array, videos: Videos, shape: tuple[int, ...]) -> Array:
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
        """Pixels, uint8 `[B, F, H, W, 3]`, of latents `[B, F, h, w, C]`: `autoencoder.decode`."""
        return autoencoder.decode(self.vae, self.params["vae"], latents)

    def encode(self, images: np.ndarray | Array) -> tuple[Array, Array]:
        """Posterior of the latents of images `[N, H, W, 3]` in [-1, 1]: `autoencoder.encode`."""
        return autoencoder.encode(self.vae, self.params["vae"], jnp.asarray(images, jnp.float32))

    def wanted(self, **asked: Any) -> Defaults:
        """What a video is to be like: the defaults with what was asked for.

        Raises:
          InputError: a number is not finite, or no integer where one is needed.
        """
        hints = get_type_hints(type(self.defaults))
        given = {name: value for name, value in asked.items() if value is not None}
        for name, value in given.items():
            if hints[name] is int:
                given[name] = check_integer(name, value)
            elif hints[name] is float:
                check_finite(name, value)
        return replace(self.defaults, **given)

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
        mesh: MeshConfig | None,
    ) -> np.ndarray:
        """Checks what every pipeline takes, computes the conditions, samples and decodes."""
        count = len(inputs)
        seed = check_seed(seed)
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
        divided = self._over(mesh, count, want)
        self._note_windows(shape[0], want)
        noise = noise * schedule.initial_scale
        whole = replace(want, frames=shape[0])
        computed = conditions()
        _check_finite(computed)
        keys = sampler.video_keys(seed, videos)
        sampled = self._sample(noise, schedule, computed, whole, keys, callback, divided)
        sampled = sampled[:, : want.frames]
        return sampled if output_type == "latents" else self.decode(sampled)

    def _over(self, asked: MeshConfig | None, videos: int, want: VideoDefaults) -> Mesh | None:
        """The mesh on which videos are sampled; None where there is only one device.

        Raises:
          InputError: the one that is asked for does not fit.
        """
        if not isinstance(asked, MeshConfig | None):
            raise InputError(
                f"mesh = {asked!r}: a MeshConfig is needed; qvd_jax.meshes.parse reads a text"
            )
        devices = meshes.devices_of(self.params)
        if asked is not None and len(devices) < asked.size:
            devices = jax.local_devices()
        config = self.work(videos, want).resolve(asked, len(devices))
        # Kernels are for `jax.shard_map`, on one of several devices too.
        return config.over(devices) if jax.device_count() > 1 else None

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
        mesh: Mesh | None,
    ) -> np.ndarray:
        unet, params, gains = self.unet, self.params["unet"], self.params.get(GAINS)
        table = jax.tree.map(jnp.asarray, schedule.table)
        steps, videos = len(table.timestep), len(latents)
        count = steps if callback is None else 1
        # Placed as the loop leaves them, so that its second call does not compile anew.
        place: Any = conditions.context.sharding
        if mesh is not None:
            place = NamedSharding(mesh, PartitionSpec(DATA))
            params, gains = meshes.replicate((params, gains), mesh)
            parts = mesh.shape[DATA]
            latents, keys = meshes.padded((latents, keys), parts)
            conditions = meshes.replicate(sampler.padded(conditions, videos, parts), mesh)
        latents = jax.device_put(latents, place)
        state = sampler.initial_state(latents, table)
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
            finite = meshes.to_host(finite)
            if not finite.all():
                step = start + int(np.argmin(finite))
                raise NotFiniteError(
                    f"step {step + 1} of {steps} (timestep {schedule.table.timestep[step]:g}) "
                    f"gave latents that are not finite; try float32, or a lower guidance scale "
                    f"than {want.guidance_scale:g}; calibration names the layer they come from"
                )
            if callback is not None:
                latents = state.latents
                callback(start + count, latents if len(latents) == videos else latents[:videos])
        return meshes.to_host(state.latents)[:videos]


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


def check_indices(indices: Sequence[int], count: int) -> Sequence[int]:
    """The indices of so many videos.

    Raises:
      InputError: there are more or fewer, or one is none of 0 to 2**31 - 1.
    """
    found = [check_integer(f"indices[{i}]", index) for i, index in enumerate(indices)]
    if len(found) != count or not all(0 <= index < 2**31 for index in found):
        raise InputError(f"indices = {found}: {count} of 0 to {2**31 - 1} are needed")
    return found
