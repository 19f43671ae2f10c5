"""The sampling loop: one jit-compiled scan over the steps of a solver's table."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qvd_jax import meshes
from qvd_jax.axes import Array, Params, exportable
from qvd_jax.diffusion.solvers import StepTable, step
from qvd_jax.meshes import DATA, FRAME, GUIDANCE
from qvd_jax.programs import program


@exportable
class SamplerState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      latents: `[B, F, H, W, C]`, float32.
      history: the predicted samples of the last steps, of the same shape, the latest first.
    """

    latents: Array
    history: tuple[Array, ...]


def initial_state(latents: Array, table: StepTable) -> SamplerState:
    """The state before the first step of a table, whose history weighs nothing."""
    history = (jnp.zeros_like(latents) for _ in range(table.to_history.shape[-1]))
    return SamplerState(latents, tuple(history))


Videos = int | Sequence[int]
"""How many videos there are, or their indices among those of a larger run."""


def initial_noise(seed: int | Array, videos: Videos, shape: tuple[int, ...]) -> Array:
    """Unit-normal noise `[B, *shape]`; a video's depends on the seed and its index alone."""
    keys = video_keys(seed, videos)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def video_keys(seed: int | Array, videos: Videos) -> Array:
    """One random key for each video, `[B]`."""
    base = jax.random.key(seed)
    indices = jnp.arange(videos) if isinstance(videos, int) else jnp.asarray(videos, jnp.int32)
    return jax.vmap(lambda index: jax.random.fold_in(base, index))(indices)


