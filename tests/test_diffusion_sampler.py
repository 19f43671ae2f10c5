"""The sampling loop against a plain Python loop over the UNet, and its windows and noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import relative_error

from qvd_jax.diffusion.sampler import (
    Conditions,
    SamplerConfig,
    initial_noise,
    initial_state,
    prepare,
    sample_steps,
    video_keys,
    window_frames,
)
from qvd_jax.diffusion.solvers import StepTable
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.unet3d import UNet3D

TOLERANCE = 1e-5
VIDEOS, STEPS, SEED = 2, 3, 5
FRAME = (2, 2, 4)
UNET = UNet3D(
    UNet3DConfig(
        block_channels=(8,),
        layers_per_block=1,
        attention_levels=(False,),
        num_heads=(2,),
        context_dim=6,
        norm_groups=4,
        down_eps=(1e-5,),
        up_eps=(1e-5,),
        temporal_heads=(2,),
        max_frames=8,
    )
)
predict = jax.jit(UNET.apply)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The networks here are tiny: compiling them is all that takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params() -> Any:
    """Random parameters, none of them left at the zero or one of an initializer."""
    inputs = (jnp.zeros((1, 1, *FRAME)), jnp.zeros(1), jnp.zeros((1, 1, 6)))
    shapes = jax.eval_shape(UNET.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.3 if len(leaf.shape) < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def table() -> StepTable:
    """A table in which every column matters."""
    columns = 0.5 + 0.5 * np.abs(normal(1, len(StepTable._fields), STEPS))
    history = 0.5 * normal(6, STEPS, 2)
    times = np.array([900.0, 501.5, 3.0], np.float32)
    return StepTable(*columns)._replace(timestep=times, to_history=history)


def sample(params: Any, table: StepTable, frames: int = 4, **options: Any) -> tuple[Any, Any]:
    """Calls `sample_steps`, by default guided and with everything it can do."""
    given = {"guided": True, "guidance_scale": 3.0, "seed": SEED, "window": 4, "clip": 0.7}
    given |= {
        "one_by_one": False,
        "noisy": True,
        "rows": slice(None),
        "state": None,
        "context": None,
    } | options
    state, context, rows = given["state"], given["context"], given["rows"]
    if state is None:
        latents = jnp.asarray(normal(2, VIDEOS, frames, *FRAME))
        state = initial_state(latents, table)
    if context is None:
        context = normal(3, 2 * VIDEOS if given["guided"] else VIDEOS, 5, 6)
    start, stop, _ = rows.indices(STEPS)
    return sample_steps(
        UNET,
        params,
        state,
        jax.tree.map(jnp.asarray, table),
        prepare(UNET, params, jnp.asarray(table.timestep), Conditions(jnp.asarray(context))),
        jnp.full(state.latents.shape[1], given["guidance_scale"], jnp.float32),
        video_keys(given["seed"], VIDEOS),
        jnp.int32(start),
        SamplerConfig(
            count=stop - start,
            **{key: given[key] for key in ("window", "guided", "one_by_one", "noisy", "clip")},
        ),
    )


def plain_loop(
    params: Any,
    table: StepTable,
    starts: tuple[int, ...],
    frames: int,
    *,
    guided: bool = True,
    noisy: bool = True,
    clip: float | None = 0.7,
) -> np.ndarray:
    """What `sample` computes, as one would write it down: the UNet sees one window at a time."""
    context = normal(3, 2 * VIDEOS if guided else VIDEOS, 5, 6)
    latents, last, before = normal(2, VIDEOS, frames, *FRAME), 0.0, 0.0
    for i in range(STEPS):
        row = StepTable(*(column[i] for column in table))
        scaled = row.model_in * np.concatenate([latents, latents] if guided else [latents])
        total, views = np.zeros_like(scaled), np.zeros(frames, np.float32)
        for start in starts:
            part = slice(start, start + 4)
            views[part] += 1
            for b in range(len(scaled)):
                inputs = (scaled[b : b + 1, part], row.timestep[None], context[b : b + 1])
                total[b, part] += predict({"params": params}, *inputs)[0]
        prediction = total / views[None, :, None, None, None]
        if guided:
            negative, positive = np.split(prediction, 2)
            prediction = negative + 3.0 * (positive - negative)
        predicted = row.x0_x * latents + row.x0_p * prediction
        if clip is not None:
            predicted = np.clip(predicted, -clip, clip)
        # More keys than videos: noise does not depend on how many videos there are.
        keys = [jax.random.fold_in(key, i + 1) for key in video_keys(SEED, 4)[:VIDEOS]]
        noise = np.stack([jax.random.normal(key, latents.shape[1:]) for key in keys])
        latents = (
            row.to_x * latents
            + row.to_d * predicted
            + row.to_history[0] * last
            + row.to_history[1] * before
            + row.to_p * prediction
            + (row.to_noise * noise if noisy else 0.0)
        )
        last, before = predicted, last
    return latents


@settings(deadline=None)
@given(frames=st.integers(1, 400), window=st.integers(1, 64))
def test_windows_overlap_cover_every_frame_and_end_with_the_video(frames, window):
    windows = window_frames(frames, window)
    assert windows.shape[1] == min(frames, window)
    assert (np.diff(windows) == 1).all()
    starts = windows[:, 0]
    assert starts[0] == 0
    assert starts[-1] == max(0, frames - window)
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    # Nothing overlaps windows of one frame; all others do by a quarter.
    assert (gaps <= max(1, window - window // 4)).all()
    if window > 1:
        assert (gaps < window).all()


@settings(deadline=None)
@given(frames=st.integers(1, 400), window=st.integers(1, 64))
def test_closed_windows_see_a_loop(frames, window):
    windows = window_frames(frames, window, closed=True)
    assert set(windows.ravel()) == set(range(frames))
    assert (np.diff(windows) % frames == 1 % frames).all()
    if frames > window:
        assert (np.diff(windows[:, 0]) == max(1, window - max(1, window // 4))).all()


def test_closed_windows_are_magic_animates():
    """The last of 32 frames' windows wraps to 7, of 48 frames' to 3."""
    assert window_frames(16, 16, closed=True).tolist() == [list(range(16))]
    windows = window_frames(32, 16, closed=True)
    assert windows[:, 0].tolist() == [0, 12, 24]
    assert windows[-1].tolist() == [*range(24, 32), *range(8)]
    windows = window_frames(48, 16, closed=True)
    assert windows[:, 0].tolist() == [0, 12, 24, 36]
    assert windows[-1].tolist() == [*range(36, 48), *range(4)]


def test_noise_of_a_video_depends_on_seed_and_index_alone():
    shape = (16, 8, 8, 4)
    noise = np.asarray(initial_noise(SEED, 3, shape))
    assert noise.shape == (3, *shape)
    np.testing.assert_array_equal(initial_noise(SEED, 1, shape), noise[:1])
    np.testing.assert_array_equal(initial_noise(SEED, [2, 0], shape), noise[[2, 0]])
    independent = np.stack([*noise, *initial_noise(SEED + 1, 3, shape)]).reshape(6, -1)
    np.testing.assert_allclose(np.cov(independent), np.eye(6), atol=0.08)
    np.testing.assert_allclose(independent.mean(axis=1), 0, atol=0.08)


@pytest.mark.parametrize("options", [{}, {"guided": False, "noisy": False, "clip": None}], ids=str)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_sampling_equals_a_plain_loop_over_the_unet(params, table, options, one_by_one):
    state, finite = sample(params, table, one_by_one=one_by_one, **options)
    assert finite.tolist() == [True] * STEPS
    expected = plain_loop(params, table, (0,), 4, **options)
    assert relative_error(state.latents, expected) < TOLERANCE


def test_windows_average_their_predictions_where_they_overlap(params, table):
    state, _ = sample(params, table, frames=9)
    expected = plain_loop(params, table, (0, 3, 5), 9)
    assert relative_error(state.latents, expected) < TOLERANCE


def test_one_scan_equals_scans_of_one_step_each(params, table):
    whole, _ = sample(params, table)
    state = None
    for i in range(STEPS):
        state, finite = sample(params, table, rows=slice(i, i + 1), state=state)
        assert finite.tolist() == [True]
    for found, expected in zip(state, whole, strict=True):
        assert relative_error(found, expected) < TOLERANCE


def test_prompts_seed_and_guidance_scale_change_the_video_without_compiling(params, table):
    before, _ = sample(params, table)
    compiled = len(sample_steps.known)
    for change in (
        {"context": normal(7, 2 * VIDEOS, 5, 6)},
        {"seed": SEED + 1},
        {"guidance_scale": 1.5},
    ):
        after, _ = sample(params, table, **change)
        assert relative_error(after.latents, before.latents) > 1e-3
    assert len(sample_steps.known) == compiled


def test_latents_that_are_not_finite_are_reported_by_step(params, table):
    broken = jax.tree.map(jnp.copy, params)
    broken["conv_in"]["kernel"] = broken["conv_in"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    _, finite = sample(broken, table)
    assert finite.tolist() == [False] * STEPS

    overflowing = table._replace(to_p=np.array([0.5, np.inf, 0.5], np.float32))
    _, finite = sample(params, overflowing)
    assert finite.tolist() == [True, False, False]
