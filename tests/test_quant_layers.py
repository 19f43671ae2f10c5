"""QuantDense and QuantConv against dequantized float64, and against their float layers."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.errors import ScopeParamShapeError
from parity import relative_error

from qvd_jax.errors import InputError
from qvd_jax.models.layers import FLOAT, Configured
from qvd_jax.models.norms import Upsampled
from qvd_jax.quant import htdq
from qvd_jax.quant.layers import QuantConv, QuantDense, SpecTable, layer_set
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.record import layouts, replace_layers
from qvd_jax.quant.solve import find_quantizer, needs_quantizer, solve_layer
from qvd_jax.quant.statistics import draw_places, observe

CONVS = {
    "3x3": ((3, 3), (1, 1), ((1, 1), (1, 1)), (2, 3, 6, 5)),
    "stride 2": ((3, 3), (2, 2), ((1, 1), (1, 1)), (2, 1, 6, 5)),
    "one-sided": ((3, 3), (2, 2), ((0, 1), (0, 1)), (1, 2, 6, 6)),
    "1x1": ((1, 1), (1, 1), ((0, 0), (0, 0)), (2, 1, 4, 4)),
    "1x1, stride 2": ((1, 1), (2, 2), ((0, 0), (0, 0)), (2, 1, 5, 4)),
    "upsampled": ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 2, 16, 18)),
    "upsampled and cut": ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 2, 15, 18)),
    "upsampled, stride 2": ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 2, 6, 8)),
    "temporal": ((3, 1, 1), (1, 1, 1), ((1, 1), (0, 0), (0, 0)), (2, 5, 3, 2)),
}
CHANNELS, OUTPUTS = 12, 10


class Net(nn.Module):
    """One layer, built through a LayerSet."""

    layers: object
    conv: str | None = None

    def setup(self):
        if self.conv is None:
            self.layer = self.layers.dense(OUTPUTS)
        else:
            kernel, strides, padding, _ = CONVS[self.conv]
            self.layer = self.layers.conv(OUTPUTS, kernel, strides=strides, padding=padding)

    def __call__(self, x):
        if self.conv is not None and self.conv.startswith("upsampled"):
            x = Upsampled(x[..., ::2, ::2, :], x.shape[-3:-1])
        return self.layer(x)


def case(conv, seed=0):
    rng = np.random.default_rng(seed)
    shape = (4, 7) if conv is None else CONVS[conv][3]
    x = rng.normal(size=(*shape, CHANNELS)) * rng.lognormal(0, 1, CHANNELS)
    x = jnp.asarray(x + rng.normal(0, 3, CHANNELS), jnp.float32)
    if conv is not None and conv.startswith("upsampled"):
        height, width = shape[-2:]
        x = jnp.repeat(jnp.repeat(x[..., ::2, ::2, :], 2, axis=-3), 2, axis=-2)
        x = x[..., :height, :width, :]
    net = Net(FLOAT, conv)
    params = net.init(jax.random.key(seed), x)["params"]
    params["layer"]["bias"] = jnp.asarray(rng.normal(size=OUTPUTS), jnp.float32)
    return net, params, x


def quantized(net, params, x, spec):
    """The quantized net, its parameters, the report and the rows it was calibrated on, of `x`."""
    places = draw_places(jax.random.key(0), 64)
    _, found = observe(net, {"params": params}, x, places=places)
    assert list(found) == ["layer"]
    quantizer, rows = None, found["layer"].rows
    if needs_quantizer(spec):
        quantizer = find_quantizer(found["layer"], [params["layer"]["kernel"]], spec)
    record, report = solve_layer("layer", params["layer"], found["layer"], spec, quantizer)
    return Net(layer_set({"layer": spec}), net.conv), {"layer": record.params()}, report, rows


def dequantized_float64(layer, x, spec):
    """The codes of `x`, and the weights that the layer's codes stand for, in float64."""
    in_scale, in_offset = (np.asarray(layer[k], np.float32) for k in ("in_scale", "in_offset"))
    limit = 2 ** (spec.activation_bits - 1) - 1
    codes = np.clip(np.rint(np.asarray(x) * in_scale + in_offset), -limit, limit)
    codes, in_scale = codes.astype(np.float64), in_scale.astype(np.float64)
    # kernel = s W / scale_w and scale = D scale_w, so W = kernel scale in_scale.
    w_hat = np.asarray(layer["kernel"], np.float64) * in_scale
    scale = np.asarray(layer["scale"], np.float64)
    return codes, w_hat * scale.reshape(-1, *(1,) * (w_hat.ndim - 1))


