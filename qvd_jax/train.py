"""`python -m qvd_jax.train CONFIG.yaml --out DIR`: makes the small models the package ships."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qvd_jax import meshes
from qvd_jax.arrows import pixels as arrows_pixels
from qvd_jax.arrows.image_to_video_task import ImageToVideo, ImageToVideoConfig
from qvd_jax.cli.command import command, make_parser
from qvd_jax.cli.mesh import add_mesh_argument
from qvd_jax.config import from_dict, read_yaml
from qvd_jax.errors import InputError
from qvd_jax.shapes import pixels as shapes_pixels
from qvd_jax.shapes.classifier_task import ClassifierConfig, ClassifierTask
from qvd_jax.shapes.text_to_video_task import TextToVideo, TextToVideoConfig
from qvd_jax.shapes.vae_task import VAETask, VAETrainingConfig
from qvd_jax.training import loop

_CLIPS = {"shapes": shapes_pixels.draw_clips, "arrows": arrows_pixels.draw_clips}


@dataclass(frozen=True)
class RunConfig:
    """One training run: the loop and exactly one task.

    Attributes:
      loop: how long and with what.
      vae: trains the VAE.
      text_to_video: trains text encoder and UNet.
      image_to_video: trains image encoder and UNet.
      classifier: trains the video classifier of the Frechet distance.
    """

    loop: loop.LoopConfig
    vae: VAETrainingConfig | None = None
    text_to_video: TextToVideoConfig | None = None
    image_to_video: ImageToVideoConfig | None = None
    classifier: ClassifierConfig | None = None

    def __post_init__(self) -> None:
        tasks = [field.name for field in fields(self) if field.name != "loop"]
        if sum(getattr(self, task) is not None for task in tasks) != 1:
            raise ValueError(f"exactly one of {', '.join(tasks[:-1])} and {tasks[-1]} is needed")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains or goes on training, writes the model."""
    args = _parser().parse_args(argv)
    config = from_dict(RunConfig, read_yaml(args.config), str(args.config))
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"{args.out} is no folder")
    # A task may prepare for minutes.
    mesh = None if args.mesh is None else meshes.parse(args.mesh)
    loop.data_mesh(config.loop, mesh)
    task = make_task(config)
    params = loop.train(task, config.loop, args.out, mesh)
    task.export(params, args.out / "model")
    print(args.out / "model")


def make_task(config: RunConfig) -> loop.Task:
    """The one task of a run."""
    if config.vae is not None:
        return VAETask(config.vae, _CLIPS[config.vae.scenes])
    if config.classifier is not None:
        return ClassifierTask(config.classifier)
    if config.image_to_video is not None:
        return ImageToVideo(config.image_to_video, config.loop.seed)
    assert config.text_to_video is not None
    return TextToVideo(config.text_to_video, config.loop.seed)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.train", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoints, sample sheets and DIR/model; a run already there goes on",
    )
    add_mesh_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
