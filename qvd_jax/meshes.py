"""How work divides over devices: the axes of their mesh, and what lies along each.

    data      videos
    guidance  the halves of classifier-free guidance, the negatives' first
    frame     frames in the layers that see every frame alone, positions in those that see the
              frames of every position; `jax.lax.all_to_all` makes one division of the other

Parameters are whole on every device. Inside `jax.shard_map` each device runs the program of one
device on its part of a batch.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from qvd_jax.axes import Array
from qvd_jax.errors import InputError

DATA, GUIDANCE, FRAME = AXES = ("data", "guidance", "frame")
"""The names of the axes."""

_EXCHANGE = 1.25
"""By how much frames in parts take longer than their share, by a v5e's compiler about so much."""


@dataclass(frozen=True)
class MeshConfig:
    """Into how many parts work divides along each axis.

    Attributes:
      data: parts of the videos; a number of them that it does not divide is padded.
      guidance: 2 computes both halves of guidance at once.
      frame: parts of the frames; divides those the UNet sees at once, and every level's positions.
    """

    data: int = 1
    guidance: int = 1
    frame: int = 1

    def __post_init__(self) -> None:
        for name, parts in zip(AXES, astuple(self), strict=True):
            if parts < 1:
                raise InputError(f"mesh {name}={parts}: at least 1 is needed")
        if self.guidance > 2:
            raise InputError(f"mesh guidance={self.guidance}: guidance has 2 halves")

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ",".join(f"{name}={parts}" for name, parts in zip(AXES, astuple(self), strict=True))

    @property
    def size(self) -> int:
        """How many devices it takes."""
        return math.prod(astuple(self))

    def over(self, devices: Sequence[jax.Device]) -> Mesh:
        """The mesh of as many devices, in the order in which they are best connected."""
        found = mesh_utils.create_device_mesh(
            astuple(self), devices, allow_split_physical_axes=True
        )
        return Mesh(found, AXES)


def parse(text: str) -> MeshConfig:
    """Reads "data=4,guidance=2"; an axis that is left out has one part.

    Raises:
      InputError: an axis is unknown or named twice, or a number is none.
    """
    parts: dict[str, int] = {}
    for entry in text.split(","):
        name, _, number = (word.strip() for word in entry.partition("="))
        if name not in AXES:
            raise InputError(f"mesh {text!r}: unknown axis {name!r}; known are {', '.join(AXES)}")
        if name in parts:
            raise InputError(f"mesh {text!r}: {name} stands there twice")
        if not re.fullmatch(r"[0-9]+", number):
            raise InputError(f"mesh {text!r}: {name}=N is needed, N a number")
        parts[name] = int(number)
    return MeshConfig(**parts)


