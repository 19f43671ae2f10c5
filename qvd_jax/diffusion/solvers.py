"""Solvers as tables: every one of them is the same linear step with other coefficients.

With x the latents, p the UNet's prediction and w fresh noise, a step is

    d  = clip(x0_x x + x0_p p)                     the predicted sample
    x' = to_x x + to_d d + sum_n to_history[n] d_n + to_p p + to_noise w

d_n are the d of the steps before, the latest first. The coefficients are computed in float64 on the
host, so the loop holds no branch and no schedule; the tables below are the papers' formulas solved
for them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, exportable
from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig, Solver
from qvd_jax.errors import InputError


@exportable
class StepTable(NamedTuple):
    """Coefficients of all steps, float32, and numpy's until it is jitted.

    Every field is `[S]`, but for `to_history`, `[S, N]`.

    Attributes:
      timestep: what the UNet takes for one.
      model_in: factor of the latents on their way into the UNet.
      x0_x: of the latents in the predicted sample.
      x0_p: of the prediction in the predicted sample.
      to_x: of the latents in the next ones.
      to_d: of the predicted sample in the next latents.
      to_history: of the predicted samples of the N steps before, the latest first.
      to_p: of the prediction.
      to_noise: of fresh unit-normal noise.
    """

    timestep: Array
    model_in: Array
    x0_x: Array
    x0_p: Array
    to_x: Array
    to_d: Array
    to_history: Array
    to_p: Array
    to_noise: Array


class Schedule(NamedTuple):
    """What a sampler needs to know of its scheduler.

    Attributes:
      table: the coefficients of all steps.
      initial_scale: standard deviation of the first latents.
      clip: magnitude to which predicted samples are clipped, or None.
    """

    table: StepTable
    initial_scale: float
    clip: float | None


def make_schedule(config: SchedulerConfig, steps: int) -> Schedule:
    """Tabulates a scheduler.

    Raises:
      InputError: something of the config is not supported, or the schedule cannot be walked in so
        many steps.
    """
    schedule = _TABLES[config.solver](schedules.complete(config), steps)
    finite = [np.isfinite(column).reshape(steps, -1).all(1) for column in schedule.table]
    broken = np.flatnonzero(~np.logical_and.reduce(finite))
    if len(broken):
        raise InputError(
            f"{config.solver} cannot step from timestep {schedule.table.timestep[broken[0]]:g}: "
            f"its latents are noise alone, from which prediction_type = "
            f"{config.prediction_type!r} gives no sample; other timesteps are needed"
        )
    return schedule


def step(
    latents: Array,
    prediction: Array,
    history: tuple[Array, ...],
    noise: Array | float,
    row: StepTable,
    clip: float | None,
) -> tuple[Array, tuple[Array, ...]]:
    """One step of any solver.

    Args:
      latents: `[B, F, H, W, C]`.
      prediction: the UNet's, of the same shape.
      history: the predicted samples of the N steps before, of the same shape, the latest first.
      noise: unit normal, of the same shape; 0 where the table takes none.
      row: one row of the table.
      clip: magnitude to which the predicted sample is clipped, or None.

    Returns:
      The next latents, and the history with the predicted sample.
    """
    sample = row.x0_x * latents + row.x0_p * prediction
    if clip is not None:
        sample = jnp.clip(sample, -clip, clip)
    past = zip(row.to_history, history, strict=True)
    latents = sum(
        (weight * before for weight, before in past), row.to_x * latents + row.to_d * sample
    )
    latents = latents + row.to_p * prediction + row.to_noise * noise
    return latents, (sample, *history)[: len(history)]


def _table(
    timestep: np.ndarray, to_history: np.ndarray | None = None, **columns: np.ndarray | float
) -> StepTable:
    values = {**dict.fromkeys(StepTable._fields, 0.0), "model_in": 1.0, **columns}
    values["timestep"] = timestep
    full = {k: np.broadcast_to(v, timestep.shape).astype(np.float32) for k, v in values.items()}
    none = np.zeros((len(timestep), 0))
    full["to_history"] = (none if to_history is None else to_history).astype(np.float32)
    return StepTable(**cast("dict[str, Array]", full))


def _sample_columns(config: SchedulerConfig, alpha: np.ndarray) -> dict[str, Any]:
    """The predicted sample from latents of cumulative alpha `[S]`.

    Epsilon: DDIM equation 9. v: Salimans and Ho, arXiv 2202.00512, section 4.
    """
    if config.prediction_type == "sample":
        return {"x0_x": 0.0, "x0_p": 1.0}
    if config.prediction_type == "epsilon":
        # A cumulative alpha of zero gives infinities, which `make_schedule` names.
        with np.errstate(divide="ignore"):
            return {"x0_x": 1 / np.sqrt(alpha), "x0_p": -np.sqrt((1 - alpha) / alpha)}
    return {"x0_x": np.sqrt(alpha), "x0_p": -np.sqrt(1 - alpha)}


def _clip(config: SchedulerConfig) -> float | None:
    if config.thresholding:
        return config.sample_max_value
    return config.clip_sample_range if config.clip_sample else None


def _alpha_at(config: SchedulerConfig, timesteps: np.ndarray) -> np.ndarray:
    """Cumulative alpha at integer timesteps; below the first, what `set_alpha_to_one` says."""
    alphas = schedules.alphas_cumprod(config)
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    index = timesteps.astype(int)
    return np.where(index >= 0, alphas[np.maximum(index, 0)], final)


def _ddim(config: SchedulerConfig, steps: int) -> Schedule:
    """DDIM without noise (Song et al., arXiv 2010.02502, equation 12, sigma = 0).

    The step before is always T // S timesteps away, whatever the spacing, as in diffusers.
    """
    timestep = schedules.spaced_timesteps(config, steps)
    alpha = _alpha_at(config, timestep)
    following = _alpha_at(config, timestep - config.num_train_timesteps // steps)
    direction = np.sqrt(1 - following)
    # The direction is the noise: the prediction itself, sqrt(alpha) v + sqrt(1 - alpha) x, or what
    # the predicted sample leaves of x.
    noise_x, noise_p = {
        "epsilon": (0.0, 1.0),
        "v_prediction": (np.sqrt(1 - alpha), np.sqrt(alpha)),
        "sample": (1 / np.sqrt(1 - alpha), -np.sqrt(alpha / (1 - alpha))),
    }[config.prediction_type]
    table = _table(
        timestep,
        **_sample_columns(config, alpha),
        to_x=direction * noise_x,
        to_d=np.sqrt(following),
        to_p=direction * noise_p,
    )
    return Schedule(table, 1.0, _clip(config))


def _euler(config: SchedulerConfig, steps: int) -> Schedule:
    """Euler's method on the probability-flow ODE (Karras et al., arXiv 2206.00364, algorithm 1).

    Latents are of variance 1 + sigma^2, and scaled to 1 on their way into the UNet.
    """
    timestep, sigmas = schedules.sigma_grid(config, steps)
    return _euler_schedule(config, timestep, sigmas, sigmas[1:], 0.0)


def _euler_ancestral(config: SchedulerConfig, steps: int) -> Schedule:
    """Euler's method to a lower noise level, and fresh noise up to the next.

    k-diffusion's ancestral sampling: with s the level and s' the next, to s'^2 / s, the rest of the
    variance s'^2 (s^2 - s'^2) / s^2 being noise.
    """
    timestep, sigmas = schedules.sigma_grid(config, steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    fresh = following * np.sqrt(sigma**2 - following**2) / sigma
    return _euler_schedule(config, timestep, sigmas, following**2 / sigma, fresh)


def _euler_schedule(
    config: SchedulerConfig,
    timestep: np.ndarray,
    sigmas: np.ndarray,
    target: np.ndarray,
    fresh: np.ndarray | float,
) -> Schedule:
    """Euler's steps from the levels `[S + 1]` down to `target`, and `fresh` noise, `[S]` each."""
    sigma = sigmas[:-1]
    sample = {
        "epsilon": {"x0_x": 1.0, "x0_p": -sigma},
        "v_prediction": {"x0_x": 1 / (sigma**2 + 1), "x0_p": -sigma / np.sqrt(sigma**2 + 1)},
        "sample": {"x0_x": 0.0, "x0_p": 1.0},
    }[config.prediction_type]
    table = _table(
        timestep,
        model_in=1 / np.sqrt(sigma**2 + 1),
        **sample,
        to_x=target / sigma,
        to_d=1 - target / sigma,
        to_noise=fresh,
    )
    largest = sigmas.max()
    # Leading timesteps stop short of T, where the latents still hold some signal.
    scale = np.sqrt(largest**2 + 1) if config.timestep_spacing == "leading" else largest
    return Schedule(table, float(scale), None)


