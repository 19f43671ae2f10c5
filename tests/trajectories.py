"""Schedulers of diffusers and our tables of them, side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from parity import relative_error

from convert import scheduler
from qvd_jax.diffusion import solvers
from qvd_jax.diffusion.schedules import SchedulerConfig

TOLERANCE = 1e-4
SHAPE = (2, 3, 4, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
ALGORITHMS = {
    "dpmsolver++": {"algorithm_type": "dpmsolver++"},
    "dpmsolver++-sde": {"algorithm_type": "sde-dpmsolver++"},
}
DRAWING = ("lcm", "euler_ancestral_discrete", "dpmsolver_multistep")


def published(solver: str, config: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The scheduler of diffusers that a solver is, of a config or of options alone."""
    cls = getattr(diffusers, scheduler.CLASSES[solver])
    options = {**ALGORITHMS.get(solver, {}), **options}
    return cls(**options) if config is None else cls.from_config(config, **options)


def saved(published: Any) -> dict[str, Any]:
    """The `scheduler_config.json` that diffusers would write."""
    return json.loads(published.to_json_string())


def fake_unet(latents: np.ndarray, timestep: float) -> np.ndarray:
    """Any nonlinear function of both arguments will do; it mixes channels too."""
    mixed = 0.8 * np.roll(latents, 1, axis=-1) + np.cos(0.004 * timestep)
    return (np.tanh(mixed) + 0.3 * latents).astype(np.float32)


def check_trajectory(
    published: Any,
    steps: int,
    config: SchedulerConfig | None = None,
    tolerance: float = TOLERANCE,
    rounding: float = 0.0,
) -> solvers.Schedule:
    """Walks diffusers' scheduler and our table of it with the same noise.

    Timesteps may differ by `rounding`; then both UNets are told ours.
    """
    published.set_timesteps(steps)
    if config is None:
        config = scheduler.read(saved(published), "file").config()
    schedule = solvers.make_schedule(config, steps)
    table, timesteps = schedule.table, published.timesteps.numpy()
    largest = max(1, np.abs(timesteps).max())
    allowed = max(rounding, 1e-5 * largest)
    np.testing.assert_allclose(table.timestep, timesteps, rtol=0, atol=allowed)
    scale = float(published.init_noise_sigma)
    np.testing.assert_allclose(schedule.initial_scale, scale, rtol=TOLERANCE)

    rng = np.random.default_rng(steps)
    start, *noise = rng.standard_normal((steps + 1, *SHAPE)).astype(np.float32)
    draws = map(torch.from_numpy, noise)
    theirs, ours = torch.from_numpy(start * np.float32(scale)), start * np.float32(scale)
    history: tuple[Any, ...] = (np.zeros_like(ours),) * table.to_history.shape[1]
    for i, timestep in enumerate(published.timesteps):
        scaled = published.scale_model_input(theirs, timestep).numpy()
        told = float(table.timestep[i] if rounding else timestep)
        prediction = torch.from_numpy(fake_unet(scaled, told))
        theirs = step(published, prediction, timestep, theirs, draws)
        row = solvers.StepTable(*(column[i] for column in table))
        prediction = fake_unet(row.model_in * np.asarray(ours), float(row.timestep))
        ours, history = solvers.step(ours, prediction, history, noise[i], row, schedule.clip)
        assert relative_error(ours, theirs) < tolerance, f"step {i + 1} of {steps}"
    return schedule


def step(
    published: Any, prediction: torch.Tensor, timestep: Any, latents: torch.Tensor, draws: Any
) -> torch.Tensor:
    """A step of diffusers' scheduler, which takes its noise from `draws`."""
    module = published.__class__.__module__
    if not module.endswith(DRAWING):
        return published.step(prediction, timestep, latents).prev_sample
    with mock.patch(f"{module}.randn_tensor", side_effect=lambda *_, **__: next(draws)):
        return published.step(prediction, timestep, latents).prev_sample


def of_old(solver: str, options: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The `scheduler_config.json` of diffusers that had only these keys."""
    config = saved(published(solver, **options))
    return {key: config[key] for key in config if key in keys or key == "_class_name"}
