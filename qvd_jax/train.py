"""`python -m qvd_jax.train CONFIG.yaml --out DIR`: makes the small model the package ships."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvd_jax import meshes
from qvd_jax.cli import command, make_parser
from qvd_jax.cli_mesh import add_mesh_argument
from qvd_jax.config import from_dict, read_yaml
from qvd_jax.errors import InputError
from qvd_jax.shapes.classifier_task import ClassifierConfig, ClassifierTask
from qvd_jax.shapes.text_to_video_task import TextToVideo, TextToVideoConfig
from qvd_jax.shapes.vae_task import VAETask, VAETrainingConfig
from qvd_jax.training import loop


@dataclass(frozen=True)
class RunConfig:
    """One training run: the loop and exactly one task.

    Attributes:
      loop: how long and with what.
      vae: trains the VAE.
      text_to_video: trains text encoder and UNet.
      classifier: trains the video classifier of the Frechet distance.
    """

    loop: loop.LoopConfig
    vae: VAETrainingConfig | None = None
    text_to_video: TextToVideoConfig | None = None
    classifier: ClassifierConfig | None = None

    def __post_init__(self) -> None:
        tasks = [self.vae, self.text_to_video, self.classifier]
        if sum(task is not None for task in tasks) != 1:
            raise ValueError("exactly one of vae, text_to_video and classifier is needed")


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
        return VAETask(config.vae)
    if config.classifier is not None:
        return ClassifierTask(config.classifier)
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
