"""Shared fixtures: tiny random checkpoints, saved by diffusers and converted once per session."""

import os
from pathlib import Path

if not any(any(Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")):
    # Before jax is imported: libtpu, which is there for its compiler, would look for a TPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re
import shutil
import zlib
from collections.abc import Callable

import jax
import pytest
import random_animatediff
import torch
from diffusers import AnimateDiffPipeline
from refusals import Outcome

from convert.__main__ import main as convert

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles without LLVM's optimizations, which take longer than the small programs here run.

    XLA's own, which choose and fuse operations, stay. Slow tests compute for long and have both.
    """
    if config.option.markexpr == "not slow":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".rstrip()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests sample few shapes many times, from several processes."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # that of all workers of this run
    jax.config.update("jax_compilation_cache_dir", str(place / "xla"))
    # A limit, though none that is met: with one, jax locks the folder while it reads and writes.
    jax.config.update("jax_compilation_cache_max_size", 2**34)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def torch_seeded() -> None:
    """For modules of PyTorch that are made in a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AnimateDiffPipeline]:
    """A v2 pipeline folder as diffusers saves it, and the pipeline itself."""
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    return folder, random_animatediff.make_pipeline(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny: tuple[Path, AnimateDiffPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same pipeline, converted."""
    out = tmp_path_factory.mktemp("qvd_jax") / "tiny"
    assert convert([str(tiny[0]), "--out", str(out)]) == 0
    return out


@pytest.fixture
def source(tiny: tuple[Path, AnimateDiffPipeline], tmp_path: Path) -> Path:
    """A copy of the v2 pipeline folder, to be spoiled."""
    return shutil.copytree(tiny[0], tmp_path / "source")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The folder that holds the output, and nothing else."""
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


@pytest.fixture
def run(parent: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command that is to fail; nothing in the output's folder may have changed."""

    def snapshot() -> dict[str, int]:
        return {
            str(path.relative_to(parent)): zlib.crc32(path.read_bytes()) if path.is_file() else 0
            for path in parent.rglob("*")
        }

    def run(source: object, *arguments: object, out: Path | None = None) -> Outcome:
        before = snapshot()
        code = convert([str(source), "--out", str(out or parent / "out"), *map(str, arguments)])
        assert snapshot() == before
        printed, stderr = capsys.readouterr()
        assert "Traceback" not in stderr
        # A progress bar may have been drawn on the lines before.
        start = re.search(r"^(error: |interrupted; )", stderr, re.MULTILINE).start()
        message = stderr[start:]
        assert message.endswith("\n")
        assert not re.search(r"^(error: |interrupted; )", message[1:], re.MULTILINE)
        return Outcome(code, message.removesuffix("\n"), printed)

    return run