def window_overlap(window: int) -> int:
    """How many frames neighboring windows of a length share; windows of one frame none."""
    return min(max(1, window // 4), window - 1)


def window_frames(frames: int, window: int, *, closed: bool = False) -> np.ndarray:
    """Frames of the windows that cover a video, `[N, window]`.

    Windows overlap by a quarter of their length, by one frame at least. The last one is moved
    back to end with the video or, closed, goes on with its beginning (MagicAnimate: Xu et al.,
    arXiv 2311.16498, section 3.4).
    """
    if frames <= window:
        return np.arange(frames)[None]
    stride = window - window_overlap(window)
    starts = (
        range(0, frames, stride)
        if closed
        else (*range(0, frames - window, stride), frames - window)
    )
    return (np.array(starts)[:, None] + np.arange(window)) % frames


@exportable
class Conditions(NamedTuple):
    """What a pipeline makes of its inputs for the UNet.

    With guidance the first B rows are the negatives', the other B the inputs' own.

    Attributes:
      context: text or image embedding, `[2B, L, C]`; `[B, L, C]` without guidance.
      image: latents behind the noisy ones' channels, the same for all frames, `[2B, 1, h, w, C]`
        or `[B, 1, h, w, C]`; None where the UNet takes none.
      added_ids: of `UNet3D.temporal_features`, `[1, added_ids]`; None where it takes none.
      control: of `UNet3D.control_features`, `[1, F, H, W, C]`; None without a ControlNet.
      reference: of `UNet3D.denoise`, `[B, 1, h, w, C]`; None without an appearance encoder.
      control_scale: factor of the ControlNet's residuals at each step, `[S]`; None is one.
    """

    context: Array
    image: Array | None = None
    added_ids: Array | None = None
    control: Array | None = None
    reference: Array | None = None
    control_scale: Array | None = None


def padded(conditions: Conditions, videos: int, parts: int) -> Conditions:
    """The conditions of as many videos as divide into parts, the last one's repeated."""

    def halves(leaf: Array) -> Array:
        apart = leaf.reshape(-1, videos, *leaf.shape[1:])
        return meshes.padded(apart, parts, axis=1).reshape(-1, *leaf.shape[1:])

    context, image = jax.tree.map(halves, (conditions.context, conditions.image))
    reference = meshes.padded(conditions.reference, parts)
    return conditions._replace(context=context, image=image, reference=reference)


@exportable
class Prepared(NamedTuple):
    """What the UNet needs of the conditions and the steps, computed once before the loop.

    Attributes:
      temporal: of `UNet3D.temporal_features` for all steps, `[S, C]` each.
      context: of `UNet3D.context_features`.
      image: of `Conditions`.
      control: of `UNet3D.control_features`, `[1, F, h, w, C]`; None without a ControlNet.
      reference: of `Conditions`.
      gains: the UNet's collection "quant" for all steps, `[S]` each; None where it has none.
      control_scale: of `Conditions`.
    """

    temporal: Any
    context: Any
    image: Array | None = None
    control: Array | None = None
    reference: Array | None = None
    gains: Any = None
    control_scale: Array | None = None


@program(static=("unet",))
def prepare(
    unet: nn.Module, params: Params, timesteps: Array, conditions: Conditions, gains: Any = None
) -> Prepared:
    """Computes all that does not depend on the latents.

    Args:
      unet: a `UNet3D`.
      params: its parameters.
      timesteps: of all steps, `[S]`.
      conditions: of all videos.
      gains: of a UNet with step-aware scales.
    """
    variables = {"params": params}
    control = conditions.control
    return Prepared(
        unet.apply(variables, timesteps, conditions.added_ids, method="temporal_features"),
        unet.apply(variables, conditions.context, method="context_features"),
        conditions.image,
        None if control is None else unet.apply(variables, control, method="control_features"),
        conditions.reference,
        gains,
        conditions.control_scale,
    )


def add_image(latents: Array, image: Array | None) -> Array:
    """The UNet's input: noisy latents `[B, F, h, w, C]`, and behind their channels an image's."""
    if image is None:
        return latents
    image = jnp.broadcast_to(image, (*latents.shape[:-1], image.shape[-1]))
    return jnp.concatenate([latents, image.astype(latents.dtype)], axis=-1)


@dataclass(frozen=True)
class SamplerConfig:
    """What a loop is compiled for.

    Attributes:
      count: how many steps to run.
      window: frames the UNet sees at once; longer videos run in overlapping windows, whose
        predictions are averaged.
      closed: whether the windows take the video for a loop.
      guided: whether negatives and inputs run as one batch and are combined.
      one_by_one: whether the UNet sees one video (with its negative) after the other, which
        makes a video's rounding independent of the batch, instead of all at once.
      noisy: whether the table takes fresh noise.
      clip: magnitude to which predicted samples are clipped.
      mesh: of a `MeshConfig`, among whose devices the work divides; None is the only device there
        is.
    """

    count: int
    window: int
    guided: bool
    closed: bool = False
    one_by_one: bool = False
    noisy: bool = False
    clip: float | None = None
    mesh: Mesh | None = None

    @property
    def halves(self) -> int:
        """Of guidance."""
        return 2 if self.guided else 1

    def parts(self, axis: str) -> int:
        """How many devices there are along an axis of the mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    @property
    def apart(self) -> bool:
        """Whether a video's predictions come from several devices."""
        return self.parts(GUIDANCE) * self.parts(FRAME) > 1


# The state is donated: the loop then needs no second copy of the latents.
@program(static=("unet", "config"), donated=("state",))
def sample_steps(
    unet: nn.Module,
    params: Params,
    state: SamplerState,
    table: StepTable,
    prepared: Prepared,
    guidance_scale: Array,
    keys: Array,
    start: Array,
    config: SamplerConfig,
) -> tuple[SamplerState, Array]:
    """Runs steps `start` to `start + config.count` of a schedule as one scan.

    Args:
      unet: a `UNet3D`.
      params: its parameters.
      state: latents and last predicted samples; donated.
      table: the whole schedule's, `[S]`.
      prepared: of `prepare`, for the whole schedule.
      guidance_scale: of classifier-free guidance (Ho and Salimans, arXiv 2207.12598), `[F]`.
      keys: one random key for each video, `[B]`.
      start: number of the first step to run.
      config: what the loop is like.

    Returns:
      The state after the last step, and whether each step's latents were finite, `[count]`.
    """
    context, image = jax.tree.map(
        lambda leaf: leaf.reshape(config.halves, -1, *leaf.shape[1:]),
        (prepared.context, prepared.image),
    )
    arguments = (
        params,
        state,
        table,
        prepared._replace(context=context, image=image),
        guidance_scale,
        keys,
        start,
    )
    if config.parts(FRAME) > 1:
        unet = unet.clone(layers=replace(unet.layers, frame_axis=FRAME))
    run = functools.partial(_scan, unet, config)
    if config.mesh is not None:
        # Every device has all frames of its videos' latents, which are few; those which share a
        # video take the same steps.
        shared, videos = PartitionSpec(), PartitionSpec(DATA)
        both = PartitionSpec(GUIDANCE, DATA)
        divided = Prepared._make((shared, both, both, shared, videos, shared, shared))
        run = jax.shard_map(
            run,
            mesh=config.mesh,
            in_specs=(shared, videos, shared, divided, shared, videos, shared),
            out_specs=(videos, PartitionSpec(None, DATA)),
            check_vma=False,
        )
    state, finite = run(*arguments)
    return state, finite.all(1)


def _scan(
    unet: nn.Module,
    config: SamplerConfig,
    params: Params,
    state: SamplerState,
    table: StepTable,
    prepared: Prepared,
    guidance_scale: Array,
    keys: Array,
    start: Array,
) -> tuple[SamplerState, Array]:
    """`sample_steps` of one device; context and image are `[2, B, ...]`, finite `[count, 1]`."""
    frames = window_frames(state.latents.shape[1], config.window, closed=config.closed)

    def predict(latents: Array, at_step: Prepared) -> Array:
        halves = config.halves // config.parts(GUIDANCE)
        context, image = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (at_step.context, at_step.image)
        )
        at_step = at_step._replace(context=context, image=image)
        seen = jnp.concatenate([latents] * halves) if halves > 1 else latents
        found = _predict_windows(unet, params, seen, at_step, frames, config)
        if not config.guided:
            return found
        negative, positive = jnp.split(found, 2)
        return negative + guidance_scale[None, :, None, None, None] * (positive - negative)

    def predict_one_by_one(latents: Array, at_step: Prepared) -> Array:
        def one(number: Array) -> Array:
            def pick(axis: int, tree: Any) -> Any:
                return jax.tree.map(
                    lambda leaf: lax.dynamic_slice_in_dim(leaf, number, 1, axis), tree
                )

            own = at_step._replace(
                context=pick(1, at_step.context),
                image=pick(1, at_step.image),
                reference=pick(0, at_step.reference),
            )
            return predict(pick(0, latents), own)[0]

        return lax.map(one, jnp.arange(len(latents)))

    def body(state: SamplerState, index: Array) -> tuple[SamplerState, Array]:
        row = jax.tree.map(lambda column: column[index], table)
        at_step = prepared._replace(
            temporal=jax.tree.map(lambda feature: feature[index][None], prepared.temporal),
            gains=jax.tree.map(lambda gain: gain[index], prepared.gains),
            control_scale=jax.tree.map(lambda scale: scale[index], prepared.control_scale),
        )
        prediction = (predict_one_by_one if config.one_by_one else predict)(
            row.model_in * state.latents, at_step
        )
        noise = _step_noise(keys, index, state.latents.shape[1:]) if config.noisy else 0.0
        new = step(state.latents, prediction, state.history, noise, row, config.clip)
        state = SamplerState(*new)
        return state, jnp.isfinite(state.latents).all()[None]

    return lax.scan(body, state, start + jnp.arange(config.count))


def _step_noise(keys: Array, index: Array, shape: tuple[int, ...]) -> Array:
    # Step i draws from stream i + 1 of the video's key; the key itself drew the first latents.
    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index + 1), shape, jnp.float32)

    return jax.vmap(draw)(keys)


