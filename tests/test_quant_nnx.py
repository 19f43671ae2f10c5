"""Modules of flax.nnx, called by linen, and quantized as such."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvd_jax import InputError, from_nnx, quantize_module


class Block(nnx.Module):
    """As of a transformer, with a norm whose statistics change in training."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.gelu)
        self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return self.batch_norm(x + self.drop(self.mlp(x)))


class Net(nnx.Module):
    """With a layer in two places, and one that stays nnx's."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(8, 8, (3,), kernel_dilation=2, rngs=rngs)
        self.again = self.conv
        self.blocks = nnx.List([Block(rngs)])
        self.head = nnx.Einsum("blc,cd->bld", (8, 5), (5,), rngs=rngs)

    def __call__(self, x):
        return self.head(self.hidden(x))

    def hidden(self, x):
        x = self.again(nnx.relu(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return x


ATTENTION = [f"blocks.0.attention.{name}" for name in ("query", "key", "value", "out")]


def noise(seed):
    return jax.random.normal(jax.random.key(seed), (4, 6, 8))


def test_an_nnx_modules_layers_are_int8_and_all_else_is_its_own():
    model = Net()
    model.eval()
    module, variables = from_nnx(model)
    batches = [noise(seed) for seed in range(4)]
    expected = model(batches[0])
    np.testing.assert_array_equal(module.apply(variables, batches[0]), expected)
    int8, quantized, report = quantize_module(module, variables, batches, "minmax-w8a8")
    names = ["again", *ATTENTION, "blocks.0.mlp.layers.0"]
    assert [layer.path for layer in report.layers] == names
    found = jax.jit(int8.apply)(quantized, batches[0])
    error = np.square(found - expected).sum() / np.square(expected).sum()
    assert 1e-8 < error < 2e-3
    hidden = int8.apply(quantized, "hidden", batches[0], method="run")
    np.testing.assert_allclose(model.head(hidden), int8.apply(quantized, batches[0]), rtol=1e-5)
    # Equal modules find what was compiled for their equals.
    assert hash(module) == hash(from_nnx(model)[0])


def test_what_a_call_changes_is_given_back():
    model = Net()
    module, variables = from_nnx(model)
    found, changed = module.apply(variables, noise(0), mutable=["state"])
    np.testing.assert_array_equal(found, model(noise(0)))
    mean = changed["state"]["blocks.0.batch_norm.mean"]
    np.testing.assert_array_equal(mean, model.blocks[0].batch_norm.mean[...])
    assert float(jnp.abs(mean).max()) > 0


class Stacked(nnx.Module):
    """Two blocks with one axis more in all their parameters, run one behind the other."""

    def __init__(self):
        @nnx.vmap
        def blocks(rngs):
            return nnx.Sequential(
                nnx.Conv(8, 8, (3,), rngs=rngs),
                nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
                nnx.Linear(8, 8, rngs=rngs),
            )

        rngs = nnx.Rngs(0)
        self.blocks = blocks(rngs.split(2))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, x))


def test_stacks_stay_nnxs():
    model = Stacked()
    module, variables = from_nnx(model)
    np.testing.assert_array_equal(module.apply(variables, noise(0)), model(noise(0)))
    _, _, report = quantize_module(module, variables, [noise(0)], "minmax-w8a8")
    assert [layer.path for layer in report.layers] == ["head"]


def test_what_is_no_nnx_module_is_refused():
    with pytest.raises(InputError, match=r"a flax\.nnx module is needed, not a dict"):
        from_nnx({})
    with pytest.raises(InputError, match="has no Linear, LinearGeneral or Conv layer"):
        from_nnx(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"from_nnx makes one of a module of flax\.nnx"):
        quantize_module(Net(), {"params": {}}, [noise(0)])
