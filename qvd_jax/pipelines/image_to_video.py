"""Image to video: an image becomes the UNet's context and part of its input (2311.15127)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax.axes import Array, Params
from qvd_jax.diffusion import sampler
from qvd_jax.diffusion.sampler import Conditions
from qvd_jax.errors import InputError
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.clip import CLIPVisionEncoder
from qvd_jax.models.vae import to_unit_range
from qvd_jax.pipelines import autoencoder
from qvd_jax.pipelines.arguments import by_either_name
from qvd_jax.pipelines.components import ComponentConfigs
from qvd_jax.pipelines.images import Images, check_images, to_arrays
from qvd_jax.pipelines.pipeline import (
    OutputType,
    StepCallback,
    VideoDefaults,
    VideoPipeline,
)
from qvd_jax.programs import program

# Of the images CLIP was trained on.
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
CLIP_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class ImageToVideoDefaults(VideoDefaults):
    """What a video from an image is like when nobody asks otherwise.

    Attributes:
      guidance_scale: of the last frame; where both are 1 or less there is no guidance.
      min_guidance_scale: of the first frame; those between are spaced evenly.
      motion_bucket_id: how much motion the model is told to make, 0 to 255.
      noise_aug_strength: standard deviation of noise added to the image's pixels in [-1, 1].
    """

    frames: int = 14
    height: int = 576
    width: int = 1024
    guidance_scale: float = 3.0
    fps: int = 7
    min_guidance_scale: float = 1.0
    motion_bucket_id: int = 127
    noise_aug_strength: float = 0.02

    @property
    def guided(self) -> bool:
        """Whether there is guidance at any frame."""
        return max(self.guidance_scale, self.min_guidance_scale) > 1


@dataclass(frozen=True, kw_only=True)
class ImageToVideoPipeline(VideoPipeline[ImageToVideoDefaults]):
    """An image-to-video model: Stable Video Diffusion.

    Attributes:
      image_encoder: maps the image to its embedding.
    """

    image_encoder: CLIPVisionEncoder

    networks = ("unet", "vae", "image_encoder")

    @by_either_name
    def __call__(
        self,
        images: Images,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        min_guidance_scale: float | None = None,
        fps: int | None = None,
        motion_bucket_id: int | None = None,
        noise_aug_strength: float | None = None,
        seed: int = 0,
        latents: Array | np.ndarray | None = None,
        output_type: OutputType = "video",
        callback_on_step_end: StepCallback | None = None,
        indices: Sequence[int] | None = None,
        mesh: MeshConfig | None = None,
    ) -> np.ndarray:
        """Samples one video for each image, which it begins with.

        A video depends on its image, the seed and its place among the images, not on how many
        there are. Another shape (videos, frames, size, steps, guidance on or off) compiles once.

        Args:
          images: one or more, uint8 `[H, W, 3]` each, or Pillow's.
          frames: F.
          height: H in pixels, the images'; a multiple of the VAE's stride.
          width: W in pixels, likewise.
          steps: S.
          guidance_scale: of the last frame; where both are 1 or less there is no guidance.
          min_guidance_scale: of the first frame.
          fps: frames per second the model is told.
          motion_bucket_id: how much motion the model is told to make, 0 to 255.
          noise_aug_strength: standard deviation of noise added to the image.
          seed: of all noise.
          latents: unit-normal noise `[B, F, h, w, C]` instead of the drawn one.
          output_type: "video" or "latents".
          callback_on_step_end: called after each step with the number of finished steps and the
            latents, which it must copy to keep.
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
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
            min_guidance_scale=min_guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
        )
        images = check_images(images, want.height, want.width)
        for name in ("motion_bucket_id", "noise_aug_strength"):
            if getattr(want, name) < 0:
                raise InputError(f"{name} = {getattr(want, name):g}: it must be 0 or more")
        return self._generate(
            images,
            lambda: self.conditions(images, want, seed, indices=indices),
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
        want: ImageToVideoDefaults,
        seed: int,
        *,
        indices: Sequence[int] | None = None,
    ) -> Conditions:
        """Embedding and latents of the images, behind zeros where guided; and the added ids."""
        keys = sampler.video_keys(seed, len(inputs) if indices is None else indices)
        embeddings, shown = [], []
        for image, key in zip(to_arrays(inputs, "images"), keys, strict=True):
            pixels = to_unit_range(image)
            seen = clip_pixels(image, self.image_encoder.config.image_size)
            embeddings.append(embed_image(self.image_encoder, self.params["image_encoder"], seen))
            # Stream 0 of the video's key: the sampler's steps draw from stream 1 on.
            noise = jax.random.normal(jax.random.fold_in(key, 0), pixels.shape)
            shown.append(pixels + want.noise_aug_strength * noise)
        # Other than the noisy latents these are not scaled.
        latents = autoencoder.encode_each(self.vae, self.params["vae"], shown)
        context, image_latents = jnp.stack(embeddings)[:, None], latents[:, None]
        if want.guided:
            context, image_latents = (
                jnp.concatenate([jnp.zeros_like(x), x]) for x in (context, image_latents)
            )
        # The model was trained on the number of frames a second less one.
        ids = [[want.fps - 1, want.motion_bucket_id, want.noise_aug_strength]]
        return Conditions(context, image_latents, jnp.asarray(ids, jnp.float32))

    def guidance(self, want: ImageToVideoDefaults) -> np.ndarray:
        """Guidance scale of each frame `[F]`: more, the farther it is from the image."""
        return np.linspace(
            want.min_guidance_scale, want.guidance_scale, want.frames, dtype=np.float32
        )

    @property
    def context_length(self) -> int:
        """The image embedding is one token."""
        return 1

    @property
    def configs(self) -> ComponentConfigs:
        """Of UNet, VAE and image encoder."""
        return ComponentConfigs(
            self.unet.config, self.vae.config, image_encoder=self.image_encoder.config
        )


