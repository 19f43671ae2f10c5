"""What diffusers' `scheduler_config.json` say, key by key, and what other solvers make of it."""

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
from trajectories import BETAS, check_trajectory, published, saved

from convert import scheduler
from qvd_jax.config import from_dict, to_dict
from qvd_jax.diffusion import schedules, solvers
from qvd_jax.diffusion.schedules import ANIMATEDIFF, SOLVERS, SchedulerConfig
from qvd_jax.errors import InputError

OF_0_15 = {
    "_class_name",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "clip_sample",
    "set_alpha_to_one",
    "steps_offset",
    "interpolation_type",
    "solver_order",
    "algorithm_type",
    "solver_type",
    "lower_order_final",
    "thresholding",
    "sample_max_value",
    "predict_x0",
    "disable_corrector",
    "solver_p",
}
OF_0_21 = OF_0_15 | {
    "timestep_spacing",
    "use_karras_sigmas",
    "clip_sample_range",
    "lambda_min_clipped",
    "variance_type",
    "original_inference_steps",
    "timestep_scaling",
}
AGES = {"0.15": OF_0_15, "0.21": OF_0_21, "0.42": None}


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("source", SOLVERS)
def test_every_solver_takes_of_every_other_what_from_config_does(source, age):
    data = saved(published(source, **BETAS, beta_schedule="scaled_linear"))
    if AGES[age] is not None:
        # Like ModelScope's, which was a PNDM scheduler before.
        data = {key: data[key] for key in data if key in AGES[age]} | {"skip_prk_steps": True}
    found = scheduler.read(data, "file")
    assert (found.solver, found.problem, found.notes) == (source, None, ())
    # Through a checkpoint, whose manifest is JSON.
    text = json.dumps(to_dict(found.config()))
    config = from_dict(SchedulerConfig, json.loads(text), "manifest")
    theirs = getattr(diffusers, scheduler.CLASSES[source]).from_config(data)
    for solver in SOLVERS:
        check_trajectory(published(solver, theirs.config), 6, replace(config, solver=solver))


VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.001],
    "beta_end": [0.015],
    "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [[0.001 + 0.00001 * i for i in range(1000)]],
    "prediction_type": ["v_prediction", "sample", "flow_prediction"],
    "clip_sample": [True, False],
    "clip_sample_range": [0.5],
    "set_alpha_to_one": [False],
    "steps_offset": [1],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "rescale_betas_zero_snr": [True],
    "interpolation_type": ["log_linear"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "timestep_type": ["continuous"],
    "final_sigmas_type": ["sigma_min"],
    "solver_order": [1, 3, 4],
    "algorithm_type": ["dpmsolver", "sde-dpmsolver++"],
    "lower_order_final": [False],
    "euler_at_final": [True],
    "lambda_min_clipped": [-1.5],
    "variance_type": ["learned_range"],
    "predict_x0": [False],
    "disable_corrector": [[0]],
    "solver_p": [None],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["exponential"],
    "shift_terminal": [0.1],
    "original_inference_steps": [100],
    "timestep_scaling": [5.0],
}
"""Values of every key that are not its default, but for `solver_type`."""

SOLVER_TYPES = {"dpmsolver++": ["heun"], "dpmsolver++-sde": ["heun"], "unipc": ["bh1"]}

BESIDE: dict[str, dict[str, Any]] = {
    "clip_sample_range": {"clip_sample": True},
    "thresholding": {"clip_sample": False},
    "sample_max_value": {"thresholding": True},
    "dynamic_thresholding_ratio": {"thresholding": True},
    "rescale_betas_zero_snr": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "sigma_min": {"use_karras_sigmas": True},
    "sigma_max": {"use_karras_sigmas": True},
    "timestep_type": {"prediction_type": "v_prediction"},
    "steps_offset": {"timestep_spacing": "leading"},
    # To no noise at all diffusers divides by zero.
    "solver_type": {"final_sigmas_type": "sigma_min"},
    "lower_order_final": {"final_sigmas_type": "sigma_min"},
    "euler_at_final": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "shift_terminal": {"use_flow_sigmas": True},
    "flow_shift": {"use_flow_sigmas": True},
}
"""Options without which a key has no effect."""


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_key_of_every_class_is_obeyed_or_without_effect_or_named(solver):
    cls = getattr(diffusers, scheduler.CLASSES[solver])
    keys = set(inspect.signature(cls.__init__).parameters) - {"self"}
    without = {
        **scheduler.WITHOUT_EFFECT,
        **(scheduler.LCM_WITHOUT_EFFECT if solver == "lcm" else {}),
    }
    read = schedules.READS[solver]
    assert keys <= read | without.keys()
    # Of others only what is in the config of one that was switched to this one.
    assert read - keys <= {"sigma_min", "sigma_max", "timestep_type"}
    for key in sorted(keys):
        beside = {k: v for k, v in BESIDE.get(key, {}).items() if k in keys}
        for value in SOLVER_TYPES[solver] if key == "solver_type" else VALUES[key]:
            check_key(solver, key, beside, value, obeyed=key in read)


