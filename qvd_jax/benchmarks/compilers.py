"""The compilers of chips that are not there: whether they are installed, and how they are asked."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import accelerators
from qvd_jax.benchmarks import hlo
from qvd_jax.benchmarks.chips import Chip
from qvd_jax.environment import version
from qvd_jax.errors import InputError, first_line
from qvd_jax.meshes import MeshConfig

_PACKAGES = {"tpu": ("libtpu", "tpu"), "cuda": ("jax-cuda12-plugin", "cuda12")}
"""What has a platform's compiler, and the extra of JAX that asks for it."""

_SCHEDULE = "schedule-analysis_final_bundles"
_BUNDLES = re.compile(r"total scheduled bundles:\s*(\d+)")
_TARGETS = Path(__file__).parent


def check_installed(chip: Chip) -> None:
    """Raises `InputError` if a chip's compiler is missing, or not of a version for this JAX."""
    package, extra = _PACKAGES[chip.platform]
    missing = accelerators.lack(package, extra, newer_works=chip.platform == "tpu")
    if missing:
        raise InputError(f"to compile for a {chip.name}: {missing}")


@contextlib.contextmanager
def settings(chip: Chip, dump: str | None = None) -> Iterator[None]:
    """Has processes started inside the block find the compiler and leave accelerators alone.

    Args:
      chip: what for.
      dump: a folder for the schedules of a TPU's kernels.
    """
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if chip.platform == "tpu":
        flags = [os.environ.get("LIBTPU_INIT_ARGS", "")]
        if dump:
            flags.append(f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true")
            flags.append("--xla_jf_dump_llo_pass_label_regex=final_bundles")
        variables |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": " ".join(flags).strip(),
            # Else it asks the network for the machine it runs on, and complains about the answer.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_STDERR_LOG_LEVEL": "3",
        }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def mesh(chip: Chip, config: MeshConfig) -> Mesh:
    """The mesh of chips that are not there.

    Raises:
      InputError: their compiler cannot be had.
    """
    try:
        devices = _devices(chip)
    except Exception as error:  # Each compiler has its own kinds.
        raise InputError(_refusal(chip, error)) from error
    return config.over(devices)


def bundles(chip: Chip, call: core.JaxprEqn, dump: Path) -> int:
    """Compiles a kernel written by hand alone, and counts the bundles of one step of its grid.

    Args:
      chip: a TPU.
      call: of the kernel, of a traced function.
      dump: the folder `environment` was given.
    """
    placed = NamedSharding(mesh(chip.one, MeshConfig()), PartitionSpec())
    avals: list[Any] = [var.aval for var in call.invars]
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    run = functools.partial(call.primitive.bind, **call.params)
    program = jax.jit(run, in_shardings=placed, out_shardings=placed).lower(*arguments).compile()
    (kernel,) = (one for one in hlo.operations(program.as_text() or "") if one.target)
    (schedule,) = dump.glob(f"*-{kernel.name}-*{_SCHEDULE}*")
    counted = _BUNDLES.search(schedule.read_text(encoding="utf-8"))
    assert counted is not None
    for file in dump.iterdir():
        file.unlink()
    return int(counted[1])


def options(chip: Chip) -> dict[str, Any]:
    """What the compiler must be told: CUDA's would try kernels out on the chip."""
    return {"xla_gpu_autotune_level": 0} if chip.platform == "cuda" else {}


def _devices(chip: Chip) -> list[jax.Device]:
    if chip.platform == "cuda":
        target = (_TARGETS / f"{chip.name}.txtpb").read_text(encoding="utf-8")
        topology = get_topology_desc(
            platform="cuda", topology_name="", topology=chip.topology, target_config=target
        )
    else:
        options: dict[str, Any] = {}
        if chip.count == 1:
            options = {
                "chip_config_name": "default",
                "chips_per_host_bounds": (1, 1, 1),
                "num_slices": 1,
            }
        topology = get_topology_desc(platform="tpu", topology_name=chip.topology, **options)
    return list(topology.devices)


def _refusal(chip: Chip, error: Exception) -> str:
    package, extra = _PACKAGES[chip.platform]
    text = str(error)
    if re.search(r"already in use|lockfile|lock file", text):
        return (
            f"{package} is held by another process, or the lock of one that ended was left behind: "
            f"{first_line(error)}"
        )
    return (
        f"{package} {version(package)} with jax {jax.__version__} gives no {chip.name}: "
        f"{first_line(error)}; pip install 'jax[{extra}]=={jax.__version__}' installs what fits"
    )
