"""Noise schedules and the timesteps at which a sampler visits them, in float64 on the host."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import betaincinv

from qvd_jax.config import check_choice
from qvd_jax.errors import InputError

Solver = Literal["ddim", "euler", "euler_a", "dpmsolver++", "dpmsolver++-sde", "unipc", "lcm"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

TimestepSpacing = Literal["leading", "linspace", "trailing"]
SPACINGS: tuple[TimestepSpacing, ...] = get_args(TimestepSpacing)

_ZERO_SNR_ALPHA = 2.0**-24
"""What stands for a last cumulative alpha of zero where noise levels must be finite."""


@dataclass(frozen=True)
class SchedulerConfig:
    """A noise schedule and the solver that walks it; fields are named as in diffusers.

    A checkpoint keeps what its source says of all solvers, so that another solver takes of it what
    diffusers' `from_config` would. None is what the source does not say: the solver's own default.

    Attributes:
      solver: the method.
      num_train_timesteps: T.
      beta_start: first beta.
      beta_end: last beta.
      beta_schedule: "linear" spaces the betas evenly, "scaled_linear" their roots;
        "squaredcos_cap_v2" is of Nichol and Dhariwal, arXiv 2102.09672, equation 17.
      trained_betas: all T betas instead.
      rescale_betas_zero_snr: whether T keeps no signal (Lin et al., arXiv 2305.08891, algorithm 1).
      prediction_type: what the UNet predicts; "sample" is the video without noise.
      timestep_spacing: how the steps are laid over T (Lin et al., table 2).
      steps_offset: added to "leading" timesteps.
      set_alpha_to_one: whether the step past the last ends at a cumulative alpha of 1, or of the
        first timestep's (DDIM).
      clip_sample: whether predicted samples are clipped (DDIM, LCM).
      clip_sample_range: to which magnitude.
      thresholding: whether predicted samples are clipped to `sample_max_value` (Saharia et al.,
        arXiv 2205.11487, section 2.3).
      sample_max_value: 1, at which the threshold is the same for all samples.
      use_karras_sigmas: noise levels of Karras et al., arXiv 2206.00364, equation 5, rho = 7.
      use_exponential_sigmas: noise levels evenly spaced in ln(sigma).
      use_beta_sigmas: noise levels at quantiles of a beta distribution (Lee et al., arXiv
        2407.12173).
      use_lu_lambdas: noise levels evenly spaced in log-SNR (Lu et al., arXiv 2206.00927).
      sigma_min: lowest of these levels; None takes the schedule's.
      sigma_max: highest of these levels; None takes the schedule's.
      timestep_type: "continuous" hands the UNet ln(sigma)/4 instead of a timestep (with v
        prediction).
      interpolation_type: how noise levels between timesteps are found (Euler).
      final_sigmas_type: whether the last step ends at a sigma of zero or the lowest.
      solver_order: 1 to 3 (DPM-Solver++, UniPC).
      solver_type: how the second order is formed: "midpoint" or "heun" (DPM-Solver++), "bh1" or
        "bh2" (UniPC); another solver's is the solver's default, as in diffusers.
      lower_order_final: whether the last steps are of lower order: of fewer than 15
        (DPM-Solver++), or of any number (UniPC).
      euler_at_final: whether the last step is always of first order (DPM-Solver++).
      lambda_min_clipped: log-SNR below which no step goes; None is no limit (DPM-Solver++).
      variance_type: of networks that predict a variance, which none here does (DPM-Solver++).
      predict_x0: whether the solver integrates predicted samples (UniPC).
      disable_corrector: numbers of the steps behind which nothing is corrected (UniPC).
      use_flow_sigmas: noise levels of flow matching.
      use_dynamic_shifting: noise levels of flow matching that depend on the size.
      original_inference_steps: steps of the distillation a subset of which is visited (LCM).
      timestep_scaling: of the boundary conditions (LCM).
    """

    solver: Solver = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float | None = 0.00085
    beta_end: float | None = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: TimestepSpacing | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = True
    clip_sample: bool | None = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    sample_max_value: float = 1.0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    solver_order: int = 2
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] | None = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float | None = None
    variance_type: str | None = None
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    use_flow_sigmas: bool = False
    use_dynamic_shifting: bool = False
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

ABSENT: dict[str, Any] = {
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "timestep_spacing": None,
    "steps_offset": 0,
    "clip_sample": None,
    "solver_type": None,
}
"""Fields of a source that says nothing, where they are not the dataclass's own defaults."""

