"""Trains text encoder and UNet together on latents of the moving shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion.schedules import SchedulerConfig, alphas_cumprod
from qvd_jax.errors import InputError
from qvd_jax.models.clip import CLIPTextConfig
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.pipelines.components import DTYPES, ComponentConfigs
from qvd_jax.pipelines.loading import load, save
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.shapes import pixels
from qvd_jax.shapes.bank import Draw, load_bank
from qvd_jax.shapes.prompts import prompt_of
from qvd_jax.shapes.scenes import ATTRIBUTES, scenes_of
from qvd_jax.shapes.tokenizer import make_tokenizer
from qvd_jax.shapes.vae_task import load_vae
from qvd_jax.training.initial import initial_params

_SHEET_VIDEOS = 8


@dataclass(frozen=True)
class TextToVideoConfig:
    """The text-to-video model and its objective.

    Attributes:
      vae: folder of the trained VAE.
      unet: shape of the UNet; without a `temporal_op` it learns single frames.
      text_encoder: shape of the text encoder.
      scheduler: noise schedule, and the solver the result samples with.
      defaults: of the result; `frames` is also F of the training videos.
      start: folder of a trained model whose parameters are taken where the names agree; what it
        lacks starts fresh, as AnimateDiff's motion modules do on an image model. The levels of a
        shallower UNet become the upper ones.
      bank_videos: how many videos are encoded before the training and drawn from.
      only: train on the videos of the bank whose plain prompt has each of these phrases.
      prompt_dropout: share of the examples whose prompt is empty (Ho and Salimans,
        arXiv 2207.12598).
      word_dropout: share of the words that are replaced by the unknown one.
      snr_range: the squared error of the clean latents a prediction implies is weighted by the
        SNR, kept within this range: its upper end is gamma of Hang et al., arXiv 2303.09556,
        section 3.4; its lower end gives weight to what is decided under much noise.
      mean_below_snr: below this SNR the target is the mean of the bank's videos of the same size,
        color, motion and background. So much noise leaves nearly nothing of one video, and the
        expectation given the noisy latents, which the squared error asks for, is nearly that of
        the prompt alone; the mean estimates it with a fraction of one video's variance.
      timestep_density: mean and standard deviation of the logit of the timesteps, as shares of
        the schedule (Esser et al., arXiv 2403.03206, section 3.1); without it they are uniform.
      dtype: in which the result is stored.
    """

    vae: str
    unet: UNet3DConfig
    text_encoder: CLIPTextConfig
    scheduler: SchedulerConfig
    defaults: VideoDefaults
    start: str | None = None
    bank_videos: int = 16384
    only: tuple[str, ...] = ()
    prompt_dropout: float = 0.1
    word_dropout: float = 0.02
    snr_range: tuple[float, float] = (0.0, 5.0)
    mean_below_snr: float = 0.0
    timestep_density: tuple[float, float] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class TextToVideo:
    """The task: denoising latents of a bank.

    Attributes:
      config: what is trained.
    """

    def __init__(self, config: TextToVideoConfig, seed: int) -> None:
        """Loads the VAE and the bank of its latents, which is encoded once."""
        self.config = config
        vae, self._vae_params = load_vae(Path(config.vae))
        self._components = ComponentConfigs(config.unet, vae, config.text_encoder)
        self._modules = self._components.modules(jnp.float32)
        self._tokenizer = make_tokenizer()
        if len(self._tokenizer) != config.text_encoder.vocab_size:
            raise InputError(
                f"text_encoder.vocab_size = {config.text_encoder.vocab_size}: the tokenizer has "
                f"{len(self._tokenizer)} words"
            )
        # 16 frames always: a single frame is drawn from a whole video.
        bank = Path(config.vae) / f"bank-{config.bank_videos}-{seed}.npz"
        draw = _draw_videos(config.bank_videos, seed)
        stored = load_bank(bank, vae, self._vae_params, config.bank_videos, draw)
        self._scenes, self._latents = stored["scenes"], stored["latents"]
        frames, side = self._latents.shape[1], self._latents.shape[2] * vae.stride
        asked = config.defaults
        if asked.frames > frames or (asked.height, asked.width) != (side, side):
            raise InputError(
                f"defaults: {asked.frames} frames of {asked.height}x{asked.width}; the training "
                f"videos have {frames} of {side}x{side}"
            )
        if config.only:
            kept = [
                all(phrase in prompt_of(scene) for phrase in config.only) for scene in self._scenes
            ]
            if not any(kept):
                raise InputError(f"only = {config.only}: no prompt of the bank has all of them")
            self._scenes, self._latents = self._scenes[kept], self._latents[kept]
        if config.mean_below_snr > 0:
            self._groups, self._means = _group_means(self._scenes, self._latents)
        self._start: dict[str, Params] = {}
        if config.start is not None:
            pipe = load(config.start, dtype=jnp.float32)
            have, want = (len(unet.block_channels) for unet in (pipe.unet.config, config.unet))
            if have > want:
                raise InputError(
                    f"{config.start}: its UNet has {have} levels, the one to train has {want}"
                )
            unet = _add_levels(pipe.params["unet"], want - have)
            self._start = {**pipe.params, "unet": unet}
        self._alphas = jnp.asarray(alphas_cumprod(config.scheduler), jnp.float32)

    def init(self, key: Array) -> Params:
        """Fresh parameters; those of `config.start` where it has them."""
        modules = {name: self._modules[name] for name in ("unet", "text_encoder")}
        inputs = self._components.example_inputs()
        return initial_params(key, modules, inputs, self._start, f"{self.config.start}")

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        """Latents `[B, F, h, w, C]` of random videos of the bank, and token ids `[B, L]`.

        With `mean_below_snr` also "means", the targets there, of the latents' shape.
        """
        chosen = rng.integers(len(self._scenes), size=size)
        latents = {"latents": self._latents[chosen]}
        if self.config.mean_below_snr > 0:
            latents["means"] = self._means[self._groups[chosen]]
        frames, every = self.config.defaults.frames, self._latents.shape[1]
        if frames < every:
            first = rng.integers(every - frames + 1, size=size)
            place = np.arange(size)[:, None], first[:, None] + np.arange(frames)
            latents = {name: videos[place] for name, videos in latents.items()}
        prompts = [self._prompt(scene, rng) for scene in self._scenes[chosen]]
        ids = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self.config.text_encoder.max_length,
            return_tensors="np",
        )["input_ids"].astype(np.int32)
        known = ids > max(self._tokenizer.all_special_ids)
        dropped = known & (rng.random(ids.shape) < self.config.word_dropout)
        ids = np.where(dropped, self._tokenizer.unk_token_id, ids)
        return {**latents, "token_ids": ids}

    def _prompt(self, scene: np.ndarray, rng: np.random.Generator) -> str:
        text = prompt_of(scene, rng)
        return "" if rng.random() < self.config.prompt_dropout else text

    def loss(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """`clean_error` of noised latents at random timesteps."""
        clean = batch["latents"].astype(jnp.float32)
        noise_key, step_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        timesteps = sample_timesteps(
            step_key, len(clean), len(self._alphas), self.config.timestep_density
        )
        alpha = self._alphas[timesteps]
        per_video = alpha[:, None, None, None, None]
        noisy = jnp.sqrt(per_video) * clean + jnp.sqrt(1 - per_video) * noise
        context = self._modules["text_encoder"].apply(
            {"params": params["text_encoder"]}, batch["token_ids"]
        )
        predicted = self._modules["unet"].apply(
            {"params": params["unet"]}, noisy, timesteps.astype(jnp.float32), context
        )
        snr = alpha / (1 - alpha)
        if "means" in batch:
            means = batch["means"].astype(jnp.float32)
            is_lost = (snr < self.config.mean_below_snr)[:, None, None, None, None]
            clean = jnp.where(is_lost, means, clean)
        prediction_type = self.config.scheduler.prediction_type
        error = clean_error(predicted, clean, noise, alpha, prediction_type)
        return (error * jnp.clip(snr, *self.config.snr_range)).mean()

    def pipeline(self, params: Params) -> TextToVideoPipeline:
        """The model with these parameters, ready to sample."""
        config = self.config
        return TextToVideoPipeline(
            **self._modules,
            params={**params, "vae": self._vae_params},
            tokenizer=self._tokenizer,
            scheduler=config.scheduler,
            defaults=config.defaults,
            family="animatediff",
            description="moving shapes, trained by qvd_jax.train",
        )

    def sheet(self, params: Params) -> np.ndarray:
        """Videos of held-out prompts."""
        return self.pipeline(params)(sheet_prompts())

    def export(self, params: Params, folder: Path) -> None:
        """Writes the model as a checkpoint."""
        dtype = DTYPES[self.config.dtype]
        pipe = self.pipeline(params)
        stored = jax.tree.map(lambda leaf: leaf.astype(dtype), pipe.params)
        save(replace(pipe, params=stored), folder, overwrite=True)


def clean_error(
    predicted: Array, clean: Array, noise: Array, alpha: Array, prediction_type: str
) -> Array:
    """Squared error of the clean latents that a prediction implies.

    For `epsilon`, times the SNR, it is the simple loss of Ho et al., arXiv 2006.11239, eq. 14.

    Args:
      predicted: `[B, F, h, w, C]`, the noise (`epsilon`), v (`v_prediction`; Salimans and Ho,
        arXiv 2202.00512, appendix D) or the clean latents (`sample`).
      clean: latents `[B, F, h, w, C]`.
      noise: like `clean`.
      alpha: cumulative product of alphas `[B]`, the share of the clean latents' variance.
      prediction_type: as in the scheduler.

    Returns:
      Mean of each video, `[B]`.
    """
    if prediction_type == "epsilon":
        target, implied = noise, (1 - alpha) / alpha
    elif prediction_type == "sample":
        target, implied = clean, jnp.ones_like(alpha)
    else:
        share = alpha[:, None, None, None, None]
        target, implied = jnp.sqrt(share) * noise - jnp.sqrt(1 - share) * clean, 1 - alpha
    return implied * jnp.square(predicted - target).mean((1, 2, 3, 4))


def sample_timesteps(
    key: Array, count: int, timesteps: int, density: tuple[float, float] | None
) -> Array:
    """Draws training timesteps, one in each of `count` equally likely parts: less variance.

    Args:
      key: of the draw.
      count: B.
      timesteps: T of the schedule.
      density: mean and standard deviation of the logit of t / T (Esser et al., arXiv 2403.03206,
        section 3.1); None is uniform.

    Returns:
      int32 `[B]` in [0, T), in rising order.
    """
    share = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    if density is not None:
        mean, deviation = density
        share = jax.nn.sigmoid(mean + deviation * jax.scipy.stats.norm.ppf(share))
    # A share may round to one.
    return jnp.minimum(share * timesteps, timesteps - 1).astype(jnp.int32)


def sheet_prompts() -> list[str]:
    """Plain prompts of the first held-out scenes."""
    return [prompt_of(s) for s in scenes_of("held_out")[:_SHEET_VIDEOS]]


def _group_means(scenes: np.ndarray, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group `[N]` of each scene `[N, 5]`, all but its shape, and the groups' mean latents."""
    others = [i for i, name in enumerate(ATTRIBUTES) if name != "shape"]
    _, groups = np.unique(scenes[:, others], axis=0, return_inverse=True)
    totals = np.zeros((groups.max() + 1, *latents.shape[1:]), np.float32)
    np.add.at(totals, groups, latents)
    return groups, totals / np.bincount(groups)[:, None, None, None, None]


def _draw_videos(count: int, seed: int) -> Draw:
    """Renders rows of a bank of random training scenes; keeps the "scenes" `[N, 5]`."""
    rng = np.random.default_rng([seed, count])
    every = scenes_of("train")
    scenes = every[rng.integers(len(every), size=count)]
    return lambda rows: (pixels.render(scenes[rows], rng), {"scenes": scenes[rows]})


def _add_levels(params: Params, count: int) -> Params:
    """Names a UNet's stages as in one with more levels below, where its mid block has no place."""
    if not count:
        return params
    return {
        re.sub(r"(?<=^up_blocks_)\d+", lambda match: str(int(match[0]) + count), name): stage
        for name, stage in params.items()
        if name != "mid_block"
    }
