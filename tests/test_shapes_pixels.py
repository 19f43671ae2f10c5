"""The procedural videos: what is drawn is what the prompt says and what is read back."""

from collections import Counter

import numpy as np
import pytest

from qvd_jax.shapes import pixels, reader
from qvd_jax.shapes.prompts import prompt_of, words
from qvd_jax.shapes.scenes import ATTRIBUTES, Description, description_of, scenes_of


def sample(count, seed=0):
    every = np.concatenate([scenes_of(split) for split in ("train", "held_out")])
    return every[np.random.default_rng(seed).integers(len(every), size=count)]


@pytest.mark.slow
def test_the_reader_reads_99_percent_of_5000_videos_exactly():
    scenes, rng = sample(5000), np.random.default_rng(1)
    right = 0
    for chunk in np.split(scenes, 50):
        found = reader.read(pixels.render(chunk, rng))
        right += sum(a == description_of(b) for a, b in zip(found, chunk, strict=True))
    assert right >= 0.99 * len(scenes)


def test_the_reader_reads_what_was_drawn():
    scenes = sample(200)
    videos = pixels.render(scenes, np.random.default_rng(1))
    expected = [description_of(scene) for scene in scenes]
    assert sum(a == b for a, b in zip(reader.read(videos), expected, strict=True)) >= 198


def test_the_reader_does_not_guess():
    """A still shape moves nowhere, an empty frame shows nothing, noise has no color of ours."""
    scenes = sample(8)
    still = np.repeat(pixels.render(scenes, np.random.default_rng(0))[:, 8:9], 16, axis=1)
    assert all(found.motion is None for found in reader.read(still))
    empty = np.full((1, 16, 64, 64, 3), 250, np.uint8)
    assert reader.read(empty) == [Description(None, None, None, "white")]


def test_reversed_videos_move_the_other_way():
    opposite = {"left": "right", "up": "down", "clockwise": "counterclockwise"}
    opposite |= {"growing": "shrinking", "up left": "down right", "up right": "down left"}
    opposite |= {b: a for a, b in opposite.items()} | {"bouncing": "bouncing"}
    scenes = sample(60)
    videos = pixels.render(scenes, np.random.default_rng(2))
    for found, scene in zip(reader.read(videos[:, ::-1]), scenes, strict=True):
        assert found.motion == opposite[description_of(scene).motion]


def test_videos_repeat_with_the_seed_and_differ_without():
    scenes = sample(6)
    first, again, other = (pixels.render(scenes, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", range(len(ATTRIBUTES["shape"])))
def test_edges_are_anti_aliased(shape):
    """Coverage summed over pixels equals the shape's area, whatever its place in the grid."""
    scenes = np.tile([1, 0, shape, 0, 1], (4, 1))
    fine = pixels.render(scenes, np.random.default_rng(0), frames=2, size=512)
    coarse = pixels.render(scenes, np.random.default_rng(0), frames=2, size=64)
    pooled = fine.reshape(4, 2, 64, 8, 64, 8, 3).astype(float).mean((3, 5))
    assert np.abs(pooled - coarse).max() < 0.35 * 255
    assert pooled.sum() == pytest.approx(coarse.sum(), rel=0.01)


def test_splits_share_every_value_and_no_scene():
    train, held_out = scenes_of("train"), scenes_of("held_out")
    rows = [set(map(tuple, split.tolist())) for split in (train, held_out)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == np.prod([len(v) for v in ATTRIBUTES.values()])
    for split in (train, held_out):
        assert all(len(np.unique(split[:, i])) == len(v) for i, v in enumerate(ATTRIBUTES.values()))
    # Each pair of values is trained on, so that a held-out scene is new only as a whole.
    for i in range(5):
        for j in range(i):
            assert len(np.unique(train[:, [i, j]], axis=0)) == len(np.unique(train[:, i])) * len(
                np.unique(train[:, j])
            )


def test_prompts_name_the_attributes_in_several_ways():
    scene = np.array([0, 0, 0, 0, 0])
    assert prompt_of(scene) == "a small red circle moving left on a white background"
    rng = np.random.default_rng(0)
    phrasings = Counter(prompt_of(scene, rng) for _ in range(200))
    assert len(phrasings) > 10
    known = set(words())
    assert "," in known
    for text in phrasings:
        assert {"small", "red", "circle", "left", "white"} <= set(text.replace(",", "").split())
        assert set(text.replace(",", " ,").split()) <= known
