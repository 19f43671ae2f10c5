"""What a computation needs of memory, before anything is allocated, and how it is given back."""

import contextlib
import ctypes
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from qvd_jax.axes import Params
from qvd_jax.errors import InputError


def check_fits(needed: int, what: str) -> None:
    """Refuses what the memory of this machine, or of its accelerator, cannot hold.

    Raises:
      InputError: fewer than `needed` bytes are free.
    """
    free = free_bytes()
    if needed > free:
        raise InputError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            f"choose a smaller size, or measure fewer variants at once"
        )


def free_bytes() -> int:
    """Memory that can still be allocated: the accelerator's, else this machine's."""
    stats = _accelerator()
    if stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return total_bytes()


def total_bytes() -> int:
    """All memory: the accelerator's, else this machine's."""
    stats = _accelerator()
    return int(stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def _accelerator() -> dict[str, int]:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats if "bytes_limit" in stats else {}


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """The most bytes that are alive at once while `function` runs, its arguments included.

    Counted over the traced program in its order: what a compiler fuses needs less, what it
    reorders may need more.

    Args:
      function: of arrays.
      *arguments: trees of arrays or of `jax.ShapeDtypeStruct`; nothing is computed.
    """
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


# Of glibc's malloc.h, and what it begins with and ends at by itself.
_M_MMAP_THRESHOLD = -3
_LEAST_MMAP_THRESHOLD = 2**17
_LARGEST_MMAP_THRESHOLD = 2**25


@contextlib.contextmanager
def buffers_freed_at_once() -> Iterator[None]:
    """Has glibc return what is freed inside the block to the system; elsewhere it does nothing.

    Once large buffers were freed, glibc keeps buffers up to their size for each thread, in pieces:
    a restore that reads thousands of arrays by several threads then holds a third more than these.
    Behind the block it adjusts nothing by itself any more, so this is for processes of ours alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LEAST_MMAP_THRESHOLD)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


# Several of which share a byte.
_PACKED = {jnp.dtype(jnp.int2): 2, jnp.dtype(jnp.int4): 4}


def tree_bytes(tree: Params) -> int:
    """Bytes of all arrays (or shapes) of a tree, as they are stored: two int4 in one byte."""
    leaves = jax.tree.leaves(tree)
    bits = (_PACKED.get(leaf.dtype, 8 * leaf.dtype.itemsize) for leaf in leaves)
    return sum(math.prod(leaf.shape) * n for leaf, n in zip(leaves, bits, strict=True)) // 8


def _peak(jaxpr: core.Jaxpr) -> int:
    last_use: dict[core.Var, int] = {}
    for position, equation in enumerate(jaxpr.eqns):
        last_use.update((v, position) for v in equation.invars if isinstance(v, core.Var))
    kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    # The caller holds the arguments to the end.
    alive = peak = sum(_bytes(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars))
    outer = {*jaxpr.invars, *jaxpr.constvars}
    for position, equation in enumerate(jaxpr.eqns):
        inputs = sum(_bytes(v.aval) for v in equation.invars)
        inner = core.jaxprs_in_params(equation.params)
        outputs = sum(_bytes(v.aval) for v in equation.outvars)
        peak = max(peak, alive + max([outputs, *(_peak(jaxpr) - inputs for jaxpr in inner)]))
        alive += outputs
        for var in {v for v in equation.invars if isinstance(v, core.Var)} - outer - kept:
            if last_use[var] == position:
                alive -= _bytes(var.aval)
    return peak


def _bytes(shaped: Any) -> int:
    return int(shaped.size * shaped.dtype.itemsize) if hasattr(shaped, "size") else 0