_DEFAULTS: dict[str, Any] = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
    "clip_sample": False,
}
_DPM: dict[str, Any] = {"solver_type": "midpoint"}
_OWN_DEFAULTS: dict[Solver, dict[str, Any]] = {
    "ddim": {"timestep_spacing": "leading", "clip_sample": True},
    "dpmsolver++": _DPM,
    "dpmsolver++-sde": _DPM,
    "unipc": {"solver_type": "bh2"},
    "lcm": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
_SOLVER_TYPES: dict[Solver, tuple[str, ...]] = {
    "dpmsolver++": ("midpoint", "heun"),
    "dpmsolver++-sde": ("midpoint", "heun"),
    "unipc": ("bh1", "bh2"),
}

_BETAS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
}
_SPACED = _BETAS | {"timestep_spacing", "steps_offset"}
_THRESHOLD = {"thresholding", "sample_max_value"}
_CLIPPED = _THRESHOLD | {"clip_sample", "clip_sample_range"}
_LEVELS = {
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "sigma_min",
    "sigma_max",
    "timestep_type",
    "final_sigmas_type",
}
_MULTISTEP = _SPACED | _LEVELS | _THRESHOLD | {"solver_order", "solver_type", "lower_order_final"}
_FLOW = {"use_flow_sigmas", "use_dynamic_shifting"}
_DPMSOLVER = {"euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type"}

