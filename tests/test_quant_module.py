"""Modules nobody here wrote: int8 layers in the place of linen's own, and what stays float."""

import re
from collections import Counter
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error

from qvd_jax import InputError, LayerSpec, Policy, Rule, quantize_module

KEY = jax.random.key(0)


class MLP(nn.Module):
    """With setup, and a method of its own."""

    def setup(self):
        self.first, self.second = nn.Dense(24), nn.Dense(10)

    def __call__(self, x):
        return self.second(nn.relu(self.first(x)))

    def hidden(self, x):
        return self.first(x)


class Residual(nn.Module):
    """As the blocks of flax's ImageNet example: convolutions without bias, BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(norm()(conv(8, (3, 3), (2, 2))(x)))
        y = norm()(conv(8, (3, 3))(y))
        x = nn.relu(norm()(conv(8, (1, 1), 2, name="projection")(x)) + y)
        return nn.Dense(8)(x.mean((1, 2)))


class Transformer(nn.Module):
    """As the encoder of flax's sequence tagging example, called by keyword alone."""

    @nn.compact
    def __call__(self, *, ids, train):
        x = nn.Embed(16, 16)(ids)
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=not train)(y)
        x = x + y
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(16)(nn.LayerNorm()(x))


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(seed):
    return jax.random.randint(jax.random.key(seed), (4, 6), 0, 16)


EXAMPLES = {
    "MLP": (MLP(), lambda seed: (noise(32, 12, seed=seed),), {}, 2, 0),
    "ResNet": (Residual(), lambda seed: noise(4, 7, 7, 8, seed=seed), {"train": False}, 4, 0),
    "transformer": (Transformer(), lambda seed: {"ids": tokens(seed)}, {"train": False}, 7, 2),
}


def call(module, variables, batch, **options):
    given = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
    return module.apply(variables, *given, **(batch if isinstance(batch, dict) else {}), **options)


def init(module, batch, **options):
    given = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
    return module.init(KEY, *given, **(batch if isinstance(batch, dict) else {}), **options)


def sqnr(exact, found):
    exact, found = np.asarray(exact, np.float64), np.asarray(found, np.float64)
    return 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_product_of_a_layer_is_int8_and_the_output_is_the_float_modules(name):
    module, batch, options, layers, of_attention = EXAMPLES[name]
    variables = init(module, batch(0), **options)
    batches = [batch(seed) for seed in range(4)]
    policy = "qvd-w8a8" if name == "MLP" else "minmax-w8a8"
    int8, quantized, report = quantize_module(module, variables, batches, policy, options=options)
    assert len(report.layers) == layers
    assert not report.kept_float
    run = jax.jit(lambda variables: call(int8, variables, batch(0), **options))
    assert sqnr(call(module, variables, batch(0), **options), run(quantized)) > 35
    text = run.trace(quantized).lower(lowering_platforms=("cuda",)).as_text()
    operands = re.findall(r"stablehlo\.(?:dot_general|convolution).* : \((.*)\) ->", text)
    # What a shift adds at borders is a product of places by taps.
    operands = [pair for pair in operands if not re.match(r"tensor<\d+x3xf32>", pair)]
    kinds = [tuple(re.findall(r"x(i8|i32|f32)>", pair)) for pair in operands]
    assert Counter(kinds) == Counter({("i8", "i8"): layers, ("f32", "f32"): of_attention})


LAYERS = {
    "several axes": (nn.DenseGeneral((3, 4), axis=(-1, 1)), (2, 5, 3, 4)),
    "kernel of a number": (nn.Conv(6, 3, strides=2), (2, 9, 8)),
    "lists": (nn.Conv(6, [3, 2], strides=[2, 1], padding=[1, (0, 2)]), (2, 7, 6, 8)),
    "same lower, no batch": (nn.Conv(6, (2, 2), padding="SAME_LOWER"), (7, 6, 8)),
    "dilated": (
        nn.Conv(6, (3, 3), strides=2, kernel_dilation=(2, 3), use_bias=False),
        (2, 9, 8, 8),
    ),
    "causal": (nn.Conv(6, (3,), padding="CAUSAL", kernel_dilation=2), (2, 9, 8)),
    "circular": (nn.Conv(6, (3, 4), padding="CIRCULAR", kernel_dilation=2), (2, 9, 8, 8)),
    "three axes, two batches": (nn.Conv(6, (2, 3, 2)), (2, 1, 4, 5, 3, 8)),
}


