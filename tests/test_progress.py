"""What is said of long work: what compiles, where it is, how long the rest may take."""

import itertools

import pytest

from qvd_jax.progress import Estimate, Part, Progress

PLAN = [
    part
    for _ in range(3)
    for name in ("float", "int8")
    for part in (
        Part(name, "sampling", name, ticks=20, work=16),
        Part(name, "decoding", name, work=16, compilation=0.25),
    )
]


def seconds_of(plan):
    """Of each tick: int8 is faster, a decoding takes three steps and compiles five times faster."""
    compiled = set()
    for part in plan:
        decodes = part.task == "decoding"
        for _ in range(part.ticks):
            first = part.program not in compiled
            compiling = first * {"float": 15.0, "int8": 20.0}[part.subject] / (5 if decodes else 1)
            yield compiling + {"float": 0.5, "int8": 0.3}[part.subject] * (3 if decodes else 1)
            compiled.add(part.program)


def test_estimates_are_within_a_third_after_a_tenth_of_the_work():
    times = list(seconds_of(PLAN))
    estimate, checked = Estimate(PLAN), 0
    for done, seconds in enumerate(times[:-1], 1):
        estimate.add(seconds)
        if done >= len(times) / 10:
            checked += 1
            assert estimate.seconds_left() == pytest.approx(sum(times[done:]), rel=1 / 3)
    assert checked > 100


def test_compilation_counts_as_no_step():
    estimate = Estimate([Part("a", "a", ticks=10)])
    assert estimate.compiling
    estimate.add(100.0)
    assert not estimate.compiling
    assert estimate.seconds_left() is None
    estimate.add(1.0)
    assert estimate.seconds_left() == 8.0


def test_a_program_that_is_still_to_come_compiles_as_long_as_those_seen():
    plan = [Part("a", "a", size=size, ticks=ticks, work=size) for size, ticks in ((16, 4), (8, 2))]
    estimate = Estimate(plan)
    for seconds in (50.0, 2.0, 2.0, 2.0):
        estimate.add(seconds)
    assert estimate.compiling
    assert estimate.seconds_left() == pytest.approx(48 + 2 * 1)


def test_the_bar_says_model_step_and_time(capsys):
    plan = [
        Part("shapes", "sampling", ticks=3),
        Part("shapes, decoding", "decoding", compilation=0.25),
    ]
    ticks = itertools.accumulate([0.0, 60.0, 2.0, 2.0, 30.0])
    with Progress(plan, lambda: next(ticks)) as progress:
        for _ in range(4):
            progress.advance()
    shown = capsys.readouterr().err
    assert "| shapes, compiling" in shown
    assert "| shapes, decoding, compiling, about 00:16 left" in shown
    assert "100%|" in shown
    assert "| done in 01:34" in shown
    assert progress._text() == "done in 01:34"


def test_a_bar_of_any_work_ends_full(capsys):
    plan = [Part("a", "a", work=0.1 * number) for number in range(1, 30)]
    with Progress(plan) as progress:
        progress.advance(len(plan))
    assert "100%|" in capsys.readouterr().err


def test_a_bar_can_be_told_how_far_it_is():
    ticks = itertools.count()
    with Progress(
        [Part("a", "a", ticks=2), Part("b", "b", ticks=2)], lambda: next(ticks)
    ) as progress:
        progress.advance(3)
        assert progress._text() == "b, step 2 of 2, about 00:01 left"
