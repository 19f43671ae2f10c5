"""Intervals against formulas written otherwise, and against how often they cover the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qvd_jax.evaluation import intervals
from qvd_jax.metrics.frechet import frechet_distance


@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_wilsons(counts):
    hits, trials = counts
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    found = intervals.Proportion(hits, trials, trials).interval()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_paired_difference_is_that_of_a_one_sample_t_interval_at_many_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.8, rng.random(4000) < 0.7
    mean, interval = intervals.paired_difference(a, b)
    found = stats.ttest_1samp(b.astype(float) - a, 0)
    assert mean == pytest.approx(b.mean() - a.mean())
    np.testing.assert_allclose(interval, found.confidence_interval(0.95), atol=2e-4)


def test_paired_difference_of_equal_answers_has_an_interval():
    alike = np.arange(128) < 120
    assert intervals.paired_difference(alike, alike)[0] == 0
    low, high = intervals.paired_difference(alike, alike)[1]
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
    value, (low, high) = intervals.frechet_ratio(reference, candidate, real, seeds)
    found, exact = (frechet_distance(x, real) for x in (candidate, reference))
    assert value == found / exact
    assert 0 < low <= value <= high
    assert intervals.frechet_ratio(reference, reference, real, seeds) == (1, (1, 1))


def test_intervals_of_frechet_ratios_cover_the_truth_as_often_as_they_say():
    """Distances of 8 and 2 to the unit normal; three dependent draws for each prompt."""
    rng = np.random.default_rng(0)
    real = 1.5**0.5 * np.asarray([[1, 0], [-1, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(np.cov(real, rowvar=False), np.eye(2), atol=1e-12)
    found = []
    for _ in range(150):
        reference, candidate = (toy_features(rng, shift, 30, 3) for shift in (1, 2))
        found.append(
            [intervals.frechet_ratio(reference, candidate, real, seeds)[1] for seeds in (3, 1)]
        )
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
        lone = intervals.Proportion(int(hits.sum()), 180, 180)
        draws = intervals.independent_draws(hits.reshape(-1), 3)
        clustered = intervals.Proportion(int(hits.sum()), 180, draws)
        change = intervals.paired_difference(hits.reshape(-1), others.reshape(-1), seeds=3)
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