@pytest.mark.parametrize("form", LAYERS)
def test_layers_take_what_linens_own_take(form):
    """Up to the borders, where a shift of the input's channels would show."""
    layer, shape = LAYERS[form]
    x = 3 + noise(*shape)
    variables = layer.init(KEY, x)
    int8, quantized, report = quantize_module(layer, variables, [x], "minmax-w8a8")
    assert [found.path for found in report.layers] == [""]
    expected = layer.apply(variables, x)
    found = int8.apply(quantized, x)
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) < 0.03


@pytest.mark.parametrize("form", ["several axes", "dilated", "circular"])
def test_gradients_are_those_of_the_float_layer_within_the_range(form):
    layer, shape = LAYERS[form]
    x = 3 + noise(*shape)
    variables = layer.init(KEY, x)
    int8, quantized, _ = quantize_module(layer, variables, [x], "minmax-w8a8")
    middle = (x.min() + x.max()) / 2
    weigh = noise(*jax.eval_shape(layer.apply, variables, x).shape, seed=1)
    gradients = [
        jax.grad(lambda x, m=m, v=v: (m.apply(v, x) * weigh).sum())(middle + 0.9 * (x - middle))
        for m, v in ((layer, variables), (int8, quantized))
    ]
    assert sqnr(*gradients) > 30


def test_results_have_the_dtype_of_the_float_module():
    for layer in (nn.Dense(4), nn.Dense(4, dtype=jnp.bfloat16), nn.Conv(4, (3,))):
        x = noise(2, 5, 8).astype(jnp.bfloat16)
        variables = layer.init(KEY, x)
        for stored in (jnp.float32, jnp.bfloat16):
            given = jax.tree.map(lambda leaf, stored=stored: leaf.astype(stored), variables)
            int8, quantized, _ = quantize_module(layer, given, [x], "minmax-w8a8")
            assert int8.apply(quantized, x).dtype == layer.apply(given, x).dtype


class Everything(nn.Module):
    """Shared layers, nested modules, nn.remat and nn.jit, a cache, noise, layers by keyword."""

    @nn.compact
    def __call__(self, x, scale=1.0, *, double=False):
        shared = nn.Dense(8, name="shared")
        x = nn.remat(MLP)(name="rematted")(shared(inputs=shared(x)))
        x = nn.jit(MLP)(name="jitted")(x)
        count = self.variable("count", "calls", jnp.zeros, ())
        if not self.is_initializing():
            count.value += 1
        self.sow("intermediates", "before", x)
        x = x + 0.01 * jax.random.normal(self.make_rng("noise"), x.shape)
        x = nn.Dense(4, name="last")(x) * scale
        return {"once": x, "twice": 2 * x if double else None}


def test_all_that_a_module_takes_and_gives_passes_through():
    module, rngs = Everything(), {"params": KEY, "noise": jax.random.key(1)}
    variables = module.init(rngs, noise(16, 8))
    options = {"rngs": {"noise": jax.random.key(2)}, "mutable": ["count"], "double": True}
    batches = [(noise(16, 8, seed=seed), 0.5) for seed in range(4)]
    int8, quantized, report = quantize_module(
        module, variables, batches, "minmax-w8a8", options=options
    )
    paths = ["shared", "rematted/first", "rematted/second", "jitted/first", "jitted/second", "last"]
    assert sorted(found.path for found in report.layers) == sorted(paths)
    options["mutable"] = ["count", "intermediates"]
    results = [
        m.apply(v, batches[0][0], scale=0.5, capture_intermediates=True, **options)
        for m, v in ((module, variables), (int8, quantized))
    ]
    (expected, state), (found, int8_state) = results
    assert int8_state["count"] == state["count"]
    assert jax.tree.structure((found, int8_state)) == jax.tree.structure((expected, state))
    assert sqnr(expected["twice"], found["twice"]) > 30
    shapes = jax.eval_shape(int8.init, rngs, noise(16, 8))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, shapes, quantized)
    assert all(jax.tree.leaves(same))
    assert jax.tree.structure(shapes) == jax.tree.structure(quantized)


