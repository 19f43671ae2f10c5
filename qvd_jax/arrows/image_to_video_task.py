"""Trains image encoder and UNet together on latents of two shapes, as Stable Video Diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.arrows import pixels
from qvd_jax.arrows.scenes import draw_scenes
from qvd_jax.axes import Array, Params
from qvd_jax.diffusion.sampler import add_image
from qvd_jax.diffusion.schedules import SchedulerConfig
from qvd_jax.errors import InputError
from qvd_jax.models.clip import CLIPVisionConfig
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.vae import to_unit_range
from qvd_jax.pipelines.components import DTYPES, ComponentConfigs
from qvd_jax.pipelines.image_to_video import (
    ImageToVideoDefaults,
    ImageToVideoPipeline,
    clip_pixels,
)
from qvd_jax.pipelines.loading import load, save
from qvd_jax.shapes.bank import Draw, load_bank
from qvd_jax.shapes.vae_task import load_vae
from qvd_jax.training.initial import initial_params

_SHEET_VIDEOS = 5


@dataclass(frozen=True)
class ImageToVideoConfig:
    """The image-to-video model and its objective.

    Attributes:
      vae: folder of the trained VAE.
      unet: shape of the UNet.
      image_encoder: shape of the image encoder.
      scheduler: what the result samples with; of it training takes v prediction over continuous
        noise levels, and none of the levels.
      defaults: of the result; frames and size are also those of the training videos.
      start: folder of a trained model whose parameters are taken where the names agree.
      bank_videos: how many videos are encoded before the training and drawn from.
      image_dropout: share of the videos whose image is zeros in both its places (Ho and Salimans,
        arXiv 2207.12598).
      noise_level: mean and standard deviation of the logarithm of sigma (Karras et al.,
        arXiv 2206.00364, table 1).
      image_noise: likewise of the noise on the image's pixels (Blattmann et al.,
        arXiv 2311.15127, appendix D).
      dtype: in which the result is stored.
    """

    vae: str
    unet: UNet3DConfig
    image_encoder: CLIPVisionConfig
    scheduler: SchedulerConfig
    defaults: ImageToVideoDefaults
    start: str | None = None
    bank_videos: int = 16384
    image_dropout: float = 0.1
    noise_level: tuple[float, float] = (0.7, 1.6)
    image_noise: tuple[float, float] = (-3.0, 0.5)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        scheduler = self.scheduler
        if (scheduler.prediction_type, scheduler.timestep_type) != ("v_prediction", "continuous"):
            raise ValueError(
                f"scheduler.prediction_type = {scheduler.prediction_type!r} and timestep_type = "
                f"{scheduler.timestep_type!r}: 'v_prediction' and 'continuous' are needed"
            )
        if self.unet.context_dim != self.image_encoder.projection_size:
            raise ValueError(
                f"unet.context_dim = {self.unet.context_dim}: image_encoder.projection_size = "
                f"{self.image_encoder.projection_size} is needed"
            )
        if self.unet.added_ids != 3:
            raise ValueError(
                f"unet.added_ids = {self.unet.added_ids}: 3 are needed, for frames a second, "
                f"motion and noise"
            )


class ImageToVideo:
    """The task: denoising latents of a bank.

    Attributes:
      config: what is trained.

    Raises:
      InputError: the VAE does not fit the UNet, or there is none.
    """

    def __init__(self, config: ImageToVideoConfig, seed: int) -> None:
        """Loads the VAE and the bank of its latents, which is encoded once."""
        self.config = config
        vae, self._vae_params = load_vae(Path(config.vae))
        # The noisy latents and those of the image, side by side.
        if config.unet.in_channels != 2 * vae.latent_channels:
            raise InputError(
                f"unet.in_channels = {config.unet.in_channels}: {2 * vae.latent_channels} are "
                f"needed, twice the channels of {config.vae}"
            )
        self._components = ComponentConfigs(config.unet, vae, image_encoder=config.image_encoder)
        self._modules = self._components.modules(jnp.float32)
        asked = config.defaults
        if asked.height != asked.width:
            raise InputError(f"defaults: {asked.height}x{asked.width}; scenes are square")
        name = f"bank-{config.bank_videos}-{asked.frames}-{asked.height}-{seed}.npz"
        draw = _draw_videos(asked.frames, asked.height, np.random.default_rng(seed))
        bank = Path(config.vae) / name
        self._bank = load_bank(bank, vae, self._vae_params, config.bank_videos, draw)
        self._start: dict[str, Params] = {}
        if config.start is not None:
            self._start = load(config.start, dtype=jnp.float32).params

    def init(self, key: Array) -> Params:
        """Fresh parameters; those of `config.start` where it has them."""
        modules = {name: self._modules[name] for name in ("unet", "image_encoder")}
        inputs = self._components.example_inputs()
        return initial_params(key, modules, inputs, self._start, f"{self.config.start}")

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        """Random videos of the bank.

        Returns:
          "latents" `[B, F, h, w, C]`, the first frames as "images" uint8 `[B, H, W, 3]` and as
          "seen" by the image encoder, and the motion "buckets" `[B]`.
        """
        chosen = rng.integers(len(self._bank["latents"]), size=size)
        drawn = {name: values[chosen] for name, values in self._bank.items()}
        side = self.config.image_encoder.image_size
        return {**drawn, "seen": np.stack([clip_pixels(x, side) for x in drawn["images"]])}

    def loss(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """Squared error of v at random noise levels.

        With Karras et al.'s weight (arXiv 2206.00364, table 1) at a deviation of the data of one,
        (sigma^2 + 1) / sigma^2, it is the squared error of the clean latents.
        """
        clean = batch["latents"].astype(jnp.float32)
        count = len(clean)
        keys = iter(jax.random.split(key, 6))
        sigma = sample_noise_levels(next(keys), count, *self.config.noise_level)
        strength = sample_noise_levels(next(keys), count, *self.config.image_noise)
        # Both are drawn in rising order.
        strength = jax.random.permutation(next(keys), strength)
        kept = jax.random.bernoulli(next(keys), 1 - self.config.image_dropout, (count,))
        images = to_unit_range(batch["images"])
        images += strength[:, None, None, None] * jax.random.normal(next(keys), images.shape)
        image_latents, _ = self._modules["vae"].apply(
            {"params": self._vae_params}, images[:, None], method="encode"
        )
        embedding = self._modules["image_encoder"].apply(
            {"params": params["image_encoder"]}, batch["seen"]
        )
        context = jnp.where(kept[:, None, None], embedding[:, None], 0.0)
        image_latents = jnp.where(kept[:, None, None, None, None], image_latents, 0.0)

        noise = jax.random.normal(next(keys), clean.shape)
        per_video = sigma[:, None, None, None, None]
        scale = jnp.sqrt(per_video**2 + 1)
        noisy = (clean + per_video * noise) / scale
        fps = jnp.full(count, self.config.defaults.fps - 1.0)
        ids = jnp.stack([fps, batch["buckets"].astype(jnp.float32), strength], axis=-1)
        predicted = self._modules["unet"].apply(
            {"params": params["unet"]},
            add_image(noisy, image_latents),
            jnp.log(sigma) / 4,
            context,
            ids,
        )
        return jnp.square(predicted - (noise - per_video * clean) / scale).mean()

    def pipeline(self, params: Params) -> ImageToVideoPipeline:
        """The model with these parameters, ready to sample."""
        config = self.config
        return ImageToVideoPipeline(
            **self._modules,
            params={**params, "vae": self._vae_params},
            scheduler=config.scheduler,
            defaults=config.defaults,
            family="svd",
            description="arrows, trained by qvd_jax.train",
        )

    def sheet(self, params: Params) -> np.ndarray:
        """Videos of held-out scenes, each rendered and, below, from its first frame."""
        want = self.config.defaults
        rng = np.random.default_rng(0)
        scenes = draw_scenes(rng, _SHEET_VIDEOS, "held_out")
        buckets = np.full(_SHEET_VIDEOS, want.motion_bucket_id)
        rendered = pixels.render(scenes, buckets, rng, want.frames, want.height)
        made = self.pipeline(params)(rendered[:, 0])
        return np.stack([rendered, made], axis=1).reshape(-1, *made.shape[1:])

    def export(self, params: Params, folder: Path) -> None:
        """Writes the model as a checkpoint."""
        dtype = DTYPES[self.config.dtype]
        pipe = self.pipeline(params)
        stored = jax.tree.map(lambda leaf: leaf.astype(dtype), pipe.params)
        save(replace(pipe, params=stored), folder, overwrite=True)


def sample_noise_levels(key: Array, count: int, mean: float, deviation: float) -> Array:
    """Draws noise levels, one in each of `count` equally likely parts: less variance.

    Args:
      key: of the draw.
      count: B.
      mean: of the logarithm (Karras et al., arXiv 2206.00364, table 1).
      deviation: likewise.

    Returns:
      float32 `[B]`, in rising order.
    """
    share = (jnp.arange(count) + jax.random.uniform(key, (count,), minval=1e-3)) / count
    # A share may round to one.
    share = jnp.minimum(share, 1 - 1e-6)
    return jnp.exp(mean + deviation * jax.scipy.stats.norm.ppf(share))


def _draw_videos(frames: int, size: int, rng: np.random.Generator) -> Draw:
    """Renders random training scenes; keeps their first "images" and motion "buckets"."""

    def draw(rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        scenes = draw_scenes(rng, len(rows), "train")
        buckets = rng.integers(pixels.BUCKETS, size=len(rows))
        videos = pixels.render(scenes, buckets, rng, frames, size)
        return videos, {"images": videos[:, 0], "buckets": buckets}

    return draw
