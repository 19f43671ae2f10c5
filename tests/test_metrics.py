"""Metrics against formulas written otherwise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, stats

from qvd_jax.data import moving_shapes
from qvd_jax.metrics import frechet, paired, prompt_accuracy, temporal


def videos(seed, shape=(2, 4, 16, 20, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_psnr_of_a_known_error():
    reference = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    candidate = reference.copy()
    candidate[0] += 5
    np.testing.assert_allclose(
        paired.psnr(reference, candidate), [20 * math.log10(255 / 5), math.inf]
    )


def test_ssim_against_windows_taken_one_by_one():
    x, y = videos(0), videos(1)
    y[1] = x[1] // 2 + y[1] // 2
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for a, b in zip(x.astype(float), y.astype(float), strict=True):
        values = []
        for f, c in np.ndindex(4, 3):
            for i, j in np.ndindex(6, 10):
                p, q = (v[f, i : i + 11, j : j + 11, c] for v in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append(
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                )
        expected.append(np.mean(values))
    np.testing.assert_allclose(paired.ssim(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(paired.ssim(x, x), 1)


def test_other_shapes_cannot_be_compared():
    with pytest.raises(ValueError, match=r"cannot be compared"):
        paired.psnr(videos(0), videos(0)[:1])
    with pytest.raises(ValueError, match=r"SSIM needs 11 pixels on each side"):
        paired.ssim(videos(0)[:, :, :10], videos(0)[:, :, :10])


def test_flicker_is_zero_for_steady_change_and_counts_jumps():
    ramp = np.broadcast_to(
        (10 * np.arange(5, dtype=np.uint8))[None, :, None, None, None], (1, 5, 2, 2, 3)
    )
    blink = ramp.copy()
    blink[:, 2] += 6
    np.testing.assert_allclose(temporal.flicker(ramp), 0)
    np.testing.assert_allclose(temporal.flicker(blink), (6 + 12 + 6) / 3)
    with pytest.raises(ValueError, match="3 are needed"):
        temporal.flicker(ramp[:, :2])


def test_frechet_distance_against_scipys_matrix_root():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(40, 6)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2)
    expected += np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two rows"):
        frechet.frechet_distance(a[:1], b)


@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_wilsons(counts):
    hits, trials = counts
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    found = prompt_accuracy.Proportion(hits, trials).interval()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_prompt_accuracy_counts_each_attribute():
    scenes = moving_shapes.scenes("held_out")[:10]
    shown = moving_shapes.render(scenes, np.random.default_rng(0))
    expected = [moving_shapes.describe_scene(scene) for scene in scenes]
    hits = prompt_accuracy.prompt_hits(shown, expected)
    assert hits.shape == (10, 5)
    assert hits.all()
    expected[0] = expected[0]._replace(motion="nowhere")
    expected[1] = expected[1]._replace(color="ultraviolet")
    found = prompt_accuracy.prompt_accuracy(prompt_accuracy.prompt_hits(shown, expected))
    assert {name: p.hits for name, p in found.items()} == {
        "color": 9,
        "shape": 10,
        "motion": 9,
        "background": 10,
        "all four": 8,
    }
    with pytest.raises(ValueError, match="10 videos for 9 descriptions"):
        prompt_accuracy.prompt_hits(shown, expected[1:])


def test_paired_difference_is_that_of_a_one_sample_t_interval_at_many_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.8, rng.random(4000) < 0.7
    mean, interval = prompt_accuracy.paired_difference(a, b)
    found = stats.ttest_1samp(b.astype(float) - a, 0)
    assert mean == pytest.approx(b.mean() - a.mean())
    np.testing.assert_allclose(interval, found.confidence_interval(0.95), atol=2e-4)


def test_paired_difference_of_equal_answers_has_an_interval():
    alike = np.arange(128) < 120
    assert prompt_accuracy.paired_difference(alike, alike)[0] == 0
    low, high = prompt_accuracy.paired_difference(alike, alike)[1]
    # One pair of a kind that did not occur, among 130.
    assert high == -low == pytest.approx(1.96 / 130, rel=1e-4)
