"""The items of a checkpoint: one tree of arrays each, as Orbax writes it."""

import collections
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qvd_jax.axes import Params
from qvd_jax.errors import InputError, first_line

_COMMIT_MARK = "commit_success.txt"
_INDEX = "_METADATA"
_DIGEST = "digest.json"

# Of arrays on their way from the disk.
_BYTES_IN_FLIGHT = 2**28


def save_params(folder: Path, name: str, params: Params) -> None:
    """Writes the parameters of one component as the Orbax item `folder/name`.

    Args:
      folder: the checkpoint.
      name: the component.
      params: tree of `jax.Array`; Orbax would copy numpy arrays, all of them at once.
    """
    # TensorStore gives a byte to each int4 and int2, most of which compression takes back; what
    # fills its bytes is not worth the time and the memory.
    wastes = any(leaf.dtype in (jnp.int2, jnp.int4) for leaf in jax.tree.leaves(params))
    # Bounded buffers: by default Orbax holds up to another copy of the whole tree.
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        # Each process has all arrays of what it writes: none waits for the others, whose parts
        # Orbax would expect of arrays that are jax's.
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        params = jax.tree.map(np.asarray, params)
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=1, use_compression=wastes, multiprocessing_options=alone
    )
    arguments = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=64 * 2**20)
    item = folder.absolute() / name
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            checkpointer.save(item, args=arguments)
        except ValueError as error:  # What TensorStore raises when the disk is full, for one.
            raise InputError(f"{item} could not be written: {first_line(error)}") from error
    # Orbax marks a finished item where no rename is atomic, and writes the absolute path into it.
    for mark in item.glob(_COMMIT_MARK):
        mark.write_text(f"{name} is complete\n", encoding="utf-8")
    arrays = sorted(flax.traverse_util.flatten_dict(params).items())
    told = _digest((path, np.asarray(array)) for path, array in arrays)
    noted = {"arrays": told, "files": _sizes(item)}
    (item / _DIGEST).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


class StoredItem:
    """An item on disk, its arrays opened and not read.

    TensorStore opens and reads all arrays at once. Orbax, which awaits each by itself, needs
    fifteen times as long for a quantized UNet, whose arrays are many and small.

    Attributes:
      shapes: tree of `jax.ShapeDtypeStruct`, in the dtypes on disk.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Opens the item `folder/name`.

        Raises:
          InputError: it is missing or damaged.
        """
        self._place = folder.absolute() / name
        if not self._place.is_dir():
            raise InputError(f"{folder}: the component {name!r} is missing")
        try:
            self._arrays = dict(_open_arrays(self._place))
        except Exception as error:
            raise InputError(f"{self._place} is damaged: its index cannot be read") from error
        structs = {
            path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
            for path, array in self._arrays.items()
        }
        self.shapes: Params = flax.traverse_util.unflatten_dict(structs)

    def check(self, expected: Params) -> None:
        """Raises `InputError` where the tree or a shape is not the expected, listing all."""
        check_tree(self.shapes, expected, str(self._place))

    def digest(self) -> str:
        """As the function `digest`, of what is read."""
        arrays = dict(sorted(self._arrays.items()))
        try:
            return _digest(zip(arrays, _read_in_order(arrays.values()), strict=True))
        except Exception as error:
            raise self._damaged() from error

    def value(self, path: str) -> np.ndarray:
        """One array, by its path with slashes.

        Raises:
          InputError: it is damaged.
        """
        try:
            return self._arrays[tuple(path.split("/"))].read().result()
        except Exception as error:
            raise self._damaged() from error

    def read(self, expected: Params, sharding: jax.sharding.Sharding | None = None) -> Params:
        """The arrays.

        Args:
          expected: tree of `jax.ShapeDtypeStruct`, whose dtypes the arrays get.
          sharding: where every array is put, without a copy on the host device; None is the
            default device.

        Raises:
          InputError: an array is damaged.
        """
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        dtypes = flax.traverse_util.flatten_dict(expected)
        arrays = {
            path: ts.cast(array, dtypes[path].dtype) if array.dtype != dtypes[path].dtype else array
            for path, array in self._arrays.items()
        }
        found = {}
        try:
            for path, value in zip(arrays, _read_in_order(arrays.values()), strict=True):
                found[path] = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        except Exception as error:
            raise self._damaged() from error
        return flax.traverse_util.unflatten_dict(found)

    def _damaged(self) -> InputError:
        # TensorStore's own message says nothing of use.
        return InputError(
            f"{self._place} is damaged, or too large for the memory: its arrays cannot be read"
        )


