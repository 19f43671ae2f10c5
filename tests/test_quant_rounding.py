"""GPTQ against the paper's algorithm written otherwise, and what it is worth."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from qvd_jax.quant import rounding
from qvd_jax.quant.codec import quantize_weights
from qvd_jax.quant.policy import LayerSpec
from qvd_jax.quant.solve import find_quantizer, needs_quantizer, solve_layer
from qvd_jax.quant.statistics import Statistics

ROWS, INPUTS, OUTPUTS = 200, 150, 12  # Inputs fill more than one block, and not two.


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of inputs that vary together, far from zero mean, and weights."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(ROWS, 20)) @ rng.normal(size=(20, INPUTS))
    rows += 0.3 * rng.normal(size=rows.shape) + rng.normal(size=INPUTS)
    return rows.astype(np.float32), rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)


def codes_one_by_one(
    weights: np.ndarray, scale: np.ndarray, rows: np.ndarray, bits: int
) -> np.ndarray:
    """Algorithm 1 in float64 without blocks; what is left is solved anew after each input.

    With inputs k and before fixed, the least of e^T H e over the others' changes d is where
    H_jj d_j = -H_jk e_k.
    """
    centered = np.float64(rows) - np.float64(rows).mean(0)
    gram = centered.T @ centered / len(rows)
    order = np.argsort(-np.diag(gram), kind="stable")
    gram += rounding.DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    limit = 2 ** (bits - 1) - 1
    left, codes = np.float64(weights) / scale, np.zeros(weights.shape, np.int64)
    for place, k in enumerate(order):
        codes[k] = np.clip(np.round(left[k]), -limit, limit)
        behind = order[place + 1 :]
        if len(behind):
            moved = linalg.solve(gram[np.ix_(behind, behind)], gram[behind, k], assume_a="pos")
            left[behind] += moved[:, None] * (left[k] - codes[k])
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_papers_algorithm(bits):
    rows, weights = case()
    _, scale = quantize_weights(jnp.asarray(weights), bits)
    steps = scale.astype(jnp.float32)
    found = rounding.round_weights(jnp.asarray(weights), steps, jnp.asarray(rows), bits)
    expected = codes_one_by_one(weights, np.asarray(steps, np.float64), rows, bits)
    # A weight halfway between two codes may fall to either, and moves those behind it.
    assert (np.asarray(found) != expected).mean() < 0.01


def test_groups_of_many_inputs_are_rounded_apart(monkeypatch):
    rows, weights = map(jnp.asarray, case())
    steps = jnp.ones(OUTPUTS) / 4
    monkeypatch.setattr(rounding, "_LARGEST", 75)
    found = rounding.round_weights(weights, steps, rows, 4)
    for part in (slice(0, 75), slice(75, 150)):
        alone = rounding.round_weights(weights[part], steps, rows[:, part], 4)
        np.testing.assert_array_equal(found[part], alone)


@pytest.mark.parametrize("rows", [np.zeros((5, INPUTS)), np.ones((1, INPUTS)), case()[0][:3]])
def test_few_rows_and_dead_inputs_leave_codes_that_are_near(rows):
    """A Gram matrix of no rank changes nothing, one of low rank nothing across it."""
    weights = case()[1]
    codes, scale = quantize_weights(jnp.asarray(weights), 4)
    seen = jnp.asarray(rows, jnp.float32)
    found = rounding.round_weights(jnp.asarray(weights), scale.astype(jnp.float32), seen, 4)
    centered = rows - rows.mean(0)
    if not centered.any():
        np.testing.assert_array_equal(found, codes)
    errors = [
        np.square(centered @ (np.asarray(c, np.float64) * np.asarray(scale, np.float64) - weights))
        for c in (found, codes)
    ]
    assert errors[0].sum() <= errors[1].sum()


@pytest.mark.parametrize(
    ("method", "bits", "least"),
    [("scri", (4, 8), 6), ("qdiffusion", (4, 8), 6), ("scri", (3, 8), 6), ("minmax", (4, 16), 6),
     ("scri", (8, 8), 0.5)],
)  # fmt: skip
def test_a_layer_gains_on_rows_it_has_not_seen(method, bits, least):
    """In decibels, of inputs of the same kind as those seen."""
    weights, errors = case()[1], []
    mixing = np.random.default_rng(5).normal(size=(20, INPUTS))

    def inputs(count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(count, 20)) @ mixing + 0.3 * rng.normal(size=(count, INPUTS))
        return (x + 2).astype(np.float32)

    seen, other = inputs(1000, 1), inputs(500, 2)
    rows = jnp.asarray(seen)[:, None]
    finite = jnp.asarray(True)
    # Ranges are of all values, as calibration finds them, and rows of some.
    values = np.concatenate([seen, other])
    statistics = Statistics(jnp.asarray(values.min(0)), jnp.asarray(values.max(0)), rows, finite)
    for how in ("nearest", "gptq"):
        spec = replace(LayerSpec(method, *bits), rounding=how)
        quantizer = None
        if needs_quantizer(spec):
            quantizer = find_quantizer(statistics, [jnp.asarray(weights)], spec)
        record, _ = solve_layer("layer", {"kernel": weights}, statistics, spec, quantizer)
        values = jnp.asarray(other)
        if quantizer is not None:
            values = jnp.round(record.steps(values, spec))
        kernel, scale, bias = (np.float64(part) for part in record[:3])
        found = np.float64(values) @ kernel.T * scale + bias
        errors.append(np.square(found - other @ np.float64(weights)).mean())
    assert 10 * np.log10(errors[0] / errors[1]) > least


def test_what_rounding_spares_foretells_its_error():
    """The mean square is a twelfth of a step's for each input, times that, damping counted."""
    rows, weights = case()
    spared = rounding.spared(jnp.asarray(rows))
    scale = np.full(OUTPUTS, 0.05, np.float32)
    codes = rounding.round_weights(jnp.asarray(weights), jnp.asarray(scale), jnp.asarray(rows), 8)
    centered = np.float64(rows) - np.float64(rows).mean(0)
    gram = centered.T @ centered / len(rows)
    missed = np.float64(codes) * scale - weights
    damping = rounding.DAMPING * np.diag(gram).mean() * np.square(missed).sum(0).mean()
    expected = float(spared.sum()) * scale[0] ** 2 / 12
    assert np.square(centered @ missed).mean() + damping == pytest.approx(expected, rel=0.1)
    # In float64, otherwise: the variance of each beside all that are rounded after it.
    order = np.argsort(-np.diag(gram), kind="stable")
    gram += rounding.DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    for place in (0, 3, len(order) - 1):
        k, behind = order[place], order[place + 1 :]
        left = gram[k, k]
        if len(behind):
            left -= gram[k, behind] @ linalg.solve(gram[np.ix_(behind, behind)], gram[behind, k])
        assert float(spared[k]) == pytest.approx(left, rel=1e-2)


