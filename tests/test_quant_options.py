"""Rotations, ranges of tokens and low-rank branches against their definitions in float64."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error
from scipy.linalg import hadamard
from test_quant_layers import CHANNELS, OUTPUTS, Net, case, correlate, quantized

from qvd_jax.errors import InputError
from qvd_jax.kernels import int8
from qvd_jax.quant import codec, low_rank
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec, Policy, Rule, TracedLayer, match
from qvd_jax.quant.record import QuantizedParams
from qvd_jax.quant.scri import CLIP_CANDIDATES
from qvd_jax.quant.solve import find_quantizer, solve_layer, step_gains
from qvd_jax.quant.statistics import Statistics, observe

OPTIONS = {
    "rotation": {"rotation": 4},
    "token": {"ranges": "token"},
    "low rank": {"low_rank": 3},
    "steps": {"ranges": "step", "low_rank": 3},
    "all of a conv": {"ranges": "step", "rotation": 4, "low_rank": 3, "rounding": "gptq"},
    "all": {"rotation": 4, "ranges": "token", "low_rank": 3, "rounding": "gptq"},
}


GAIN = 0.3
"""Of a step: the share of the layer's D that its values need."""


def cases(*convs: str | None) -> pytest.MarkDecorator:
    """Each layer with each option that it can have."""
    both = [
        (conv, option)
        for conv in convs
        for option, options in OPTIONS.items()
        if conv in (None, "1x1", "1x1, stride 2") or options.get("ranges") != "token"
    ]
    return pytest.mark.parametrize(("conv", "option"), both)


