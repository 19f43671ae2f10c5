"""One seed, one video, however many devices there are and however the work divides over them."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import divided
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divided import DEVICES
from parity import relative_error
from test_training import CONFIG, Line

from qvd_jax.diffusion.sampler import Prepared, SamplerConfig, initial_state, sample_steps
from qvd_jax.diffusion.solvers import StepTable
from qvd_jax.errors import InputError
from qvd_jax.kernels import int8
from qvd_jax.meshes import MeshConfig
from qvd_jax.models.layers import Dense
from qvd_jax.training import loop

STEPS = 3
EIGHT = replace(CONFIG, batch_size=8)
TOLERANCE = 1e-5
FLIPPED = 1e-2
"""Of int8 products of divided halves or frames: what is a rounding apart before a quantizer may be
a code apart behind it. How many are depends on the order in which a CPU adds: with VNNI less than
half of the latents are further apart than `TOLERANCE`, without it the median is 3e-4."""

# All axes at once, windows, joint norms, videos that do not divide, noise at each step; frames of
# networks with temporal convolutions and norms over them; step-aware scales.
TELLING = (
    ("animatediff:float:5:4", "data=2,guidance=2,frame=2"),
    ("svd:float:1:8", "guidance=2,frame=4"),
    ("animatediff:step_aware:1:8", "guidance=2,frame=4"),
)
EVERY_MESH = [
    str(MeshConfig(data, guidance, frame))
    for data, guidance, frame in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8))
    if data * guidance * frame <= DEVICES
]
ALL = (
    *itertools.product(
        ("animatediff:float:5:8", "animatediff:int8:5:8", "svd:float:2:8", "svd:int8:1:8"),
        EVERY_MESH,
    ),
    *itertools.product(
        ("animatediff:step_aware:5:4", "modelscope:float:1:8", "joint_resnets:float:3:4"),
        ("rule", "guidance=2,frame=4"),
    ),
    ("sparsectrl:float:2:4", "data=2,guidance=2,frame=2"),
    ("magicanimate:float:3:4", "data=2,frame=4"),
    ("animatediff:float:5:pixels", "rule"),
    ("svd:float:1:pixels", "guidance=2,frame=4"),
    ("svd:float:3:pixels", "data=4,guidance=2"),
)


def in_a_process(out: Path, function: str, *arguments: str) -> dict[str, np.ndarray]:
    """What a function of this file returns in a process that sees several devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        # Compiled in half the time.
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    program = "import sys, test_devices, numpy as np; "
    program += f"np.savez(sys.argv[1], **test_devices.{function}(*sys.argv[2:]))"
    subprocess.run(
        [sys.executable, "-c", program, str(out), *arguments], env=environment, check=True
    )
    return dict(np.load(out))


def sampled(*cases: str) -> dict[str, np.ndarray]:
    return {case: divided.run(case) for case in cases}


def all_meshes_of(cases: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(f"{case}:{m}" for case, mesh in cases for m in ("one", mesh)))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("devices")
    return in_a_process(folder / "found.npz", "several", str(folder), *all_meshes_of(TELLING))


def several(folder: str, *cases: str) -> dict[str, np.ndarray]:
    mesh = MeshConfig(data=4).over(jax.devices()[:4])
    states = [conditioned_steps(mesh) for mesh in (None, mesh)]
    return {
        "devices": np.array([len(state.latents.devices()) for state, _ in states]),
        "alone": np.asarray(states[0][0].latents),
        "divided": np.asarray(states[1][0].latents),
        "finite": np.asarray(states[1][1]),
        "kernels": np.array(kernels(MeshConfig(data=DEVICES).over(jax.devices()))),
        **trained(Path(folder)),
        **sampled(*cases),
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
    weight = loop.train(Line(), EIGHT, folder / "run")["weight"]
    try:
        loop.train(Line(), replace(EIGHT, batch_size=6), folder / "other")
    except InputError as error:
        return {"weight": np.asarray(weight), "refused": np.array(str(error))}
    raise AssertionError("six examples divided over eight devices")


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

    videos = 4
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


@pytest.mark.parametrize(("case", "mesh"), TELLING)
def test_any_mesh_makes_the_videos_of_one_device(found, case, mesh):
    check_same(found, case, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["animatediff:f", "animatediff:[is]", "svd:f", "svd:i", "[mj]|sp"]
)
def test_every_mesh_makes_the_videos_of_one_device(family, tmp_path):
    chosen = [(case, mesh) for case, mesh in ALL if re.match(family, case)]
    found = in_a_process(tmp_path / "found.npz", "sampled", *all_meshes_of(chosen))
    for case, mesh in chosen:
        check_same(found, case, mesh)


def check_same(found: dict[str, np.ndarray], case: str, mesh: str) -> None:
    one, other = found[f"{case}:one"], found[f"{case}:{mesh}"]
    assert len(np.unique(one.reshape(len(one), -1), axis=0)) == len(one)
    if case.endswith("pixels"):
        # A rounding apart before the last one.
        assert np.abs(one.astype(int) - other).max() <= 1, mesh
        assert (one != other).mean() < 1e-3, mesh
    elif ":float:" in case or "guidance=1,frame=1" in mesh:
        assert relative_error(other, one) <= TOLERANCE, mesh
    else:
        apart = np.abs(other - one) / np.abs(one).max()
        assert np.median(apart) <= (TOLERANCE if int8._has_vnni() else FLIPPED / 10), mesh
        assert apart.max() <= FLIPPED, mesh


def test_videos_divide_over_the_devices(found):
    assert found["devices"].tolist() == [1, 4]


def test_kernels_are_for_what_jax_need_not_divide(found):
    assert found["kernels"].tolist() == [0, 1]


def test_training_divides_over_the_devices(found, tmp_path):
    expected = loop.train(Line(), EIGHT, tmp_path)["weight"]
    np.testing.assert_allclose(found["weight"], expected, rtol=1e-5)
    assert str(found["refused"]) == "batch_size = 6 does not divide over 8 devices"


def test_every_condition_reaches_its_own_video(found):
    np.testing.assert_allclose(found["divided"], found["alone"], rtol=1e-5)
    assert np.isfinite(found["alone"]).all(axis=(1, 2, 3, 4)).tolist() == [True, True, False, True]


def test_what_is_not_finite_on_one_device_is_reported(found):
    assert found["finite"].tolist() == [False] * STEPS
