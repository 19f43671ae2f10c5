"""Text to video: prompts become the UNet's context through tokenizer and text encoder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qvd_jax.axes import Array
from qvd_jax.config import check_finite, check_integer
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions
from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig
from qvd_jax.pipelines import autoencoder
from qvd_jax.pipelines.arguments import by_either_name
from qvd_jax.pipelines.images import Images, check_image, to_arrays
from qvd_jax.pipelines.pipeline import (
    OutputType,
    StepCallback,
    VideoDefaults,
)
from qvd_jax.pipelines.text import TextPipeline, Texts, read_texts

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextToVideoPipeline(TextPipeline):
    """A text-to-video model: AnimateDiff, ModelScope, ZeroScope."""

    @by_either_name
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        conditioning_frames: Images = (),
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
        prompt_embeds: ArrayLike | None = None,
        negative_prompt_embeds: ArrayLike | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        indices: Sequence[int] | None = None,
        mesh: MeshConfig | None = None,
    ) -> np.ndarray:
        """Samples one video for each prompt.

        A video depends on its prompt, the seed and its place among the prompts, not on how many
        there are. Another shape (videos, frames, size, steps, guidance on or off) compiles once;
        other prompts, seeds and guidance scales do not.

        Args:
          prompts: one or more; the words of each that are cut are named in the log.
          negative_prompts: none, one for all, or one for each prompt.
          conditioning_frames: of a model with a ControlNet, images uint8 `[H, W, 3]` or
            Pillow's: one for each frame, or those of some frames for SparseCtrl.
          controlnet_frame_indices: which frame each of SparseCtrl's is about.
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
          prompt_embeds: text embeddings `[B, L, C]` in the prompts' place, of any length L.
          negative_prompt_embeds: the same in the negative prompts' place, or `[1, L, C]` for all.
          controlnet_conditioning_scale: factor of what the ControlNet adds.
          control_guidance_start: share of the steps before the first to which it adds.
          control_guidance_end: share of the steps up to the last to which it adds.
          indices: of the videos among those of a larger run, by which their noise is drawn; None
            counts from 0.
          mesh: how the work divides over the devices, as of `VideoPipeline.__call__`.

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          InputError: an argument does not fit, before anything is computed; or a step produced
            values that are not finite.
        """
        channels = self.unet.config.context_dim
        inputs = read_texts(prompts, prompt_embeds, "prompt_embeds", channels)
        if inputs is None or not len(inputs):
            raise InputError("there are no prompts; prompts or prompt_embeds are needed")
        negated = read_texts(
            negative_prompts, negative_prompt_embeds, "negative_prompt_embeds", channels
        )
        negatives = _for_all(negated, len(inputs))
        _check_lengths(inputs, negatives, self.context_length)
        want = self.wanted(
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        if negated is not None and any(map(len, negated)) and not want.guided:
            _logger.warning(
                "negative prompts have no effect at guidance_scale = %g; more than 1 is needed",
                want.guidance_scale,
            )
        scale = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        images = to_arrays(conditioning_frames, "conditioning_frames")
        controlnet = self.unet.config.controlnet
        shown = as_frames(controlnet_frame_indices)
        if controlnet is None:
            _refuse_control(images, shown, scale)
        else:
            if not images:
                raise InputError(
                    "the model has a ControlNet, whose conditioning_frames are missing"
                )
            check_scale(*scale)
            if controlnet.ignores_latents:
                check_control_images(images, shown, want)
                self._note_unguided(shown, want)
            else:
                check_control_video(images, shown, want)
        return self._generate(
            list(inputs),
            lambda: self.conditions(
                inputs,
                want,
                seed,
                negatives,
                images,
                shown,
                *scale,
            ),
            want,
            seed,
            latents,
            output_type,
            callback_on_step_end,
            indices,
            mesh,
        )

    def conditions(
        self,
        inputs: Sequence[Any] | np.ndarray,
        want: VideoDefaults,
        seed: int,
        negatives: Texts | None = None,
        conditioning_frames: Images = (),
        controlnet_frame_indices: Sequence[int] = (),
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        *,
        indices: Sequence[int] | None = None,
    ) -> Conditions:
        """The embedding of the texts, behind that of the negative ones where guided."""
        text = self.embed(inputs)
        if want.guided:
            negative = self.embed(_for_all(negatives, len(inputs)), text.shape[1])
            text = jnp.concatenate([negative, text])
        controlnet = self.unet.config.controlnet
        if controlnet is None:
            return Conditions(text)
        images = to_arrays(conditioning_frames, "conditioning_frames")
        if controlnet.ignores_latents:
            control = self._control(images, controlnet_frame_indices, want, seed)
        else:
            control = jnp.asarray(np.stack(images)[None], jnp.float32) / 255
        # As in diffusers a step counts if all of it lies between the two shares.
        steps = len(self.schedule(want.steps).table.timestep)
        index = np.arange(steps)
        adds = (index / steps >= control_guidance_start) & (
            (index + 1) / steps <= control_guidance_end
        )
        scale = jnp.asarray(controlnet_conditioning_scale * adds, jnp.float32)
        return Conditions(text, control=control, control_scale=scale)

    def _note_unguided(self, indices: Sequence[int], want: VideoDefaults) -> None:
        """Says which frames are in no window with an image: nothing ties them to it."""
        windows = sampler.window_frames(want.frames, self.window(want.frames))
        guided = np.isin(windows, indices).any(1)
        alone = sorted(set(windows[~guided].ravel()) - set(windows[guided].ravel()))
        if alone:
            _logger.warning(
                "frames %d to %d are in no window with a conditioning frame, so none guides them; "
                "give one for each %d frames",
                alone[0],
                alone[-1],
                windows.shape[1],
            )

    def _control(
        self,
        images: Sequence[np.ndarray],
        indices: Sequence[int],
        want: VideoDefaults,
        seed: int,
    ) -> Array:
        """SparseCtrl's input `[1, F, H, W, C]`: images, zeros between them, and a mask."""
        pixels = np.stack(images).astype(np.float32) / 255
        latents = self.latents_shape(want.frames, want.height, want.width)
        shape = self.configs.control_shape(*latents[:3])
        # With the size of the latents it is latents that are asked for.
        if shape[2:4] != latents[1:3]:
            content = jnp.asarray(pixels)
        else:
            posterior = self.encode(2 * pixels - 1)
            scaling_factor = self.vae.config.scaling_factor
            content = autoencoder.draw_latents(*posterior, control_key(seed), scaling_factor)
        content = jnp.concatenate([content, jnp.ones_like(content[..., :1])], axis=-1)
        return jnp.zeros(shape).at[0, jnp.asarray(indices)].set(content)


