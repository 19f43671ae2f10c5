"""What commands are told of the videos and of how they are sampled."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qvd_jax.cli.command import passed, positive_int
from qvd_jax.diffusion.schedules import SOLVERS, SPACINGS, SchedulerConfig, switch, walked_as
from qvd_jax.errors import naming
from qvd_jax.pipelines.loading import CheckpointConfigs, read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults


def wanted(args: argparse.Namespace, configs: CheckpointConfigs) -> VideoDefaults:
    """The checkpoint's defaults with the size that is asked for."""
    return replace(configs.defaults, **passed(args, "frames", "height", "width"))


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --frames, --height and --width, None where the checkpoint decides."""
    parser.add_argument("--frames", type=positive_int, metavar="F", help="of a video")
    parser.add_argument("--height", type=positive_int, metavar="H", help="in pixels")
    parser.add_argument("--width", type=positive_int, metavar="W", help="in pixels")


def add_sampler_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --steps, --scheduler, --karras and --timestep-spacing, None for the checkpoint's."""
    parser.add_argument("--steps", type=positive_int, metavar="N", help=f"({default})")
    parser.add_argument("--scheduler", choices=SOLVERS, help=f"({default})")
    parser.add_argument(
        "--karras",
        action=argparse.BooleanOptionalAction,
        help=f"noise levels of Karras et al. ({default})",
    )
    parser.add_argument(
        "--timestep-spacing",
        choices=SPACINGS,
        help=f"how the steps lie over time ({default})",
    )


def asked_scheduler(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of the scheduler, as arguments of `with_scheduler`."""
    return {
        "solver": args.scheduler,
        "karras": args.karras,
        "timestep_spacing": args.timestep_spacing,
    }


def check_videos(
    names: Sequence[str], args: argparse.Namespace, like: str, **asked: Any
) -> VideoDefaults:
    """Checks sizes, steps and schedulers before the arrays of any checkpoint are loaded.

    Args:
      names: of the checkpoints.
      args: of `add_size_arguments` and `add_sampler_arguments`.
      like: the checkpoint whose defaults stand for what the command line does not say.
      **asked: of `asked_scheduler`: changes of the scheduler of `like`, as which all are walked.

    Returns:
      What all videos are to be like.

    Raises:
      InputError: a folder is no checkpoint, or what is asked for does not fit.
    """
    defaults, scheduler = read_configs(like).defaults, switched(like, **asked)
    want = replace(defaults, **passed(args, "frames", "height", "width", "steps"))
    for name in names:
        with naming(name):
            configs = read_configs(name)
            configs.check(want, walked_as(configs.scheduler, scheduler))
    return want


def switched(name: str, **asked: Any) -> SchedulerConfig:
    """A checkpoint's scheduler with what is asked for.

    Raises:
      InputError: the folder is no checkpoint, or the scheduler cannot be so.
    """
    with naming(name):
        return switch(read_configs(name).scheduler, **asked)
