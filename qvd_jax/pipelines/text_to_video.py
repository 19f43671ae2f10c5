"""Text to video: prompts become the UNet's context through tokenizer and text encoder."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion.sampler import Conditions
from qvd_jax.errors import InputError
from qvd_jax.models.clip import CLIPTextEncoder
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.pipeline import (
    OutputType,
    StepCallback,
    VideoDefaults,
    VideoPipeline,
    check_image,
)


@dataclass(frozen=True, kw_only=True)
class TextToVideoPipeline(VideoPipeline[VideoDefaults]):
    """A text-to-video model: AnimateDiff, ModelScope, ZeroScope.

    Attributes:
      text_encoder: maps token ids to the text embedding.
      tokenizer: of transformers.
    """

    text_encoder: CLIPTextEncoder
    tokenizer: Any = field(repr=False)

    networks = ("unet", "vae", "text_encoder")

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        conditioning_frames: Sequence[np.ndarray] = (),
        controlnet_frame_indices: Sequence[int] = (),
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        latents: Array | np.ndarray | None = None,
        output_type: OutputType = "video",
        callback_on_step_end: StepCallback | None = None,
    ) -> np.ndarray:
        """Samples one video for each prompt.

        A video depends on its prompt, the seed and its place among the prompts, not on how many
        there are. Another shape (videos, frames, size, steps, guidance on or off) compiles once;
        other prompts, seeds and guidance scales do not.

        Args:
          prompts: one or more.
          negative_prompts: none, one for all, or one for each prompt.
          conditioning_frames: of a model with a ControlNet, images uint8 `[H, W, 3]`.
          controlnet_frame_indices: which frame each of them is about.
          frames: F; more than the motion modules' positions run in overlapping windows.
          height: H in pixels, divisible by the strides of VAE and UNet.
          width: W in pixels, likewise.
          steps: S.
          guidance_scale: 1 or less samples without guidance.
          seed: of the noise.
          latents: unit-normal noise `[B, F, h, w, C]` instead of the drawn one.
          output_type: "video" or "latents".
          callback_on_step_end: called after each step with the number of finished steps and the
            latents, which it must copy to keep. Without it all steps run as one scan, with it as
            one scan of length one each.

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          InputError: an argument does not fit, before anything is computed; or a step produced
            values that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _negative_prompts(negative_prompts, len(prompts))
        want = self._replace_defaults(
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        self._check_control(conditioning_frames, controlnet_frame_indices, want)
        return self._generate(
            prompts,
            lambda: self.conditions(
                prompts, want, seed, negatives, conditioning_frames, controlnet_frame_indices
            ),
            want,
            seed,
            latents,
            output_type,
            callback_on_step_end,
        )

    def conditions(
        self,
        inputs: Sequence[str],
        want: VideoDefaults,
        seed: int,
        negatives: Sequence[str] | None = None,
        conditioning_frames: Sequence[np.ndarray] = (),
        controlnet_frame_indices: Sequence[int] = (),
    ) -> Conditions:
        """The text embedding of the prompts, behind that of the negative ones where guided."""
        negatives = [""] * len(inputs) if negatives is None else negatives
        text = self.encode_text([*negatives, *inputs] if want.guided else inputs)
        if self.unet.config.controlnet is None:
            return Conditions(text)
        control = self._control(conditioning_frames, controlnet_frame_indices, want, seed)
        return Conditions(text, control=control)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.text_encoder.config.max_length

    @property
    def configs(self) -> ComponentConfigs:
        """Of UNet, VAE and text encoder."""
        return ComponentConfigs(
            self.unet.config, self.vae.config, text_encoder=self.text_encoder.config
        )

    def _check_control(
        self, images: Sequence[np.ndarray], indices: Sequence[int], want: VideoDefaults
    ) -> None:
        """Raises `InputError` if the conditions do not fit the model or the video."""
        if (self.unet.config.controlnet is not None) != bool(images):
            raise InputError(
                "the model has a ControlNet, whose conditioning_frames are missing"
                if not images
                else "conditioning_frames were given, the model has no ControlNet"
            )
        if len(images) != len(indices) or len(set(indices)) != len(indices):
            raise InputError(
                f"controlnet_frame_indices = {list(indices)}: a frame of its own is needed for "
                f"each of the {len(images)} conditioning_frames"
            )
        for image, index in zip(images, indices, strict=True):
            if not 0 <= index < want.frames:
                raise InputError(f"there is no frame {index} of {want.frames} (0 is the first)")
            check_image(image, want.height, want.width, f"the condition of frame {index}")

    def _control(
        self,
        images: Sequence[np.ndarray],
        indices: Sequence[int],
        want: VideoDefaults,
        seed: int,
    ) -> Array:
        """The ControlNet's input `[1, F, H, W, C]`: images, zeros between them, and a mask."""
        pixels = np.stack(images).astype(np.float32) / 255
        latents = self.latents_shape(want.frames, want.height, want.width)
        shape = self.configs.control_shape(*latents[:3])
        # With the size of the latents it is latents that are asked for.
        if shape[2:4] != latents[1:3]:
            content = jnp.asarray(pixels)
        else:
            mean, log_variance = self.encode(2 * pixels - 1)
            # No video's stream: they share the images.
            key = jax.random.fold_in(jax.random.key(seed), np.iinfo(np.uint32).max)
            noise = jax.random.normal(key, mean.shape)
            content = (mean + jnp.exp(log_variance / 2) * noise) * self.vae.config.scaling_factor
        content = jnp.concatenate([content, jnp.ones_like(content[..., :1])], axis=-1)
        return jnp.zeros(shape).at[0, jnp.asarray(indices)].set(content)

    def encode_text(self, prompts: Sequence[str]) -> Array:
        """Text embedding `[B, L, C]` of the prompts, padded and cut to the tower's length.

        Raises:
          InputError: there is no prompt.
        """
        if not prompts:
            raise InputError("there are no prompts; at least one is needed")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_length,
            return_tensors="np",
        )
        ids = jnp.asarray(tokens["input_ids"], jnp.int32)
        return _encode_text(self.text_encoder, self.params["text_encoder"], ids)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words the tokenizer can only replace by its unknown token, as they are written."""
        tokenizer = self.tokenizer
        tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        return [
            prompt[start:end]
            for token, (start, end) in zip(
                tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
            if token == tokenizer.unk_token_id
        ]


@functools.partial(jax.jit, static_argnames="encoder")
def _encode_text(encoder: CLIPTextEncoder, params: Params, ids: Array) -> Array:
    # Prompt by prompt: what one is embedded as must not depend on the others, even in rounding.
    return jax.lax.map(lambda row: encoder.apply({"params": params}, row[None])[0], ids)


def _negative_prompts(given: str | Sequence[str] | None, count: int) -> list[str]:
    negatives = [given or ""] if given is None or isinstance(given, str) else list(given)
    if len(negatives) == 1:
        negatives *= count
    if len(negatives) != count:
        raise InputError(
            f"{len(negatives)} negative prompts for {count} prompts: none, one, or one for each "
            f"is needed"
        )
    return negatives