def control_key(seed: int | Array) -> Array:
    """The random key of SparseCtrl's images: of no video's stream, for all videos share them."""
    return jax.random.fold_in(jax.random.key(seed), np.iinfo(np.uint32).max)


def as_frames(indices: Any) -> list[int]:
    """Which frames SparseCtrl's images are about, as integers.

    Raises:
      InputError: they are no list, or one is no integer.
    """
    name = "controlnet_frame_indices"
    try:
        found = list(indices)
    except TypeError as error:
        raise InputError(f"{name} = {indices!r}: a list of frames is needed") from error
    return [check_integer(f"{name}[{i}]", index) for i, index in enumerate(found)]


def _refuse_control(
    images: Sequence[np.ndarray], indices: Sequence[int], scale: tuple[float, float, float]
) -> None:
    """Raises `InputError` for what a model without a ControlNet was given for one."""
    given = {
        "conditioning_frames": len(images) > 0,
        "controlnet_frame_indices": len(indices) > 0,
        "controlnet_conditioning_scale": scale[0] != 1,
        "control_guidance_start": scale[1] != 0,
        "control_guidance_end": scale[2] != 1,
    }
    names = " and ".join(name for name, is_given in given.items() if is_given)
    if names:
        raise InputError(f"{names} given, but the model has no ControlNet")


def check_control_images(
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


def check_control_video(
    images: Sequence[np.ndarray], indices: Sequence[int], want: VideoDefaults
) -> None:
    """Raises `InputError` unless there is an image of the video's size for each of its frames."""
    if len(indices):
        raise InputError(
            "controlnet_frame_indices are SparseCtrl's; this ControlNet is told of every frame"
        )
    if len(images) != want.frames:
        raise InputError(
            f"the ControlNet is told of every frame: {len(images)} conditioning frames were given "
            f"for a video of {want.frames}"
        )
    for number, image in enumerate(images):
        check_image(image, want.height, want.width, f"conditioning frame {number}")


def check_scale(scale: float, start: float, end: float) -> None:
    """Raises `InputError` if a ControlNet cannot be weighed so.

    Args:
      scale: factor of what it adds.
      start: share of the steps before the first to which it adds.
      end: share of the steps up to the last to which it adds.
    """
    check_finite("controlnet_conditioning_scale", scale)
    check_finite("control_guidance_start", start)
    check_finite("control_guidance_end", end)
    if not 0 <= start < end <= 1:
        raise InputError(
            f"control_guidance_start = {start:g}, control_guidance_end = {end:g}: shares of the "
            f"steps are needed, 0 <= start < end <= 1"
        )


def _for_all(negatives: Texts | None, count: int) -> Texts:
    """A negative for each of some inputs: none, one for all, or one for each are given."""
    if negatives is None:
        return [""] * count
    if len(negatives) == 1:
        if isinstance(negatives, np.ndarray):
            return negatives.repeat(count, 0)
        return [*negatives] * count
    if len(negatives) != count:
        raise InputError(
            f"{len(negatives)} negative prompts for {count} prompts: none, one, or one for each "
            f"is needed"
        )
    return negatives


def _check_lengths(inputs: Texts, negatives: Texts, limit: int) -> None:
    """Raises `InputError` if inputs and negatives cannot have the same number of tokens.

    Args:
      inputs: prompts or embeddings.
      negatives: prompts, which the encoder can pad to any length up to its limit, or embeddings.
      limit: tokens of a prompt.
    """
    tokens = inputs.shape[1] if isinstance(inputs, np.ndarray) else limit
    if isinstance(negatives, np.ndarray):
        if negatives.shape[1] != tokens:
            raise InputError(
                f"negative_prompt_embeds of {negatives.shape[1]} tokens for {tokens} tokens of the "
                f"prompts: as many are needed"
            )
    elif tokens > limit:
        raise InputError(
            f"prompt_embeds of {tokens} tokens: the text encoder makes {limit} of a negative "
            f"prompt; negative_prompt_embeds of {tokens} are needed"
        )
