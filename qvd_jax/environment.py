"""What a measured figure depends on besides the code."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

import qvd_jax

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "diffusers",
    "torchao",
    "qwix",
    "libtpu",
    "jax-cuda12-plugin",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cudnn-cu12",
)


def environment(device: str | None = None) -> dict[str, Any]:
    """Hardware and versions a figure depends on.

    Args:
      device: what a figure is about; None takes this machine's, and this process then has it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: found for name in _PACKAGES if (found := version(name))}
    return {
        "device": device or _device_kind(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {"qvd_jax": qvd_jax.__version__, **versions},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def version(package: str) -> str | None:
    """That of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_kind() -> str:
    device = jax.local_devices()[0]
    return device.device_kind if device.platform != "cpu" else "cpu"