def _open_arrays(item: Path) -> Iterator[tuple[tuple[str, ...], ts.TensorStore]]:
    """Every array of an item by its path."""
    index = json.loads((item / _INDEX).read_text(encoding="utf-8"))
    files: Any = {"driver": "file", "path": f"{item}/"}
    if index["use_ocdbt"]:
        files = {"driver": "ocdbt", "base": files}
    driver = "zarr3" if index["use_zarr3"] else "zarr"
    context = ts.Context({"file_io_concurrency": {"limit": 128}})
    opening = {}
    for leaf in index["tree_metadata"].values():
        path = tuple(part["key"] for part in leaf["key_metadata"])
        spec = {"driver": driver, "kvstore": files, "path": ".".join(path)}
        opening[path] = ts.open(spec, open=True, read=True, context=context)
    for path, array in opening.items():
        yield path, array.result()


def _read_in_order(arrays: Iterable[ts.TensorStore]) -> Iterator[Any]:
    """The arrays' values, of which the next are read while one is used."""
    reading: collections.deque[tuple[ts.Future, int]] = collections.deque()
    in_flight = 0
    for array in arrays:
        needed = array.size * array.dtype.numpy_dtype.itemsize
        while reading and in_flight + needed > _BYTES_IN_FLIGHT:
            value, size = reading.popleft()
            in_flight -= size
            yield value.result()
        reading.append((array.read(), needed))
        in_flight += needed
    while reading:
        yield reading.popleft()[0].result()


def digest(folder: Path, name: str) -> str:
    """Of all arrays of an item, their dtypes and their paths, however they lie on the disk.

    Whoever saved it noted the digest beside it. That holds for the files that were written then, by
    name and size: TensorStore gives a new name to each that it writes, so that other arrays lie in
    other files. Where the files are others, or nothing was noted, all arrays are read.

    Raises:
      InputError: the item is damaged.
    """
    item = folder / name
    try:
        noted = json.loads((item / _DIGEST).read_text(encoding="utf-8"))
        if noted["files"] == _sizes(item):
            return str(noted["arrays"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # None is there, or it is damaged.
    return StoredItem(folder, name).digest()


def _digest(arrays: Iterable[tuple[tuple[str, ...], np.ndarray]]) -> str:
    """Of arrays by their paths, in the order of these."""
    told = hashlib.sha256()
    for path, value in arrays:
        told.update(f"{'/'.join(path)} {value.dtype} {value.shape}\n".encode())
        told.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return told.hexdigest()


def _sizes(item: Path) -> dict[str, int]:
    """Bytes of each file of an item but the note of its digest."""
    paths = (path for path in item.rglob("*") if path.is_file() and path.name != _DIGEST)
    return {path.relative_to(item).as_posix(): path.stat().st_size for path in paths}


def stored_items(folder: Path) -> list[str]:
    """The names of a folder's items, in order."""
    return sorted(place.parent.name for place in folder.glob(f"*/{_INDEX}"))


def restore_params(
    folder: Path, name: str, expected: Params, sharding: jax.sharding.Sharding | None = None
) -> Params:
    """Restores one component's parameters.

    Args:
      folder: the checkpoint.
      name: the component.
      expected: tree of `jax.ShapeDtypeStruct`.
      sharding: as of `StoredItem.read`.

    Raises:
      InputError: the item is missing or damaged, or its tree or shapes are not the expected.
    """
    stored = StoredItem(folder, name)
    stored.check(expected)
    return stored.read(expected, sharding)


def check_tree(found: Any, expected: Any, where: str) -> None:
    """Compares two trees of arrays, or of what has their shapes, by path.

    Raises:
      InputError: listing every missing (-), extra (+) and misshapen (!) name at once.
    """
    flat = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (found, expected))
    have, want = ({name: tuple(leaf.shape) for name, leaf in leaves.items()} for leaves in flat)
    lines = [f"- {name} {want[name]}" for name in want if name not in have]
    lines += [f"+ {name} {have[name]}" for name in have if name not in want]
    lines += [
        f"! {name}: {have[name]}, expected {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if lines:
        raise InputError(
            f"{where} does not fit ({len(lines)} names; - missing, + extra, ! other shape):\n  "
            + "\n  ".join(sorted(lines))
        )
