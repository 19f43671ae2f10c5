"""LoRA: additions that train on float and int8 bases, and merge into float ones."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_families
from parity import relative_error

import qvd_jax
from qvd_jax import FLOAT, InputError, LayerSet, lora, quantize_module
from qvd_jax.pipelines.quantization import make_plan
from qvd_jax.quant.policy import named_policy

KEY = jax.random.key(0)
ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """Layers of this package's networks: with a residual, gated, and convolutions."""

    layers: LayerSet = FLOAT

    @nn.compact
    def __call__(self, x):
        x = self.layers.conv(8, (3, 3), strides=(2, 2))(x)
        y = nn.LayerNorm(name="norm")(x)
        y = self.layers.dense(16, gated=True)(y)
        x = self.layers.dense(8)(y, x)
        return self.layers.conv(8, (3, 1, 1), padding=((1, 1), (0, 0), (0, 0)))(x[None])[0]


class Foreign(nn.Module):
    """Layers of linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, padding="CIRCULAR")(x)
        x = x.reshape(len(x), -1, 8)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(4)(x)


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def filled(adapter, size=0.3):
    """An adapter that adds something."""
    leaves, structure = jax.tree.flatten(adapter.params)
    leaves = [size * noise(*leaf.shape, seed=n) for n, leaf in enumerate(leaves)]
    return dataclasses.replace(adapter, params=jax.tree.unflatten(structure, leaves))


@pytest.mark.parametrize(("module", "layers"), [(Net(), 3), (Foreign(), 6)])
def test_merged_weights_give_what_attached_ones_give(module, layers):
    x = noise(4, 6, 6, 8)
    variables = module.init(KEY, x)
    config = lora.LoRAConfig(rank=2, alpha=3)
    adapter = lora.create_for_module(module, variables, x, config=config)
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapter.params)]
    assert names == ["lora_a", "lora_b"] * layers
    expected = module.apply(variables, x)
    fresh, with_nothing = lora.attach_to_module(module, variables, adapter)
    np.testing.assert_array_equal(fresh.apply(with_nothing, x), expected)
    adapter = filled(adapter)
    attached, tuned = lora.attach_to_module(module, variables, adapter)
    merged = {"params": lora.merge_params(variables["params"], adapter)}
    found = attached.apply(tuned, x)
    assert relative_error(found, module.apply(merged, x)) < 1e-5
    assert relative_error(found, expected) > 0.1
    base, added = lora.split(tuned["params"])
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, variables["params"])
    assert jax.tree.map(jnp.shape, added) == jax.tree.map(jnp.shape, adapter.params)


def test_an_adapter_trains_on_an_int8_base_and_is_for_its_float_model(tmp_path):
    module, x = Foreign(), noise(4, 6, 6, 8)
    variables = module.init(KEY, x)
    int8, quantized, _ = quantize_module(module, variables, [x], "minmax-w8a8")
    adapter = lora.create_for_module(int8, quantized, x, config=lora.LoRAConfig(rank=4))
    attached, tuned = lora.attach_to_module(int8, quantized, adapter)
    np.testing.assert_array_equal(attached.apply(tuned, x), int8.apply(quantized, x))
    # What another adapter makes of the float model is to be learned.
    wanted, with_other = lora.attach_to_module(module, variables, filled(adapter, 0.15))
    target = wanted.apply(with_other, x)
    base, added = lora.split(tuned["params"])
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(added, state):
        def loss(added):
            params = {"params": lora.join(base, added)}
            return jnp.square(attached.apply(params, x) - target).mean()

        value, gradients = jax.value_and_grad(loss)(added)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(added, updates), state, value

    state, losses = optimizer.init(added), []
    for _ in range(60):
        added, state, value = step(added, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    file = tmp_path / "adapter.npz"
    lora.save(dataclasses.replace(adapter, params=added), file)
    read = lora.load(file)
    assert (read.config, read.base, read.kernels) == (adapter.config, adapter.base, None)
    jax.tree.map(np.testing.assert_array_equal, read.params, added)
    merged = {"params": lora.merge_params(variables["params"], read)}
    before, after = (
        float(jnp.square(module.apply(v, x) - target).mean()) for v in (variables, merged)
    )
    assert after < 0.4 * before
    with pytest.raises(InputError, match="codes, which cannot take the additions; merge into the"):
        lora.merge_params(quantized["params"], read)


def test_an_adapter_of_the_packages_model_fits_its_int8_one(tmp_path):
    pipe, int8 = qvd_jax.load("shapes"), qvd_jax.load("shapes-w8a8")
    adapter = lora.create(pipe, lora.LoRAConfig(rank=2, targets=("*/attn1/*", "*/resnet/conv1")))
    tuned = lora.attach(int8, adapter)
    shapes = tuned.configs.unet_shapes(1, 8, 8, 4)

    def operations(model):
        traced = jax.make_jaxpr(lambda p, *given: model.unet.apply({"params": p}, *given))
        return len(traced(model.params["unet"], *shapes).eqns)

    layers = len(jax.tree.leaves(adapter.params)) // 2
    assert operations(tuned) >= operations(int8) + 3 * layers
    with pytest.raises(InputError, match=r"there is an adapter already .*the base alone"):
        lora.attach(tuned, adapter)
    with pytest.raises(InputError, match="adapter attached; merge it"):
        make_plan(lora.attach(pipe, adapter), named_policy("qvd-w8a8"))
    with pytest.raises(InputError, match=r"the pipeline does not fit \(\d+ names.*\n  \+ .*lora_a"):
        qvd_jax.save(tuned, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def one_level():
    """A pipeline of the smallest UNet with every place that is called apart from the others."""
    unet = dataclasses.replace(
        tiny_families.ANIMATEDIFF,
        block_channels=(32,),
        attention_levels=(True,),
        num_heads=(4,),
        down_eps=(1e-5,),
        up_eps=(1e-5,),
        temporal_heads=(4,),
        temporal_mid_block=False,
    )
    return tiny_families.make(tiny_families.Family(unet, ()))


def test_a_pipeline_samples_the_same_attached_and_merged():
    pipe = one_level()
    config = lora.LoRAConfig(rank=2, alpha=3)
    adapter = filled(lora.create(pipe, config), 0.1)
    attached, merged = lora.attach(pipe, adapter), lora.merge(pipe, adapter)
    options = {"output_type": "latents", "steps": 2, "frames": 2, "guidance_scale": 1.0}
    exact, found, base = (p(["a red circle"], **options) for p in (merged, attached, pipe))
    assert relative_error(found, exact) < 1e-4
    assert relative_error(base, exact) > 0.1


def test_an_adapter_is_added_once():
    pipe = one_level()
    fresh = lora.create(pipe, lora.LoRAConfig(rank=2))
    trained = filled(fresh)
    merged = lora.merge(pipe, trained)
    for attached in (lora.attach(pipe, fresh), lora.attach(pipe, trained)):
        again = lora.merge(attached, trained)
        assert again.unet == pipe.unet
        jax.tree.map(np.testing.assert_array_equal, again.params, merged.params)
    with pytest.raises(InputError, match="another adapter attached, whose additions would be lost"):
        lora.merge(lora.attach(pipe, trained), fresh)
    for twice in (lora.attach, lora.merge):
        with pytest.raises(InputError, match="kernels that it adds to are others; it may be merg"):
            twice(merged, trained)
    module, x = Net(), noise(4, 6, 6, 8)
    variables = module.init(KEY, x)
    adapter = lora.create_for_module(module, variables, x)
    attached, tuned = lora.attach_to_module(module, variables, adapter)
    with pytest.raises(InputError, match=r"already \(.*lora_a\); take the base alone"):
        lora.attach_to_module(attached, tuned, adapter)
    with pytest.raises(InputError, match=r"already \(.*lora_a\); take the base alone"):
        lora.merge_params(tuned["params"], adapter)


def test_parameters_keep_the_names_of_their_partitions():
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    module, x = nn.Sequential([nn.Dense(8, kernel_init=kernel)]), noise(4, 6)
    variables = module.init(KEY, x)
    adapter = filled(lora.create_for_module(module, variables, x))
    merged = lora.merge_params(variables["params"], adapter)
    assert merged["layers_0"]["kernel"].names == ("in", "out")
    attached, values = lora.attach_to_module(module, variables, adapter)
    np.testing.assert_allclose(
        module.apply({"params": merged}, x), attached.apply(values, x), rtol=1e-5
    )


def test_an_adapter_that_cannot_be_written_names_its_file(tmp_path):
    module, x = nn.Sequential([nn.Dense(8)]), noise(4, 6)
    adapter = lora.create_for_module(module, module.init(KEY, x), x)
    message = r"none/adapter.npz could not be written: No such file or directory"
    with pytest.raises(InputError, match=message):
        lora.save(adapter, tmp_path / "none" / "adapter.npz")


def test_damaged_adapters_are_refused(tmp_path):
    module, x = Net(), noise(4, 6, 6, 8)
    variables = module.init(KEY, x)
    config = lora.LoRAConfig(rank=2, targets=("Dense_1",))
    adapter = lora.create_for_module(module, variables, x, config=config)
    ((name, pair),) = adapter.params.items()
    down, up = pair["lora_a"], pair["lora_b"]
    damaged = {
        f"adapter.npz: .* damaged: {name} has no lora_b": {name: {"lora_a": down}},
        f"adapter.npz: .* damaged: {name} has no lora_a": {name: {"lora_b": up}},
        r"lora_a \(16, 3\) and lora_b \(2, 8\); \(\.\.\., 2\) and \(2, outputs\) are of its": {
            name: {"lora_a": jnp.ones((16, 3)), "lora_b": up}
        },
        "adapter.npz: .* adds to no layer": {},
    }
    for message, params in damaged.items():
        lora.save(dataclasses.replace(adapter, params=params), tmp_path / "adapter.npz")
        with pytest.raises(InputError, match=message):
            lora.load(tmp_path / "adapter.npz")
    longer = {name: {"lora_a": jnp.ones((17, 2)), "lora_b": up}}
    with pytest.raises(InputError, match=r"lora_a \(17, 2\) .* none of a kernel \(8, 8\)"):
        lora.attach_to_module(module, variables, dataclasses.replace(adapter, params=longer))
    with pytest.raises(InputError, match="alpha = nan: it must be finite"):
        lora.LoRAConfig(alpha=float("nan"))
    with pytest.raises(InputError, match=r"seed = -1: 0 to 4294967295 is needed"):
        lora.create_for_module(module, variables, x, seed=-1)


def test_what_does_not_fit_is_refused(tmp_path):
    module, x = Foreign(), noise(4, 6, 6, 8)
    variables = module.init(KEY, x)
    adapter = lora.create_for_module(module, variables, x)
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    with pytest.raises(InputError, match="another base: the layers have the same names, but other"):
        lora.attach_to_module(module, other, adapter)
    net, params = Net(), Net().init(KEY, x)
    with pytest.raises(InputError, match=r"another base: this one has no .*/query, and 4 of"):
        lora.attach_to_module(net, params, adapter)
    config = lora.LoRAConfig(targets=("Conv_0", "Dense_1"))
    with pytest.raises(InputError, match=r"'Dense_1' matches no layer .*; did you mean 'Dense_0'"):
        lora.create_for_module(module, variables, x, config=config)
    with pytest.raises(ValueError, match="rank = 0: at least 1"):
        lora.LoRAConfig(rank=0)
    np.savez(tmp_path / "else.npz", x=np.ones(2))
    with pytest.raises(InputError, match=r"else\.npz is no adapter"):
        lora.load(tmp_path / "else.npz")
    with pytest.raises(InputError, match=r"an adapter is an \.npz file"):
        lora.save(adapter, tmp_path / "adapter.safetensors")


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path):
    page = (ROOT / "docs/how-to/lora.md").read_text(encoding="utf-8")
    shown = ""
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        shown += done.stdout
    before, after = (int(count) for count in re.findall(r"^int8.*: (\d) of 8 move", shown, re.M))
    assert before <= 3
    assert after >= before + 3