class _Grid(NamedTuple):
    """What the solvers of several steps walk; `[S + 1]` each, but for `timestep` and `step`, `[S]`.

    Attributes:
      timestep: what the UNet takes for one.
      alpha: share of the signal in the latents.
      sigma: share of the noise.
      log_snr: ln(alpha / sigma), lambda in the papers.
      step: h, the step in it.
    """

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    log_snr: np.ndarray
    step: np.ndarray


def _log_snr_grid(config: SchedulerConfig, steps: int) -> _Grid:
    timestep, sigmas = schedules.sigma_grid(config, steps)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    with np.errstate(divide="ignore"):
        log_snr = -np.log(sigmas)
    step = np.diff(log_snr)
    # A last level that is the schedule's lowest was computed in two ways, a rounding apart.
    step[np.abs(step) < 1e-12] = 0
    return _Grid(timestep, alpha, sigmas * alpha, log_snr, step)


def _multistep_schedule(
    config: SchedulerConfig,
    grid: _Grid,
    to_x: np.ndarray,
    to_samples: np.ndarray,
    to_noise: np.ndarray | float = 0.0,
) -> Schedule:
    """With `to_samples` `[S, 1 + N]`, of this step's predicted sample and of those before."""
    table = _table(
        grid.timestep,
        to_samples[:, 1:],
        **_sample_columns(config, grid.alpha[:-1] ** 2),
        to_x=to_x,
        to_d=to_samples[:, 0],
        to_noise=to_noise,
    )
    return Schedule(table, 1.0, 1.0 if config.thresholding else None)


