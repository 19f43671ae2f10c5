"""The reader in `docs/checkpoint-format.md`, run as it stands against the layers themselves."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from parity import relative_error

from qvd_jax import checkpoint
from qvd_jax.models.layers import LayerSet
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "checkpoint-format.md"
CODE = re.search(r"<!-- reader -->\n```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)[1]


@pytest.fixture(scope="module")
def reader() -> dict[str, Callable[..., np.ndarray]]:
    assert len(CODE.splitlines()) <= 40
    functions: dict[str, Any] = {}
    exec(CODE, functions)
    return functions


@pytest.fixture(scope="module")
def unet() -> dict[str, Any]:
    """The parameters of each layer of the packaged int8 model, by path, as Orbax gives them."""
    item = checkpoint.find("shapes-w8a8") / "unet"
    flat = flax.traverse_util.flatten_dict(ocp.StandardCheckpointer().restore(item))
    layers: dict[str, Any] = {}
    for (*path, name), array in flat.items():
        layers.setdefault("/".join(path), {})[name] = array
    return layers


class Net(nn.Module):
    """One layer."""

    layers: LayerSet
    build: Callable[[LayerSet], nn.Module]

    def setup(self):
        self.layer = self.build(self.layers)

    def __call__(self, x):
        return self.layer(x)


def inputs_near_codes(layer: Any, shape: tuple[int, ...], reach: float) -> np.ndarray:
    """Values at most 0.3 of a step from a code, up to 1.1 of the range, so that none is a tie."""
    rng = np.random.default_rng(0)
    scale, offset = (np.asarray(layer[name], np.float64) for name in ("in_scale", "in_offset"))
    codes = np.rint(rng.uniform(-1.1, 1.1, shape) * reach)
    return np.float32((codes + rng.uniform(-0.3, 0.3, shape) - offset) / scale)


def of_package(layer: Any, method: str, x: np.ndarray, build: Callable[[LayerSet], nn.Module]):
    net = Net(layer_set({"layer": LayerSpec(method)}), build)
    return net.apply({"params": {"layer": layer}}, jnp.asarray(x))


def test_the_reader_of_the_format_computes_what_the_layers_do(reader, unet):
    layer = unet["down_blocks_1/blocks_0/attention/block/attn1/to_qkv"]
    outputs, channels = layer["kernel"].shape
    x = inputs_near_codes(layer, (5, channels), 127)
    expected = of_package(layer, "scri", x, lambda layers: layers.dense(outputs))
    assert relative_error(reader["dense"](x, layer), expected) <= 1e-5


@pytest.mark.parametrize(
    ("path", "strides"),
    [
        ("down_blocks_0/blocks_0/resnet/conv1", (1, 1)),
        ("down_blocks_0/downsample/conv", (2, 2)),
    ],
)
def test_the_reader_computes_a_convolution_up_to_its_border(reader, unet, path, strides):
    layer = unet[path]
    outputs, *kernel, channels = layer["kernel"].shape
    x = inputs_near_codes(layer, (2, 5, 4, channels), 127)
    padding = ((1, 1), (1, 1))
    expected = of_package(
        layer,
        "scri",
        x,
        lambda layers: layers.conv(outputs, tuple(kernel), strides=strides, padding=padding),
    )
    found = reader["conv"](x, layer, strides, padding)
    assert relative_error(found, expected) <= 1e-5
    # The borders are what it is about: without the taps they would be off.
    without = {**layer, "taps": np.zeros_like(layer["taps"])}
    assert relative_error(reader["conv"](x, without, strides, padding), expected) > 1e-3


@pytest.mark.parametrize("ranges", [1, 2])
def test_the_reader_computes_a_layer_of_htdq(reader, unet, ranges):
    layers = [layer for layer in unet.values() if "coarse" in layer]
    layer = next(layer for layer in layers if (float(layer["coarse"]) > 0) == (ranges == 2))
    ratio = float(layer["coarse"])
    outputs, channels = layer["kernel"].shape
    small, large = (inputs_near_codes(layer, (8, channels), 127 * r) for r in (1, max(ratio, 1)))
    x = np.concatenate([small, large])
    expected = of_package(layer, "htdq", x, lambda layers: layers.dense(outputs))
    assert relative_error(reader["htdq"](x, layer), expected) <= 1e-5