@dataclass(frozen=True)
class Work:
    """What there is to divide.

    Attributes:
      videos: B.
      frames: F the network sees at once.
      positions: H W of each level of the network.
      whole: axes that cannot divide it, with the reason.
    """

    videos: int
    frames: int = 1
    positions: tuple[int, ...] = (1,)
    whole: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: MeshConfig, devices: int) -> None:
        """Raises `InputError` if a mesh does not fit this work, or the number of devices."""
        if config.size != devices:
            raise InputError(
                f"mesh {config}: the axes multiply to {config.size}, there "
                f"{'is 1 device' if devices == 1 else f'are {devices} devices'}"
            )
        for name in AXES:
            if getattr(config, name) > 1 and name in self.whole:
                raise InputError(f"mesh {config}: {name} must be 1, for {self.whole[name]}")
        if self.frames % config.frame:
            raise InputError(
                f"mesh {config}: {self.frames} frames do not divide into {config.frame} parts; "
                f"frame may be {self._frame_parts()}"
            )
        for level, positions in enumerate(self.positions):
            if positions % config.frame:
                raise InputError(
                    f"mesh {config}: the {positions} positions of level {level} do not divide into "
                    f"{config.frame} parts; frame may be {self._frame_parts()}"
                )

    def choose(self, devices: int) -> MeshConfig:
        """The mesh of so many devices on which each has least to do.

        Of several with as little, the one with most parts of the videos, which are independent of
        each other, and then of guidance, whose halves meet once a step.
        """
        fitting = [
            MeshConfig(devices // (guidance * frame), guidance, frame)
            for guidance, frame in itertools.product((1, 2), range(1, devices + 1))
            if devices % (guidance * frame) == 0
            and (guidance == 1 or GUIDANCE not in self.whole)
            and (frame == 1 or (self._divides_into(frame) and FRAME not in self.whole))
        ]

        def burden(config: MeshConfig) -> tuple[float, ...]:
            # Of all devices together, padding included; guidance and frames divide without rest.
            total = math.ceil(self.videos / config.data) * config.data
            return total * (_EXCHANGE if config.frame > 1 else 1), -config.data, -config.guidance

        return min(fitting, key=burden)

    def resolve(self, asked: MeshConfig | None, devices: int) -> MeshConfig:
        """What is asked for, if it fits, or what `choose` chooses.

        Raises:
          InputError: it does not fit.
        """
        if asked is None:
            return self.choose(devices)
        self.check(asked, devices)
        return asked

    def _divides_into(self, parts: int) -> bool:
        return not any(count % parts for count in (self.frames, *self.positions))

    def _frame_parts(self) -> str:
        most = math.gcd(self.frames, *self.positions)
        return ", ".join(str(parts) for parts in range(1, most + 1) if most % parts == 0)


def devices_of(tree: Any) -> list[jax.Device]:
    """The devices on which a tree's arrays lie."""
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = getattr(sharding, "mesh", None)
    return list(mesh.devices.flat) if isinstance(mesh, Mesh) else list(sharding.device_set)


def replicated(devices: Sequence[jax.Device] | None = None) -> Sharding:
    """A copy on each of some devices; None is all of this process."""
    devices = jax.local_devices() if devices is None else devices
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(MeshConfig(data=len(devices)).over(devices), PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A tree whose arrays lie whole on each device of a mesh, without a copy of what lies there."""
    place = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Array:
        before = getattr(leaf, "sharding", None)
        if before == place:
            return leaf
        if (
            before is None
            or before.device_set != place.device_set
            or not before.is_fully_replicated
        ):
            return jax.device_put(leaf, place)
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)

    return jax.tree.map(put, tree)


def padded(tree: Any, parts: int, axis: int = 0) -> Any:
    """Arrays with their last entry repeated until an axis divides into parts."""

    def pad(leaf: Array) -> Array:
        missing = -leaf.shape[axis] % parts
        if not missing:
            return leaf
        last = lax.slice_in_dim(leaf, leaf.shape[axis] - 1, None, axis=axis)
        return jnp.concatenate([leaf, jnp.repeat(last, missing, axis)], axis)

    return jax.tree.map(pad, tree)


def to_host(x: Array) -> np.ndarray:
    """An array with all its parts, those of other processes' devices included."""
    whole = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if whole else multihost_utils.process_allgather(x, tiled=True))


def is_of_one_device() -> bool:
    """Whether what is traced is one device's part of a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def to_positions(x: Array, axis: str | None) -> Array:
    """Of a device's frames of all positions, all frames of its positions.

    Args:
      x: `[B, F, L, C]`, or `[B, F, H, W, C]`, which becomes `[B, F, H * W, 1, C]`.
      axis: along which the frames are divided; None leaves `x` as it is.
    """
    if axis is None:
        return x
    batch, frames, *positions, channels = x.shape
    flat = x.reshape(batch, frames, math.prod(positions), channels)
    flat = lax.all_to_all(flat, axis, split_axis=2, concat_axis=1, tiled=True)
    return flat if x.ndim == 4 else flat[:, :, :, None]


def to_frames(x: Array, axis: str | None, shape: tuple[int, ...]) -> Array:
    """The opposite of `to_positions`, whose `x` had a shape."""
    if axis is None:
        return x
    flat = x.reshape(*x.shape[:3], -1)
    return lax.all_to_all(flat, axis, split_axis=1, concat_axis=2, tiled=True).reshape(shape)


def divided_by_xla(
    method: Callable[..., Array], module: nn.Module, x: Array, *inputs: Array | None
) -> Array:
    """What a module's method returns, with XLA dividing the operations among devices.

    On explicit axes, those of `jax.make_mesh` unless it is told otherwise, the type of every array
    says how it lies. A network brings the axes of videos, frames and positions together, takes them
    apart and loops over blocks of them, and has one formulation for each platform, which all lie
    otherwise: between its inputs and its result their types are XLA's affair.

    Args:
      method: of the module, not bound to it.
      module: a bound one.
      x: the first input; the result lies as it does, but for the last axis, which is whole.
      *inputs: the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    # What a module stores, it stores in its own scope: it is initialized and observed on arrays
    # that are whole, which every operation takes.
    if not explicit or module.is_initializing() or module.scope.mutable:
        return method(module, x, *inputs)
    unbound, variables = module.unbind()

    def run(variables: Any, *inputs: Array | None) -> Array:
        return unbound.apply(variables, *inputs, method=method)

    *spec, _ = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    divided = jax.sharding.auto_axes(run, axes=explicit, out_sharding=PartitionSpec(*spec, None))
    return divided(variables, x, *inputs)
