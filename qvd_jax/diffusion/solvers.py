"""Solvers as tables: every one of them is the same linear step with other coefficients.

With x the latents, p the UNet's prediction and w fresh noise, a step is

    d  = clip(x0_x x + x0_p p)                     the predicted sample
    x' = to_x x + to_d d + to_last d_last + to_p p + to_noise w

d_last is the d of the step before. The coefficients are computed in float64 on the host, so the
loop holds no branch and no schedule; the tables below are the papers' formulas solved for them.
"""

from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array
from qvd_jax.diffusion import schedules
from qvd_jax.diffusion.schedules import SchedulerConfig


class StepTable(NamedTuple):
    """Coefficients of all steps; every field is `[S]`, float32, and numpy's until it is jitted.

    Attributes:
      timestep: what the UNet is told.
      model_in: factor of the latents on their way into the UNet.
      x0_x: of the latents in the predicted sample.
      x0_p: of the prediction in the predicted sample.
      to_x: of the latents in the next ones.
      to_d: of the predicted sample in the next latents.
      to_last: of the last step's predicted sample.
      to_p: of the prediction.
      to_noise: of fresh unit-normal noise.
    """

    timestep: Array
    model_in: Array
    x0_x: Array
    x0_p: Array
    to_x: Array
    to_d: Array
    to_last: Array
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
      InputError: the schedule cannot be walked in so many steps.
    """
    solver = {"ddim": _ddim, "euler": _euler, "dpmsolver++": _dpmsolver, "lcm": _lcm}
    return solver[config.solver](config, steps)


def step(
    latents: Array,
    prediction: Array,
    last: Array,
    noise: Array | float,
    row: StepTable,
    clip: float | None,
) -> tuple[Array, Array]:
    """One step of any solver.

    Args:
      latents: `[B, F, H, W, C]`.
      prediction: the UNet's, of the same shape.
      last: the predicted sample of the step before, of the same shape.
      noise: unit normal, of the same shape; 0 where the table takes none.
      row: one row of the table.
      clip: magnitude to which the predicted sample is clipped, or None.

    Returns:
      The next latents and the predicted sample.
    """
    sample = row.x0_x * latents + row.x0_p * prediction
    if clip is not None:
        sample = jnp.clip(sample, -clip, clip)
    latents = (
        row.to_x * latents
        + row.to_d * sample
        + row.to_last * last
        + row.to_p * prediction
        + row.to_noise * noise
    )
    return latents, sample


def _table(timestep: np.ndarray, **columns: np.ndarray | float) -> StepTable:
    values = {**dict.fromkeys(StepTable._fields, 0.0), "model_in": 1.0, **columns}
    values["timestep"] = timestep
    full = {k: np.broadcast_to(v, timestep.shape).astype(np.float32) for k, v in values.items()}
    return StepTable(**cast("dict[str, Array]", full))


def _sample_columns(config: SchedulerConfig, alpha: np.ndarray) -> dict[str, np.ndarray]:
    """The predicted sample from latents of cumulative alpha `[S]`.

    Epsilon: DDIM equation 9. v: Salimans and Ho, arXiv 2202.00512, section 4.
    """
    if config.prediction_type == "epsilon":
        return {"x0_x": 1 / np.sqrt(alpha), "x0_p": -np.sqrt((1 - alpha) / alpha)}
    return {"x0_x": np.sqrt(alpha), "x0_p": -np.sqrt(1 - alpha)}


def _clip(config: SchedulerConfig) -> float | None:
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
    # The direction is the noise: the prediction itself, or sqrt(alpha) v + sqrt(1 - alpha) x.
    noise_x, noise_p = (
        (0.0, 1.0) if config.prediction_type == "epsilon" else (np.sqrt(1 - alpha), np.sqrt(alpha))
    )
    table = _table(
        timestep,
        **_sample_columns(config, alpha),
        to_x=direction * noise_x,
        to_d=np.sqrt(following),
        to_p=direction * noise_p,
    )
    return Schedule(table, 1.0, _clip(config))


def _sigma_grid(config: SchedulerConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps `[S]` and noise levels `[S + 1]` of the solvers that walk sigmas."""
    grid = schedules.sigmas_of(schedules.alphas_cumprod(config))
    timestep = schedules.spaced_timesteps(config, steps)
    sigma = np.interp(timestep, np.arange(len(grid)), grid)
    if config.use_karras_sigmas:
        # DPM-Solver++ spans the whole schedule, Euler the spaced steps or what it was given.
        whole = config.solver == "dpmsolver++"
        low = grid[0] if whole else sigma[-1]
        high = grid[-1] if whole else sigma[0]
        low = low if config.sigma_min is None else config.sigma_min
        high = high if config.sigma_max is None else config.sigma_max
        sigma = schedules.karras_sigmas(low, high, steps)
        timestep = schedules.sigma_to_timestep(sigma, grid)
        timestep = np.round(timestep) if whole else timestep
    last = 0.0 if config.final_sigmas_type == "zero" else grid[0]
    return timestep, np.append(sigma, last)


def _euler(config: SchedulerConfig, steps: int) -> Schedule:
    """Euler's method on the probability-flow ODE (Karras et al., arXiv 2206.00364, algorithm 1).

    Latents are of variance 1 + sigma^2, and scaled to 1 on their way into the UNet.
    """
    timestep, sigmas = _sigma_grid(config, steps)
    sigma, following = sigmas[:-1], sigmas[1:]
    continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
    if config.prediction_type == "epsilon":
        sample = {"x0_x": np.ones_like(sigma), "x0_p": -sigma}
    else:
        sample = {"x0_x": 1 / (sigma**2 + 1), "x0_p": -sigma / np.sqrt(sigma**2 + 1)}
    table = _table(
        np.log(sigma) / 4 if continuous else timestep,
        model_in=1 / np.sqrt(sigma**2 + 1),
        **sample,
        to_x=following / sigma,
        to_d=1 - following / sigma,
    )
    largest = sigmas.max()
    # Leading timesteps stop short of T, where the latents still hold some signal.
    scale = np.sqrt(largest**2 + 1) if config.timestep_spacing == "leading" else largest
    return Schedule(table, float(scale), None)


def _dpmsolver(config: SchedulerConfig, steps: int) -> Schedule:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), or its first order.

    With h the step in log-SNR and r the last step over this one, the update is
    x' = (s'/s) x - a' (e^-h - 1) D, D = d + (d - d_last) / (2 r) for the midpoint form.
    """
    timestep, sigmas = _sigma_grid(config, steps)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    noise = sigmas * alpha
    with np.errstate(divide="ignore"):
        log_snr = -np.log(sigmas)
    h = np.diff(log_snr)
    gain = -alpha[1:] * np.expm1(-h)

    second = np.zeros(steps)
    if config.solver_order == 2:
        # A last step down to zero noise has an infinite h; it is of first order, below.
        with np.errstate(divide="ignore", invalid="ignore"):
            heun = alpha[2:] * (np.expm1(-h[1:]) / h[1:] + 1)
            factor = gain[1:] / 2 if config.solver_type == "midpoint" else heun
            second[1:] = factor * h[1:] / h[:-1]
        short = config.lower_order_final and steps < 15
        if short or config.euler_at_final or config.final_sigmas_type == "zero":
            second[-1] = 0.0
    table = _table(
        timestep,
        **_sample_columns(config, alpha[:-1] ** 2),
        to_x=noise[1:] / noise[:-1],
        to_d=gain + second,
        to_last=-second,
    )
    return Schedule(table, 1.0, None)


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
