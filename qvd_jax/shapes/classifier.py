"""A small video classifier of the moving shapes, in whose features a Frechet distance is taken.

The distance is built like FVD, but this classifier knows the moving shapes alone. So it is no FVD:
its values compare with each other only, and only on videos of moving shapes.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qvd_jax import checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.errors import InputError
from qvd_jax.shapes.scenes import ATTRIBUTES

COMPONENT = "classifier"
"""Its name in a checkpoint."""

_CHUNK_VIDEOS = 32


@dataclass(frozen=True)
class VideoClassifierConfig:
    """Shape of the classifier.

    Attributes:
      frames: F of its videos.
      size: H and W of its videos in pixels, divisible by two for each of `conv_channels`.
      conv_channels: C behind each convolution of stride two.
      frame_features: C of a frame.
      features: C of a video, the space of the distance.
    """

    frames: int = 16
    size: int = 64
    conv_channels: tuple[int, ...] = (16, 32, 48, 64)
    frame_features: int = 64
    features: int = 64

    def __post_init__(self) -> None:
        if self.size % 2 ** len(self.conv_channels):
            raise ValueError(f"size = {self.size} cannot be halved {len(self.conv_channels)} times")


class VideoClassifier(nn.Module):
    """Reads the attributes of a moving shape: convolutions by frame, then all frames together.

    Attributes:
      config: its shape.
    """

    config: VideoClassifierConfig

    def setup(self) -> None:
        config = self.config
        self.convs = [nn.Conv(width, (3, 3), strides=2) for width in config.conv_channels]
        self.frame_dense = nn.Dense(config.frame_features)
        self.video_dense = nn.Dense(2 * config.features)
        self.feature_dense = nn.Dense(config.features)
        self.heads = [nn.Dense(len(values)) for values in ATTRIBUTES.values()]

    def features(self, videos: Array) -> Array:
        """Maps uint8 `[B, F, H, W, 3]` to `[B, C]`."""
        x = videos.astype(jnp.float32) / 127.5 - 1
        count, frames = x.shape[:2]
        x = x.reshape(count * frames, *x.shape[2:])
        for conv in self.convs:
            x = nn.gelu(conv(x))
        x = nn.gelu(self.frame_dense(x.reshape(count * frames, -1)))
        x = nn.gelu(self.video_dense(x.reshape(count, -1)))
        return nn.gelu(self.feature_dense(x))

    def __call__(self, videos: Array) -> list[Array]:
        """Logits of each of `ATTRIBUTES`, each `[B, values]`."""
        features = self.features(videos)
        return [head(features) for head in self.heads]


Classifier = tuple[VideoClassifierConfig, Params]
"""Config and parameters."""


def video_features(config: VideoClassifierConfig, params: Params, videos: np.ndarray) -> np.ndarray:
    """The classifier's features `[N, C]` of uint8 `[N, F, H, W, 3]`.

    Raises:
      InputError: the videos are not of the length and size the classifier was trained on.
    """
    expected = (config.frames, config.size, config.size, 3)
    if videos.shape[1:] != expected:
        raise InputError(f"videos of shape {videos.shape[1:]}: the classifier reads {expected}")
    rows = np.arange(-(-len(videos) // _CHUNK_VIDEOS) * _CHUNK_VIDEOS) % len(videos)
    chunks = [
        np.asarray(_features(config, params, videos[rows[start : start + _CHUNK_VIDEOS]]))
        for start in range(0, len(rows), _CHUNK_VIDEOS)
    ]
    return np.concatenate(chunks)[: len(videos)]


@functools.partial(jax.jit, static_argnames="config")
def _features(config: VideoClassifierConfig, params: Params, videos: Array) -> Array:
    return VideoClassifier(config).apply({"params": params}, videos, method="features")


def load_classifier(folder: Path = checkpoint.ASSETS / COMPONENT) -> Classifier:
    """The trained classifier of a folder; the one in the package unless another is named.

    Raises:
      InputError: the folder holds none.
    """

    def shapes(config: VideoClassifierConfig) -> Params:
        videos = jnp.zeros((1, config.frames, config.size, config.size, 3), jnp.uint8)
        return jax.eval_shape(VideoClassifier(config).init, jax.random.key(0), videos)["params"]

    return checkpoint.load_component(folder, COMPONENT, VideoClassifierConfig, shapes)
