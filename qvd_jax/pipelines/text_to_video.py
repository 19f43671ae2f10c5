"""Text to video: prompts become the UNet's context through tokenizer and text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array
from qvd_jax.diffusion.sampler import Conditions
from qvd_jax.errors import InputError
from qvd_jax.pipelines.pipeline import (
    OutputType,
    StepCallback,
    VideoDefaults,
    check_image,
)
from qvd_jax.pipelines.text import TextPipeline


@dataclass(frozen=True, kw_only=True)
class TextToVideoPipeline(TextPipeline):
    """A text-to-video model: AnimateDiff, ModelScope, ZeroScope."""

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
          height: H in pixels, a multiple of the VAE's stride.
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
        if (self.unet.config.controlnet is not None) != bool(len(conditioning_frames)):
            raise InputError(
                "conditioning_frames were given, the model has no ControlNet"
                if len(conditioning_frames)
                else "the model has a ControlNet, whose conditioning_frames are missing"
            )
        check_conditions(conditioning_frames, controlnet_frame_indices, want)
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


def check_conditions(
    images: Sequence[np.ndarray], indices: Sequence[int], want: VideoDefaults
) -> None:
    """Raises `InputError` if images, or the frames they are about, do not fit a video."""
    if len(images) != len(indices) or len(set(indices)) != len(indices):
        raise InputError(
            f"controlnet_frame_indices = {list(indices)}: a frame of its own is needed for "
            f"each of the {len(images)} conditioning_frames"
        )
    for image, index in zip(images, indices, strict=True):
        if not 0 <= index < want.frames:
            raise InputError(f"there is no frame {index} of {want.frames} (0 is the first)")
        check_image(image, want.height, want.width, f"the condition of frame {index}")


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
