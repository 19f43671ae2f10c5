"""SCRI against minmax and against its own definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvd_jax.quant import baselines, clipping, codec, scri


def layer(seed=0, rows=64, channels=24, outputs=16, taps=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, taps, channels)).astype(np.float32)
    w = rng.normal(size=(taps, channels, outputs)).astype(np.float32)
    return x, w


def ranges(x):
    return x.min((0, 1)), x.max((0, 1))


def output_error(x, w, quantizer, activation_bits, weight_bits):
    exact = scri.row_product(jnp.asarray(x) - quantizer.shift[None, None], w)
    return scri.output_error(x, w, exact, quantizer, activation_bits, weight_bits).mean()


def relative_output_error(x, w, quantizer, activation_bits=8, weight_bits=8):
    error = output_error(x, w, quantizer, activation_bits, weight_bits)
    flat = x.reshape(len(x), -1) @ w.reshape(-1, w.shape[-1])
    return float(error / np.square(flat).mean())


def test_at_the_widest_range_unshifted_channels_are_minmax():
    x, _ = layer()
    half = np.abs(x).max((0, 1))
    found = scri.integrate(-half, half, half.max(), jnp.float32(1), 8)
    expected = baselines.minmax(-half, half, 8)
    np.testing.assert_array_equal(found.shift, 0)
    np.testing.assert_array_equal(found.factor, 1)
    np.testing.assert_array_equal(found.codes(x, 8), expected.codes(x, 8))


def test_the_narrowest_range_gives_every_channel_every_level():
    x, _ = layer()
    x *= np.geomspace(1, 100, x.shape[-1], dtype=np.float32)
    lower, upper = ranges(x + 7)
    quantizer = scri.integrate(lower, upper, ((upper - lower) / 2).min(), jnp.float32(1), 8)
    codes = np.asarray(quantizer.codes(x + 7, 8))
    assert (codes.min((0, 1)) == -127).all()
    assert (codes.max((0, 1)) == 127).all()
    assert float(scri.coverage(lower, upper, quantizer, 8)) == pytest.approx(255 / 256)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_rescaled_channels_leave_scri_where_it_is_and_break_minmax(seed):
    x, w = layer(seed)
    factors = np.exp(np.random.default_rng(seed + 1).normal(0, 1.5, x.shape[-1]))
    factors = factors.astype(np.float32)
    shifts = np.random.default_rng(seed + 2).normal(0, 3, x.shape[-1]).astype(np.float32)
    plain = relative_output_error(x, w, scri.search(*ranges(x), x, w, 8, 8)[0])
    y, v = x * factors + shifts, w / factors[:, None]
    found = relative_output_error(
        y - shifts, v, scri.search(*ranges(y - shifts), y - shifts, v, 8, 8)[0]
    )
    assert found < 2 * plain
    # Against the same output: what a shift adds to it is exact for SCRI and signal for minmax.
    reference = np.square((y - shifts).reshape(len(y), -1) @ v[0]).mean()
    shifted = float(output_error(y, v, scri.search(*ranges(y), y, v, 8, 8)[0], 8, 8) / reference)
    broken = float(output_error(y, v, baselines.minmax(*ranges(y), 8), 8, 8) / reference)
    assert shifted < 2 * plain
    assert broken > 4 * plain


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 16), st.floats(-44, -3))
def test_nearly_dead_channels_cost_the_others_nothing(seed, dead, exponent):
    """Beside what constant ones cost; a float32 goes down to 1e-45."""
    x, w = layer(seed)
    x *= np.exp(np.random.default_rng(seed).normal(0, 1, x.shape[-1])).astype(np.float32)
    x[..., :dead] = 0
    constant = float(output_error(x, w, scri.search(*ranges(x), x, w, 8, 8)[0], 8, 8))
    x[:, :, :dead] = np.float32(10**exponent) * np.linspace(-1, 1, len(x))[:, None, None]
    found = float(output_error(x, w, scri.search(*ranges(x), x, w, 8, 8)[0], 8, 8))
    # They make the grid coarser for all, up to a factor of two from one R to the next: the nearest
    # is off by the root of two at most, whose square is what the error can grow by.
    assert found < 2 * constant


def test_the_search_is_no_worse_than_any_of_its_candidates():
    x, w = layer(taps=3)
    x[..., :3] *= 30
    lower, upper = ranges(x)
    found = float(output_error(x, w, scri.search(lower, upper, x, w, 6, 6)[0], 6, 6))
    half = (upper - lower) / 2
    for target in np.geomspace(half.max(), half.min(), scri.RANGE_CANDIDATES):
        quantizer = scri.integrate(lower, upper, jnp.float32(target), jnp.float32(1), 6)
        assert found <= float(output_error(x, w, quantizer, 6, 6)) * (1 + 1e-5)


def test_output_error_is_the_variance_of_the_dequantized_layers():
    """y = D dW sum q Wq + b', written out in float64."""
    x, w = layer(taps=2)
    quantizer = scri.search(*ranges(x), x, w, 8, 4)[0]
    z, s, d = (np.asarray(part, np.float64) for part in quantizer)
    q = np.clip(np.rint((x - z) / (s * d)), -127, 127)
    folded = w.astype(np.float64) * s[None, :, None]
    scale = np.abs(folded).max((0, 1)) / 7
    wq = np.clip(np.rint(folded / scale), -7, 7)
    bias = np.einsum("c,tco->o", z, w.astype(np.float64))
    y = d * scale * np.einsum("ntc,tco->no", q, wq) + bias
    error = y - np.einsum("ntc,tco->no", x.astype(np.float64), w)
    expected = (np.square(error).mean(0) - np.square(error.mean(0))).mean()
    assert float(output_error(x, w, quantizer, 8, 4)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("bits", "mean_counts"), [(4, False), (4, True), (2, False)])
