"""CLIP's two towers, in whose space frames and prompts are compared."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from qvd_jax import checkpoint, items
from qvd_jax.axes import Array, Params
from qvd_jax.config import from_dict
from qvd_jax.errors import InputError
from qvd_jax.models.clip import (
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
)
from qvd_jax.pipelines.loading import load_tokenizer

FAMILY = "clip"
TEXT, IMAGE, PROJECTION = "text_encoder", "image_encoder", "text_projection"
"""Names of the components in a checkpoint."""

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True)
class CLIP:
    """Both towers with their projections into one space.

    Attributes:
      text_encoder: up to the last hidden state.
      image_encoder: with its projection.
      params: of both, and the text's projection.
      tokenizer: of transformers.
      description: where the weights came from.
    """

    text_encoder: CLIPTextEncoder
    image_encoder: CLIPVisionEncoder
    params: Params = field(repr=False)
    tokenizer: Any = field(repr=False)
    description: str

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings `[N, C]`; a text that is too long is cut, as CLIP's own code does."""
        length = self.text_encoder.config.max_length
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length
        )
        ids = jnp.asarray(np.array(tokens["input_ids"]), jnp.int32)
        return np.asarray(_embed_texts(self.text_encoder, self.params, ids))

    def embed_frames(self, video: np.ndarray) -> np.ndarray:
        """Embeddings `[F, C]` of a video uint8 `[F, H, W, 3]`."""
        size = self.image_encoder.config.image_size
        pixels = np.stack([prepare_image(frame, size) for frame in video])
        return np.asarray(_embed_frames(self.image_encoder, self.params[IMAGE], pixels))


def load_clip(folder: Path) -> CLIP:
    """CLIP of a folder that `python -m qvd_jax.convert` made of one of transformers.

    Raises:
      InputError: the folder holds no CLIP, or a damaged one.
    """
    manifest = checkpoint.read_manifest(folder)
    if manifest.family != FAMILY:
        raise InputError(f"{folder} is of the family {manifest.family!r}; {FAMILY!r} is needed")
    where = f"{folder / checkpoint.MANIFEST}: "
    text = from_dict(CLIPTextConfig, manifest.components.get(TEXT), f"{where}{TEXT}")
    image = from_dict(CLIPVisionConfig, manifest.components.get(IMAGE), f"{where}{IMAGE}")
    shapes = param_shapes(text, image)
    return CLIP(
        CLIPTextEncoder(text),
        CLIPVisionEncoder(image),
        {name: items.restore_params(folder, name, shapes[name]) for name in shapes},
        load_tokenizer(folder / checkpoint.TOKENIZER),
        manifest.description,
    )


def param_shapes(text: CLIPTextConfig, image: CLIPVisionConfig) -> dict[str, Params]:
    """The trees of shapes of all components."""
    key = jax.random.key(0)
    ids = jax.ShapeDtypeStruct((1, text.max_length), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, image.image_size, image.image_size, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((text.hidden_size, image.projection_size), jnp.float32)
    return {
        TEXT: jax.eval_shape(CLIPTextEncoder(text).init, key, ids)["params"],
        IMAGE: jax.eval_shape(CLIPVisionEncoder(image).init, key, pixels)["params"],
        PROJECTION: {"kernel": kernel},
    }


def prepare_image(image: np.ndarray, size: int) -> np.ndarray:
    """Pixels as CLIP takes them: the shorter side resized, the middle cut out, normalized.

    Args:
      image: uint8 `[H, W, 3]`.
      size: of the result's sides.

    Returns:
      float32 `[size, size, 3]`.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = (int(size * side / shorter) for side in (height, width))
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    cut = resized[top : top + size, left : left + size].astype(np.float32) / 255
    return (cut - _MEAN) / _DEVIATION


@functools.partial(jax.jit, static_argnames="encoder")
def _embed_texts(encoder: CLIPTextEncoder, params: Params, ids: Array) -> Array:
    hidden = encoder.apply({"params": params[TEXT]}, ids)
    # The end of the text, the largest id there is; padding behind it may be the same.
    ends = jnp.argmax(ids, axis=-1)
    at_end = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
    return at_end @ params[PROJECTION]["kernel"]


@functools.partial(jax.jit, static_argnames="encoder")
def _embed_frames(encoder: CLIPVisionEncoder, params: Params, pixels: Array) -> Array:
    return encoder.apply({"params": params}, pixels)