METHODS = ["minmax", "mse", "smoothquant", "qdiffusion", "scri"]


@pytest.mark.parametrize(
    ("conv", "spec"),
    [
        (None, LayerSpec("scri", 4)),
        (None, LayerSpec("htdq")),
        (None, LayerSpec("minmax", 8, 16)),
        ("3x3", LayerSpec("minmax", ranges="step")),
        ("1x1", LayerSpec("mse")),
        ("temporal", LayerSpec("minmax", 4, 16)),
    ],
)
def test_what_calibration_writes_layers_read_and_loading_expects_are_one_record(conv, spec):
    net, params, x = case(conv)
    int8_net, solved, *_ = quantized(net, params, x, spec)
    read = jax.eval_shape(int8_net.init, jax.random.key(0), x)
    float_shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    expected, gains = replace_layers(float_shapes, layouts(float_shapes, {"layer": spec}))

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert described(read["params"]) == described(solved) == described(expected)
    assert described(read.get("quant", {})) == described(gains)
    assert bool(gains) is (spec.ranges == "step")


def test_specs_of_a_layer_that_is_not_there_are_refused():
    shapes = {"layer": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    message = "quantized layers that the UNet does not have: other/layer"
    with pytest.raises(InputError, match=message):
        layouts(shapes, {"layer": LayerSpec("scri"), "other/layer": LayerSpec("scri")})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conv", [None, *CONVS])
def test_layers_equal_their_definition_in_float64(conv, method):
    net, params, x = case(conv)
    spec = LayerSpec(method)
    int8_net, int8_params, _, rows = quantized(net, params, x, spec)
    layer = int8_params["layer"]
    codes, w_hat = dequantized_float64(layer, x, spec)
    # y = W^ x^ + b and what is constant inside the image: W m - W^ m^, the means of the rows.
    kernel = np.asarray(params["layer"]["kernel"], np.float64)
    bias = np.asarray(params["layer"]["bias"], np.float64)
    scale = np.asarray(layer["in_scale"], np.float64)
    mean_code = dequantized_float64(layer, rows, spec)[0].mean((0, 1))
    from_codes = np.broadcast_to((codes - mean_code) / scale, x.shape)
    expected = correlate(from_codes, np.moveaxis(w_hat, 0, -1), conv) + bias
    mean = np.asarray(rows, np.float64).mean((0, 1))
    expected = expected + correlate(np.broadcast_to(mean, x.shape), kernel, conv)
    found = np.asarray(int8_net.apply({"params": int8_params}, x), np.float64)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("conv", [None, *CONVS])
def test_the_gradient_of_the_input_is_that_of_the_dequantized_weights(conv):
    """Within the quantizer's range; beyond it the input has none."""
    net, params, x = case(conv)
    spec = LayerSpec("scri", 4, 6)
    int8_net, int8_params, *_ = quantized(net, params, 0.7 * x, spec)
    steps, w_hat = int8_params["layer"], dequantized_float64(int8_params["layer"], x, spec)[1]
    weights = {"layer": {"kernel": jnp.asarray(np.moveaxis(w_hat, 0, -1), jnp.float32)}}
    weights["layer"]["bias"] = jnp.zeros(OUTPUTS)
    # Of an upsampled image the layer reads one position of four, whose gradients add up.
    upsampled = conv is not None and conv.startswith("upsampled")
    given = x[..., ::2, ::2, :] if upsampled else x

    def output(net, params, given):
        if upsampled:
            given = jnp.repeat(jnp.repeat(given, 2, axis=-3), 2, axis=-2)
            given = given[..., : x.shape[-3], : x.shape[-2], :]
        return net.apply({"params": params}, given)

    toward = jax.random.normal(jax.random.key(1), output(net, params, given).shape)
    expected, found = (
        jax.grad(lambda x, net=n, params=p: (toward * output(net, params, x)).sum())(given)
        for n, p in ((net, weights), (int8_net, int8_params))
    )
    place = np.asarray(given) * np.float32(steps["in_scale"]) + np.asarray(steps["in_offset"])
    inside = np.abs(place) < 31
    assert inside.any(), "the range is met"
    assert not inside.all(), "and left"
    assert relative_error(found, np.where(inside, expected, 0)) < 1e-5


@pytest.mark.parametrize(("coarse", "first", "last"), [(0, -8, 7), (4, 0, 4 * 7)])
def test_gradients_of_htdq_are_those_of_the_dequantized_weights(coarse, first, last):
    """From the first value with a code to the last, with one range and with two."""
    module = layer_set({"": LayerSpec("htdq", 8, 4)}).dense(2)
    kernel = np.asarray([[3, -5, 127], [-2, 11, 90]], np.int8)
    params = {
        "kernel": kernel,
        "sums": kernel.sum(1, dtype=np.int32),
        "scale": jnp.asarray([0.5, 0.25], jnp.bfloat16),
        "bias": np.zeros(2, np.float32),
        "in_scale": np.float32(8),
        "in_offset": np.float32(3),
        "coarse": np.float32(coarse),
    }
    steps = np.asarray([first - 1, first + 0.3, last / 2 + 0.2, last - 0.3, last + 1])
    x = np.float32((steps - 3) / 8)[:, None] * np.ones(3, np.float32)
    found = jax.grad(lambda x: module.apply({"params": params}, x).sum())(jnp.asarray(x))
    slopes = 8 * (kernel * np.asarray([[0.5], [0.25]])).sum(0)
    np.testing.assert_allclose(found, np.asarray([[0], [1], [1], [1], [0]]) * slopes, rtol=1e-6)


def test_derivatives_pass_through_every_transformation():
    """Forward and reverse mode agree, through jit, vmap, scan and remat."""
    net, params, x = case("3x3")
    int8_net, int8_params, *_ = quantized(net, params, x, LayerSpec("scri"))

    @jax.checkpoint
    def layer(x):
        return int8_net.apply({"params": int8_params}, x)

    def total(x):
        out, _ = jax.lax.scan(
            lambda sum, image: (sum + jnp.square(layer(image)).sum(), None), 0.0, x
        )
        return out

    def loss(x):
        return jax.vmap(total)(x[:, :, None]).sum()

    tangent = jax.random.normal(jax.random.key(2), x.shape)
    gradient = jax.jit(jax.grad(loss))(x)
    _, forward = jax.jit(lambda x: jax.jvp(loss, (x,), (tangent,)))(x)
    assert float(forward) == pytest.approx(float((gradient * tangent).sum()), rel=1e-4)
    assert float(jnp.abs(gradient).max()) > 0


def test_a_layer_that_cannot_be_int8_is_refused_by_name():
    specs = SpecTable(FrozenDict({"": LayerSpec("minmax")}))
    grouped = QuantConv(8, (3,), feature_group_count=2, specs=specs)
    with pytest.raises(InputError, match="QuantConv: its channels are in 2 groups"):
        grouped.init(jax.random.key(0), jnp.ones((1, 4, 8)))


@pytest.mark.parametrize(
    "form",
    [
        {"strides": 2, "padding": "VALID", "use_bias": False},
        {"padding": "CAUSAL", "kernel_dilation": 2},
        {"padding": "CIRCULAR"},
        {"padding": 1, "feature_group_count": 4},
        {"padding": ((2, 0),), "input_dilation": 2},
        {"mask": np.tri(8)[None] * np.ones((3, 1, 1))},
    ],
)
def test_float_convolutions_take_what_linens_own_takes(form):
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    expected, variables = nn.Conv(8, (3,), **form).init_with_output(jax.random.key(1), x)
    found = QuantConv(8, (3,), **form).apply(variables, x)
    assert relative_error(found, expected) < 1e-6


def test_inputs_round_halves_to_even_and_stop_at_the_last_code():
    module = layer_set({"": LayerSpec("minmax")}).dense(1, use_bias=False)
    x = np.concatenate([np.arange(-520, 520) / 4, np.nextafter(np.arange(-127, 127) + 0.5, 0)])
    x = x.astype(np.float32)[:, None]
    params = module.init(jax.random.key(0), x)["params"] | {"kernel": jnp.ones((1, 1), jnp.int8)}
    found = jax.jit(module.apply)({"params": params | {"sums": jnp.ones(1, jnp.int32)}}, x)
    np.testing.assert_array_equal(found, np.clip(np.rint(x), -127, 127))


def correlate(x, kernel, conv):
    """Zero-padded correlation in float64."""
    if conv is None:
        return x @ kernel
    _, strides, padding, _ = CONVS[conv]
    rank = len(strides)
    lead, spatial = x.shape[: -rank - 1], x.shape[-rank - 1 : -1]
    x = np.pad(x.reshape(-1, *spatial, CHANNELS), ((0, 0), *padding, (0, 0)))
    sizes = [
        (n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], kernel.shape, strides, strict=False)
    ]
    out = np.zeros((len(x), *sizes, OUTPUTS))
    for tap in np.ndindex(kernel.shape[:-2]):
        window = tuple(
            slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, sizes, strides, strict=True)
        )
        out += x[(slice(None), *window)] @ kernel[tap]
    return out.reshape(*lead, *out.shape[1:])


