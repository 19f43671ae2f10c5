"""Two pointing shapes: what is drawn is what is read back, and the judge counts what stays."""

import re

import numpy as np
import pytest

from qvd_jax.arrows import pixels, reader
from qvd_jax.arrows.judge import held_out_cases, hits_of
from qvd_jax.arrows.scenes import (
    ATTRIBUTES,
    HEADINGS,
    OBJECT,
    SHAPES,
    draw_scenes,
    objects_in,
    objects_of,
    title_of,
)
from qvd_jax.errors import InputError
from qvd_jax.evaluate import main as evaluate_command
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults

WANT = ImageToVideoDefaults(frames=16, height=64, width=64)


def render(count, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(rng, count, split)
    buckets = rng.integers(pixels.BUCKETS, size=count)
    return scenes, buckets, pixels.render(scenes, buckets, rng)


def test_the_reader_reads_what_was_drawn():
    scenes, buckets, videos = render(120)
    right = 0
    for sights, scene, bucket in zip(reader.read(videos), scenes, buckets, strict=True):
        right += {sight.object for sight in sights} == set(objects_in(scene)) and all(
            sight.motion == sight.object.heading
            and sight.travel == pytest.approx(0.25 + 0.55 * bucket / 255, rel=0.15)
            for sight in sights
        )
    assert right >= 118


def test_the_reader_does_not_guess():
    """Still shapes move nowhere, and on a ground alone there are none."""
    _, _, videos = render(8)
    for sights in reader.read(np.repeat(videos[:, :1], 16, axis=1)):
        assert [sight.motion for sight in sights] == [None, None]
    gray = np.random.default_rng(0).integers(80, 160, size=(1, 16, 64, 64, 1), dtype=np.uint8)
    assert reader.read(np.repeat(gray, 3, axis=-1)) == [[]]
    # Seen in half of the frames only, a shape is none that moves.
    blinking = np.where(np.arange(16)[:, None, None, None] % 2, videos, videos[:, :, :1, :1])
    assert all(sight.motion is None for sights in reader.read(blinking) for sight in sights)


def test_reversed_videos_move_against_where_they_point():
    _, _, videos = render(40)
    for sights in reader.read(videos[:, ::-1]):
        for sight in sights:
            there = HEADINGS.index(sight.object.heading)
            assert HEADINGS.index(sight.motion) == (there + 4) % 8


def test_a_quarter_turn_of_the_heading_turns_the_picture():
    shape, heading = np.indices((len(SHAPES), len(HEADINGS))).reshape(2, -1)
    center, radius = np.zeros((len(shape), 1, 2)), np.full(len(shape), 0.8)
    drawn = pixels.coverage(center, radius, shape, heading, 32)[:, 0]
    drawn = drawn.reshape(len(SHAPES), len(HEADINGS), 32, 32)
    clockwise = np.rot90(np.roll(drawn, -2, axis=1), axes=(2, 3))
    np.testing.assert_allclose(clockwise, drawn, atol=1e-4)
    # Those that point right are symmetric, and at their widest no further than their middle.
    np.testing.assert_allclose(drawn[:, 0, ::-1], drawn[:, 0], atol=1e-4)
    for right in drawn[:, 0] > 0.5:
        columns = np.flatnonzero(right.any(0))
        assert right.sum(0).argmax() <= columns.mean() + 1


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_edges_are_anti_aliased(shape):
    """Coverage summed over pixels equals the shape's area, whatever its place in the grid."""
    rng = np.random.default_rng(shape)
    inputs = rng.uniform(-0.3, 0.3, size=(8, 1, 2)), np.full(8, 0.32), np.full(8, shape)
    fine = pixels.coverage(*inputs, np.arange(8), 512).reshape(8, 64, 8, 64, 8).mean((2, 4))
    coarse = pixels.coverage(*inputs, np.arange(8), 64)[:, 0]
    assert np.abs(fine - coarse).max() < 0.4
    np.testing.assert_allclose(coarse.sum((1, 2)), fine.sum((1, 2)), rtol=0.04)


def test_shapes_begin_and_stay_inside_and_apart():
    scenes, buckets, _ = render(400)
    course = pixels._courses(scenes, buckets, np.random.default_rng(0), 16)
    assert (np.abs(course.center).max((2, 3)) + course.radius).max() <= 0.9801
    apart = np.linalg.norm(course.center[:, 0] - course.center[:, 1], axis=-1).min(1)
    assert (apart > course.radius.sum(1)).mean() > 0.99


def test_splits_share_every_pair_of_values_and_no_object():
    train, held_out = objects_of("train"), objects_of("held_out")
    rows = [set(map(tuple, split.tolist())) for split in (train, held_out)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == np.prod([len(values) for values in OBJECT.values()])
    sizes = [len(values) for values in OBJECT.values()]
    for i in range(3):
        assert len(np.unique(held_out[:, i])) == sizes[i]
        for j in range(i):
            assert len(np.unique(train[:, [i, j]], axis=0)) == sizes[i] * sizes[j]
    scenes = draw_scenes(np.random.default_rng(0), 500, "held_out")
    assert {tuple(o) for o in scenes[:, 2:].reshape(-1, 3).tolist()} <= rows[1]
    assert (scenes[:, 2] != scenes[:, 5]).all()
    for i, values in enumerate(ATTRIBUTES.values()):
        assert len(np.unique(scenes[:, i])) == len(values)


def test_clips_are_frames_in_a_row_of_one_scene():
    clips = pixels.draw_clips(np.random.default_rng(0), 6, 4, 64, "train")
    again = pixels.draw_clips(np.random.default_rng(0), 6, 4, 64, "train")
    np.testing.assert_array_equal(clips, again)
    assert clips.shape == (6, 4, 64, 64, 3)
    step = np.abs(np.diff(clips.astype(int), axis=1)).mean((2, 3, 4))
    whole = np.abs(clips[:, 3].astype(int) - clips[:, 0]).mean((1, 2, 3))
    assert (step.max(1) < whole).all()


def test_the_judge_counts_what_stays():
    cases = held_out_cases(8, seed=3, want=WANT)
    scenes, images = cases.judge.scenes, np.stack(cases.inputs)
    assert cases.titles == [title_of(scene) for scene in scenes]
    expected = [objects_in(scene) for scene in scenes]

    def share(videos):
        return hits_of(videos, images, expected, WANT.motion_bucket_id).mean(0).tolist()

    def moved(bucket, scenes=scenes):
        # The same draws as those of the images.
        rng = np.random.default_rng([3, 8])
        draw_scenes(rng, 8, "held_out")
        return pixels.render(scenes, np.full(8, bucket), rng)

    right = moved(WANT.motion_bucket_id)
    np.testing.assert_array_equal(right[:, 0], images)
    assert share(right) == [1, 1, 1, 1, 1]
    assert share(np.repeat(right[:, :1], 16, axis=1)) == [1, 1, 0, 1, 0]
    assert share(right[:, ::-1])[:3] == [1, 1, 0]
    assert share(moved(255))[:3] == [1, 1, 0]
    other = scenes.copy()
    other[:, [3, 6]] = (other[:, [3, 6]] + 1) % len(SHAPES)
    assert share(moved(WANT.motion_bucket_id, other))[:3] == [1, 0, 1]
    other = scenes.copy()
    other[:, 1] = (other[:, 1] + 1) % 4
    assert share(moved(WANT.motion_bucket_id, other)) == [1, 1, 1, 0, 0]
    other = scenes.copy()
    other[:, 2] = (other[:, 2] + 1) % 8
    assert share(moved(WANT.motion_bucket_id, other))[0] == 0


def test_the_judge_compares_candidates_with_the_reference():
    cases = held_out_cases(12, seed=0, want=WANT)
    rng = np.random.default_rng([0, 12])
    scenes = draw_scenes(rng, 12, "held_out")
    right = pixels.render(scenes, np.full(12, WANT.motion_bucket_id), rng)
    still = np.where(np.arange(12)[:, None, None, None, None] < 6, right, right[:, :1])
    videos = {"right": np.concatenate([right, right]), "half": np.concatenate([still, right])}
    found = cases.judge.figures(videos, 0)
    assert found["right"]["accuracy"]["all four"]["hits"] == 24
    assert found["half"]["accuracy"]["motion"]["hits"] == 18
    assert found["half"]["accuracy_change"]["value"] == -0.25
    low, high = found["half"]["accuracy_change"]["interval"]
    assert low < -0.25 < high
    assert found["half"]["flicker_real"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 32}, "arrows are drawn in squares; 32x64 is none"),
        ({"motion_bucket_id": 256}, "motion_bucket_id = 256: 0 to 255 are drawn"),
    ],
)
def test_what_cannot_be_drawn_is_named(change, message):
    want = ImageToVideoDefaults(**{"frames": 16, "height": 64, "width": 64, **change})
    with pytest.raises(InputError, match=message):
        held_out_cases(4, 0, want)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--scenes arrows shows images; .*shapes makes no videos from them"),
        (["--prompt", "an arrow"], "shows its own images; leave --image and prompts out"),
    ],
)
def test_scenes_are_refused_where_they_do_not_fit(tmp_path, capsys, more, message):
    asked = ["--reference", "shapes", "--scenes", "arrows", "--out", str(tmp_path / "out")]
    assert evaluate_command([*asked, *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
