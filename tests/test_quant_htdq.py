"""HTDQ: steps stay apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvd_jax.quant import htdq


def features(seed=0, steps=20, channels=96, skew=2.5):
    """What comes out of a SiLU: small values and a long positive tail, drifting with the step."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-1, 1, channels) * np.exp(rng.normal(0, skew / 2, channels))
    drift = 0.05 * rng.normal(size=channels) * np.linspace(0, 1, steps)[:, None]
    x = np.maximum(base + drift, -50)
    return x / (1 + np.exp(-x))


def test_td_score_counted_pair_by_pair():
    x = features(steps=6)
    y = np.round(x, 1)
    terms = []
    for i in range(6):
        for j in range(i):
            d, e = (np.sqrt(((a[i] - a[j]) ** 2).sum()) for a in (x, y))
            terms.append(abs(e - d) / d)
    assert htdq.td_score(x, y) == pytest.approx(1 - np.mean(terms))
    assert htdq.td_score(x, x) == 1
    assert htdq.td_score(np.ones((4, 3)), np.ones((4, 3))) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 6, 8]), skew=st.floats(0.1, 5))
def test_never_below_uniform_quantizers_however_far_they_reach(seed, bits, skew):
    """Each of 2^b levels from the lowest value up, to 30% or more of the range."""
    x = features(seed, skew=skew)
    found = htdq.td_score(x, htdq.search(x, bits)(x))
    for percent in range(30, 101, 5):
        step = (x.max() - x.min()) * percent / 100 / (2**bits - 1)
        level = np.clip(np.floor((x - x.min()) / step + 0.5), 0, 2**bits - 1)
        assert found >= htdq.td_score(x, x.min() + step * level) - 1e-9


def test_skewed_features_gain():
    x = features(skew=1)
    x[:, :4] += 15  # the tail: large, and hardly different from step to step
    uniform = max(htdq.td_score(x, q(x)) for q in htdq.uniform_candidates(x, 8))
    quantizer = htdq.search(x, 8)
    assert quantizer.shift is not None
    assert htdq.td_score(x, quantizer(x)) > uniform + 0.05


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 6, 8]))
def test_codes_fit_their_ranges_and_the_error_half_a_step(seed, bits):
    x = features(seed)
    for quantizer in (htdq.search(x, bits), htdq.uniform_candidates(x, bits)[-1]):
        fine, coarse = quantizer.codes(x)
        levels = 2 ** (bits - 1)
        assert fine.min() >= (-levels if quantizer.shift is None else 0)
        assert max(fine.max(), coarse.max()) < levels
        assert not ((fine != 0) & (coarse != 0)).any()
        if quantizer.shift is not None:
            end = quantizer.offset + (levels - 1) * quantizer.step
            half = np.where(x > end, 2.0**quantizer.shift, 1) * quantizer.step / 2
            assert (np.abs(quantizer(x) - x) <= half * (1 + 1e-6)).all()


def test_features_that_never_change():
    x = np.full((5, 4), 0.3)
    np.testing.assert_allclose(htdq.search(x, 8)(x), x)
    (uniform,) = htdq.uniform_candidates(x, 8)
    np.testing.assert_allclose(uniform(x), x)


def test_merged_steps_counts_equal_neighbors():
    assert htdq.merged_steps(np.array([[1, 2], [1, 2], [1, 3], [1, 3]])) == pytest.approx(2 / 3)
    assert htdq.merged_steps(np.array([[1, 2]])) == 0