def _predict_windows(
    unet: nn.Module,
    params: Params,
    latents: Array,
    prepared: Prepared,
    frames: np.ndarray,
    config: SamplerConfig,
) -> Array:
    """The UNet's prediction, averaged over the windows `[N, window]` that see each frame.

    The latents are those of this device's halves, what is returned is that of both.
    """
    temporal, context, image, control, reference, gains, control_scale = prepared
    variables = {"params": params} if gains is None else {"params": params, "quant": gains}

    def denoise(part: Array, control: Array | None) -> Array:
        part = add_image(part, image)
        weighed = {} if control_scale is None else {"control_scale": control_scale}
        return unet.apply(
            variables, part, temporal, context, control, reference, method="denoise", **weighed
        )

    if len(frames) == 1 and not config.apart:
        return denoise(latents, control)

    def add(total: Array, seen: Array) -> tuple[Array, None]:
        part, shown = jax.tree.map(lambda leaf: leaf[:, seen], (latents, control))
        return total.at[:, seen].add(denoise(part, shown)), None

    total, _ = lax.scan(add, jnp.zeros_like(latents), _own_frames(frames, config))
    if config.apart:
        total = _joined(total, config)
    views = np.bincount(frames.ravel()).astype(np.float32)
    return total / views[None, :, None, None, None]


def _own_frames(frames: np.ndarray, config: SamplerConfig) -> Array:
    """Of each window `[N, window]` the part of this device."""
    parts = config.parts(FRAME)
    if parts == 1:
        return jnp.asarray(frames)
    size = frames.shape[1] // parts
    return lax.dynamic_slice_in_dim(jnp.asarray(frames), lax.axis_index(FRAME) * size, size, 1)


def _joined(own: Array, config: SamplerConfig) -> Array:
    """Both halves, of which each device has one or both, with zeros for the frames of others."""
    if config.parts(GUIDANCE) > 1:
        nothing = jnp.zeros((config.halves, *own.shape), own.dtype)
        own = nothing.at[lax.axis_index(GUIDANCE)].set(own).reshape(-1, *own.shape[1:])
    return lax.psum(own, (GUIDANCE, FRAME))
