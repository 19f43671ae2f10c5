"""The UNet, float and int8, inside other people's programs: meshes, vmap, checkpoint, scan."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qvd_jax.axes import Array
from qvd_jax.kernels import int8
from qvd_jax.models.configs import UNet3DConfig
from qvd_jax.models.layers import FLOAT, LayerSet
from qvd_jax.models.stages import down_stages
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.record import layouts, replace_layers

CONFIG = UNet3DConfig(
    block_channels=(8,),
    layers_per_block=1,
    attention_levels=(True,),
    num_heads=(2,),
    temporal_heads=(2,),
    context_dim=4,
    norm_groups=4,
    down_eps=(1e-5,),
    up_eps=(1e-5,),
    max_frames=4,
)
KINDS = ["float", "int8"]


def make_inputs(videos: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(videos)
    shapes = (videos, 2, 4, 2, 4), (videos, 3, 4)
    latents, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return latents, jnp.linspace(1.0, 900.0, videos), context


class Down(nn.Module):
    """A stage of the UNet: a resnet, a transformer over positions and one over frames."""

    config: UNet3DConfig
    layers: LayerSet = FLOAT

    def setup(self) -> None:
        (self.stage,) = down_stages(self.config, self.layers)

    def __call__(self, latents: Array, timesteps: Array, context: Array) -> Array:
        embedding = jnp.broadcast_to(jnp.sin(timesteps)[:, None], (len(timesteps), 32))
        features = self.stage.temporal_features(embedding)
        x = jnp.concatenate([latents, -latents], -1)
        return self.stage(x, features, self.stage.context_features(context))[0]


def make(kind: str, network: type[nn.Module] = UNet3D) -> tuple[nn.Module, Any]:
    """A network, and random variables; int8 ones are made of random codes."""
    unet, rng = network(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *make_inputs(1))["params"]
    if kind == "int8":
        paths = [
            n.removesuffix("/kernel")
            for n in flax.traverse_util.flatten_dict(shapes, sep="/")
            if n.endswith("/kernel") and not n.startswith("conv_")
        ]
        specs = {p: LayerSpec("htdq" if "time_emb" in p else "scri") for p in paths}
        unet = network(CONFIG, layer_set(specs))
        shapes, _ = replace_layers(shapes, layouts(shapes, specs))

    def draw(path: Any, leaf: Any) -> Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(-127, 128, leaf.shape), leaf.dtype)
        size = {
            "in_scale": 30.0,
            "scale": 1e-3 if leaf.dtype == jnp.bfloat16 else 1.0,
            "coarse": 4.0,
        }
        values = rng.uniform(0.5, 1.0, leaf.shape) * size.get(path[-1].key, 0.3)
        signs = 1 if path[-1].key in size else rng.choice([-1.0, 1.0], leaf.shape)
        return jnp.asarray(values * signs, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    if kind == "int8":
        flat = flax.traverse_util.flatten_dict(params)
        sums = {
            path: flat[(*path[:-1], "kernel")].astype(jnp.int32).reshape(len(leaf), -1).sum(1)
            for path, leaf in flat.items()
            if path[-1] == "sums"
        }
        params = flax.traverse_util.unflatten_dict(flat | sums)
    return unet, {"params": params}


def draw_codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-127, 128, shape).astype(np.int8)


ROWS, IMAGES, WEIGHTS, KERNEL = (
    draw_codes(*shape) for shape in ((4, 8), (2, 4, 4, 8), (6, 8), (6, 3, 3, 8))
)
PRODUCTS = {
    "dot": (int8.dot, ROWS, (WEIGHTS, WEIGHTS.sum(1, dtype=np.int32))),
    "conv": (
        partial(int8.conv, strides=(1, 1), padding=((1, 1), (1, 1))),
        IMAGES,
        (KERNEL, KERNEL.sum((1, 2, 3), dtype=np.int32)),
    ),
}
"""Of int8 layers without a network around them."""


def on_a_mesh(out: str) -> None:
    """Writes what UNets give on two devices whose mesh has explicit axes, as is jax's default."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,))
    found = {}
    for kind in KINDS:
        unet, variables = make(kind)
        with jax.set_mesh(mesh):
            variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
            places = NamedSharding(mesh, PartitionSpec("data"))
            inputs = (jax.device_put(x, places) for x in make_inputs(2))
            y = jax.jit(lambda *xs, u=unet: 2 * u.apply(*xs))(variables, *inputs)
        assert y.sharding.spec[0] == "data"
        assert len(y.devices()) == 2
        found[kind] = np.asarray(y) / 2
    with jax.set_mesh(mesh):
        for name, (product, codes, others) in PRODUCTS.items():
            y = jax.jit(product)(jax.device_put(codes, places), *others)
            assert y.sharding.spec[0] == "data"
            found[name] = np.asarray(y)
    np.savez(out, **found)