def check_key(solver: str, key: str, beside: dict[str, Any], value: Any, *, obeyed: bool) -> None:
    data = saved(published(solver, **BETAS)) | beside
    changed = data | {key: value}
    if (key, value) == ("prediction_type", "flow_prediction"):
        with pytest.raises(InputError, match=r"^file.prediction_type: unknown value 'flow_"):
            scheduler.read(changed, "file")
        return
    found = scheduler.read(changed, "file")
    if found.problem is not None:
        assert key in found.problem or "use_flow_sigmas" in found.problem
        return
    before = scheduler.read(data, "file").config()
    if found.solver == solver and value != data.get(key):
        one, other = (solvers.make_schedule(config, 6) for config in (before, found.config()))
        pairs = zip((*one.table, *one[1:]), (*other.table, *other[1:]), strict=True)
        assert obeyed != all(np.array_equal(a, b) for a, b in pairs), (solver, key)
    if (solver, key, value) == ("euler_a", "prediction_type", "sample"):
        return  # diffusers does not have it.
    theirs = getattr(diffusers, scheduler.CLASSES[solver]).from_config(changed)
    # Rounded down in float32, the highest level is told as 999 or as 998.
    floors = key in ("use_exponential_sigmas", "use_beta_sigmas") and solver != "euler"
    check_trajectory(theirs, 6, found.config(), rounding=1.0 if floors else 0.0)


def test_the_names_of_defaults_are_another_classes_to_choose():
    data = saved(published("euler")) | {"_use_default_values": ["timestep_spacing"]}
    assert scheduler.read(data, "file").config().timestep_spacing is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prediction_type", "flow_prediction", "^file.prediction_type: unknown value 'flow_"),
        ("beta_schedule", "sigmoid", "^file.beta_schedule: unknown value 'sigmoid'"),
        ("beta_end", "0.012", "^file.beta_end: float is needed, got '0.012'"),
        ("timestep_spacing", "even", "^file.timestep_spacing: unknown value 'even'"),
    ],
)
def test_values_that_diffusers_does_not_know_are_refused(key, value, message):
    with pytest.raises(InputError, match=message):
        scheduler.read({"_class_name": "DPMSolverMultistepScheduler", key: value}, "file")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler is not supported"),
        ({"_class_name": None}, "None is not supported"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver' is not supported"),
        ({"solver_order": 4}, "solver_order = 4 is not supported; it must be 1 or 2 or 3"),
        (
            {"thresholding": True, "sample_max_value": 2.0},
            "sample_max_value = 2.0 is not supported; it must be 1.0 where thresholding is on",
        ),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "only one of use_karras_sigmas and use_beta_sigmas can be on",
        ),
        ({"variance_type": "learned"}, "variance_type = 'learned' is not supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = True is not supported; it must be False"),
    ],
)
def test_what_is_not_supported_is_replaced_and_the_rest_is_kept(data, problem):
    given = {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.02, "steps_offset": 1}
    found = scheduler.read({**given, "rescale_betas_zero_snr": True, **data}, "file")
    assert found.problem == problem
    config, text = scheduler.replaced(found, ANIMATEDIFF)
    solvers.make_schedule(replace(config, prediction_type="v_prediction"), 4)
    assert (config.solver, config.beta_end, config.rescale_betas_zero_snr) == ("ddim", 0.02, True)
    kept = "beta_end = 0.02, rescale_betas_zero_snr = True"
    assert f"; keeps the folder's {kept}" in text


def test_keys_that_nothing_reads_are_named():
    data = {"_class_name": "DDIMScheduler", "betas": [1], "skip_prk_steps": True, "_private": 1}
    assert scheduler.read(data, "file").notes == (
        "file: betas = [1] is no key of a scheduler; left out",
    )


def test_null_is_false_where_diffusers_asks_whether_it_is_true():
    nulls = {"use_karras_sigmas": None, "clip_sample": None, "sigma_min": None, "solver_type": None}
    config = scheduler.read({"_class_name": "DDIMScheduler", **nulls}, "file").config()
    assert (config.use_karras_sigmas, config.clip_sample) == (False, False)
    assert config.sigma_min is config.solver_type is None


def test_old_networks_of_samples_say_so_otherwise():
    data = {"_class_name": "DDIMScheduler", "predict_epsilon": False}
    assert scheduler.read(data, "file").config().prediction_type == "sample"