def test_weights_are_clipped_where_each_output_errs_least(bits, mean_counts):
    """The errors of all candidates, written out in float64."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-127, 128, (256, 48)).astype(np.float32)
    w = rng.normal(size=(48, 16)).astype(np.float32)
    d = 0.037
    exact = d * rows.astype(np.float64) @ w
    found = np.asarray(
        clipping.search_weight_clip(
            rows, w, exact.astype(np.float32), bits, d, mean_counts=mean_counts
        )
    )

    def errors(clip):
        most = 2 ** (bits - 1) - 1
        scale = d * clip * np.abs(w.astype(np.float64)).max(0) / most
        scale = scale.astype(codec.SCALE_DTYPE).astype(np.float64) / d
        error = d * rows @ (scale * np.clip(np.rint(w / scale), -most, most)) - exact
        return np.square(error).mean(0) if mean_counts else error.var(0)

    # Of few levels, narrow ones too.
    least = np.min([errors(clip) for clip in np.arange(1, 0.58 if bits == 4 else 0.23, -0.05)], 0)
    assert (errors(found) <= 1.001 * least).all()
    assert errors(found).mean() < 0.9 * errors(1).mean()


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_channels_divide_by_nothing(value):
    x, w = layer()
    x[:] = value
    quantizer = scri.search(*ranges(x), x, w, 8, 8)[0]
    assert all(np.isfinite(part).all() for part in quantizer)
    assert float(output_error(x, w, quantizer, 8, 8)) == 0
    x[:, :, 0] = np.linspace(-1, 1, len(x))[:, None]
    quantizer = scri.search(*ranges(x), x, w, 8, 8)[0]
    assert relative_output_error(x, w, quantizer) < 1e-3


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"{bits} bits: codes have 2 to 8"):
        codec.max_code(bits)


def test_weights_are_symmetric_per_channel_and_empty_channels_defined():
    w = np.array([[1.2, 0.0, -8.0], [-2.0, 0.0, 5.0]], np.float32)
    codes, scale = codec.quantize_weights(w, 4)
    np.testing.assert_array_equal(codes, [[4, 0, -7], [-7, 0, 4]])
    assert scale.dtype == codec.SCALE_DTYPE
    np.testing.assert_allclose(np.float32(scale), [2 / 7, 1, 8 / 7], rtol=2**-8)


def test_weights_are_coded_with_the_scale_that_is_stored():
    """Half a step off at most, though the scale was rounded."""
    w = np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32)
    codes, scale = codec.quantize_weights(w, 8, 0.037)
    step = np.asarray(scale, np.float64) / 0.037
    assert (np.abs(np.float64(codes) * step - w) <= 0.5001 * step).all()
