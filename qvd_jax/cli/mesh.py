"""What commands are told of the devices they use."""

import argparse
from collections.abc import Sequence

import jax

from qvd_jax import accelerators, meshes
from qvd_jax.errors import naming
from qvd_jax.meshes import MeshConfig
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh, None where the work decides."""
    parser.add_argument(
        "--mesh",
        metavar="data=N,guidance=N,frame=N",
        help="how work divides over all devices: by videos, by the halves of guidance, by frames "
        "(chosen by their numbers)",
    )


def asked_mesh(
    args: argparse.Namespace, names: Sequence[str], want: VideoDefaults
) -> MeshConfig | None:
    """The mesh the command line asks for, checked before any array is loaded.

    Args:
      args: of `add_mesh_argument`.
      names: of the checkpoints.
      want: what the videos are like, of which any number fits.

    Raises:
      InputError: it cannot be read, or does not fit the devices or the videos of a checkpoint.
    """
    if args.mesh is None:
        return None
    config = meshes.parse(args.mesh)
    accelerators.check_used()
    for name in names:
        with naming(name):
            read_configs(name).work(1, want).check(config, jax.local_device_count())
    return config