@pytest.fixture(scope="module", autouse=True)
def compiled_fast() -> Iterator[None]:
    """What is compared is the same program in other places, not its speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory) -> dict[str, np.ndarray]:
    """What `on_a_mesh` gives in a process that sees two devices."""
    out = tmp_path_factory.mktemp("mesh") / "found.npz"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    }
    program = "import sys, test_models_in_jit as t; t.on_a_mesh(sys.argv[1])"
    arguments = [sys.executable, "-c", program, str(out)]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
    return dict(np.load(out))


@pytest.fixture(scope="module", params=KINDS)
def case(request) -> tuple[str, UNet3D, Any]:
    return request.param, *make(request.param)


@pytest.fixture(scope="module")
def plain(case) -> Array:
    """The predictions of two videos."""
    _, unet, variables = case
    return jax.jit(unet.apply)(variables, *make_inputs(2))


def assert_close(found: Array, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def test_on_a_mesh_of_explicit_axes(case, plain, on_mesh):
    kind, *_ = case
    assert_close(on_mesh[kind], plain)


def test_products_alone_on_a_mesh_of_explicit_axes(on_mesh):
    np.testing.assert_array_equal(on_mesh["dot"], np.int64(ROWS) @ np.int64(WEIGHTS).T)
    padded = np.pad(np.int64(IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum("nhwcij,oijc->nhwo", windows, np.int64(KERNEL))
    np.testing.assert_array_equal(on_mesh["conv"], expected)


def test_under_vmap(case, plain):
    _, unet, variables = case
    inputs = (x[:, None] for x in make_inputs(2))
    found = jax.jit(jax.vmap(unet.apply, (None, 0, 0, 0)))(variables, *inputs)
    assert_close(found[:, 0], plain)


@pytest.mark.parametrize("kind", [pytest.param("float", marks=pytest.mark.slow), "int8"])
def test_under_checkpoint(kind):
    network, variables = make(kind, Down)
    latents, *others = make_inputs(2)

    def gradient(apply: Callable[..., Array], latents: Array) -> Array:
        return jax.grad(lambda x: jnp.square(apply(variables, x, *others)).sum())(latents)

    # jax's own, and that of flax.
    applies = {
        "float": jax.checkpoint(network.apply),
        "int8": nn.remat(Down)(network.config, network.layers).apply,
    }
    expected, found = (
        jax.jit(partial(gradient, f))(latents) for f in (network.apply, applies[kind])
    )
    assert jnp.abs(expected).min() > 0
    assert_close(found, expected)


def test_under_scan(case, plain):
    _, unet, variables = case

    def step(carry: None, inputs: tuple[Array, ...]) -> tuple[None, Array]:
        return carry, unet.apply(variables, *inputs)

    inputs = tuple(x[:, None] for x in make_inputs(2))
    _, found = jax.jit(partial(jax.lax.scan, step, None))(inputs)
    assert_close(found[:, 0], plain)
