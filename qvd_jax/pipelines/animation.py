"""Animation: a person's image moves as a motion video does (MagicAnimate)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array
from qvd_jax.diffusion.sampler import Conditions, Videos
from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.vae import to_unit_range
from qvd_jax.pipelines import autoencoder
from qvd_jax.pipelines.arguments import by_either_name
from qvd_jax.pipelines.images import Images, check_image, check_images, to_arrays
from qvd_jax.pipelines.pipeline import (
    OutputType,
    StepCallback,
    VideoDefaults,
)
from qvd_jax.pipelines.text import TextPipeline


@dataclass(frozen=True, kw_only=True)
class AnimationPipeline(TextPipeline):
    """An animation model: MagicAnimate (Xu et al., arXiv 2311.16498). Its text is empty.

    The UNet always sees the default's number of frames, which it was trained on. A video of another
    number is sampled longer, its last pose held until the windows are whole, and then cut.
    """

    closed_windows = True

    @by_either_name
    def __call__(
        self,
        images: Images,
        motion_video: Images = (),
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        latents: Array | np.ndarray | None = None,
        output_type: OutputType = "video",
        callback_on_step_end: StepCallback | None = None,
        indices: Sequence[int] | None = None,
        mesh: MeshConfig | None = None,
    ) -> np.ndarray:
        """Samples one video for each image, all of the same motion.

        A video depends on its image, the motion, the seed and its place among the images, not on
        how many there are.

        Args:
          images: one or more, uint8 `[H, W, 3]` each, or Pillow's.
          motion_video: the DensePose rendering of a video, uint8 `[F, H, W, 3]`; frames past F
            are left out.
          frames: F; up to a multiple of the default are sampled, in windows that overlap by a
            quarter.
          height: H in pixels, that of images and motion; a multiple of the VAE's stride.
          width: W in pixels, likewise.
          steps: S.
          guidance_scale: 1 or less samples without guidance.
          seed: of the noise.
          latents: unit-normal noise `[B, F, h, w, C]` instead of the drawn one, of all frames that
            are sampled.
          output_type: "video" or "latents".
          callback_on_step_end: called after each step with the number of finished steps and the
            latents of all frames that are sampled, which it must copy to keep.
          indices: of the videos among those of a larger run, by which their noise is drawn; None
            counts from 0.
          mesh: how the work divides over the devices, as of `VideoPipeline.__call__`.

        Returns:
          uint8 `[B, F, H, W, 3]`, or float32 `[B, F, h, w, C]` latents.

        Raises:
          InputError: an argument does not fit, before anything is computed; or a step produced
            values that are not finite.
        """
        want = self.wanted(
            frames=frames, height=height, width=width, steps=steps, guidance_scale=guidance_scale
        )
        images = check_images(images, want.height, want.width)
        motion = to_arrays(motion_video, "motion_video")
        check_motion(motion, want)
        return self._generate(
            images,
            lambda: self.conditions(images, want, seed, motion),
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
        inputs: Sequence[np.ndarray],
        want: VideoDefaults,
        seed: int,
        motion_video: Images = (),
        *,
        indices: Sequence[int] | None = None,
    ) -> Conditions:
        """An empty text, the latents of the images, and the motion."""
        motion = to_arrays(motion_video, "motion_video")
        text = self.encode_text([""])
        text = jnp.repeat(text, len(inputs) * (1 + want.guided), axis=0)
        images = [to_unit_range(image) for image in to_arrays(inputs, "images")]
        means = autoencoder.encode_each(self.vae, self.params["vae"], images)
        sampled, *_ = self.latents_shape(want.frames, want.height, want.width)
        poses = np.stack([motion[min(frame, want.frames - 1)] for frame in range(sampled)])
        return Conditions(
            text,
            control=jnp.asarray(poses[None], jnp.float32) / 255,
            reference=means[:, None] * self.vae.config.scaling_factor,
        )

    @classmethod
    def window_of(cls, unet: UNet3DConfig, defaults: VideoDefaults, frames: int) -> int:
        """The default's number of frames, whatever a video has."""
        return super().window_of(unet, defaults, defaults.frames)

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """As of every pipeline, of whole windows."""
        frames, height, width, channels = super().latents_shape(frames, height, width)
        window = self.window(frames)
        return window * math.ceil(frames / window), height, width, channels

    def initial_noise(self, seed: int | Array, videos: Videos, shape: tuple[int, ...]) -> Array:
        """Noise of one window, repeated over the video."""
        frames = shape[0]
        window = self.window(frames)
        noise = super().initial_noise(seed, videos, (window, *shape[1:]))
        return jnp.take(noise, np.arange(frames) % window, axis=1)


def check_motion(motion_video: Sequence[np.ndarray], want: VideoDefaults) -> None:
    """Raises `InputError` if a motion video is missing, too short or of another size."""
    if not motion_video:
        raise InputError("there is no motion video; one is needed")
    if len(motion_video) < want.frames:
        raise InputError(
            f"the motion video has {len(motion_video)} frames, {want.frames} are asked for"
        )
    for frame in motion_video[: want.frames]:
        check_image(frame, want.height, want.width, "the motion video")
