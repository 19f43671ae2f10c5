"""Schedulers of diffusers: what their configs say, and what becomes of the unsupported ones."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from qvd_jax.config import from_dict, to_dict
from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig, Solver

CLASSES: dict[Solver, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver++-sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
"""The classes of diffusers that the solvers are."""

_ALGORITHMS: dict[str, Solver] = {
    "dpmsolver++": "dpmsolver++",
    "sde-dpmsolver++": "dpmsolver++-sde",
    # What `from_config` makes of DEISMultistepScheduler's.
    "deis": "dpmsolver++",
}

WITHOUT_EFFECT = {
    "algorithm_type": "the solver's name says it",
    "dynamic_thresholding_ratio": "where sample_max_value is 1, the threshold is 1 at any ratio",
    "flow_shift": "of use_flow_sigmas, which is not supported",
    "shift_terminal": "of use_flow_sigmas, which is not supported",
    "time_shift_type": "of use_dynamic_shifting, which is not supported",
    "solver_p": "an object, which no JSON holds",
    "skip_prk_steps": "of PNDMScheduler alone",
    "sigma_data": "of EDMEulerScheduler alone",
    "sigma_schedule": "of EDMEulerScheduler alone",
    "rho": "of EDMEulerScheduler alone",
    "noise_sampler_seed": "of DPMSolverSDEScheduler alone",
    "tensor_format": "of diffusers before 0.3, which had numpy's schedulers too",
    "predict_epsilon": "of diffusers before 0.11: read as prediction_type",
}
"""Keys of diffusers' schedulers that change nothing in any solver here, with the reason."""

LCM_WITHOUT_EFFECT = {
    "timestep_spacing": "its timesteps are those of the distillation",
    "steps_offset": "its timesteps are those of the distillation",
    "set_alpha_to_one": "its last step ends without noise, not at an alpha",
}
"""Keys that `LCMScheduler` has and does not read."""

_OF_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")

REPLACED_BY_MOTION = (*_OF_BETAS, "set_alpha_to_one")
"""What motion modules were trained and published with, whatever Stable Diffusion has."""

KEPT_BY_PRESET = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
"""What the UNet was trained for, whatever the motion modules were distilled to."""


class Found(NamedTuple):
    """A scheduler's config.

    Attributes:
      given: those fields of a `SchedulerConfig` that it says, without the solver.
      solver: None where there is none like it.
      problem: why the class, or what is asked of it, is not supported; None where it is.
      notes: what else it says, and nothing reads.
    """

    given: dict[str, Any]
    solver: Solver | None
    problem: str | None
    notes: tuple[str, ...]

    def config(self) -> SchedulerConfig:
        """The config, of a supported scheduler."""
        assert self.solver is not None
        return replace(SchedulerConfig(**schedules.ABSENT), **self.given, solver=self.solver)


def read(data: Mapping[str, Any], where: str) -> Found:
    """Reads diffusers' `scheduler_config.json`, as `from_config` of its classes does.

    A key that is absent stays so, for its default is another solver's to choose.

    Args:
      data: the parsed JSON.
      where: how messages name the file.

    Raises:
      InputError: a value is of another type, or none that diffusers knows.
    """
    # Values that were defaults when diffusers wrote them are no more the next class's.
    left = {"_use_default_values", *data.get("_use_default_values", ())}
    data = {key: value for key, value in data.items() if key not in left}
    known = {field.name: field for field in fields(SchedulerConfig) if field.name != "solver"}
    given = {key: _value(key, value) for key, value in data.items() if key in known}
    if data.get("predict_epsilon") is False:
        given.setdefault("prediction_type", "sample")
    given = {key: value for key, value in given.items() if value is not None}
    typed = from_dict(SchedulerConfig, given, where)
    given = {key: getattr(typed, key) for key in given}
    notes = tuple(
        f"{where}: {key} = {value!r} is no key of a scheduler; left out"
        for key, value in data.items()
        if key not in known and key not in WITHOUT_EFFECT and not key.startswith("_")
    )
    solver, problem = _solver(data)
    found = Found(given, solver, problem, notes)
    if solver is not None and (unsupported := schedules.unsupported(found.config())):
        found = found._replace(problem="; ".join(unsupported.values()))
    return found


def _value(key: str, value: Any) -> Any:
    """A value as a `SchedulerConfig` has it."""
    if value is None and isinstance(SchedulerConfig.__dataclass_fields__[key].default, bool):
        # What diffusers asks is whether it is true.
        return False
    if key == "lambda_min_clipped" and value == float("-inf"):
        return None
    return "sample" if value == "original_sample" else value


def _solver(data: Mapping[str, Any]) -> tuple[Solver | None, str | None]:
    """The solver of a config, or what is wrong with it."""
    name = data.get("_class_name")
    if name == CLASSES["dpmsolver++"]:
        algorithm = data.get("algorithm_type", "dpmsolver++")
        if algorithm not in _ALGORITHMS:
            return None, f"algorithm_type = {algorithm!r} is not supported"
        return _ALGORITHMS[algorithm], None
    for solver, known in CLASSES.items():
        if name == known:
            return solver, None
    return None, f"{name} is not supported"


def to_json(config: SchedulerConfig) -> dict[str, Any]:
    """The `scheduler_config.json` that `read` makes the config of: what a source would say."""
    absent = SchedulerConfig(**schedules.ABSENT, solver=config.solver)
    said = {
        key: value
        for key, value in to_dict(config).items()
        if key != "solver" and value is not None and getattr(config, key) != getattr(absent, key)
    }
    algorithms = {solver: name for name, solver in reversed(_ALGORITHMS.items())}
    name = CLASSES[config.solver]
    if config.solver in algorithms:
        said["algorithm_type"] = algorithms[config.solver]
    return {"_class_name": name, **said}


def replaced(
    found: Found, target: SchedulerConfig, kept: tuple[str, ...] | None = None
) -> tuple[SchedulerConfig, str]:
    """Another scheduler in place of a source's, and what became of the source's fields.

    Args:
      found: the source's.
      target: the one that takes its place.
      kept: the fields of the source that stay; None are all.

    Returns:
      The scheduler, and a text of what was kept and what was not, empty if it was the same.
    """
    stay = {key: found.given[key] for key in found.given if kept is None or key in kept}
    config = replace(target, **stay)
    stay = {key: stay[key] for key in stay if key not in schedules.unsupported(config)}
    config = replace(target, **stay)
    read_ = schedules.READS[config.solver]
    changed = [key for key in stay if key in read_ and stay[key] != getattr(target, key)]
    lost = [
        key
        for key, value in found.given.items()
        if key not in stay and key in read_ and value != getattr(target, key)
    ]
    text = "".join(
        f"; {verb} {', '.join(f'{key} = {found.given[key]!r}' for key in keys)}"
        for verb, keys in (("keeps the folder's", changed), ("instead of the folder's", lost))
        if keys
    )
    return config, text
