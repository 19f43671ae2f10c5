"""Trains a VAE on rendered frames: reconstruction and KL."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.models.vae import AutoencoderKL, VAEConfig, to_bytes, to_unit_range

DrawClips = Callable[[np.random.Generator, int, int, int, Literal["train", "held_out"]], np.ndarray]
"""From a generator, N, F, the size and the split: uint8 `[N, F, H, W, 3]`."""

_NAME = "vae"
_DECODER = ("post_quant_conv", "decoder")
_DESCRIPTION = "VAE of {}, trained by qvd_jax.train"
_SHEET_ROWS = 8
_SCALE_FRAMES = 512


@dataclass(frozen=True)
class VAETrainingConfig:
    """The VAE and its objective.

    Attributes:
      model: shape of the VAE.
      start: folder of a trained VAE of the same shape. Its decoder alone is trained on, so that
        latents, and models trained on them, stay what they are.
      kl_weight: of the mean KL divergence of a latent, beside the mean error of a pixel's channel.
      size: H and W of the frames in pixels.
      scenes: what is rendered: one moving shape, or two that move where they point.
      frames: F of an example, frames in a row. One shows a temporal decoder no neighbors.
    """

    model: VAEConfig
    start: str | None = None
    kl_weight: float = 1e-4
    size: int = 64
    scenes: Literal["shapes", "arrows"] = "shapes"
    frames: int = 1


class VAETask:
    """The task: frames in, the same frames out.

    Attributes:
      config: what is trained.

    Raises:
      InputError: `config.start` is no VAE, or one of another shape.
    """

    def __init__(self, config: VAETrainingConfig, draw_clips: DrawClips) -> None:
        self.config = config
        self._draw_clips = draw_clips
        self._vae = AutoencoderKL(config.model)
        self._start: Params = {}
        self._scaling_factor: float | None = None
        if config.start is not None:
            model, self._start = load_vae(Path(config.start))
            self._scaling_factor = model.scaling_factor
            if replace(config.model, scaling_factor=model.scaling_factor) != model:
                raise InputError(f"{config.start}: its VAE has another shape than the one to train")

    def init(self, key: Array) -> Params:
        """Fresh parameters, or those of the decoder of `config.start`."""
        if self._start:
            return {name: self._start[name] for name in _DECODER if name in self._start}
        side = self.config.model.stride
        return self._vae.init(key, jnp.zeros((1, 1, side, side, 3)))["params"]

    def _whole(self, params: Params) -> Params:
        """What is trained, with what is not."""
        return {**self._start, **params}

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        """Random clips of random training scenes."""
        return {"frames": self._draw(rng, size, "train")}

    def _draw(
        self, rng: np.random.Generator, count: int, split: Literal["train", "held_out"]
    ) -> np.ndarray:
        return self._draw_clips(rng, count, self.config.frames, self.config.size, split)

    def loss(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """Reconstruction error plus weighted KL (Kingma and Welling, arXiv 1312.6114, eq. 10).

        The error is absolute (sharp), squared (else plain backgrounds would be learned first and
        long), and absolute between neighboring pixels (outlines, which cover few of them).
        """
        params = self._whole(params)
        pixels = to_unit_range(batch["frames"])
        mean, log_variance = self._vae.apply({"params": params}, pixels, method="encode")
        noise = jax.random.normal(key, mean.shape)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        decoded = self._vae.apply({"params": params}, latents, method="decode")
        divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        error = decoded - pixels
        outlines = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
        reconstruction = (jnp.abs(error) + jnp.square(error)).mean() + outlines
        return reconstruction + self.config.kl_weight * divergence.mean()

    def sheet(self, params: Params) -> np.ndarray:
        """Frames `[B, 2 F, H, W, 3]` of held-out scenes, true and reconstructed."""
        frames = self._draw(np.random.default_rng(0), _SHEET_ROWS, "held_out")
        decoded = reconstruct(self.config.model, self._whole(params), frames)
        return np.concatenate([frames, np.asarray(decoded)], 1)

    def export(self, params: Params, folder: Path) -> None:
        """Writes the VAE; the scaling factor of a new one gives scaled latents unit variance."""
        params, factor = self._whole(params), self._scaling_factor
        if factor is None:
            frames = self.batch(np.random.default_rng(0), _SCALE_FRAMES)["frames"]
            mean, _ = self._vae.apply({"params": params}, to_unit_range(frames), method="encode")
            factor = float(1 / jnp.std(mean))
        model = replace(self.config.model, scaling_factor=factor)
        checkpoint.save_component(
            folder, _NAME, model, params, _DESCRIPTION.format(self.config.scenes)
        )


def load_vae(folder: Path) -> tuple[VAEConfig, Params]:
    """The VAE that `VAETask.export` wrote.

    Raises:
      InputError: the folder holds none.
    """

    def shapes(config: VAEConfig) -> Params:
        pixels = jnp.zeros((1, 1, config.stride, config.stride, config.channels))
        return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), pixels)["params"]

    return checkpoint.load_component(folder, _NAME, VAEConfig, shapes)


@functools.partial(jax.jit, static_argnames="config")
def reconstruct(config: VAEConfig, params: Params, video: Array) -> Array:
    """Encodes and decodes uint8 `[B, F, H, W, 3]`."""
    decoded = AutoencoderKL(config).apply({"params": params}, to_unit_range(video))
    return to_bytes(decoded)