def test_methods_are_called_by_name_and_by_function():
    x = noise(8, 12)
    module, variables = MLP(), MLP().init(KEY, x)
    options = {"method": "hidden"}
    int8, quantized, report = quantize_module(
        module, variables, [x], "minmax-w8a8", options=options
    )
    assert [found.path for found in report.layers] == ["first"]
    found = [int8.apply(quantized, x, method=method) for method in ("hidden", MLP.hidden)]
    np.testing.assert_array_equal(*found)
    assert sqnr(module.apply(variables, x, method="hidden"), found[0]) > 35


def test_an_int8_module_is_a_part_of_another():
    x = noise(8, 12)
    variables = MLP().init(KEY, x)
    int8, quantized, _ = quantize_module(MLP(), variables, [x], "minmax-w8a8")

    class Outer(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="first")(self.part(x))

    outer = Outer(int8)
    shapes = jax.eval_shape(outer.init, KEY, x)["params"]
    part = shapes["part"]
    assert jax.tree.map(jnp.shape, part) == jax.tree.map(jnp.shape, quantized["params"])
    params = outer.init(KEY, x)["params"] | {"part": quantized["params"]}
    head = params["first"]
    expected = int8.apply(quantized, x) @ head["kernel"]
    assert relative_error(outer.apply({"params": params}, x), expected) < 1e-5


class Odd(nn.Module):
    """Layers that are no plain product, or stand where their inputs are not seen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="plain")(x)
        x = nn.Conv(8, (3,), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(8, (3,), mask=jnp.ones((3, 8, 8)), name="masked")(x)
        x = nn.Conv(8, (1,), padding=1, name="one_tap")(x)
        x = nn.ConvTranspose(8, (2,), name="transposed")(x)
        x = nn.Conv(8, (3,), padding=1, input_dilation=2, name="spread")(x)
        x = nn.Dense(8, dot_general=jax.lax.dot_general, name="own")(x)
        x = nn.DenseGeneral(8, batch_dims=(0,), name="batched")(x)
        x = nn.Einsum((8, 8), "blc,cd->bld", use_bias=False, name="einsum")(x)
        x = nn.WeightNorm(nn.Dense(8, name="normed"))(x)
        x = Derived(8, name="derived")(x)
        stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="stack")(x, None)
        inner = nn.Dense(8, name="mapped")
        x = jax.vmap(inner)(x) if not self.is_initializing() else inner(x)
        return nn.Embed(5, 8, name="table").attend(x)


class Derived(nn.Dense):
    """A Dense with a call of its own."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + 1


