"""The TPU's kernels, interpreted, beside float64 and beside the layers they stand for."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from parity import relative_error
from scipy import special

from qvd_jax.kernels import conv_tpu, layers_tpu, upsampled_conv_tpu
from qvd_jax.kernels.activations import gelu_by_tanh
from qvd_jax.models.attention import TemporalTransformer
from qvd_jax.models.blocks import ResnetBlock, Upsample
from qvd_jax.models.layers import FLOAT
from qvd_jax.quant.layers import layer_set
from qvd_jax.quant.policy import LayerSpec

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def exact_input(x, scale, offset, epsilon=None):
    x = np.float64(x)
    if epsilon is not None:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
    images = np.arange(len(x))
    return x * scale[images % len(scale)][:, None] + offset[images % len(offset)][:, None]


def exact_codes(x, limit):
    return np.clip(np.round(x), -limit, limit)


@pytest.mark.parametrize("weights_dtype", [np.int8, np.float32])
@pytest.mark.parametrize(
    ("shape", "outputs", "images", "options"),
    [
        pytest.param((2, 70, 40), 48, (1, 1), {"epsilon": 1e-5, "residual": True}, id="small"),
        pytest.param((4, 600, 64), 256, (2, 4), {"gated": True}, id="gated, two blocks of tokens"),
        pytest.param(
            (4, 600, 64), 96, (4, 1), {"epsilon": 1e-5, "transposes": "output"}, id="output turned"
        ),
        pytest.param(
            (3, 130, 64), 96, (1, 3), {"transposes": "input", "residual": True}, id="input turned"
        ),
        pytest.param(
            (2, 700, 128), 512, (2, 1), {"epsilon": 1e-5, "gated": True, "limit": 7}, id="blocks"
        ),
        pytest.param(
            (1, 33, 24), 20, (1, 1), {"transposes": "output", "residual": True}, id="odd, turned"
        ),
        pytest.param(
            (2, 700, 128), 512, (2, 1), {"epsilon": 1e-5, "gated": True, "token": True}, id="token"
        ),
        *(
            pytest.param(
                (3, 130, 64),
                96,
                (1, 3),
                {"transposes": turned, "token": True},
                id=f"token, {turned}",
            )
            for turned in ("input", "output")
        ),
    ],
)
def test_dense_equals_its_definition_in_float64(
    shape, outputs, images, options, weights_dtype, monkeypatch
):
    # Few weights a block, so that outputs come in several.
    monkeypatch.setattr(layers_tpu, "_WEIGHT_BYTES", 2**15 * np.dtype(weights_dtype).itemsize)
    is_int8 = weights_dtype == np.int8
    gated, limit = options.get("gated", False), options.get("limit", 127) if is_int8 else None
    by_token = is_int8 and options.get("token", False)
    x = 3 * normal(*shape) + 1
    weights = RNG.integers(-127, 128, (outputs, shape[-1])).astype(weights_dtype)
    scale, offset = 20 + 5 * normal(images[0], shape[-1]), 5 * normal(images[1], shape[-1])
    out_scale, bias = np.float32(1e-3) * normal(outputs), normal(outputs)
    residual = None
    if options.get("residual"):
        residual = normal(*shape[:-1], outputs)
    found = layers_tpu.dense(
        layers_tpu.Input(x, scale, offset, limit, options.get("epsilon"), by_token),
        weights,
        layers_tpu.Output(out_scale, bias, jnp.float32, gated, residual),
        options.get("transposes"),
        interpret=True,
    )
    multiplied = exact_input(x, scale, offset, options.get("epsilon"))
    if by_token:
        step = np.abs(multiplied).max(-1, keepdims=True) / limit
        multiplied = step * exact_codes(multiplied / step, limit)
    elif is_int8:
        multiplied = exact_codes(multiplied, limit)
    expected = multiplied @ np.float64(weights).T * out_scale + bias
    if gated:
        value, gate = np.split(expected, 2, axis=-1)
        expected = value * gate * special.ndtr(gate)
    if residual is not None:
        expected = expected + residual
    errors = np.abs(np.float64(found) - expected) / np.abs(expected).max()
    # A value next to the middle of a step is rounded to the other code by float32.
    assert (errors > 1e-5).mean() <= (5e-3 if is_int8 else 0)
    assert errors.max() <= 5e-3


@pytest.mark.parametrize("length", [64, 700])
def test_quantize_equals_its_definition_in_float64(length):
    x, scale, offset = normal(4, length, 48), 1 + normal(2, 48) / 4, normal(4, 48)
    steps = 20 + 5 * normal(48), normal(48)
    found = layers_tpu.quantize_activated(x, (scale, offset), steps, 127, interpret=True)
    assert found.dtype == jnp.int8
    expected = exact_input(x, scale, offset)
    expected = exact_codes(expected * special.expit(expected) * steps[0] + steps[1], 127)
    assert np.abs(np.float64(found) - expected).max() <= 1
    assert (found != expected).mean() <= 1e-4


@pytest.mark.parametrize("weights_dtype", [np.int8, np.float32])
@pytest.mark.parametrize(
    ("size", "outputs", "images", "options"),
    [
        pytest.param((6, 32), 24, (2, 1), {"residual": True}, id="one block"),
        pytest.param((48, 32), 256, (1, 4), {"border": True}, id="blocks of rows and outputs"),
        pytest.param((1, 64), 4, (4, 2), {"border": True, "residual": True}, id="one row"),
    ],
)
def test_conv_equals_its_definition_in_float64(
    size, outputs, images, options, weights_dtype, monkeypatch
):
    is_int8 = weights_dtype == np.int8
    channels, count, positions = 16, 4, size[0] * size[1]
    weight_bytes = 128 * 9 * channels * np.dtype(weights_dtype).itemsize
    monkeypatch.setattr(conv_tpu, "_WEIGHT_BYTES", weight_bytes)
    x = normal(count, positions, channels)
    scale, offset = 1 + normal(images[0], channels) / 4, normal(images[1], channels)
    quantizer = (20 + 5 * normal(channels), normal(channels)) if is_int8 else None
    weights = RNG.integers(-127, 128, (3, 3, outputs, channels)).astype(weights_dtype)
    out_scale, bias = np.float32(1e-3) * normal(outputs), normal(images[0], outputs)
    border = normal(positions, outputs) if options.get("border") else None
    residual = normal(count, positions, outputs) if options.get("residual") else None
    assert conv_tpu.can_use(size, channels, outputs, weights_dtype)
    found = conv_tpu.conv(
        conv_tpu.Input(x, scale, offset, quantizer),
        weights,
        conv_tpu.Output(out_scale, bias, border, residual),
        size=size,
        dtype=jnp.float32,
        limit=127,
        interpret=True,
    )
    expected = exact_input(x, scale, offset)
    expected = expected * special.expit(expected)
    if is_int8:
        expected = exact_codes(expected * quantizer[0] + quantizer[1], 127)
    padded = np.pad(expected.reshape(count, *size, channels), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    products = np.einsum("nhwcij,ijoc->nhwo", windows, np.float64(weights))
    expected = products.reshape(count, positions, outputs) * out_scale
    expected = expected + bias[np.arange(count) % len(bias)][:, None]
    for added in (border, residual):
        expected = expected if added is None else expected + added
    errors = np.abs(np.float64(found) - expected) / np.abs(expected).max()
    # A value next to the middle of a step is rounded to the other code by float32.
    assert (errors > 1e-5).mean() <= (5e-2 if is_int8 else 0)
    assert errors.max() <= 5e-3


@pytest.mark.parametrize(
    ("size", "channels", "fits"),
    [
        ((64, 64), 960, True),
        ((16, 16), 1280, False),
        ((64, 48), 320, False),
        ((512, 512), 128, False),
    ],
)
def test_conv_takes_images_that_fit_the_chip_in_rows_that_fill_blocks(size, channels, fits):
    assert conv_tpu.can_use(size, channels, 320, jnp.bfloat16) == fits


@pytest.mark.parametrize(
    ("shape", "outputs", "parts", "fits"),
    [
        # The widest of Stable Diffusion's: the feed-forward of level 2, into it and out of it.
        ((32, 256, 1280), 5120, 2, True),
        ((32, 256, 5120), 1280, 1, True),
        ((32, 4096, 320), 1280, 2, True),
        ((32, 64, 2560), 0, 1, True),
        ((1, 512, 1280), 1280, 1, False),
        # A vocabulary is not divided into blocks.
        ((1, 2048, 768), 50257, 1, False),
        ((1, 2048, 50304), 768, 1, False),
    ],
)
def test_dense_takes_what_is_worth_its_call_and_fits_the_chip(shape, outputs, parts, fits):
    assert layers_tpu.can_use(shape, outputs, parts) == fits


@pytest.mark.parametrize(
    ("size", "count", "outputs"),
    [
        pytest.param((4, 8), 2, 24, id="images that share a block"),
        pytest.param((8, 32), 3, 256, id="blocks of images and outputs"),
        pytest.param((2, 16), 1, 8, id="two rows"),
    ],
)
def test_upsampled_conv_equals_its_definition_in_float64(size, count, outputs, monkeypatch):
    monkeypatch.setattr(upsampled_conv_tpu, "_POSITIONS", 256)
    channels, (height, width) = 16, size
    assert upsampled_conv_tpu.can_use(size, channels, outputs, jnp.bfloat16)
    # Far from the middle of a step, so that no code is rounded to another.
    codes = RNG.integers(-127, 128, (count, height, width, channels))
    step_scale, step_offset = np.float32(2.0 ** RNG.integers(-2, 3, channels)), normal(channels)
    x = np.float32((codes - step_offset) / step_scale)
    weights = RNG.integers(-127, 128, (3, 3, outputs, channels)).astype(np.int8)
    scale, bias = np.float32(1e-3) * normal(outputs), normal(outputs)
    border = normal(3, 2 * width, outputs)
    found = upsampled_conv_tpu.conv(
        x.reshape(count, -1, channels),
        (step_scale, step_offset),
        weights,
        scale,
        bias,
        border,
        size=size,
        limit=127,
        interpret=True,
    )
    assert found.dtype == jnp.bfloat16
    upsampled = codes.repeat(2, 1).repeat(2, 2)
    padded = np.pad(upsampled, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum("nhwcij,ijoc->nhwo", windows, np.int64(weights)) * np.float64(scale) + bias
    expected += border[[0, *[1] * (2 * height - 2), 2]]
    # The sums are exact: what is left is the rounding to bfloat16.
    errors = np.abs(np.float64(found) - expected)
    assert (errors <= 2**-8 * np.abs(expected) + 1e-5 * np.abs(expected).max()).all()


@pytest.mark.parametrize(
    ("size", "dtype", "fits"),
    [
        ((32, 32), jnp.bfloat16, True),
        ((32, 32), jnp.float32, False),
        ((12, 12), jnp.bfloat16, False),
        ((3, 8), jnp.bfloat16, False),
        ((1, 32), jnp.bfloat16, False),
        ((256, 256), jnp.bfloat16, False),
    ],
)
def test_upsampled_conv_takes_images_that_fill_vectors_and_fit_the_chip(size, dtype, fits):
    assert upsampled_conv_tpu.can_use(size, 640, 640, dtype) == fits


@pytest.mark.parametrize("length", [9, 512, 1100])
def test_moments_equal_their_definition_in_float64(length):
    """Of values far from zero, in blocks of which the last may be partly filled."""
    x = 1000 + normal(3, length, 40)
    found = layers_tpu.moments(x, interpret=True)
    from_first = np.float64(x) - np.float64(x[:, :1])
    for one, expected in zip(found, (from_first, np.square(from_first)), strict=True):
        np.testing.assert_allclose(one, expected.mean(1), rtol=1e-4, atol=1e-5)


def test_gelu_by_tanh_is_near_gelu():
    x = np.linspace(-30, 30, 100_001, dtype=np.float32)
    expected = np.float64(x) * special.ndtr(np.float64(x))
    assert np.abs(gelu_by_tanh(x) - expected).max() <= 1e-6


class Resnet(nn.Module):
    """A resnet called like the other module of the test."""

    layers: object

    @nn.compact
    def __call__(self, x):
        block = ResnetBlock(32, 64, 8, 1e-5, "frame", self.layers, has_temporal_feature=False)
        return block(x)


class Motion(nn.Module):
    """A motion module."""

    layers: object

    @nn.compact
    def __call__(self, x):
        return TemporalTransformer(32, 32, 4, 8, 8, "joint", self.layers)(x)


class Doubled(nn.Module):
    """An upsampling."""

    layers: object

    @nn.compact
    def __call__(self, x):
        return Upsample(64, self.layers)(x)


def quantized(module, size=(16, 16), dtype=jnp.float32):
    """The module with int8 layers, random parameters and an input of images of a size."""
    paths = []

    def note(call, arguments, options, context):
        if isinstance(context.module, nn.Dense | nn.Conv) and context.method_name == "__call__":
            paths.append("/".join(context.module.path))
        return call(*arguments, **options)

    x = jnp.asarray(normal(2, 4, *size, 32), dtype)
    with nn.intercept_methods(note):
        jax.eval_shape(module(layer_set({})).init, jax.random.key(0), x)
    net = module(layer_set(dict.fromkeys(paths, LayerSpec("scri")), dtype))

    def random(path, leaf):
        name = path[-1].key
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(RNG.integers(-127, 128, leaf.shape), leaf.dtype)
        # Products about as large as the input, or attention hangs on a rounding between two keys.
        about = {"in_scale": 30, "scale": 1e-5 if leaf.dtype == jnp.bfloat16 else 1}.get(name)
        drawn = 0.1 * normal(*leaf.shape)
        return jnp.asarray(drawn if about is None else about * (1 + drawn), leaf.dtype)

    def summed(layer):
        if not isinstance(layer, dict):
            return layer
        layer = {name: summed(value) for name, value in layer.items()}
        if "sums" in layer:
            kernel = layer["kernel"].astype(jnp.int32)
            layer["sums"] = kernel.sum(range(1, kernel.ndim))
        return layer

    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return net, summed(jax.tree_util.tree_map_with_path(random, shapes)), x


@pytest.fixture
def kernels(monkeypatch):
    """Has modules call the TPU's kernels, interpreted; lists whether each choice was of one.

    Layers of the same shapes are traced, and so choose, once.
    """
    places = {
        conv_tpu: ["conv"],
        upsampled_conv_tpu: ["conv"],
        layers_tpu: ["dense", "moments", "quantize_activated"],
    }
    for place, names in places.items():
        for name in names:
            kernel = functools.partial(getattr(place, name), interpret=True)
            monkeypatch.setattr(place, name, kernel)
    called = []

    def on_tpu(*operands, cpu=None, tpu=None, default=None, **others):
        name = getattr(tpu, "__qualname__", "")
        named = name.endswith(("fused", "quantized_in_kernel", "upsampled_in_kernel"))
        called.append(named)
        return (tpu if named else cpu or default)(*operands)

    def use():
        monkeypatch.setattr(lax, "platform_dependent", on_tpu)
        jax.clear_caches()
        return called

    yield use
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "size", "kernels_called"),
    [
        pytest.param(Resnet, (8, 32), 5, id="resnet whose rows fill blocks"),
        pytest.param(Resnet, (16, 16), 5, id="resnet"),
        pytest.param(Motion, (16, 16), 7, id="motion"),
    ],
)
def test_kernels_make_of_a_block_what_passes_make_of_it(module, size, kernels_called, kernels):
    """Norms, positions, gates, borders and residuals go into the kernels with the same result."""
    net, variables, x = quantized(module, size)
    expected = jax.jit(net.apply)(variables, x)
    called = kernels()
    found = net.apply(variables, x)
    assert sum(called) == kernels_called
    # A code next to the middle of a step may be the other one.
    assert relative_error(found, expected) <= 2e-2
    errors = np.abs(np.float64(found) - np.float64(expected)) / np.abs(expected).max()
    assert np.median(errors) <= 1e-5


def test_the_kernel_makes_of_an_upsampled_image_what_passes_make_of_it(kernels):
    net, variables, x = quantized(Doubled, (8, 8), jnp.bfloat16)
    expected = jax.jit(net.apply)(variables, x)
    called = kernels()
    found = net.apply(variables, x)
    assert called == [True]
    assert found.shape == (2, 4, 16, 16, 64)
    assert relative_error(*(y.astype(jnp.float32) for y in (found, expected))) <= 2**-7


@pytest.mark.parametrize(
    ("module", "kernels_called"), [(Resnet, 5), (Motion, 9)], ids=["resnet", "motion"]
)
def test_kernels_make_of_a_bfloat16_block_what_passes_make_of_it(module, kernels_called, kernels):
    exact, x = module(FLOAT), jnp.asarray(normal(2, 4, 8, 32, 32))
    net = module(replace(FLOAT, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    variables = exact.init(jax.random.key(0), x)
    expected = jax.jit(exact.apply)(variables, x)
    x, rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, variables))
    passes = relative_error(jax.jit(net.apply)(rounded, x), expected)
    called = kernels()
    assert relative_error(net.apply(rounded, x), expected) <= 1.5 * passes
    assert sum(called) == kernels_called


def test_gradients_are_those_of_the_passes():
    net, variables, x = quantized(Motion)
    params, rest = {"params": variables["params"]}, {}

    def loss(x):
        return jnp.sin(net.apply(params | rest, x)).sum()

    text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
    assert float(jnp.abs(jax.grad(loss)(x)).max()) > 0


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_kernels_are_for_tpus_alone(platform):
    net, variables, x = quantized(Motion)
    text = jax.jit(net.apply).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