def rotated(x: np.ndarray, rotation: int) -> np.ndarray:
    """By a matrix of all channels, of blocks that are another library's."""
    blocks = np.kron(np.eye(CHANNELS // rotation), hadamard(rotation) / np.sqrt(rotation))
    return x @ blocks


def defined(
    layer: dict[str, np.ndarray], x: np.ndarray, spec: LayerSpec, conv: str | None
) -> np.ndarray:
    """What `QuantizedParams` says that a layer with ranges by channel makes of `x`, in float64."""
    record = {name: np.asarray(part).astype(np.float64) for name, part in layer.items()}
    limit = 2 ** (spec.activation_bits - 1) - 1
    values = rotated(x * record["in_scale"] + record["in_offset"], spec.rotation)
    step = np.full((1,) * x.ndim, GAIN if spec.ranges == "step" else 1.0)
    if spec.ranges == "token":
        step = np.abs(values).max(-1, keepdims=True) / limit
    codes = np.clip(np.rint(values / step), -limit, limit)
    y = record["scale"] * correlate(codes, np.moveaxis(record["kernel"], 0, -1), conv)
    if spec.low_rank:
        # Of a convolution the branch sees the same taps: one kernel of both factors together.
        both = np.tensordot(record["down"], record["up"], (0, 1))
        y = y + correlate(codes, both, conv)
    if conv == "1x1, stride 2" and spec.ranges == "token":
        step = step[..., ::2, ::2, :]
    y = step * y + record["bias"]
    if "taps" in record:
        through = np.repeat(record["taps"][..., None, :], CHANNELS, axis=-2) / CHANNELS
        y = y + correlate(np.ones(x.shape), through, conv)
    return y


@cases(None, "3x3", "one-sided", "1x1", "1x1, stride 2", "upsampled", "temporal")
def test_layers_equal_their_definition_in_float64(conv, option):
    net, params, x = case(conv)
    spec = LayerSpec("scri", 4, 8, **OPTIONS[option])
    int8_net, int8_params, report, _ = quantized(net, params, x, spec)
    variables = {"params": int8_params}
    if spec.ranges == "step":
        # Of a step whose values lie nearer to the centers.
        center = -int8_params["layer"]["in_offset"] / int8_params["layer"]["in_scale"]
        center = jnp.broadcast_to(center, x.shape)
        x = center + GAIN * (x - center)
        variables["quant"] = {"layer": {"gain": jnp.float32(GAIN)}}
    expected = defined(int8_params["layer"], np.asarray(x, np.float64), spec, conv)
    found = int8_net.apply(variables, x)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    # And they are near the float layer, up to the border.
    exact = np.asarray(net.apply({"params": params}, x))
    assert relative_error(found, exact) < 0.12
    assert report.coverage_after is None or option == "low rank"


@pytest.fixture(params=[True, False])
def has_vnni(request, monkeypatch):
    """Whether the CPU is one that multiplies unsigned codes by signed ones."""
    monkeypatch.setattr(int8, "_has_vnni", lambda: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@cases(None, "3x3", "temporal")
def test_every_product_of_codes_is_int8(conv, option, has_vnni):
    """Beside it are the rotation's product and the branch's two, and else those of a plain one."""
    _, _, x = case(conv)

    def products(platform: str, **options: object) -> list[list[str]]:
        """What each product's two operands are of."""
        spec = LayerSpec("scri", 2, 8, **options)
        module = Net(layer_set({"layer": spec}), conv)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        lowered = jax.jit(module.apply).trace(variables, x).lower(lowering_platforms=(platform,))
        operands = r"stablehlo\.(?:dot_general|convolution).*: \((.*?)\) -> "
        return [
            re.findall(r"x([a-z]+\d+)>", given) for given in re.findall(operands, lowered.as_text())
        ]

    more = {"rotation": 1, "token": 0, "low rank": 2, "steps": 2, "all of a conv": 3, "all": 3}
    # A CPU without these instructions multiplies codes as they are.
    on_cpu = "ui8" if has_vnni else "i8"
    for platform, codes in (("cpu", on_cpu), ("cuda", "i8"), ("tpu", "i8")):
        found, plain = products(platform, **OPTIONS[option]), products(platform)
        assert found.count([codes, "i8"]) == plain.count([codes, "i8"]) == 1
        floats = plain.count(["f32", "f32"])
        assert len(plain) == 1 + floats
        assert len(found) == 1 + found.count(["f32", "f32"]) == 1 + floats + more[option]


def test_a_rotation_changes_nothing_in_float_and_is_its_own_inverse():
    x = np.random.default_rng(0).normal(size=(3, CHANNELS)).astype(np.float32)
    np.testing.assert_allclose(codec.rotate(x, 4), rotated(x, 4), atol=1e-6)
    np.testing.assert_allclose(codec.rotate(codec.rotate(x, 4), 4), x, atol=1e-6)


@pytest.mark.parametrize("method", ["minmax", "mse", "smoothquant", "qdiffusion", "scri"])
@pytest.mark.parametrize("option", ["rotation", "token"])
def test_every_method_gains_where_the_option_is_for(method, option):
    """A rotation where a single value is far out, ranges of tokens where these differ in size."""
    net, params, _ = case(None)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, CHANNELS))
    if option == "rotation":
        x[np.arange(256), rng.integers(CHANNELS, size=256)] *= 8
    else:
        x *= np.geomspace(0.01, 1, 256)[:, None]
    # Of a channel's center, which small rows see, nothing is to be said here.
    x = jnp.asarray(np.concatenate([x, -x]), jnp.float32)
    errors = []
    for options in ({}, OPTIONS[option]):
        spec = LayerSpec(method, 8, 4, **options)
        module, values, *_ = quantized(net, params, x, spec)
        bias = np.asarray(params["layer"]["bias"])
        exact = np.asarray(net.apply({"params": params}, x)) - bias
        error = np.asarray(module.apply({"params": values}, x)) - bias - exact
        # Of each row by itself: small ones count as well.
        errors.append((np.square(error).sum(1) / np.square(exact).sum(1)).mean())
    assert errors[1] < (0.9 if option == "rotation" else 0.1) * errors[0]


@pytest.mark.parametrize(("method", "least"), [("minmax", 1.0), ("scri", min(CLIP_CANDIDATES))])
def test_the_reach_of_rotated_values_is_that_of_every_row_that_calibration_saw(method, least):
    """One of a thousand is far out, and none of those by which a search compares."""
    x = np.random.default_rng(0).normal(size=(1000, 1, CHANNELS)).astype(np.float32)
    x[1, 0, 5] = 1000
    statistics = Statistics(x.min((0, 1)), x.max((0, 1)), jnp.asarray(x), jnp.asarray(True))
    spec = LayerSpec(method, rotation=4)
    kernel = np.ones((CHANNELS, OUTPUTS), np.float32)
    found = find_quantizer(statistics, [jnp.asarray(kernel)], spec)
    exact = rotated((x - np.asarray(found.shift)) * np.asarray(found.in_scale), 4)
    assert least * np.abs(exact).max() <= 127.01


@pytest.mark.parametrize("conv", [None, "3x3"])
def test_a_low_rank_branch_takes_what_it_can_of_the_weights_errors(conv):
    """All of them, up to bfloat16, where its rank is that of the layer."""
    net, params, x = case(conv)
    errors = []
    for rank in (0, 3, OUTPUTS):
        spec = LayerSpec("minmax", 2, 16, low_rank=rank)
        module, values, *_ = quantized(net, params, x, spec)
        exact = net.apply({"params": params}, x)
        errors.append(relative_error(module.apply({"params": values}, x), exact))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.05 * errors[0]


def test_the_branch_is_of_least_error_among_its_rank():
    """As the nearest matrix of a rank with each input weighed by its spread."""
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 1, size=(4000, 20)) * np.geomspace(0.1, 10, 20)
    left = rng.normal(size=(20, 8))
    down, up = low_rank.factors(jnp.asarray(left), jnp.asarray(rows), 3)
    found = np.asarray(down).astype(np.float64) @ np.asarray(up).astype(np.float64)
    error = np.square((rows - rows.mean(0)).std(0)[:, None] * (left - found)).sum()
    values = np.linalg.svd(rows.std(0)[:, None] * left, compute_uv=False)
    assert error == pytest.approx(np.square(values[3:]).sum(), rel=1e-2)


