"""CLIP of transformers, both towers, for the metrics of frames and prompts."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from qvd_jax import checkpoint, items
from qvd_jax import config as qvd_config
from qvd_jax.errors import InputError
from qvd_jax.evaluation.clip import FAMILY, IMAGE, PROJECTION, TEXT, param_shapes
from qvd_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from qvd_jax.pipelines.loading import check_vocabulary, load_tokenizer

from . import companions, names
from . import config_classes as classes
from .configs import read as read_config
from .keys import require
from .names import Names
from .tensors import Tensors, open_folder, read_json

_PROJECTION = "text_projection.weight"
_NAMES: dict[str, Names] = {
    TEXT: names.CLIP_TEXT,
    IMAGE: names.CLIP_VISION,
    PROJECTION: lambda path: (_PROJECTION,),
}


@dataclass(frozen=True)
class ClipSource:
    """An opened folder of CLIP.

    Attributes:
      folder: of transformers.
      text: shape of the text tower.
      image: shape of the image tower.
      tensors: of each component.
      notes: what the user should know.
    """

    folder: Path
    text: CLIPTextConfig
    image: CLIPVisionConfig
    tensors: dict[str, Tensors]
    notes: tuple[str, ...]

    @property
    def description(self) -> str:
        """One line on what it is."""
        return f"CLIP of {self.folder.name}"

    def write(self, out: Path) -> None:
        """Writes it as a checkpoint, which `evaluation.clip.load_clip` reads.

        Raises:
          InputError: tensors are missing, extra or misshapen.
        """
        tokenizer = load_tokenizer(self.folder)
        check_vocabulary(tokenizer, self.text, str(self.folder))
        shapes = param_shapes(self.text, self.image)
        for name, tensors in self.tensors.items():
            names.check_names(shapes[name], _NAMES[name], tensors, f"{self.folder}: {name}")
        manifest = checkpoint.Manifest(
            family=FAMILY,
            components={
                TEXT: qvd_config.to_dict(self.text),
                IMAGE: qvd_config.to_dict(self.image),
            },
            scheduler={},
            defaults={},
            description=self.description,
            versions=checkpoint.package_versions(),
        )
        with checkpoint.write_directory(out, overwrite=True) as partial:
            for name, tensors in self.tensors.items():
                params = names.build_params(
                    shapes[name], _NAMES[name], tensors, jnp.float32, lambda count: None
                )
                items.save_params(partial, name, params)
            tokenizer.save_pretrained(partial / checkpoint.TOKENIZER)
            checkpoint.write_manifest(partial, manifest)


def open_clip(source: Path) -> ClipSource | None:
    """Opens a folder of transformers' CLIPModel; None if it is something else.

    Raises:
      InputError: it is one, damaged or of a kind that is not supported.
    """
    file = source / "config.json"
    if not file.is_file() or (config := read_json(file)).get("model_type") != "clip":
        return None
    weights = open_folder(source, "model", "pytorch_model")
    require(weights, _PROJECTION, f"{source} is no CLIP of both towers")
    notes = list(weights.notes)
    processor = source / "preprocessor_config.json"
    if processor.is_file():
        notes += read_config(read_json(processor), classes.IMAGE_PROCESSOR, str(source)).notes
    towers: dict[str, Tensors] = {
        TEXT: companions.rename_text(_of(weights, "text_model.")),
        IMAGE: companions.without_position_ids(_of(weights, "vision_model.", "visual_projection.")),
    }
    text, text_notes = companions.text_config(
        towers[TEXT], _tower(config, "text_config", source), str(source)
    )
    # The tower has the width of its projection under a name of the whole.
    image, image_notes = companions.vision_config(
        towers[IMAGE], _tower(config, "vision_config", source), str(source)
    )
    towers[PROJECTION] = {_PROJECTION: weights[_PROJECTION]}
    return ClipSource(source, text, image, towers, (*notes, *text_notes, *image_notes))


def _of(weights: Tensors, *prefixes: str) -> Tensors:
    """The tensors whose names begin so."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}


def _tower(config: companions.Json, name: str, source: Path) -> companions.Json:
    """The config of a tower, without what its projection says, which the tensors tell."""
    found = config.get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"{source}/config.json: {name} is no table")
    return {key: value for key, value in found.items() if key != "projection_dim"}