READS: dict[Solver, set[str]] = {
    "ddim": _SPACED | _CLIPPED | {"set_alpha_to_one"},
    "euler": _SPACED | _LEVELS | {"interpolation_type"},
    "euler_a": _SPACED,
    "dpmsolver++": _MULTISTEP | _FLOW | _DPMSOLVER,
    "dpmsolver++-sde": _MULTISTEP | _FLOW | _DPMSOLVER,
    "unipc": _MULTISTEP | _FLOW | {"predict_x0", "disable_corrector"},
    "lcm": _BETAS | _CLIPPED | {"original_inference_steps", "timestep_scaling"},
}
"""The fields that change what a solver does."""

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "solver_order": (1, 2, 3),
    "predict_x0": (True,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
_LEVEL_KINDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

_OF_LEVELS = tuple(solver for solver in SOLVERS if "use_karras_sigmas" in READS[solver])
"""Solvers that can walk noise levels that are no timestep's, such as Karras'."""


def switch(
    config: SchedulerConfig,
    solver: Solver | None = None,
    *,
    karras: bool | None = None,
    timestep_spacing: TimestepSpacing | None = None,
) -> SchedulerConfig:
    """A schedule with another solver, as `from_config` of diffusers makes it.

    Args:
      config: the schedule.
      solver: None keeps it.
      karras: whether the noise levels are Karras'; None keeps them. The solvers of several steps
        lay them over the whole schedule, whatever the spacing.
      timestep_spacing: None keeps it.

    Raises:
      InputError: there is no such solver or spacing, or the solver has no such option.
    """
    solver = config.solver if solver is None else solver
    check_choice("solver", solver, SOLVERS)
    if timestep_spacing is not None:
        check_choice("timestep_spacing", timestep_spacing, SPACINGS)
    if karras and solver not in _OF_LEVELS:
        raise InputError(f"{solver} has no Karras noise levels; {', '.join(_OF_LEVELS)} have")
    if timestep_spacing is not None and "timestep_spacing" not in READS[solver]:
        raise InputError(f"{solver} visits the timesteps of its distillation, without a spacing")
    asked = {"use_karras_sigmas": karras, "timestep_spacing": timestep_spacing}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(config, solver=solver, **given)


# All else says how a solver walks it.
_OF_MODEL = _BETAS | {"timestep_type"}


def walked_as(config: SchedulerConfig, other: SchedulerConfig) -> SchedulerConfig:
    """The noise a model was trained with, walked by another's solver at the other's steps."""
    return replace(other, **{name: getattr(config, name) for name in _OF_MODEL})


def unsupported(config: SchedulerConfig) -> dict[str, str]:
    """What a config asks of its solver that is not supported: a sentence for each field."""
    read = READS[config.solver]
    found = {
        name: f"{name} = {getattr(config, name)!r} is not supported; it must be "
        f"{' or '.join(map(repr, supported))}"
        for name, supported in _SUPPORTED.items()
        if name in read and getattr(config, name) not in supported
    }
    if "variance_type" in read and (config.variance_type or "").startswith("learned"):
        found["variance_type"] = f"variance_type = {config.variance_type!r} is not supported"
    if "thresholding" in read and config.thresholding and config.sample_max_value != 1:
        found["sample_max_value"] = (
            f"sample_max_value = {config.sample_max_value!r} is not supported; it must be 1.0 "
            f"where thresholding is on"
        )
    together = [name for name in _LEVEL_KINDS if name in read and getattr(config, name)]
    if len(together) > 1:
        found[together[1]] = f"only one of {' and '.join(together)} can be on"
    if _is_continuous(config) and config.solver not in _OF_LEVELS:
        found["timestep_type"] = (
            f"{config.solver} walks timesteps, and the UNet takes noise levels "
            f"(timestep_type = 'continuous'); {', '.join(_OF_LEVELS)} fit it"
        )
    return found


def complete(config: SchedulerConfig) -> SchedulerConfig:
    """The config with the solver's own defaults in place of None.

    Raises:
      InputError: something of it is not supported.
    """
    if found := unsupported(config):
        raise InputError("scheduler: " + "; ".join(found.values()))
    own = {**_DEFAULTS, **_OWN_DEFAULTS.get(config.solver, {})}
    missing = {name for name in own if getattr(config, name) is None}
    if config.solver_type not in _SOLVER_TYPES.get(config.solver, (config.solver_type,)):
        missing.add("solver_type")
    return replace(config, **{name: own[name] for name in missing})


def _is_continuous(config: SchedulerConfig) -> bool:
    return config.timestep_type == "continuous" and config.prediction_type == "v_prediction"


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """Cumulative products of 1 - beta, `[T]`.

    Raises:
      InputError: there are not T trained betas.
    """
    config = complete(config)
    alphas = np.cumprod(1 - _betas(config))
    if config.rescale_betas_zero_snr:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas


def _betas(config: SchedulerConfig) -> np.ndarray:
    start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        if len(config.trained_betas) != count:
            raise InputError(
                f"trained_betas: {count} are needed, one for each of num_train_timesteps, got "
                f"{len(config.trained_betas)}"
            )
        return np.array(config.trained_betas)
    if config.beta_schedule == "squaredcos_cap_v2":
        kept = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        # In float32, as diffusers has them: what 0.999 leaves of the signal depends on rounding.
        return np.minimum(1 - kept[1:] / kept[:-1], 0.999).astype(np.float32).astype(np.float64)
    assert start is not None
    assert end is not None
    if config.beta_schedule == "linear":
        return np.linspace(start, end, count)
    return np.linspace(start**0.5, end**0.5, count) ** 2


def sigmas_of(alphas: np.ndarray) -> np.ndarray:
    """Noise-to-signal ratio, sqrt((1 - alpha) / alpha)."""
    return np.sqrt((1 - alphas) / alphas)


def spaced_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps `[S]` from high to low, spaced as `timestep_spacing` says.

    Args:
      config: of `complete`.
      steps: S.

    Raises:
      InputError: the schedule has not so many timesteps.
    """
    total = config.num_train_timesteps
    last = _last_timestep(config)
    fractional = config.solver in ("euler", "euler_a")
    # The solvers of several steps space one step more and leave the last out.
    extra = config.solver not in ("ddim", "euler", "euler_a")
    extra = extra and config.timestep_spacing != "trailing"
    points = steps + extra
    _check_steps(config, steps, last - extra)
    if config.timestep_spacing == "trailing":
        spaced = np.round(np.arange(last, 0, -total / steps))[:steps] - 1
        if len(spaced) < steps:
            raise InputError(
                f"steps = {steps}: lambda_min_clipped leaves {len(spaced)} of them with trailing "
                f"timesteps; take another spacing"
            )
        return spaced
    if config.timestep_spacing == "linspace":
        spaced = np.linspace(0.0, last - 1, points)
        spaced = spaced if fractional else np.round(spaced)
    else:
        spaced = np.arange(points, dtype=np.float64) * (last // points) + config.steps_offset
        if spaced[-1] >= total and not fractional:
            raise InputError(
                f"steps = {steps}: with steps_offset = {config.steps_offset} the first timestep "
                f"is {spaced[-1]:g}, past the schedule's {total}; take fewer steps"
            )
    return spaced[::-1][:steps]


def _last_timestep(config: SchedulerConfig) -> int:
    """How many timesteps have a log-SNR of `lambda_min_clipped` at least."""
    lowest = config.lambda_min_clipped
    if lowest is None or "lambda_min_clipped" not in READS[config.solver]:
        return config.num_train_timesteps
    return int((-np.log(schedule_sigmas(config)) >= lowest).sum())


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


def schedule_sigmas(config: SchedulerConfig) -> np.ndarray:
    """Noise levels `[T]` of all timesteps, finite ones."""
    alphas = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = _ZERO_SNR_ALPHA
    return sigmas_of(alphas)


def sigma_grid(config: SchedulerConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The UNet's timesteps `[S]`, and the noise levels `[S + 1]`, of solvers that walk these.

    Args:
      config: of `complete`.
      steps: S.

    Raises:
      InputError: as `spaced_timesteps`.
    """
    schedule = schedule_sigmas(config)
    timestep = spaced_timesteps(config, steps)
    sigma = np.interp(timestep, np.arange(len(schedule)), schedule)
    read = READS[config.solver]
    last = schedule[0] if "final_sigmas_type" in read else 0.0
    # Euler's levels span its own timesteps, those of the solvers of several steps the schedule.
    span = sigma if config.solver == "euler" else schedule[::-1]
    levels = _levels(config, span, steps)
    if levels is not None:
        sigma = levels
        timestep = _rounded_timesteps(config, sigma_to_timestep(sigma, schedule))
        if config.solver == "unipc":
            last = sigma[-1]
    if config.final_sigmas_type == "zero":
        last = 0.0
    if config.solver in _OF_LEVELS and _is_continuous(config):
        timestep = np.log(sigma) / 4
    return timestep, np.append(sigma, last)


def _levels(config: SchedulerConfig, span: np.ndarray, steps: int) -> np.ndarray | None:
    """Noise levels `[S]` that are no timestep's, or None; `span` is from high to low."""
    if config.solver not in _OF_LEVELS:
        return None
    low = span[-1] if config.sigma_min is None else config.sigma_min
    high = span[0] if config.sigma_max is None else config.sigma_max
    if config.use_karras_sigmas:
        return karras_sigmas(low, high, steps)
    if config.use_lu_lambdas and "use_lu_lambdas" in READS[config.solver]:
        return np.exp(np.linspace(np.log(span[0]), np.log(span[-1]), steps))
    if config.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    if config.use_beta_sigmas:
        return low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))
    return None


def _rounded_timesteps(config: SchedulerConfig, timesteps: np.ndarray) -> np.ndarray:
    """Fractions of timesteps as diffusers' solvers round them: to the nearest, or down."""
    if config.solver == "euler":
        return timesteps
    lu = config.use_lu_lambdas and config.solver != "unipc"
    nearest = config.use_karras_sigmas or lu
    if config.solver != "unipc":
        nearest = nearest and config.beta_schedule != "squaredcos_cap_v2"
    return np.round(timesteps) if nearest else np.floor(timesteps)


def karras_sigmas(low: float, high: float, steps: int) -> np.ndarray:
    """Noise levels `[S]` of Karras et al. (arXiv 2206.00364), equation 5, with rho = 7."""
    rho = 7.0
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def sigma_to_timestep(sigmas: np.ndarray, schedule: np.ndarray) -> np.ndarray:
    """Fractional timesteps at which the schedule reaches `sigmas`, linear in ln(sigma)."""
    return np.interp(np.log(sigmas), np.log(schedule), np.arange(len(schedule)))