@pytest.mark.parametrize("option", ["rotation", "low rank"])
def test_htdq_and_float_inputs_take_the_option(option):
    options = OPTIONS[option]
    net, params, _ = case(None)
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.exp(rng.normal(size=(20, CHANNELS))), jnp.float32)
    exact = net.apply({"params": params}, x)
    _, found = observe(net, {"params": params}, x, places=None)
    for spec in (LayerSpec("htdq", 8, 8, **options), LayerSpec("minmax", 8, 16, **options)):
        record, report = solve_layer("layer", params["layer"], found["layer"], spec)
        module = Net(layer_set({"layer": spec}))
        y = module.apply({"params": {"layer": record.params()}}, x)
        assert relative_error(y, exact) < 0.02
        assert report.sqnr > 35
        kernel, bias = record.dequantized(spec.rotation)
        assert relative_error(x @ kernel + bias[None], exact) < 0.02


@cases(None, "3x3")
def test_the_float_layer_that_codes_stand_for_is_what_they_tend_to(conv, option):
    """With codes that are not rounded the layer is linear, with that kernel inside the image."""
    net, params, x = case(conv)
    spec = LayerSpec("scri", 8, 8, **OPTIONS[option])
    _, int8_params, *_ = quantized(net, params, x, spec)
    kernel, bias = QuantizedParams(**int8_params["layer"]).dequantized(spec.rotation)
    for part, exact in (("kernel", kernel), ("bias", bias)):
        assert relative_error(exact, params["layer"][part]) < 0.05, part