@pytest.mark.parametrize("conv", [None, *CONVS])
def test_scri_layers_are_near_the_float_layer_up_to_the_border(conv):
    net, params, x = case(conv)
    int8_net, int8_params, report, _ = quantized(net, params, x, LayerSpec("scri"))
    expected = np.asarray(net.apply({"params": params}, x))
    found = np.asarray(int8_net.apply({"params": int8_params}, x))
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    assert report.sqnr > 35
    assert report.coverage_after > report.coverage_before


def rounding_noise(params, x, spec):
    """Mean squared error of the output where one range takes all inputs and nothing is clipped.

    What is rounded to steps of d is off by d^2/12 on average (Bennett, 1948), inputs and weights
    apart; of the inputs only the variance meets the weights' error, whose mean the bias takes.
    """
    weights = np.asarray(params["layer"]["kernel"], np.float64).reshape(-1, OUTPUTS)
    taps = len(weights) // CHANNELS
    x = np.asarray(x, np.float64).reshape(-1, CHANNELS)
    step = np.abs(weights).max(0) / (2 ** (spec.weight_bits - 1) - 1)
    if spec.activation_bits == 16:
        return (step**2 / 12 * taps * np.square(x).mean(0).sum()).mean()
    input_step = (x.max() - x.min()) / 2 / (2 ** (spec.activation_bits - 1) - 1)
    from_inputs = input_step**2 / 12 * np.square(weights).sum(0)
    return (step**2 / 12 * taps * x.var(0).sum() + from_inputs).mean()


