"""Runs of a command on several hosts: its arguments, and what all of them must agree on."""

import argparse
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qvd_jax import checkpoint
from qvd_jax.cli.inputs import Inputs
from qvd_jax.errors import InputError
from qvd_jax.hosts import Coordinator, Hosts
from qvd_jax.hosts import joined as joined_hosts

_OWN = ("coordinator", "num_processes", "process_id", "coordinator_timeout")
"""What the command line says of hosts, which each may say otherwise."""


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --num-processes, --process-id and --coordinator-timeout."""
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several hosts that run this command where the first listens; TPU pods know it",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many hosts there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")
    parser.add_argument(
        "--coordinator-timeout",
        type=int,
        default=Coordinator().patience,
        metavar="S",
        help="seconds to wait for the other hosts (%(default)s)",
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace, again: str) -> Iterator[Hosts]:
    """The hosts that run a command, as `hosts.joined`.

    Args:
      args: of `add_host_arguments`.
      again: what to do where one has died.

    Raises:
      InputError: the arguments do not fit each other, or as `hosts.joined`.
    """
    given = {name: getattr(args, name) for name in _OWN[:3]}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            option = missing[0].replace("_", "-")
            raise InputError(
                f"--{option} is missing; --coordinator, --num-processes and --process-id belong "
                f"together"
            )
    else:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--coordinator {args.coordinator}: HOST:PORT is needed")
        if not 0 <= args.process_id < args.num_processes:
            raise InputError(
                f"--process-id {args.process_id}: 0 to {args.num_processes - 1} are possible with "
                f"--num-processes {args.num_processes}"
            )
    if args.coordinator_timeout < 1:
        raise InputError(f"--coordinator-timeout {args.coordinator_timeout}: at least 1 is needed")
    coordinator = Coordinator(
        args.coordinator, args.num_processes, args.process_id, args.coordinator_timeout
    )
    with joined_hosts(coordinator, again) as hosts:
        yield hosts


def compare(
    hosts: Hosts,
    args: argparse.Namespace,
    checkpoints: Sequence[str],
    inputs: Inputs,
    options: Mapping[str, Any],
) -> None:
    """Makes sure that all hosts do the same with the same: see `Hosts.compare`.

    Args:
      hosts: of this run.
      args: the command line.
      checkpoints: their names.
      inputs: what is sampled.
      options: of the pipelines' calls.
    """
    if hosts.count == 1:
        return
    asked = {name: value for name, value in vars(args).items() if name not in _OWN}
    digests, devices = checkpoint_digests(checkpoints), jax.local_devices()
    hosts.compare(
        {
            **{f"--{name.replace('_', '-')}": described(value) for name, value in asked.items()},
            **{f"the checkpoint {name}": digest for name, digest in digests.items()},
            **{f"input {i + 1}": [name, *given(inputs, i)] for i, name in enumerate(inputs.names)},
            **{f"the option {name}": value for name, value in described(options).items()},
            **{f"the version of {name}": v for name, v in checkpoint.package_versions().items()},
            "the hardware": f"{len(devices)} {devices[0].device_kind}",
        }
    )


def described(value: Any) -> Any:
    """A value as JSON has it; arrays and paths as short texts that tell them apart."""
    if isinstance(value, np.ndarray):
        told = hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return f"{value.dtype} {list(value.shape)} {told.hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {name: described(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def given(inputs: Inputs, index: int) -> list[Any]:
    """What a video is made from besides the name of it: images and embeddings, as `described`."""
    own = inputs.take([index])
    images = [value for value in own.values if not isinstance(value, str)]
    return described([*images, *own.options.values()])


def checkpoint_digests(names: Sequence[str]) -> dict[str, str]:
    """Of checkpoints, or models of the package, by name."""
    return {name: checkpoint.digest(checkpoint.find(name)) for name in names}
