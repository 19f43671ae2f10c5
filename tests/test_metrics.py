"""Metrics against formulas written otherwise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from qvd_jax.data import moving_shapes
from qvd_jax.evaluate import frechet_ratio
from qvd_jax.metrics import frechet, intervals, paired, prompt_accuracy, temporal


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
    found = prompt_accuracy.Proportion(hits, trials, trials).interval()
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


def toy_features(rng, shift, prompts, seeds):
    """Unit-normal features around a shift, seed by seed, mostly alike for one prompt."""
    of_prompt = rng.normal(0, 0.9, (prompts, 2))
    return shift + np.tile(of_prompt, (seeds, 1)) + rng.normal(0, 0.19**0.5, (seeds * prompts, 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(1, 3), st.floats(0, 20), st.integers(0, 99))
def test_the_interval_of_a_frechet_ratio_contains_its_estimate(prompts, seeds, shift, seed):
    """Also of few videos in many features, whose covariance has no full rank."""
    rng = np.random.default_rng(seed)
    reference, candidate, real = (
        rng.normal(of, 1, (prompts * seeds, 16)) for of in (0, shift, 0.1)
    )
    value, (low, high) = frechet_ratio(reference, candidate, real, seeds)
    found, exact = (frechet.frechet_distance(x, real) for x in (candidate, reference))
    assert value == found / exact
    assert 0 < low <= value <= high
    assert frechet_ratio(reference, reference, real, seeds) == (1, (1, 1))


def test_intervals_of_frechet_ratios_cover_the_truth_as_often_as_they_say():
    """Distances of 8 and 2 to the unit normal; three dependent draws for each prompt."""
    rng = np.random.default_rng(0)
    real = 1.5**0.5 * np.asarray([[1, 0], [-1, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(np.cov(real, rowvar=False), np.eye(2), atol=1e-12)
    found = []
    for _ in range(150):
        reference, candidate = (toy_features(rng, shift, 30, 3) for shift in (1, 2))
        found.append([frechet_ratio(reference, candidate, real, seeds)[1] for seeds in (3, 1)])
    lows, highs = np.moveaxis(np.asarray(found), -1, 0)
    by_prompt, by_video = ((lows <= 4) & (highs >= 4)).mean(0)
    # Three standard errors of 150 trials.
    assert by_prompt > 0.95 - 3 * (0.95 * 0.05 / 150) ** 0.5
    assert by_video < 0.85, "videos of one prompt taken for independent"


def test_proportions_of_several_seeds_cover_the_truth():
    """Prompts that succeed with a probability of their own, at three seeds each."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        easy = rng.beta(1.4, 0.6, 60)
        hits, others = (rng.random((3, 60)) < easy for _ in range(2))
        lone = prompt_accuracy.Proportion(int(hits.sum()), 180, 180)
        columns = np.repeat(hits.reshape(-1, 1), 5, axis=1)
        clustered = prompt_accuracy.prompt_accuracy(columns, seeds=3)["all four"]
        change = prompt_accuracy.paired_difference(hits.reshape(-1), others.reshape(-1), seeds=3)
        found.append([lone.interval(), clustered.interval(), change[1]])
    lows, highs = np.moveaxis(np.asarray(found), -1, 0)
    truth = np.asarray([0.7, 0.7, 0])
    lone, clustered, change = ((lows <= truth) & (highs >= truth)).mean(0)
    least = 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5
    assert clustered > least
    assert change > least
    assert lone < 0.88, "videos of one prompt taken for independent"


def test_independent_draws_lie_between_prompts_and_videos():
    rng = np.random.default_rng(0)
    alike = np.tile(rng.random(40) < 0.5, 3)
    assert intervals.independent_draws(alike, 3) == pytest.approx(40, rel=0.02)
    assert intervals.independent_draws(np.ones(120), 3) == 40
    assert intervals.independent_draws(rng.random(12_000) < 0.5, 3) > 11_000
    assert intervals.independent_draws(rng.random(40) < 0.5, 1) == 40