@pytest.mark.parametrize("conv", [None, "3x3"])
@pytest.mark.parametrize(
    ("spec", "dtype", "least"),
    [
        (LayerSpec("minmax", 4, 8, weight_clipping=False), jnp.int4, 0.5),
        (LayerSpec("minmax", 6, 6), jnp.int8, 0.5),
        (LayerSpec("minmax", 8, 16), jnp.int8, 0.5),
        (LayerSpec("scri", 4, 8), jnp.int4, 0),
        (LayerSpec("scri", 6, 6), jnp.int8, 0),
    ],
)
def test_layers_err_as_much_as_their_widths_do(conv, spec, dtype, least):
    """A bit more or less is a factor of four; SCRI and clipping may gain."""
    most = 2 if least else 1
    errors, expected_errors = [], []
    for seed in range(3):
        net, params, x = case(conv, seed)
        int8_net, int8_params, *_ = quantized(net, params, x, spec)
        assert int8_params["layer"]["kernel"].dtype == dtype
        expected = np.asarray(net.apply({"params": params}, x), np.float64)
        found = np.asarray(int8_net.apply({"params": int8_params}, x), np.float64)
        errors.append(np.square(found - expected).mean())
        expected_errors.append(rounding_noise(params, x, spec))
    assert least < np.sum(errors) / np.sum(expected_errors) < most


def test_htdq_layer_equals_its_quantizer_in_float64():
    rng = np.random.default_rng(0)
    x = rng.normal(-1, 1, CHANNELS) + 0.01 * rng.normal(size=(20, CHANNELS)).cumsum(0)
    x[:, :2] += 20
    x = jnp.asarray(x / (1 + np.exp(-x)), jnp.float32)
    net = Net(FLOAT)
    params = net.init(jax.random.key(0), x)["params"]
    spec = LayerSpec("htdq")
    _, found = observe(net, {"params": params}, x, places=None)
    np.testing.assert_array_equal(found["layer"].rows[:, 0], x)
    record, report = solve_layer("layer", params["layer"], found["layer"], spec)
    layer = record.params()
    assert float(record.coarse) > 1
    assert report.td_score_after >= report.td_score_before
    y = Net(layer_set({"layer": spec})).apply({"params": {"layer": layer}}, x)
    quantizer = htdq.search(np.asarray(x, np.float64), spec.activation_bits)
    assert quantizer.shift
    weights = np.asarray(params["layer"]["kernel"], np.float64)
    steps = np.asarray(layer["scale"], np.float64) / quantizer.step
    stored = np.asarray(layer["kernel"], np.float64).T * steps
    expected = (quantizer(np.asarray(x, np.float64)) - quantizer.offset) @ stored
    exact = np.asarray(x, np.float64) @ weights
    expected += (exact - expected).mean(0)
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, exact) < 0.05


