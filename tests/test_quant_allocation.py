"""How bits are shared out among layers, held to all choices there are."""

import itertools

import numpy as np
import pytest

from qvd_jax.quant.allocation import Option, total, widths_reaching, widths_within

WIDTHS = (2, 4, 8)


def instance(rng):
    """Four layers of three widths; errors mostly fall with bytes, not always, and may tie."""
    options = {}
    for layer in "abcd":
        taken = np.sort(rng.integers(1, 30, 3))
        errors = (
            rng.integers(1, 1000, 3)
            if rng.random() < 0.3
            else np.sort(rng.integers(1, 1000, 3))[::-1]
        )
        options[layer] = {
            bits: Option(int(size), float(error))
            for bits, size, error in zip(WIDTHS, taken, errors, strict=True)
        }
    return options


def every_choice(options):
    return [dict(zip(options, bits, strict=True)) for bits in itertools.product(WIDTHS, repeat=4)]


def largest_step(options, what):
    return max(
        abs(getattr(a, what) - getattr(b, what))
        for of_layer in options.values()
        for a, b in itertools.combinations(of_layer.values(), 2)
    )


@pytest.mark.parametrize("seed", range(40))
def test_choices_are_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    options = instance(rng)
    found = [total(options, widths) for widths in every_choice(options)]
    # Where bytes have a price, each layer chooses for itself: that is the optimum of its budget.
    price = float(rng.uniform(0, 60))
    alone = {
        layer: min(of, key=lambda bits: (of[bits].error + price * of[bits].bytes, of[bits].bytes))
        for layer, of in options.items()
    }
    asked = total(options, alone)
    assert total(options, widths_within(options, asked.bytes)).error == asked.error
    assert total(options, widths_reaching(options, asked.error)).bytes == asked.bytes
    assert asked.error == min(one.error for one in found if one.bytes <= asked.bytes)
    # Between these, what one step may miss.
    budget = int(rng.integers(min(one.bytes for one in found), max(one.bytes for one in found)))
    got = total(options, widths_within(options, budget))
    best = min(one.error for one in found if one.bytes <= budget)
    assert got.bytes <= budget
    assert best <= got.error < best + largest_step(options, "error")
    limit = float(rng.uniform(min(one.error for one in found), max(one.error for one in found)))
    got = total(options, widths_reaching(options, limit))
    fewest = min(one.bytes for one in found if one.error <= limit)
    assert got.error <= limit
    assert fewest <= got.bytes < fewest + largest_step(options, "bytes")


def test_what_no_choice_reaches_is_refused():
    options = {"a": {4: Option(10, 3.0), 8: Option(20, 1.0)}}
    assert widths_within(options, 10) == widths_reaching(options, 3.0) == {"a": 4}
    assert widths_within(options, 20) == widths_reaching(options, 1.0) == {"a": 8}
    with pytest.raises(ValueError, match="9 bytes: 10 are the least"):
        widths_within(options, 9)
    with pytest.raises(ValueError, match=r"an error of 0\.9: 1\.0 is the least"):
        widths_reaching(options, 0.9)
