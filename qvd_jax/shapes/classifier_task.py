"""Trains the video classifier whose features the Frechet distance is taken in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from qvd_jax import checkpoint
from qvd_jax.axes import Array, Params
from qvd_jax.shapes import pixels
from qvd_jax.shapes.classifier import COMPONENT, VideoClassifier, VideoClassifierConfig
from qvd_jax.shapes.scenes import scenes_of

_SHEET_VIDEOS = 8
_DESCRIPTION = "classifier of the moving shapes, trained by qvd_jax.train"


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier and its objective.

    Attributes:
      model: shape of the classifier.
    """

    model: VideoClassifierConfig


class ClassifierTask:
    """The task: rendered videos in, the attributes of their scenes out.

    Attributes:
      config: what is trained.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config
        self._classifier = VideoClassifier(config.model)
        # Both splits: the distance must know what was held out.
        splits = [scenes_of("train"), scenes_of("held_out")]
        self._scenes = np.concatenate(splits)

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        model = self.config.model
        videos = jnp.zeros((1, model.frames, model.size, model.size, 3), jnp.uint8)
        return self._classifier.init(key, videos)["params"]

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        """Videos of random scenes, and the scenes."""
        scenes = self._scenes[rng.integers(len(self._scenes), size=size)]
        model = self.config.model
        return {
            "videos": pixels.render(scenes, rng, model.frames, model.size),
            "scenes": scenes.astype(np.int32),
        }

    def loss(self, params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        """Cross-entropy, summed over the attributes; `key` is not used."""
        del key
        logits = self._classifier.apply({"params": params}, batch["videos"])
        return sum(
            optax.softmax_cross_entropy_with_integer_labels(head, batch["scenes"][:, i]).mean()
            for i, head in enumerate(logits)
        )

    def sheet(self, params: Params) -> np.ndarray:
        """Held-out videos; those of which it gets an attribute wrong are blackened."""
        scenes = scenes_of("held_out")[:_SHEET_VIDEOS]
        model = self.config.model
        videos = pixels.render(scenes, np.random.default_rng(0), model.frames, model.size)
        logits = self._classifier.apply({"params": params}, videos)
        read = np.stack([np.asarray(head).argmax(-1) for head in logits], -1)
        return videos * (read == scenes).all(-1).astype(np.uint8)[:, None, None, None, None]

    def export(self, params: Params, folder: Path) -> None:
        """Writes the classifier as a checkpoint."""
        checkpoint.save_component(folder, COMPONENT, self.config.model, params, _DESCRIPTION)
