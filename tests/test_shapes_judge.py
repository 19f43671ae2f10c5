"""Held-out scenes are asked for, and what is seen of them is counted."""

import numpy as np
import pytest

from qvd_jax.shapes import pixels
from qvd_jax.shapes.classifier import load_classifier
from qvd_jax.shapes.judge import ShapesJudge, held_out_cases, prompt_accuracy, prompt_hits
from qvd_jax.shapes.scenes import description_of, scenes_of


def test_held_out_cases_ask_for_what_their_scenes_are():
    cases = held_out_cases(600, seed=1)
    assert len(set(map(tuple, cases.judge.scenes[:499].tolist()))) == 499
    train = set(map(tuple, scenes_of("train").tolist()))
    for text, scene in zip(cases.inputs, cases.judge.scenes, strict=True):
        assert tuple(scene.tolist()) not in train
        wanted = description_of(scene)
        assert all(word in text for word in (wanted.color, wanted.shape, wanted.background))


def test_shapes_are_counted_against_what_was_asked_for():
    """Rendered videos stand for a reference; for the candidate every other one is of another."""
    asked, other = np.split(scenes_of("held_out")[:48], 2)
    scenes = np.where(np.arange(24)[:, None] % 2, other, asked)
    videos = {
        name: pixels.render(of, np.random.default_rng(seed))
        for seed, (name, of) in enumerate((("right", asked), ("half", scenes)))
    }
    right, half = ShapesJudge(asked, load_classifier()).figures(videos, 0).values()
    assert right["accuracy"]["all four"]["hits"] == 24
    assert half["accuracy"]["all four"]["hits"] == 12
    assert half["accuracy_change"]["value"] == -0.5
    low, high = half["frechet_ratio"]["interval"]
    assert low < half["frechet_ratio"]["value"] < high
    assert right["frechet"] > 0
    assert right["frechet_real"] == half["frechet_real"] > 0


def test_prompt_accuracy_counts_each_attribute():
    scenes = scenes_of("held_out")[:10]
    shown = pixels.render(scenes, np.random.default_rng(0))
    expected = [description_of(scene) for scene in scenes]
    hits = prompt_hits(shown, expected)
    assert hits.shape == (10, 5)
    assert hits.all()
    expected[0] = expected[0]._replace(motion="nowhere")
    expected[1] = expected[1]._replace(color="ultraviolet")
    found = prompt_accuracy(prompt_hits(shown, expected))
    assert {name: p.hits for name, p in found.items()} == {
        "color": 9,
        "shape": 10,
        "motion": 9,
        "background": 10,
        "all four": 8,
    }
    with pytest.raises(ValueError, match="10 videos for 9 descriptions"):
        prompt_hits(shown, expected[1:])
