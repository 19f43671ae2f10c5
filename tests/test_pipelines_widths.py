"""Bits of weights chosen by what they cost the final latents."""

import argparse
import math
import re
from dataclasses import replace
from typing import ClassVar

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qvd_jax
from qvd_jax import calibrate
from qvd_jax.config import from_dict, read_yaml
from qvd_jax.errors import InputError
from qvd_jax.hosts import Hosts
from qvd_jax.models.layers import FLOAT, Dense, LayerSet
from qvd_jax.pipelines import export_stages, sensitivity
from qvd_jax.pipelines.loading import save
from qvd_jax.pipelines.observation import CalibrationConfig, Observed
from qvd_jax.pipelines.quantization import make_plan, solve_plan, unet_layers
from qvd_jax.pipelines.sensitivity import Sensitivities, measure, with_widths
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline
from qvd_jax.pipelines.widths import Sizes, Target, check_budget, choose, held_bytes, unet_sizes
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec, Policy, Rule
from qvd_jax.quant.record import QuantizedParams
from qvd_jax.quant.solve import find_quantizer, solve_layer
from qvd_jax.quant.statistics import Statistics

PROMPTS = ["a red circle", "a blue square"]
SIZE = {"frames": 2, "height": 8, "width": 8}
CONFIG = CalibrationConfig(steps=2, rows=64)
CONV = "mid_block/blocks_0/resnet/conv1"
DENSE = "mid_block/blocks_0/motion_module/block/ff/proj"


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return qvd_jax.load(tiny_checkpoint)


class OneConv(nn.Module):
    layers: LayerSet

    def setup(self):
        self.conv = self.layers.conv(6, (3, 3))

    def __call__(self, x):
        return self.conv(x)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_a_probed_conv_is_the_quantized_one_whose_inputs_are_not_rounded(activation_bits):
    """At every pixel, and most have taps outside the image, which get no part of the correction."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.gamma(1.0, rng.uniform(0.5, 2, 8), (64, 2, 3, 8)), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + 2, j : j + 3] for i in range(3) for j in range(3)]
    rows = jnp.stack(taps, -2).reshape(-1, 9, 8)
    params = OneConv(FLOAT).init(jax.random.key(0), x)["params"]
    spec = LayerSpec("minmax", 2, activation_bits)
    statistics = Statistics(x.min((0, 1, 2)), x.max((0, 1, 2)), rows, jnp.asarray(True))
    weights = params["conv"]["kernel"]
    quantizer = find_quantizer(statistics, [weights], spec) if activation_bits == 8 else None
    record, _ = solve_layer("conv", params["conv"], statistics, spec, quantizer)
    change = sensitivity._change(record, weights, rows, spec)
    probed = {"kernel": change.kernel, "bias": params["conv"]["bias"], "taps": change.constant}

    def outputs(layers, conv):
        return OneConv(layers).apply({"params": {"conv": conv}}, x)

    exact = outputs(FLOAT, params["conv"])
    quantized = outputs(layer_set({"conv": spec}), record.params())
    found = outputs(sensitivity._ProbedLayers(Dense, sensitivity._ProbedConv), probed)
    lost = np.square(quantized - exact).mean()
    assert np.square(found - quantized).mean() < 1e-3 * lost
    assert np.square(found - exact).mean() == pytest.approx(lost, rel=0.02)


class Concatenated(TextToVideoPipeline):
    """A pipeline whose latents are what some layers of its UNet make of fixed rows."""

    rows: ClassVar[dict[str, np.ndarray]] = {}

    def __call__(self, inputs, **call):
        assert len(inputs) == len(call["indices"])
        flat = flax.traverse_util.flatten_dict(self.params["unet"], sep="/")
        made = []
        for path, rows in self.rows.items():
            own = {n.rpartition("/")[2]: x for n, x in flat.items() if n.startswith(f"{path}/")}
            if "scale" in own:
                kernel, bias = QuantizedParams(**own).dequantized()
            else:
                kernel, bias = own["kernel"], own.get("bias", 0.0)
                bias = bias + sum(np.reshape(own.get("taps", []), (-1, kernel.shape[-1])))
            made.append(
                np.einsum("rtc,tco->ro", rows, np.reshape(kernel, (-1, *kernel.shape[-2:])))
            )
            made[-1] += np.reshape(bias, (1, -1))
        return np.stack([np.concatenate([part.ravel() for part in made])] * len(inputs))


@pytest.fixture
def observed(pipe, monkeypatch):
    """What there is to see of the two layers, which is what the stub multiplies."""
    kernels = {layer.path: layer.kernel for layer in unet_layers(pipe, SIZE)}
    rng, statistics = np.random.default_rng(0), {}
    for path in (CONV, DENSE):
        *taps, channels, _ = kernels[path]
        rows = rng.gamma(1.0, size=(64, math.prod(taps), channels)).astype(np.float32)
        monkeypatch.setitem(Concatenated.rows, path, rows)
        ends = rows.min((0, 1)), rows.max((0, 1)), rows, True
        statistics[path] = Statistics(*map(jnp.asarray, ends))
    return Observed(statistics, {})


def test_errors_of_layers_and_widths_are_those_of_the_latents(pipe, observed):
    """Where the latents are the layers' outputs themselves, so are those of widths not sampled."""
    spec = LayerSpec("minmax", 8, 16)
    policy = Policy("own", (Rule(CONV, spec), Rule(DENSE, spec)))
    plan = make_plan(pipe, policy, CONFIG, SIZE)
    stub = Concatenated(**vars(pipe))
    found = measure(stub, plan, [2, 4, 8], observed, PROMPTS, CONFIG)
    exact = stub(PROMPTS, indices=[0, 1])
    assert found.signal == pytest.approx(np.square(exact).sum(), rel=1e-5)
    for bits in (2, 4, 8):
        by_layer = []
        for path in plan.specs:
            alone = replace(plan, specs={path: replace(spec, weight_bits=bits)})
            quantized, _ = solve_plan(stub, alone, observed, CONFIG)
            lost = np.square(quantized(PROMPTS, indices=[0, 1]) - exact).sum()
            assert found.errors[path][bits] == pytest.approx(lost, rel=1e-3)
            by_layer.append(lost)
    assert found.noise == pytest.approx(sum(by_layer), rel=1e-4)