def _dpmsolver(config: SchedulerConfig, steps: int) -> Schedule:
    """DPM-Solver++ of up to three steps (Lu et al., arXiv 2211.01095), of the ODE or the SDE.

    With h the step in log-SNR, k = 1 for the ODE and 2 for the SDE, H = k h and g = 1 - e^-H, the
    update is x' = (s'/s) e^(h - H) x + a' g D0 + c1 D1 + c2 D2, D1 and D2 being differences of the
    predicted samples; for the SDE (appendix B of the paper), s' sqrt(g) w is added.
    """
    grid = _log_snr_grid(config, steps)
    stochastic = config.solver == "dpmsolver++-sde"
    width = 2.0 if stochastic else 1.0
    alpha, sigma, h = grid.alpha, grid.sigma, grid.step
    if stochastic and (h < 0).any():
        raise InputError(
            f"{config.solver} cannot end on more noise than it has: final_sigmas_type = "
            f"{config.final_sigmas_type!r} is above the lowest noise level; 'zero' is below all"
        )
    gain = -np.expm1(-width * h)
    to_samples = np.zeros((steps, config.solver_order))
    for i in range(steps):
        order = _dpmsolver_order(config, i, steps)
        to_samples[i, 0] = alpha[i + 1] * gain[i]
        # A step onto the same noise level has nothing to correct.
        if order == 1 or h[i] == 0:
            continue
        total = width * h[i]
        linear = 1 - gain[i] / total
        first, second = _differences(h, i, order)
        if order == 2:
            half = gain[i] / 2 if config.solver_type == "midpoint" else linear
            to_samples[i, :2] += alpha[i + 1] * half * first
        else:
            # For the SDE diffusers subtracts 1/2 where the expansion has it added.
            curve = (gain[i] - total) / total**2 + (-0.5 if stochastic else 0.5)
            to_samples[i, :3] += alpha[i + 1] * (linear * first + curve * second)
    damping = np.exp(-h) if stochastic else 1.0
    to_noise = sigma[1:] * np.sqrt(gain) if stochastic else 0.0
    return _multistep_schedule(config, grid, sigma[1:] / sigma[:-1] * damping, to_samples, to_noise)


def _dpmsolver_order(config: SchedulerConfig, i: int, steps: int) -> int:
    """Order of step i: as many steps as there were, and fewer at the end where it is short."""
    short = config.lower_order_final and steps < 15
    if i == steps - 1 and (short or config.euler_at_final or config.final_sigmas_type == "zero"):
        return 1
    return min(config.solver_order, i + 1, 2 if short and i == steps - 2 else 3)