class Step(nn.Module):
    """Of a stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8)(x), None


REASONS = {
    "grouped": "2 groups",
    "masked": "a mask",
    "one_tap": "one tap",
    "transposed": "a ConvTranspose is no one matrix product",
    "spread": "input is dilated",
    "own": "own \\(dot_general\\)",
    "batched": "batch of matrices",
    "einsum": "an? Einsum is no one matrix product",
    "normed": "inside nn.scan, nn.vmap, nn.WeightNorm",
    "derived": "a Derived has a call of its own",
    "stack/Dense_0": "inside nn.scan",
    "mapped": "a transformation of jax",
    "table": "looked up",
}


class Twice(nn.Module):
    """One layer reads what another does not."""

    @nn.compact
    def __call__(self, x, y):
        first, second = nn.Dense(16, name="first"), nn.Dense(16, name="second")
        return first(x), second(x), second(y)


class Branches(nn.Module):
    """Each batch is for a layer of its own."""

    @nn.compact
    def __call__(self, x, kind):
        first, second = nn.Dense(16, name="first"), nn.Dense(16, name="second")
        if self.is_initializing():
            return first(x), second(x)
        return first(x) if kind == "a" else second(x)


def test_layers_share_a_range_only_where_all_that_they_read_is_one_tensor():
    small, large = noise(64, 12), 100 * noise(64, 12, seed=1)
    module = Twice()
    variables = init(module, (small, large))
    int8, quantized, _ = quantize_module(module, variables, [(small, large)], "minmax-w8a8")
    exact, found = (call(m, v, (small, large)) for m, v in ((module, variables), (int8, quantized)))
    assert sqnr(exact[0], found[0]) > 35
    assert sqnr(exact[2], found[2]) > 35
    module = Branches()
    batches = [{"x": small, "kind": "a"}, {"x": large, "kind": "b"}]
    variables = init(module, batches[0])
    int8, quantized, _ = quantize_module(module, variables, batches, "minmax-w8a8")
    for batch in batches:
        assert sqnr(call(module, variables, batch), call(int8, quantized, batch)) > 35


def test_batches_beyond_the_rows_give_no_more_of_them(monkeypatch):
    module, batches = MLP(), [noise(8, 12, seed=seed) for seed in range(7)]
    taken = []

    def solve(layers, specs, statistics, *_):
        taken.extend(len(found.rows) for found in statistics.values())
        return []

    monkeypatch.setattr("qvd_jax.quant.module.solve_layers", solve)
    quantize_module(module, init(module, batches[0]), batches, "minmax-w8a8", rows=3)
    assert taken == [3, 3]


def test_what_cannot_be_int8_stays_float_and_is_named():
    x = noise(2, 4, 8)
    module, variables = Odd(), Odd().init(KEY, x)
    int8, quantized, report = quantize_module(module, variables, [x], "minmax-w8a8")
    assert [found.path for found in report.layers] == ["plain"]
    assert report.kept_float.keys() == REASONS.keys()
    for path, reason in REASONS.items():
        assert re.search(reason, report.kept_float[path]), path
    assert sqnr(module.apply(variables, x), int8.apply(quantized, x)) > 30
    everything = Policy("mine", (Rule("*", LayerSpec("minmax")),))
    with pytest.raises(InputError, match=r"keep them float(\n  [\w/]+: .*){13}$"):
        quantize_module(module, variables, [x], everything)
    rest = Policy("mine", (Rule("plain", LayerSpec("minmax")),))
    assert len(quantize_module(module, variables, [x], rest).report.layers) == 1


def test_what_does_not_fit_is_one_message():
    x = noise(4, 12)
    module, variables = MLP(), MLP().init(KEY, x)
    calls = [
        ((object(), variables, [x]), "a flax.linen module is needed, not a object"),
        ((module, variables["params"], [x]), '"params" among them'),
        ((module, variables, []), "no batches to calibrate with"),
        ((module, variables, x), "a list is needed"),
        ((module, variables, iter([x])), "a list is needed, not a list_iterator; list"),
        (
            (module, variables, [x, x[:0]]),
            r"batch 2: first: its input is empty, of shape \(0, 12\)",
        ),
        ((module, variables, [x, x[:, :5]]), r"batch 2: the module cannot be called with it \(Sco"),
        ((module, variables, [x, x * jnp.nan]), "first: its input is not finite in batch 2"),
        ((module, variables, [x * 1e20]), "first: its input reaches .*e.20 .* squares .* finite"),
        ((module, variables, [x], "qvd-w7a7"), "unknown policy 'qvd-w7a7'; did you mean"),
        ((module, variables, [x], Policy("p", (Rule("conv*", LayerSpec("mse")),))), "such a path"),
        ((module, variables, [x], Policy("p", (Rule("*", LayerSpec("htdq")),))), "sampler's steps"),
        (
            (module, variables, [x], Policy("p", (Rule("*", LayerSpec("mse", propagate=True)),))),
            "'p': .*: propagate needs a second observation",
        ),
    ]
    for arguments, message in calls:
        with pytest.raises(InputError, match=message):
            quantize_module(*arguments)
    for option, message in (
        ({"rows": 0}, "rows = 0: at least 1 is needed"),
        ({"rows": 1.5}, "rows = 1.5: an integer is needed"),
        ({"seed": 2**32}, "seed = 4294967296: 0 to 4294967295 is needed"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_module(module, variables, [x], **option)
    quantized = quantize_module(module, variables, [x], "minmax-w8a8").variables
    with pytest.raises(InputError, match="first/kernel: it is quantized already"):
        quantize_module(module, quantized, [x])
    norm = nn.LayerNorm()
    with pytest.raises(InputError, match="no layer of the module can be int8"):
        quantize_module(norm, norm.init(KEY, x), [x])


@pytest.mark.slow
def test_the_page_runs_as_written(capsys):
    page = Path(__file__).parent.parent / "docs/how-to/your-own-model.md"
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
        exec(code, {})
    shown = capsys.readouterr().out
    assert shown.count(" dB ") == 6
    assert "float" not in shown
