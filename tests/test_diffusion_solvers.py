"""Schedules and solvers against diffusers' own schedulers, over whole trajectories."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from parity import relative_error
from trajectories import BETAS, SHAPE, check_trajectory, fake_unet, published

from convert import scheduler
from qvd_jax.diffusion import schedules, solvers
from qvd_jax.diffusion.schedules import ANIMATEDIFF, SOLVERS, SchedulerConfig, switch
from qvd_jax.errors import InputError

STEPS = (1, 2, 5, 25)
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


def product(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of some options."""
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def name(options: dict[str, Any]) -> str:
    """A test id."""
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


OPTIONS = {
    "ddim": product(set_alpha_to_one=(True, False), clip_sample=(True, False), steps_offset=(1,)),
    "euler": product(use_karras_sigmas=(True, False), final_sigmas_type=("zero", "sigma_min")),
    "euler_a": [{}, {"steps_offset": 1}],
    "dpmsolver++": [
        *product(use_karras_sigmas=(True, False), solver_type=("midpoint", "heun")),
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "solver_type": "heun", "steps_offset": 1},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ],
    "dpmsolver++-sde": [
        *product(use_karras_sigmas=(True, False), solver_type=("midpoint", "heun")),
        {"solver_order": 1, "final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
    ],
    "unipc": [
        *product(use_karras_sigmas=(True, False)),
        # To a level of zero diffusers divides by zero with "bh1".
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 2]},
    ],
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("solver", OPTIONS)
def test_solvers_follow_diffusers(solver, axes):
    for options in OPTIONS[solver]:
        # Fewer than 15 steps may end otherwise than more.
        for steps in (1, 2, 14, 15):
            check_trajectory(published(solver, **BETAS, **axes, **options), steps)


@pytest.mark.parametrize(
    "options",
    product(
        beta_schedule=("linear", "scaled_linear"),
        prediction_type=("epsilon", "v_prediction", "sample"),
        clip_sample=(True, False),
    ),
    ids=name,
)
def test_lcm_follows_diffusers_given_its_noise(options):
    for steps in (*STEPS, 7, 50):
        schedule = check_trajectory(published("lcm", **options), steps)
        # The last step draws none.
        assert schedule.table.to_noise[-1] == 0


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr_follows_diffusers(solver, prediction):
    if (solver, prediction) == ("euler_a", "sample"):
        pytest.skip("diffusers does not have it")
    options = {"prediction_type": prediction, "rescale_betas_zero_snr": True, **BETAS}
    if solver != "lcm":
        options["timestep_spacing"] = "trailing"
    for steps in STEPS:
        # From a sigma of 4096 to 0 in few steps, Euler in float32 loses as much.
        tolerance = 5e-4 if solver.startswith("euler") and steps < 5 else 1e-4
        schedule = check_trajectory(published(solver, **options), steps, tolerance=tolerance)
        assert schedule.table.timestep[0] == 999


@pytest.mark.parametrize("solver", ["ddim", "lcm"])
def test_epsilon_cannot_be_predicted_from_noise_alone(solver):
    config = SchedulerConfig(solver, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match=r"from timestep 999: its latents are noise alone, from"):
        solvers.make_schedule(config, 4)


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc", "euler"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
        {"use_lu_lambdas": True},
    ],
    ids=name,
)
def test_noise_levels_follow_diffusers(solver, options):
    # DPM-Solver++ has `sigma_min` from the configs of others, Euler no `use_lu_lambdas`.
    theirs = published(solver, {**BETAS, "_class_name": "EulerDiscreteScheduler", **options})
    # Rounded down in float32, the highest level is told as 999 or as 998.
    floors = solver != "euler" and "use_lu_lambdas" not in options
    check_trajectory(theirs, 8, rounding=1.0 if floors else 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_cosine_and_trained_betas_follow_diffusers(solver):
    trained = np.linspace(0.001, 0.01, 1000).tolist()
    for options in ({"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": trained}):
        check_trajectory(published(solver, **options), 8)


def test_trained_betas_of_another_number_are_refused():
    config = SchedulerConfig(trained_betas=(0.1, 0.2))
    with pytest.raises(InputError, match=r"trained_betas: 1000 are needed, .* got 2"):
        solvers.make_schedule(config, 2)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_steps_stop_at_the_lowest_log_snr(spacing):
    theirs = published("dpmsolver++", **BETAS, lambda_min_clipped=-1.5, timestep_spacing=spacing)
    assert check_trajectory(theirs, 8).table.timestep[0] < 900


def test_euler_follows_diffusers_in_continuous_time():
    theirs = published("euler", **CONTINUOUS, timestep_spacing="leading", steps_offset=1)
    for steps in STEPS:
        # From 700 to 0.002 in one step, diffusers is off by 1.7e-4: it subtracts in float32.
        schedule = check_trajectory(theirs, steps, tolerance=5e-4 if steps == 2 else 1e-4)
        assert schedule.initial_scale == pytest.approx(np.sqrt(700**2 + 1))
        assert schedule.table.timestep[0] == pytest.approx(np.log(700) / 4)


CONTINUOUS = {
    **BETAS,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_type": "continuous",
}


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpmsolver_in_continuous_time_is_that_of_edm(steps):
    """In EDM's terms, with its latents of variance 1 + sigma^2 where ours have 1."""
    theirs = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction"
    )
    theirs.set_timesteps(steps)
    config = switch(schedules.STABLE_VIDEO_DIFFUSION, "dpmsolver++")
    table = solvers.make_schedule(config, steps).table
    np.testing.assert_allclose(table.timestep, theirs.timesteps, rtol=1e-5, atol=1e-6)
    ours = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    sigmas = theirs.sigmas.numpy()
    latents = torch.from_numpy(ours * np.sqrt(sigmas[0] ** 2 + 1))
    history = (np.zeros_like(ours),)
    for i, timestep in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(latents, timestep).numpy()
        prediction = torch.from_numpy(fake_unet(scaled, float(timestep)))
        latents = theirs.step(prediction, timestep, latents).prev_sample
        row = solvers.StepTable(*(column[i] for column in table))
        ours, history = solvers.step(
            ours, fake_unet(ours, float(row.timestep)), history, 0.0, row, None
        )
        expected = latents.numpy() / np.sqrt(sigmas[i + 1] ** 2 + 1)
        assert relative_error(ours, expected) < 1e-4, f"step {i + 1} of {steps}"


