"""Metrics against formulas written otherwise."""

import math

import numpy as np
import pytest
from scipy import linalg

from qvd_jax.metrics import frechet, paired, temporal


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


def test_frechet_distance_of_singular_covariances_is_exact():
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2; rotated into many it stays the same."""
    rng = np.random.default_rng(0)
    # Fewer rows than columns, of which two alone vary.
    rotation = np.linalg.qr(rng.normal(size=(60, 60)))[0][:2]
    a, b = rng.normal(size=(20, 2)), rng.normal(size=(30, 2)) * (3, 0.001) + (1, 2)
    first = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T
    second = (b - b.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(b.T))).T
    first, second = first * (5, 2), second * (3, 1e-6) + (1, 2)
    expected = (5 - 3) ** 2 + (2 - 1e-6) ** 2 + 1 + 4
    found = frechet.frechet_distance(first @ rotation, second @ rotation)
    assert found == pytest.approx(expected, rel=1e-12)
    assert frechet.frechet_distance(first @ rotation, first @ rotation) == pytest.approx(
        0, abs=1e-9
    )


def test_frechet_distance_leaves_its_features_as_they_were():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(9, 3))
    before = a.copy()
    frechet.frechet_distance(a, b)
    np.testing.assert_array_equal(a, before)


@pytest.mark.parametrize("degrees_lost", [0, 1])
def test_covariances_are_divided_as_asked(degrees_lost):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))
    ca, cb = (np.cov(x, rowvar=False, ddof=degrees_lost) for x in (a, b))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2)
    expected += np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert frechet.frechet_distance(a, b, degrees_lost) == pytest.approx(expected, rel=1e-6)


def test_the_estimate_without_bias_is_near_the_distance_of_the_distributions():
    """Of Gaussians whose distance is known; the plain distance is far above it."""
    rng = np.random.default_rng(0)
    width, count = 20, 200
    true = 4.0
    plain, unbiased = [], []
    for _ in range(10):
        a, b = rng.normal(size=(count, width)), rng.normal(size=(count, width))
        b[:, 0] += 2
        plain.append(frechet.frechet_distance(a, b))
        places = rng.random(count), rng.random(count)
        unbiased.append(frechet.unbiased_frechet_distance(a, b, places))
    assert np.mean(plain) - true > 0.8
    assert abs(np.mean(unbiased) - true) < 0.4
    assert frechet.unbiased_frechet_distance(a[:4], b, (places[0][:4], places[1])) is None


def test_motion_is_the_mean_change():
    ramp = np.broadcast_to(
        (10 * np.arange(5, dtype=np.uint8))[None, :, None, None, None], (1, 5, 2, 2, 3)
    )
    np.testing.assert_allclose(temporal.motion(ramp), 10)
    np.testing.assert_allclose(temporal.motion(ramp[:, :1].repeat(3, 1)), 0)
    with pytest.raises(ValueError, match="1 frames have no difference; 2 are needed"):
        temporal.motion(ramp[:, :1])