@pytest.mark.parametrize("method", ["minmax", "scri"])
def test_the_mean_of_the_output_is_the_float_layers(method):
    """Though four bits round the weights of an input far from zero mean."""
    net, params, x = case(None)
    x = jnp.abs(x)
    int8_net, int8_params, _, rows = quantized(net, params, x, LayerSpec(method, 4, 8))
    exact, found = (
        np.asarray(n.apply({"params": p}, rows[:, 0]))
        for n, p in ((net, params), (int8_net, int8_params))
    )
    error = found - exact
    assert np.abs(error).mean() > 1e-3 * np.abs(exact).max()
    assert np.abs(error.mean(0)).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("method", [*METHODS, "htdq", "float input"])
def test_every_method_clips_weights_of_four_bits(method):
    """By default and when told to, and not when told not to; it makes the layer better."""
    net, params, x = case(None)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, CHANNELS)), jnp.float32)
    spec = LayerSpec(method, 4, 8) if method != "float input" else LayerSpec("minmax", 4, 16)
    layers, sqnrs = [], []
    for clipped in (None, True, False):
        choice = replace(spec, weight_clipping=clipped)
        _, layer, report, _ = quantized(net, params, x, choice)
        layers.append(np.asarray(layer["layer"]["kernel"], np.int32))
        sqnrs.append(report.sqnr)
    np.testing.assert_array_equal(layers[0], layers[1])
    assert (layers[0] != layers[2]).any()
    assert sqnrs[0] > sqnrs[2]


def test_layers_without_a_spec_are_flax_own():
    net, params, x = case("3x3")
    same = Net(layer_set({"other": LayerSpec("scri")}), "3x3")
    np.testing.assert_array_equal(
        same.apply({"params": params}, x), net.apply({"params": params}, x)
    )


def test_statistics_of_a_conv_are_patches_inside_the_image():
    net, params, x = case("3x3")
    places = draw_places(jax.random.key(1), 32)
    _, found = observe(net, {"params": params}, x, places=places)
    images = np.asarray(x).reshape(-1, 6, 5, CHANNELS)
    patches = {
        images[n, i : i + 3, j : j + 3].tobytes() for n, i, j in np.ndindex(len(images), 4, 3)
    }
    rows = np.asarray(found["layer"].rows).reshape(-1, 3, 3, CHANNELS)
    assert all(row.tobytes() in patches for row in rows)
    np.testing.assert_array_equal(found["layer"].lower, images.min((0, 1, 2)))
    np.testing.assert_array_equal(found["layer"].upper, images.max((0, 1, 2)))


def test_layers_find_their_specs_without_a_walk_through_all_of_them():
    class Unwalked(FrozenDict):
        def items(self):
            raise AssertionError("the specs of all layers were walked through for one of them")

        keys = values = __iter__ = items

    spec = LayerSpec("minmax", 8, 8)
    table = SpecTable(Unwalked({"layer": spec}))
    layers = layer_set({"layer": spec})
    layers = replace(layers, dense_cls=Configured(QuantDense, FrozenDict(specs=table)))
    shapes = jax.eval_shape(Net(layers).init, jax.random.key(0), jnp.zeros((4, CHANNELS)))
    assert shapes["params"]["layer"]["kernel"].dtype == jnp.int8


def test_no_initializer_is_traced_for_parameters_that_are_there(monkeypatch):
    net, params, x = case("3x3")
    int8_net, layer, *_ = quantized(net, params, x, LayerSpec("minmax", 8, 8))

    def eval_shape(*arguments):
        raise AssertionError("an initializer was traced")

    with monkeypatch.context() as patch:
        patch.setattr(jax, "eval_shape", eval_shape)
        found = int8_net.apply({"params": layer}, x)
        with pytest.raises(AssertionError, match="an initializer was traced"):
            net.apply({"params": params}, x)
    assert found.shape == (*CONVS["3x3"][3], OUTPUTS)


def test_a_parameter_of_another_shape_is_named():
    net, params, x = case(None)
    int8_net, layer, *_ = quantized(net, params, x, LayerSpec("minmax", 8, 8))
    layer["layer"]["sums"] = jnp.zeros(OUTPUTS + 1, jnp.int32)
    message = rf'"sums" in "layer".*\({OUTPUTS},\).*\({OUTPUTS + 1},\)'
    with pytest.raises(ScopeParamShapeError, match=message):
        int8_net.apply({"params": layer}, x)