def _differences(h: np.ndarray, i: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """D1 and D2 of step i as coefficients of the predicted samples, the latest first.

    Lu et al., arXiv 2211.01095, appendix: r are the steps before as shares of this one.
    """
    before = h[i - 1] / h[i]
    if order == 2:
        return np.array([1.0, -1.0]) / before, np.zeros(2)
    earlier = h[i - 2] / h[i]
    last, past = np.array([1.0, -1.0, 0.0]) / before, np.array([0.0, 1.0, -1.0]) / earlier
    second = (last - past) / (before + earlier)
    return last + before * second, second


def _unipc(config: SchedulerConfig, steps: int) -> Schedule:
    """UniPC (Zhao et al., arXiv 2302.04867, algorithms 5 to 8), predicting samples.

    The predictor gives x'~; with the sample predicted from x'~ the corrector changes it by
    differences of predicted samples alone, for both begin with the same terms. So the correction is
    a part of the next step's coefficients.
    """
    grid = _log_snr_grid(config, steps)
    to_x = grid.sigma[1:] / grid.sigma[:-1]
    to_samples = np.zeros((steps, 1 + config.solver_order))
    correction = np.zeros(1 + config.solver_order)
    for i in range(steps):
        left = steps - i if config.lower_order_final else config.solver_order
        # A last step down to zero noise has an infinite h.
        order = 1 if np.isinf(grid.step[i]) else min(config.solver_order, i + 1, left)
        predicted, corrected = _unipc_weights(config, grid, i, order)
        to_samples[i, :order] = predicted
        to_samples[i, 0] -= grid.alpha[i + 1] * np.expm1(-grid.step[i])
        to_samples[i] += to_x[i] * correction
        correction = np.zeros(1 + config.solver_order)
        if i not in config.disable_corrector:
            correction[: 1 + order] = corrected
            correction[1 : 1 + order] -= predicted
    return _multistep_schedule(config, grid, to_x, to_samples)


def _unipc_weights(
    config: SchedulerConfig, grid: _Grid, i: int, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """What predictor and corrector of step i add to DDIM's step, as coefficients of samples.

    The predictor's are of this step's sample and those before, the corrector's have the next step's
    in front.
    """
    h = grid.step[i]
    # A step onto the same noise level, or to none, stays as DDIM has it.
    if h == 0 or np.isinf(h):
        return np.zeros(order), np.zeros(1 + order)
    before = grid.log_snr[[i - j for j in range(1, order)]]
    ratios = np.append((before - grid.log_snr[i]) / h, 1.0)
    # b of equation 13: phi_k(-h) by its recurrence.
    scale = -h if config.solver_type == "bh1" else np.expm1(-h)
    phi, factorial, moments = np.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, order + 1):
        moments.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(ratios, order, increasing=True).T
    half = np.array([0.5])
    predict = half if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
    correct = half if order == 1 else np.linalg.solve(powers, moments)
    predicted, corrected = np.zeros(order), np.zeros(1 + order)
    predicted[1:] = predict / ratios[:-1]
    corrected[2:] = correct[:-1] / ratios[:-1]
    corrected[0] = correct[-1]
    for weights, latest in ((predicted, 0), (corrected, 1)):
        weights[latest] = -weights.sum()
        weights *= -grid.alpha[i + 1] * scale
    return predicted, corrected


def _lcm(config: SchedulerConfig, steps: int) -> Schedule:
    """Latent consistency sampling (Luo et al., arXiv 2310.04378, algorithm 3, equation 9)."""
    timestep = schedules.lcm_timesteps(config, steps)
    alpha = _alpha_at(config, timestep)
    # The last step ends on the consistency function itself: no signal is lost, no noise added.
    following = np.append(_alpha_at(config, timestep[1:]), 1.0)
    scaled, sigma_data = timestep * config.timestep_scaling, 0.5
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    table = _table(
        timestep,
        **_sample_columns(config, alpha),
        to_x=np.sqrt(following) * skip,
        to_d=np.sqrt(following) * out,
        to_noise=np.sqrt(1 - following),
    )
    return Schedule(table, 1.0, _clip(config))


_TABLES: dict[Solver, Callable[[SchedulerConfig, int], Schedule]] = {
    "ddim": _ddim,
    "euler": _euler,
    "euler_a": _euler_ancestral,
    "dpmsolver++": _dpmsolver,
    "dpmsolver++-sde": _dpmsolver,
    "unipc": _unipc,
    "lcm": _lcm,
}
