"""Accelerators: which this machine has, and whether jax is installed for them."""

import functools
import importlib.metadata
import logging
import shlex
import sys
from pathlib import Path

import jax
from packaging.requirements import Requirement
from packaging.version import Version

from qvd_jax.environment import version

_logger = logging.getLogger(__name__)

GPU, TPU = "an NVIDIA GPU", "a TPU"

DEVICES = {GPU: ("nvidia[0-9]*", "dxg"), TPU: ("accel[0-9]*", "vfio/[0-9]*")}
"""Files under /dev: `dxg` is a GPU under WSL, `vfio` has whatever a virtual machine is handed."""

_GOOGLE = "0x1ae0"
_PLUGINS = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
"""Packages of jax's extras, of which one serves a GPU."""


@functools.cache
def check_used() -> None:
    """Says, once and as an error, that jax leaves an accelerator idle, and what mends it.

    Nothing is said where somebody chose jax's platforms.
    """
    if jax.config.jax_platforms or jax.default_backend() != "cpu":  # type: ignore[attr-defined]
        return
    found = present(Path("/"))
    if found:
        _logger.error("this machine has %s, jax sees its CPU alone: %s", found, remedy(found))


def present(root: Path) -> str | None:
    """The accelerator that device files tell of, if any, whether or not jax can use it.

    Args:
      root: of the file system.
    """
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    of_google = any(path.read_text().strip() == _GOOGLE for path in vendors)
    for name, patterns in DEVICES.items():
        for pattern in patterns:
            if any((root / "dev").glob(pattern)) and ("vfio" not in pattern or of_google):
                return name
    return None


def remedy(name: str) -> str:
    """What gives jax the accelerator of that name."""
    if name == TPU:
        return lack("libtpu", "tpu", newer_works=True) or (
            "its libtpu fits; another process may hold the chips"
        )
    extra = next((extra for extra, package in _PLUGINS.items() if version(package)), "cuda12")
    return lack(_PLUGINS[extra], extra) or (
        f"its {_PLUGINS[extra]} fits; `nvidia-smi` tells whether the driver works"
    )


def lack(package: str, extra: str, *, newer_works: bool = False) -> str | None:
    """Why a package does not serve the installed jax, and what installs one that does.

    Args:
      package: that a platform of jax is made of.
      extra: of jax, which asks for it.
      newer_works: whether versions above the one that is asked for do, too.
    """
    ours, found = importlib.metadata.version("jax"), version(package)
    command = shlex.join([sys.executable, "-m", "pip", "install", f"jax[{extra}]=={ours}"])
    if found is None:
        return f"{package} is missing; on Linux: {command}"
    asked = _asked_of(package, extra)
    if asked is not None and not _fits(asked, found, newer_works):
        return (
            f"{package} {found} does not fit jax {ours}, which asks for {asked.specifier}: "
            f"{command}"
        )
    return None


def _asked_of(package: str, extra: str) -> Requirement | None:
    """What the installed jax asks of a package, if anything."""
    asked = map(Requirement, importlib.metadata.requires("jax") or ())
    return next(
        (
            one
            for one in asked
            if one.name == package and one.marker and one.marker.evaluate({"extra": extra})
        ),
        None,
    )


def _fits(asked: Requirement, found: str, newer_works: bool) -> bool:
    """Whether a version is one of those that are asked for, or a newer one where that works too."""
    if asked.specifier.contains(found):
        return True
    wanted = [Version(one.version.removesuffix(".*")) for one in asked.specifier]
    return newer_works and Version(found) >= max(wanted)
