"""One seed, one video, however many devices there are."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import CONFIG, Line

import qvd_jax
from qvd_jax import CalibrationConfig, VideoPipeline
from qvd_jax.diffusion.sampler import Prepared, SamplerConfig, initial_state, sample_steps
from qvd_jax.diffusion.solvers import StepTable
from qvd_jax.errors import InputError
from qvd_jax.metrics.paired import psnr
from qvd_jax.models.layers import Dense
from qvd_jax.pipelines.loading import devices_for
from qvd_jax.training import loop

DEVICES, STEPS = 4, 3
PROMPTS = ["a red circle", "a blue square moving left", "three", "four"]
SMALL = {"frames": 4, "height": 8, "width": 12, "steps": STEPS}


@pytest.fixture(scope="module")
def int8(tiny_checkpoint) -> VideoPipeline:
    """Step-aware, so that the sampler has gains to slice."""
    config = CalibrationConfig(steps=STEPS, rows=8, step_aware=True)
    size = {name: SMALL[name] for name in ("frames", "height", "width")}
    quantized, _ = qvd_jax.quantize(
        qvd_jax.load(tiny_checkpoint), "minmax-w8a8", PROMPTS[:1], config, size
    )
    return quantized


@pytest.fixture(scope="module")
def found(tiny_checkpoint, int8, tmp_path_factory) -> dict[str, np.ndarray]:
    """What `several` returned in a process that sees several devices."""
    folder = tmp_path_factory.mktemp("devices")
    qvd_jax.save(int8, folder / "int8")
    out = folder / "found.npz"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    program = "import sys, test_devices, numpy as np; "
    program += "np.savez(sys.argv[1], **test_devices.several(*sys.argv[2:]))"
    folders = [str(tiny_checkpoint), str(folder / "int8"), str(folder)]
    arguments = [sys.executable, "-c", program, str(out), *folders]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
    return dict(np.load(out))


def several(checkpoint: str, int8: str, folder: str) -> dict[str, np.ndarray]:
    sharding = devices_for(len(PROMPTS))
    pipe = qvd_jax.load(checkpoint, sharding=sharding)
    states = [conditioned_steps(mesh) for mesh in (None, sharding.mesh)]
    return {
        "devices": np.array([len(state.latents.devices()) for state, _ in states]),
        "videos": pipe(PROMPTS, **SMALL),
        "int8": qvd_jax.load(int8, sharding=sharding)(PROMPTS, **SMALL),
        "three": pipe(PROMPTS[:3], **SMALL),
        "alone": np.asarray(states[0][0].latents),
        "divided": np.asarray(states[1][0].latents),
        "finite": np.asarray(states[1][1]),
        "kernels": np.array(kernels(sharding.mesh)),
        **trained(Path(folder)),
    }


def kernels(mesh: jax.sharding.Mesh) -> list[int]:
    """How many kernels of TPUs a layer has that JAX divides, and one inside `jax.shard_map`."""
    x = jnp.zeros((DEVICES, 1024, 128), jnp.bfloat16)
    layer = Dense(128, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    over_videos = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, over_videos)
    divided = jax.jit(layer.apply, in_shardings=(None, sharding))
    specs = jax.sharding.PartitionSpec(), over_videos
    one_by_one = jax.shard_map(
        layer.apply, mesh=mesh, in_specs=specs, out_specs=over_videos, check_vma=False
    )
    texts = (
        run.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
        for run in (divided, jax.jit(one_by_one))
    )
    return [text.count("tpu_custom_call") for text in texts]


def trained(folder: Path) -> dict[str, np.ndarray]:
    """A training whose batch divides over the devices, and the message of one that does not."""
    weight = loop.train(Line(), CONFIG, folder / "run")["weight"]
    try:
        loop.train(Line(), replace(CONFIG, batch_size=6), folder / "other")
    except InputError as error:
        return {"weight": np.asarray(weight), "refused": np.array(str(error))}
    raise AssertionError("six examples divided over four devices")


class Summing:
    """Stands for a `UNet3D`: its prediction depends on everything it is told."""

    def apply(
        self,
        variables: Any,
        latents: Any,
        temporal: Any,
        context: Any,
        control: Any,
        reference: Any,
        method: str,
    ) -> Any:
        assert method == "denoise"
        negatives = len(latents) - len(reference)
        told = context.mean(1)[:, None, None, None] + temporal + control.mean()
        guide = jnp.concatenate([jnp.zeros((negatives, *reference.shape[1:])), reference])
        gain = variables["params"]["gain"] * variables["quant"]["gain"]
        seen, image = jnp.split(latents, 2, axis=-1)
        return gain * seen * image + told + guide


UNET = Summing()


def conditioned_steps(mesh: Any) -> Any:
    """`sample_steps` with every kind of condition; the third video becomes infinite."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    videos = len(PROMPTS)
    prepared = Prepared(
        temporal=normal(STEPS, 1),
        context=normal(2 * videos, 5, 2).at[videos + 2].set(jnp.inf),
        image=normal(2 * videos, 1, 2, 2, 2),
        control=normal(1, 3, 2, 2, 2),
        reference=normal(videos, 1, 2, 2, 2),
        gains={"gain": normal(STEPS)},
    )
    latents = normal(videos, 3, 2, 2, 2)
    table = StepTable(*normal(len(StepTable._fields), STEPS))
    table = table._replace(to_history=normal(STEPS, 2))
    return sample_steps(
        UNET,
        {"gain": jnp.float32(0.5)},
        initial_state(latents, table),
        table,
        prepared,
        jnp.full(3, 2.0),
        jax.vmap(jax.random.key)(jnp.arange(videos)),
        jnp.int32(0),
        SamplerConfig(count=STEPS, window=3, guided=True, noisy=True, mesh=mesh),
    )


def test_videos_divide_over_the_devices(found):
    assert found["devices"].tolist() == [1, DEVICES]


def test_several_devices_make_the_videos_of_one(found, tiny_checkpoint):
    expected = qvd_jax.load(tiny_checkpoint)(PROMPTS, **SMALL)
    np.testing.assert_array_equal(found["videos"], expected)
    assert len(np.unique(expected.reshape(len(PROMPTS), -1), axis=0)) == len(PROMPTS)


def test_kernels_are_for_what_jax_need_not_divide(found):
    assert found["kernels"].tolist() == [0, 1]


def test_training_divides_over_the_devices(found, tmp_path):
    expected = loop.train(Line(), CONFIG, tmp_path)["weight"]
    np.testing.assert_allclose(found["weight"], expected, rtol=1e-5)
    assert str(found["refused"]) == "batch_size = 6 does not divide over 4 devices"


def test_int8_products_divide_too(found, int8):
    # A rounding apart before a quantizer is a code apart behind it, which three steps of random
    # weights make 31 dB at the worst of 48 videos, most of which are equal.
    apart = psnr(int8(PROMPTS, **SMALL), found["int8"])
    assert np.median(apart) > 40
    assert apart.min() > 28
    assert (found["int8"] != found["videos"]).any()


def test_videos_that_do_not_divide_are_the_same_too(found):
    np.testing.assert_array_equal(found["three"], found["videos"][:3])


def test_every_condition_reaches_its_own_video(found):
    np.testing.assert_allclose(found["divided"], found["alone"], rtol=1e-5)
    assert np.isfinite(found["alone"]).all(axis=(1, 2, 3, 4)).tolist() == [True, True, False, True]


def test_what_is_not_finite_on_one_device_is_reported(found):
    assert found["finite"].tolist() == [False] * STEPS
