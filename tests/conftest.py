"""Shared fixtures: tiny random checkpoints, saved by diffusers and converted once per session."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import random_animatediff
import torch
from diffusers import AnimateDiffPipeline

from convert.__main__ import main as convert
from qvd_jax.pipelines.components import ComponentConfigs

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests sample few shapes many times, from several processes."""
    place = tmp_path_factory.getbasetemp() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session", autouse=True)
def shapes_traced_once() -> Iterator[None]:
    """Most checkpoints here have the same configs, and tracing takes most of a tiny load."""
    with pytest.MonkeyPatch.context() as patch:
        original = ComponentConfigs.param_shapes
        cached = functools.cache(original)

        def param_shapes(configs, dtype, quantization=None):
            if quantization is None:
                return cached(configs, dtype)
            return original(configs, dtype, quantization)

        patch.setattr(ComponentConfigs, "param_shapes", param_shapes)
        yield


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


def relative_error(found: object, expected: object) -> float:
    """Largest difference relative to the expected array's largest magnitude."""
    found, expected = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        for x in (found, expected)
    )
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