def test_weights_are_clipped_where_their_error_is_least_once_rounded():
    """Each output at the share that is best for it alone, one share being tried after the other."""
    rows, weights = (jnp.asarray(part) for part in case())
    weights = weights.at[0].mul(4)
    exact = rows @ weights
    clips = (1.0, 0.8, 0.6)
    codes, scale = rounding.clip_and_round(weights, rows, exact, 3, clips=clips)
    least = np.full(OUTPUTS, np.inf)
    for clip in clips:
        alone, step = rounding.clip_and_round(weights, rows, exact, 3, clips=(clip,))
        least = np.minimum(
            least, np.var(rows @ alone.astype(jnp.float32) * step[None] - exact, axis=0)
        )
    found = np.var(rows @ codes.astype(jnp.float32) * scale[None] - exact, axis=0)
    np.testing.assert_allclose(found, least, rtol=1e-4)
    assert (found < 0.99 * np.var(rows @ clip_free(weights, rows, exact) - exact, axis=0)).any()


def clip_free(weights: jnp.ndarray, rows: jnp.ndarray, exact: jnp.ndarray) -> jnp.ndarray:
    codes, scale = rounding.clip_and_round(weights, rows, exact, 3, clips=(1.0,))
    return codes.astype(jnp.float32) * scale[None]
