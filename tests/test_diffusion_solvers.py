"""Schedules and solvers against diffusers' own schedulers, over whole trajectories."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error

from qvd_jax.diffusion import schedules, solvers
from qvd_jax.diffusion.schedules import ANIMATEDIFF, SchedulerConfig, from_diffusers
from qvd_jax.errors import InputError

TOLERANCE = 1e-4
STEPS = (1, 2, 5, 25)
SHAPE = (2, 3, 4, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
AXES = [
    pytest.param(
        {"beta_schedule": betas, "timestep_spacing": spacing, "prediction_type": prediction},
        id=f"{betas}-{spacing}-{prediction}",
    )
    for betas, spacing, prediction in itertools.product(
        ("linear", "scaled_linear"),
        ("leading", "linspace", "trailing"),
        ("epsilon", "v_prediction"),
    )
]

advance = jax.jit(solvers.step, static_argnames="clip")


def product(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of some options."""
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def name(options: dict[str, Any]) -> str:
    """A test id."""
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


def saved(scheduler: Any) -> dict[str, Any]:
    """The `scheduler_config.json` that diffusers would write."""
    return json.loads(scheduler.to_json_string())


def fake_unet(latents: np.ndarray, timestep: float) -> np.ndarray:
    """Any nonlinear function of both arguments will do; it mixes channels too."""
    mixed = 0.8 * np.roll(latents, 1, axis=-1) + np.cos(0.004 * timestep)
    return (np.tanh(mixed) + 0.3 * latents).astype(np.float32)


def check_trajectory(
    scheduler: Any,
    steps: int,
    noise: Sequence[np.ndarray] | None = None,
    tolerance: float = TOLERANCE,
) -> solvers.Schedule:
    """Walks diffusers' scheduler and our table of it side by side."""
    scheduler.set_timesteps(steps)
    schedule = solvers.make_schedule(from_diffusers(saved(scheduler), "file"), steps)
    table, timesteps = schedule.table, scheduler.timesteps.numpy()
    scale = float(scheduler.init_noise_sigma)
    largest = max(1, np.abs(timesteps).max())
    np.testing.assert_allclose(table.timestep, timesteps, rtol=0, atol=1e-5 * largest)
    assert schedule.initial_scale == pytest.approx(scale, rel=TOLERANCE)

    start = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
    theirs = torch.from_numpy(start * np.float32(scale))
    ours = jnp.asarray(start * np.float32(schedule.initial_scale))
    last = jnp.zeros_like(ours)
    for i, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(theirs, timestep).numpy()
        prediction = torch.from_numpy(fake_unet(scaled, float(timestep)))
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        row = jax.tree.map(lambda column, i=i: column[i], table)
        prediction = fake_unet(row.model_in * np.asarray(ours), float(row.timestep))
        fresh = 0.0 if noise is None else noise[i]
        ours, last = advance(ours, prediction, last, fresh, row, schedule.clip)
        assert relative_error(ours, theirs) < tolerance, f"step {i + 1} of {steps}"
    return schedule


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    "options",
    product(set_alpha_to_one=(True, False), clip_sample=(True, False), steps_offset=(1,)),
    ids=name,
)
def test_ddim_follows_diffusers(axes, options):
    for steps in STEPS:
        check_trajectory(diffusers.DDIMScheduler(**BETAS, **axes, **options), steps)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    "options",
    product(use_karras_sigmas=(True, False), final_sigmas_type=("zero", "sigma_min")),
    ids=name,
)
def test_euler_follows_diffusers(axes, options):
    for steps in STEPS:
        check_trajectory(diffusers.EulerDiscreteScheduler(**BETAS, **axes, **options), steps)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    "options",
    [
        *product(use_karras_sigmas=(True, False), solver_type=("midpoint", "heun")),
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "solver_type": "heun", "steps_offset": 1},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"solver_order": 1},
    ],
    ids=name,
)
def test_dpmsolver_follows_diffusers(axes, options):
    # Fewer than 15 steps may end otherwise than more.
    for steps in (*STEPS, 14, 15):
        check_trajectory(diffusers.DPMSolverMultistepScheduler(**BETAS, **axes, **options), steps)


@pytest.mark.parametrize(
    "options",
    product(
        beta_schedule=("linear", "scaled_linear"),
        prediction_type=("epsilon", "v_prediction"),
        clip_sample=(True, False),
    ),
    ids=name,
)
def test_lcm_follows_diffusers_given_its_noise(options, monkeypatch):
    for steps in (*STEPS, 7, 50):
        noise = np.random.default_rng(0).standard_normal((steps, *SHAPE)).astype(np.float32)
        draws = map(torch.from_numpy, noise)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_lcm.randn_tensor",
            lambda *_, draws=draws, **__: next(draws),
        )
        schedule = check_trajectory(diffusers.LCMScheduler(**options), steps, noise)
        # The last step draws none, there or here.
        assert schedule.table.to_noise[-1] == 0
        assert len(list(draws)) == 1


