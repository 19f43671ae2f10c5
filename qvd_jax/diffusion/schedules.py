"""Noise schedules and the timesteps at which a sampler visits them, in float64 on the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qvd_jax.config import did_you_mean, from_dict
from qvd_jax.errors import InputError

Solver = Literal["ddim", "euler", "dpmsolver++", "lcm"]

SOLVERS: dict[str, Solver] = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "LCMScheduler": "lcm",
}
"""Our names of diffusers' scheduler classes."""


@dataclass(frozen=True)
class SchedulerConfig:
    """A noise schedule and the solver that walks it; fields are named as in diffusers.

    Attributes:
      solver: the method.
      num_train_timesteps: T.
      beta_start: first beta.
      beta_end: last beta.
      beta_schedule: "linear" spaces the betas evenly, "scaled_linear" their roots.
      prediction_type: what the UNet predicts.
      timestep_spacing: how the steps are laid over T (Lin et al., arXiv 2305.08891, table 2).
      steps_offset: added to "leading" timesteps.
      set_alpha_to_one: whether the step past the last ends at a cumulative alpha of 1, or of the
        first timestep's (DDIM, LCM).
      clip_sample: whether predicted samples are clipped (DDIM, LCM).
      clip_sample_range: to which magnitude.
      use_karras_sigmas: noise levels of Karras et al., arXiv 2206.00364, equation 5, rho = 7
        (Euler, DPM-Solver++).
      sigma_min: lowest Karras level; None takes the schedule's (Euler).
      sigma_max: highest Karras level; None takes the schedule's (Euler).
      timestep_type: "continuous" hands the UNet ln(sigma)/4 instead of a timestep (Euler with v
        prediction).
      final_sigmas_type: whether the last step ends at a sigma of zero or the schedule's lowest
        (Euler, DPM-Solver++).
      solver_order: 1 or 2 (DPM-Solver++).
      solver_type: how the second order is formed (DPM-Solver++).
      lower_order_final: whether the last of fewer than 15 steps is of first order
        (DPM-Solver++).
      euler_at_final: whether the last step is always of first order (DPM-Solver++).
      original_inference_steps: steps of the distillation a subset of which is visited (LCM).
      timestep_scaling: of the boundary conditions (LCM).
    """

    solver: Solver = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    solver_order: int = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


ANIMATEDIFF = SchedulerConfig()
"""DDIM with linear betas, as the original AnimateDiff samples."""

ANIMATELCM = SchedulerConfig(solver="lcm")
"""As published with AnimateLCM."""

LIGHTNING = SchedulerConfig(solver="euler", timestep_spacing="trailing")
"""As published with AnimateDiff-Lightning."""

MODELSCOPE = SchedulerConfig(beta_schedule="scaled_linear", set_alpha_to_one=False)
"""DDIM with scaled betas, as published with ModelScope."""

STABLE_VIDEO_DIFFUSION = SchedulerConfig(
    solver="euler",
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    timestep_type="continuous",
)
"""Euler over Karras' noise levels, as published with Stable Video Diffusion."""

_CLASS_DEFAULTS: dict[Solver, dict[str, Any]] = {
    "ddim": {"clip_sample": True, "timestep_spacing": "leading", "steps_offset": 0},
    "euler": {"timestep_spacing": "linspace", "steps_offset": 0},
    "dpmsolver++": {"timestep_spacing": "linspace", "steps_offset": 0},
    "lcm": {"beta_schedule": "scaled_linear", "steps_offset": 0},
}
_BETA_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02}

_ONLY: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "algorithm_type": ("dpmsolver++",),
    "variance_type": (None,),
    "lambda_min_clipped": (None, float("-inf")),
    "solver_order": (1, 2),
}
"""Options of diffusers that change the result, with the values that are understood here."""