def test_gains_of_a_rotated_layer_grow_with_the_norm_of_its_ranges():
    spec = LayerSpec("minmax", ranges="step", rotation=4)
    record = QuantizedParams(
        kernel=jnp.zeros((1, 4), jnp.int8),
        scale=jnp.ones(1),
        bias=jnp.zeros(1),
        in_scale=jnp.ones(4),
        in_offset=jnp.zeros(4),
    )
    upper = np.asarray([[1, 1, 1, 1], [4, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0]], np.float32)
    gains = step_gains(-upper, upper, record, spec)
    np.testing.assert_allclose(gains, [0.25, 0.5, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": 6}, "rotation = 6: a power of two is needed"),
        ({"rotation": 0}, "rotation = 0: a power of two is needed"),
        ({"low_rank": -1}, "low_rank = -1: 0 or more"),
        ({"ranges": "row"}, "ranges = 'row': static, step, token are possible"),
        ({"method": "htdq", "ranges": "token"}, "ranges = 'token' has no meaning for .*'htdq'"),
        ({"activation_bits": 16, "ranges": "step"}, "ranges = 'step' has no meaning for .*16"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(LayerSpec("minmax"), **options)


def test_a_rotation_that_does_not_divide_the_channels_is_refused_by_layer():
    layer = TracedLayer("a/b", (12, 10), (1, 12), (1, 10), (0,))
    policy = Policy("mine", (Rule("*", LayerSpec("scri", rotation=8)),))
    with pytest.raises(InputError, match="'mine': a/b: rotation = 8 does not divide its 12 chan"):
        match(policy, [layer])


def test_a_low_rank_beyond_a_layers_own_is_refused_by_layer():
    layer = TracedLayer("a/b", (3, 3, 12, 10), (1, 12), (1, 10), (0,))
    policy = Policy("mine", (Rule("*", LayerSpec("scri", low_rank=11)),))
    with pytest.raises(InputError, match=r"'mine': a/b: low_rank = 11 is more .*, at most 10"):
        match(policy, [layer])


def test_a_kernel_of_several_taps_has_one_range_where_positions_have_their_own():
    shapes = {"dense": (12, 10), "1x1": (1, 1, 12, 10), "3x3": (3, 3, 12, 10)}
    layers = [TracedLayer(path, shape, (1, 12), (1, 10), (0,)) for path, shape in shapes.items()]
    policy = Policy("mine", (Rule("*", LayerSpec("scri", ranges="token")),))
    found = {path: spec.ranges for path, spec in match(policy, layers).items()}
    assert found == {"dense": "token", "1x1": "token", "3x3": "static"}
    _, _, x = case("3x3")
    module = Net(layer_set({"layer": LayerSpec("scri", ranges="token")}), "3x3")
    with pytest.raises(InputError, match="layer: ranges = 'token': a kernel of 9 taps sums over"):
        jax.eval_shape(module.init, jax.random.key(0), x)


@pytest.mark.parametrize("ranges", ["static", "token"])
@pytest.mark.parametrize("bits", [(4, 8), (6, 6)])
def test_learned_factors_are_better_than_those_of_one_range(ranges, bits):
    """Where half of the channels are wide with small weights, as beside a shortcut's."""
    net, params, _ = case(None)
    rng = np.random.default_rng(0)
    wide = np.where(np.arange(CHANNELS) < CHANNELS // 2, 10.0, 1.0) * rng.lognormal(
        0, 0.5, CHANNELS
    )
    x = jnp.asarray(wide * rng.normal(size=(512, CHANNELS)), jnp.float32)
    params["layer"]["kernel"] = params["layer"]["kernel"] / jnp.asarray(wide**0.7)[:, None]
    errors = {}
    for method in ("scri", "learned"):
        spec = LayerSpec(method, *bits, ranges=ranges, rounding="gptq")
        module, values, *_ = quantized(net, params, x, spec)
        exact = net.apply({"params": params}, x)
        errors[method] = float(np.square(module.apply({"params": values}, x) - exact).mean())
    assert errors["learned"] < 0.98 * errors["scri"]


@pytest.mark.parametrize("value", [0.0, 3.5])
@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}, {"low_rank": 2}], ids=str)
def test_of_a_constant_input_nothing_is_learned(value, options):
    net, params, x = case(None)
    constant = jnp.full_like(x, value)
    found = []
    for method in ("scri", "learned"):
        spec = LayerSpec(method, 8, 8, **options)
        module, values, *_ = quantized(net, params, constant, spec)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))
        found.append(module.apply({"params": values}, x))
    np.testing.assert_array_equal(*found)


def test_derivatives_pass_tokens_whose_range_is_their_own():
    values = jax.random.normal(jax.random.key(3), (64, 16)).at[0].set(0).at[1].set(1e-44)

    def total(values):
        steps, step = codec.token_steps(values, 127)
        return (steps * step).sum()

    np.testing.assert_allclose(jax.grad(total)(values), np.ones(values.shape), rtol=1e-6)
    steps, _ = codec.token_steps(values, 127)
    assert np.abs(np.round(steps)).max() == 127


def test_learned_factors_of_a_layer_that_is_all_zero_are_finite():
    net, params, x = case(None)
    params["layer"]["kernel"] = jnp.zeros_like(params["layer"]["kernel"])
    module, values, *_ = quantized(net, params, 0 * x, LayerSpec("learned", 4, 8))
    expected = net.apply({"params": params}, 0 * x)
    np.testing.assert_allclose(module.apply({"params": values}, 0 * x), expected, atol=1e-6)