def test_changed_layers_have_the_parameters_of_the_probed_network(pipe):
    plan = make_plan(pipe, Policy("own", (Rule("*", LayerSpec("minmax")),)), CONFIG, SIZE)
    probed = sensitivity._probed(pipe, plan)
    inputs = pipe.configs.unet_shapes(2, 4, 4, pipe.context_length)
    shapes = jax.eval_shape(probed.unet.init, jax.random.key(0), *inputs)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(probed.params["unet"], shapes)

    def placed(pipe):
        return [(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(pipe.params["unet"])]

    for path in (CONV, DENSE):
        *taps, _, features = kernel = plan.layers[path].kernel
        change = sensitivity._Change(jnp.ones(kernel), jnp.ones((*taps, features)), 1.0)
        changed = sensitivity._changed(probed, path, change)
        chex.assert_trees_all_equal_shapes_and_dtypes(changed.params["unet"], shapes)
        # Else each layer's would be compiled anew.
        assert placed(changed) == placed(probed)


def test_codes_of_two_bits_are_int2_wherever_they_can_be(pipe, observed, tmp_path):
    """Four to a byte in memory and in a checkpoint; jax.export, which has none, is given int4."""
    spec = LayerSpec("minmax", 2)
    plan = make_plan(pipe, Policy("own", (Rule(CONV, spec), Rule(DENSE, spec))), CONFIG, SIZE)
    quantized, _ = solve_plan(pipe, plan, observed, CONFIG)
    save(quantized, tmp_path / "w2")
    restored = qvd_jax.load(tmp_path / "w2")
    chex.assert_trees_all_equal(restored.params, quantized.params)
    flat = flax.traverse_util.flatten_dict(restored.params["unet"], sep="/")
    kernels = {path: flat[f"{path}/kernel"] for path in (CONV, DENSE)}
    assert {str(kernel.dtype) for kernel in kernels.values()} == {"int2"}
    wide = solve_plan(pipe, with_widths(plan, {CONV: 8, DENSE: 8}), observed, CONFIG)[0]
    spared = sum(kernel.size for kernel in kernels.values()) * 3 // 4
    assert held_bytes(wide.params) - held_bytes(restored.params) == spared
    unet, _ = export_stages.weights_of(restored, "unet")
    for path, kernel in kernels.items():
        exported = flax.traverse_util.flatten_dict(unet, sep="/")[f"{path}/kernel"]
        assert exported.dtype == jnp.int4
        np.testing.assert_array_equal(exported.astype(jnp.int8), kernel.astype(jnp.int8))
        assert set(np.unique(kernel.astype(jnp.int8))) == {-1, 0, 1}


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_budget_is_met_by_a_policy_file_that_makes_the_same_again(
    sampled, pipe, observed, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    (tmp_path / "own.yaml").write_text(
        f"name: own\nrules:\n- {{pattern: {CONV}, spec: {{method: minmax}}}}\n"
        f"- {{pattern: {DENSE}, spec: {{method: minmax, weight_bits: 6}}}}\n"
    )
    if not sampled:
        monkeypatch.setattr(calibrate, "load", lambda _: Concatenated(**vars(pipe)))
        monkeypatch.setattr(calibrate, "collect", lambda *_: observed)
    plan = make_plan(pipe, calibrate.read_policy(str(tmp_path / "own.yaml")), CONFIG, SIZE)
    sizes = unet_sizes(pipe, plan, CONFIG)
    arguments = [
        "--checkpoint", str(tiny_checkpoint), "--prompt", "a red circle", "--steps", "1",
        "--frames", "2", "--height", "8", "--width", "10", "--scheduler", "euler", "--karras",
    ]  # fmt: skip

    def run(name, *more):
        assert calibrate.main([*arguments, "--out", str(tmp_path / name), *more]) == 0
        printed, bar = capsys.readouterr()
        assert "| done in " in bar.splitlines()[-1]
        return qvd_jax.load(tmp_path / name), printed

    own = ["--policy", str(tmp_path / "own.yaml")]
    # 4 bits for both, and 8 for either of them.
    more = max(of[8] - of[4] for of in sizes.layers.values())
    most = sizes.others + sum(of[4] for of in sizes.layers.values()) + more
    budget = f"{most / sizes.float32 + 1e-6:.6f}"
    first, printed = run("first", *own, "--budget", budget)
    share = held_bytes(first.params) / sizes.float32
    assert sizes.least < share <= float(budget)
    assert f"own-budget-{float(budget):g}: {share:.4f} of the float32 UNet's bytes" in printed
    policy = from_dict(Policy, read_yaml(tmp_path / "first" / "policy.yaml"), "policy.yaml")
    chosen = {rule.pattern: rule.spec.weight_bits for rule in policy.rules}
    assert len(set(chosen.values())) == 2
    for path, bits in chosen.items():
        assert re.search(rf"^{path} .* {bits} bits$", printed, re.MULTILINE)
    second, _ = run("second", "--policy", str(tmp_path / "first" / "policy.yaml"))
    assert second.quantization == first.quantization
    chex.assert_trees_all_equal(second.params, first.params)


def test_fewest_bytes_are_chosen_for_what_is_to_be_kept():
    """Of layers of equal bytes those that cost most get the bits, until it is enough."""
    errors = {"a": {4: 4.0, 8: 0.0}, "b": {4: 20.0, 8: 0.0}, "c": {4: 1.0, 8: 0.0}}
    found = Sensitivities(1000.0, 5.0, errors)
    sizes = Sizes({path: {4: 100, 8: 200} for path in errors}, 50, 2000)
    assert choose(found, sizes, Target(keep=20)) == {"a": 4, "b": 8, "c": 4}  # 10 are allowed
    assert choose(found, sizes, Target(keep=22)) == {"a": 8, "b": 8, "c": 4}  # 6.3
    assert choose(found, sizes, Target(budget=0.225)) == {"a": 4, "b": 8, "c": 4}
    with pytest.raises(InputError, match=r"keep = 23\.1: with the most bits .* keep 23\.0 dB"):
        choose(found, sizes, Target(keep=23.1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "budget and keep: one of them is needed"),
        ({"budget": 0.2, "keep": 20.0}, "budget and keep: one of them is needed"),
        ({"budget": 0.0}, "budget = 0: a share of the float32 UNet's bytes"),
        ({"budget": 1.5}, r"budget = 1\.5: a share of the float32 UNet's bytes"),
        ({"budget": float("nan")}, "budget = nan: a share"),
        ({"keep": float("inf")}, "keep = inf: a number of decibels"),
        ({"keep": 201.0}, "keep = 201: .* above 0 and up to 200"),
        ({"keep": -4000.0}, "keep = -4000: .* above 0 and up to 200"),
    ],
)
def test_targets_that_make_no_sense_are_refused(target, message):
    with pytest.raises(InputError, match=message):
        Target(**target)


def test_budgets_without_a_choice_name_the_shares_that_have_one(pipe):
    plan = make_plan(pipe, Policy("own", (Rule("*/ff/*", LayerSpec("minmax")),)), CONFIG, SIZE)
    sizes = unet_sizes(pipe, plan, CONFIG)
    with pytest.raises(InputError, match=r"no more than 0\.\d+ of .*, by 8 bits of weights"):
        check_budget(Target(budget=0.99), plan, sizes)
    with pytest.raises(InputError, match=r"at least 0\.\d+ of .*, by 2 bits of weights") as error:
        check_budget(Target(budget=0.01), plan, sizes)
    named = float(re.search(r"at least (\S+)", str(error.value))[1])
    check_budget(Target(budget=named), plan, sizes)
    assert sizes.least <= named < sizes.least + 1e-4


def test_several_hosts_are_told_to_measure_on_one():
    args = argparse.Namespace(budget=0.2, keep=None)
    with pytest.raises(InputError, match="--budget and --keep: one host alone"):
        calibrate.asked_target(args, Hosts(1, 2))
    assert calibrate.asked_target(args, Hosts()) == Target(budget=0.2)