def clip_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """What CLIP's image tower sees of an image uint8 `[H, W, 3]`: float32 `[size, size, 3]`."""
    small = resize_antialiased(np.asarray(to_unit_range(image)), size)
    normal = ((small + 1) / 2 - CLIP_MEAN) / CLIP_DEVIATION
    return normal.astype(np.float32)


def resize_antialiased(image: np.ndarray, size: int) -> np.ndarray:
    """Blurs and resizes as Stable Video Diffusion does before CLIP.

    Args:
      image: `[H, W, C]`.
      size: height and width of the result.

    Returns:
      float64 `[size, size, C]`.
    """
    rows, columns = (resize_matrix(length, size) for length in image.shape[:2])
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image, optimize=True)


def resize_matrix(length: int, size: int) -> np.ndarray:
    """Along an axis: Gaussian blur, then bicubic with aligned corners, `[size, length]`."""
    deviation = max((length / size - 1) / 2, 0.001)
    taps = int(max(4 * deviation, 3)) // 2
    offsets = np.arange(-taps, taps + 1)
    gaussian = np.exp(-(offsets**2) / (2 * deviation**2))
    gaussian /= gaussian.sum()
    # Reflected at the borders, without repeating the border itself.
    padded = np.pad(np.arange(length), taps, mode="reflect")
    blur = np.zeros((length, length))
    for tap, weight in enumerate(gaussian):
        blur[np.arange(length), padded[tap : tap + length]] += weight

    places = np.arange(size) * (length - 1) / max(size - 1, 1)
    first = np.floor(places).astype(int)
    bicubic = np.zeros((size, length))
    for shift in range(-1, 3):
        weights = _cubic(np.abs(places - first - shift))
        np.add.at(bicubic, (np.arange(size), np.clip(first + shift, 0, length - 1)), weights)
    return bicubic @ blur


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.75, as PyTorch has it."""
    a, x = -0.75, distance
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@program(static=("encoder",))
def embed_image(encoder: CLIPVisionEncoder, params: Params, pixels: Array) -> Array:
    """Embedding `[C]` of what `clip_pixels` gives."""
    return encoder.apply({"params": params}, pixels[None])[0].astype(jnp.float32)