@pytest.mark.parametrize("steps", STEPS)
def test_euler_follows_diffusers_in_continuous_time(steps):
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    # From 700 to 0.002 in one step, diffusers is off by 1.7e-4: it subtracts in float32.
    schedule = check_trajectory(scheduler, steps, tolerance=5e-4 if steps == 2 else TOLERANCE)
    assert schedule.initial_scale == pytest.approx(np.sqrt(700**2 + 1))
    assert schedule.table.timestep[0] == pytest.approx(np.log(700) / 4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_a_heun_step_onto_the_same_noise_level_is_finite(schedule):
    # The lowest Karras level is where "sigma_min" ends: diffusers divides zero by zero.
    config = SchedulerConfig(
        solver="dpmsolver++",
        beta_schedule=schedule,
        use_karras_sigmas=True,
        final_sigmas_type="sigma_min",
        solver_type="heun",
    )
    for column in solvers.make_schedule(config, 25).table:
        assert np.isfinite(column).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", (0.99914998, 0.99828953, 0.16181217, 0.16077162, 0.00159814, 0.00157896)),
        ("scaled_linear", (0.99914998, 0.99829602, 0.27766943, 0.27633247, 0.0047167, 0.0046601)),
    ],
)
def test_alphas_are_the_published_ones(schedule, expected):
    alphas = schedules.alphas_cumprod(SchedulerConfig(beta_schedule=schedule))
    assert alphas.shape == (1000,)
    np.testing.assert_allclose(alphas[[0, 1, 499, 500, 998, 999]], expected, rtol=1e-6, atol=5e-9)


def test_timesteps_and_noise_levels_are_the_published_ones():
    table = solvers.make_schedule(ANIMATEDIFF, 25).table
    np.testing.assert_array_equal(table.timestep, np.arange(961, 0, -40))

    table = solvers.make_schedule(schedules.ANIMATELCM, 6).table
    np.testing.assert_array_equal(table.timestep, [999, 839, 679, 499, 339, 179])

    schedule = solvers.make_schedule(schedules.LIGHTNING, 4)
    np.testing.assert_array_equal(schedule.table.timestep, [999, 749, 499, 249])
    sigmas = np.sqrt(1 / schedule.table.model_in.astype(np.float64) ** 2 - 1)
    np.testing.assert_allclose(sigmas, [25.1461, 6.5572, 2.276, 0.867], rtol=1e-4)
    assert schedule.initial_scale == pytest.approx(25.1461, rel=1e-5)


@pytest.mark.parametrize("scheduler", schedules.SOLVERS)
def test_missing_keys_mean_the_defaults_of_diffusers(scheduler):
    full = saved(getattr(diffusers, scheduler)())
    # Keys of other classes change nothing, nor does the null of older files.
    sparse = {"_class_name": scheduler, "skip_prk_steps": True, "use_karras_sigmas": None}
    assert from_diffusers(sparse, "file") == from_diffusers(full, "file")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "DDIMSheduler", "^file: unknown .*; did you mean 'DDIMScheduler'\\?"),
        ("_class_name", "PNDM", "^file: unknown scheduler 'PNDM'; known: DDIMScheduler, Euler"),
        ("_class_name", None, "^file: unknown scheduler None"),
        ("_class_name", ["DDIMScheduler"], "^file: unknown scheduler"),
        ("thresholding", True, "^file: thresholding = True is not supported; it must be False"),
        ("algorithm_type", "sde-dpmsolver++", "^file: algorithm_type = 'sde-.*' is not supported"),
        ("lambda_min_clipped", -2.0, "^file: lambda_min_clipped = -2.0 is not supported"),
        ("solver_order", 3, "^file: solver_order = 3 is not supported; it must be 1 or 2"),
        ("prediction_type", "sample", "^file.prediction_type: unknown value 'sample'"),
        ("beta_schedule", "squaredcos_cap_v2", "^file.beta_schedule: unknown value 'squaredcos"),
        ("beta_end", "0.012", "^file.beta_end: float is needed, got '0.012'"),
    ],
)
def test_schedulers_that_are_not_understood_are_refused(key, value, message):
    data = {"_class_name": "DPMSolverMultistepScheduler", key: value}
    with pytest.raises(InputError, match=message):
        from_diffusers(data, "file")


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"solver": "ddim", "steps_offset": 0}, 1000),
        ({"solver": "euler", "timestep_spacing": "trailing"}, 1000),
        ({"solver": "dpmsolver++", "timestep_spacing": "trailing"}, 1000),
        ({"solver": "dpmsolver++", "steps_offset": 0}, 999),
        ({"solver": "lcm", "original_inference_steps": 20}, 20),
    ],
    ids=str,
)
def test_every_number_of_steps_gives_a_finite_table_or_a_message(options, limit):
    config = SchedulerConfig(**options)
    for steps in (1, limit):
        for column in solvers.make_schedule(config, steps).table:
            assert column.shape == (steps,)
            assert np.isfinite(column).all()
    for steps in (-1, 0, limit + 1):
        with pytest.raises(InputError, match=f"^steps = {steps}: .* takes 1 to {limit} steps"):
            solvers.make_schedule(config, steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # Timestep 1000 of 0 to 999.
        ({"solver": "ddim", "steps_offset": 1}, 1000),
        ({"solver": "dpmsolver++", "steps_offset": 1}, 999),
        # 1001 points on 1000 timesteps: a step of no length.
        ({"solver": "dpmsolver++", "timestep_spacing": "linspace"}, 1000),
        # Fewer timesteps than steps of the distillation.
        ({"solver": "lcm", "original_inference_steps": 2000}, 4),
    ],
    ids=str,
)
def test_schedules_that_run_out_of_timesteps_are_refused(options, steps):
    with pytest.raises(InputError, match="steps"):
        solvers.make_schedule(SchedulerConfig(**options), steps)