@pytest.mark.parametrize("solver", ["ddim", "euler_a", "lcm"])
def test_solvers_that_walk_timesteps_are_refused_in_continuous_time(solver):
    config = switch(schedules.STABLE_VIDEO_DIFFUSION, solver)
    fit = r"euler, dpmsolver\+\+, dpmsolver\+\+-sde, unipc fit it"
    with pytest.raises(InputError, match=f"^scheduler: {solver} walks timesteps, .*; {fit}$"):
        solvers.make_schedule(config, 4)


@pytest.mark.parametrize(
    ("solver", "asked", "message"),
    [
        ("ddim", {"karras": True}, r"^ddim has no Karras noise levels; euler, dpmsolver\+\+, "),
        ("euler_a", {"karras": True}, "^euler_a has no Karras noise levels"),
        ("eulr", {}, "^solver = 'eulr': it must be one of ddim, euler"),
        ("", {}, "^solver = '': it must be one of ddim, euler"),
        (
            "euler",
            {"timestep_spacing": "even"},
            "^timestep_spacing = 'even': it must be one of lea",
        ),
        ("lcm", {"timestep_spacing": "trailing"}, "^lcm visits the timesteps of its distillation"),
    ],
)
def test_options_that_a_solver_lacks_are_named(solver, asked, message):
    with pytest.raises(InputError, match=message):
        switch(ANIMATEDIFF, solver, **asked)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("karras", [None, True, False])
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
def test_options_of_the_command_follow_diffusers(solver, karras, spacing):
    if (karras and solver in ("ddim", "euler_a", "lcm")) or (spacing and solver == "lcm"):
        pytest.skip("refused")
    given = {"_class_name": "DDIMScheduler", **BETAS, "clip_sample": False, "steps_offset": 1}
    options = {
        **({"use_karras_sigmas": karras} if karras is not None else {}),
        **({"timestep_spacing": spacing} if spacing else {}),
    }
    config = scheduler.read(given, "file").config()
    asked = switch(config, solver, karras=karras, timestep_spacing=spacing)
    check_trajectory(published(solver, given, **options), 6, asked)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("solver", ["dpmsolver++", "dpmsolver++-sde", "unipc"])
def test_a_step_onto_the_same_noise_level_is_finite(solver, schedule):
    # The lowest Karras level is where "sigma_min" ends: diffusers divides zero by zero.
    config = SchedulerConfig(
        solver=solver,
        beta_schedule=schedule,
        use_karras_sigmas=True,
        final_sigmas_type="sigma_min",
        solver_type="heun",
        lower_order_final=False,
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
            assert len(column) == steps
            assert np.isfinite(column).all()
    for steps in (-1, 0, limit + 1):
        with pytest.raises(InputError, match=f"^steps = {steps}: .* takes 1 to {limit} steps"):
            solvers.make_schedule(config, steps)


def test_the_sde_ends_on_the_lowest_noise_level_and_on_none_above_it():
    config = SchedulerConfig(
        solver="dpmsolver++-sde",
        beta_schedule="squaredcos_cap_v2",
        use_karras_sigmas=True,
        final_sigmas_type="sigma_min",
    )
    for steps in range(1, 51):
        table = solvers.make_schedule(config, steps).table
        assert all(np.isfinite(column).all() for column in table)
    with pytest.raises(InputError, match="cannot end on more noise than it has: final_sigmas_type"):
        solvers.make_schedule(replace(config, sigma_min=0.002), 25)


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