def from_diffusers(data: Mapping[str, Any], where: str) -> SchedulerConfig:
    """Reads diffusers' `scheduler_config.json`, with its classes' own defaults.

    Keys that belong to other classes are ignored, as diffusers does.

    Args:
      data: the parsed JSON.
      where: how messages name the file.

    Raises:
      InputError: the scheduler, or a value that changes its result, is not supported.
    """
    name = data.get("_class_name")
    if not isinstance(name, str) or name not in SOLVERS:
        raise InputError(f"{where}: unknown scheduler {name!r}{did_you_mean(str(name), SOLVERS)}")
    solver = SOLVERS[name]
    for key, supported in _ONLY.items():
        if key in data and data[key] not in supported:
            raise InputError(
                f"{where}: {key} = {data[key]!r} is not supported; it must be "
                f"{' or '.join(map(repr, supported))}"
            )
    fields = SchedulerConfig.__dataclass_fields__
    given = {key: value for key, value in data.items() if key in fields and key != "solver"}
    if given.get("use_karras_sigmas") is None:
        given.pop("use_karras_sigmas", None)
    betas = {} if solver == "lcm" else _BETA_DEFAULTS
    merged = {**betas, **_CLASS_DEFAULTS[solver], **given, "solver": solver}
    return from_dict(SchedulerConfig, merged, where)


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """Cumulative products of 1 - beta, `[T]`."""
    start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    else:
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    return np.cumprod(1 - betas)


def sigmas_of(alphas: np.ndarray) -> np.ndarray:
    """Noise-to-signal ratio, sqrt((1 - alpha) / alpha)."""
    return np.sqrt((1 - alphas) / alphas)


def spaced_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps `[S]` from high to low, spaced as `timestep_spacing` says.

    Raises:
      InputError: the schedule has not so many timesteps.
    """
    total = config.num_train_timesteps
    # DPM-Solver++ spaces one step more and leaves the last out.
    extra = config.solver == "dpmsolver++" and config.timestep_spacing != "trailing"
    points = steps + extra
    _check_steps(config, steps, total - extra)
    if config.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    if config.timestep_spacing == "linspace":
        spaced = np.linspace(0.0, total - 1, points)
        # Euler alone visits fractions of a timestep.
        spaced = spaced if config.solver == "euler" else np.round(spaced)
    else:
        spaced = np.arange(points, dtype=np.float64) * (total // points) + config.steps_offset
        if spaced[-1] >= total and config.solver != "euler":
            raise InputError(
                f"steps = {steps}: with steps_offset = {config.steps_offset} the first timestep "
                f"is {spaced[-1]:g}, past the schedule's {total}; take fewer steps"
            )
    return spaced[::-1][:steps]


def _check_steps(config: SchedulerConfig, steps: int, limit: int) -> None:
    if not 1 <= steps <= limit:
        raise InputError(f"steps = {steps}: {config.solver} takes 1 to {limit} steps")


def lcm_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps `[S]` of latent consistency: an even subset of the distillation's own.

    Raises:
      InputError: the distillation has not so many steps, or more than the schedule.
    """
    original = config.original_inference_steps
    if not 1 <= original <= config.num_train_timesteps:
        raise InputError(
            f"original_inference_steps = {original}: 1 to {config.num_train_timesteps} training "
            f"timesteps allow as many steps"
        )
    _check_steps(config, steps, original)
    ladder = np.arange(1, original + 1) * (config.num_train_timesteps // original) - 1
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return ladder[::-1][chosen].astype(np.float64)


def karras_sigmas(low: float, high: float, steps: int) -> np.ndarray:
    """Noise levels `[S]` of Karras et al. (arXiv 2206.00364), equation 5, with rho = 7."""
    rho = 7.0
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def sigma_to_timestep(sigmas: np.ndarray, schedule: np.ndarray) -> np.ndarray:
    """Fractional timesteps at which the schedule reaches `sigmas`, linear in ln(sigma)."""
    return np.interp(np.log(sigmas), np.log(schedule), np.arange(len(schedule)))
