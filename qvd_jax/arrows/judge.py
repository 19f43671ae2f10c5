"""What arrows are judged by: whether videos of held-out images go on as these show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qvd_jax.arrows import pixels
from qvd_jax.arrows.reader import Sight, chroma_of, read
from qvd_jax.arrows.scenes import Object, draw_scenes, objects_in, title_of
from qvd_jax.errors import InputError
from qvd_jax.evaluation.cases import Cases, Figures
from qvd_jax.evaluation.intervals import Proportion, independent_draws, paired_difference
from qvd_jax.metrics import temporal
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults
from qvd_jax.pipelines.pipeline import VideoDefaults

COUNTED = ("color", "shape", "motion", "background", "all four")

# Of the travel a bucket stands for; rendered videos differ by 8%.
_TRAVEL_TOLERANCE = 0.25
# Mean difference of the ground's pixels from the image's, of 0 to 255.
_GROUND_TOLERANCE = 8.0
# Grounds have less chroma, inks more.
_GROUND_CHROMA = 40.0


def held_out_cases(count: int, seed: int, want: ImageToVideoDefaults) -> Cases:
    """First frames of scenes no model was trained on.

    Args:
      count: N.
      seed: of the scenes.
      want: frames, size and motion bucket of the videos.

    Raises:
      InputError: the videos are no squares, or the bucket is none of the scenes'.
    """
    if want.height != want.width:
        raise InputError(f"arrows are drawn in squares; {want.height}x{want.width} is none")
    if not 0 <= want.motion_bucket_id < pixels.BUCKETS:
        raise InputError(f"motion_bucket_id = {want.motion_bucket_id}: 0 to 255 are drawn")
    rng = np.random.default_rng([seed, count])
    scenes = draw_scenes(rng, count, "held_out")
    bucket = want.motion_bucket_id
    rendered = pixels.render(scenes, np.full(count, bucket), rng, want.frames, want.height)
    titles = [title_of(scene) for scene in scenes]
    judge = ArrowsJudge(scenes, rendered[:, 0], bucket, want.frames)
    return Cases([*rendered[:, 0]], titles, {"motion_bucket_id": bucket}, judge)


@dataclass(frozen=True)
class ArrowsJudge:
    """Whether what an image shows stays, and moves where it points, as far as it was told.

    Attributes:
      scenes: what each image shows, `[J, 8]`.
      images: uint8 `[J, H, W, 3]`.
      bucket: how much motion was asked for.
      frames: F of the videos.
    """

    scenes: np.ndarray
    images: np.ndarray
    bucket: int
    frames: int

    # An interval needs two videos.
    least_cases = 2

    def check(self, want: VideoDefaults) -> None:
        """Nothing: scenes are rendered as the videos are wanted."""

    def real(self, count: int, seed: int) -> np.ndarray:
        """Rendered videos of other held-out scenes, uint8 `[count, F, H, W, 3]`."""
        rng = np.random.default_rng([seed, 0])
        scenes, buckets = draw_scenes(rng, count, "held_out"), np.full(count, self.bucket)
        return pixels.render(scenes, buckets, rng, self.frames, self.images.shape[1])

    def figures(self, videos: Mapping[str, np.ndarray], seed: int) -> dict[str, Figures]:
        """What each model's videos show, beside the first's and beside rendered ones.

        Args:
          videos: uint8 `[N, F, H, W, 3]` of each, all images once for each of N / J seeds.
          seed: of the rendered videos.
        """
        reference = next(iter(videos))
        count, frames, height = videos[reference].shape[:3]
        seeds = count // len(self.scenes)
        expected = seeds * [objects_in(scene) for scene in self.scenes]
        images = np.concatenate(seeds * [self.images])
        buckets = np.full(len(self.scenes), self.bucket)
        rng = np.random.default_rng(seed)
        rendered = pixels.render(self.scenes, buckets, rng, frames, height)
        hits = {name: hits_of(v, images, expected, self.bucket) for name, v in videos.items()}
        found: dict[str, Figures] = {}
        for name, right in hits.items():
            found[name] = {
                "accuracy": _accuracy(right, seeds),
                "flicker_real": float(temporal.flicker(rendered).mean()),
            }
            if name != reference:
                change = paired_difference(hits[reference][:, -1], right[:, -1], seeds)
                found[name]["accuracy_change"] = dict(
                    zip(("value", "interval"), change, strict=True)
                )
        return found


def hits_of(
    videos: np.ndarray,
    images: np.ndarray,
    expected: Sequence[tuple[Object, Object]],
    bucket: int,
) -> np.ndarray:
    """Which videos show what was expected.

    Args:
      videos: uint8 `[N, F, H, W, 3]`.
      images: which they begin with, uint8 `[N, H, W, 3]`.
      expected: the objects of each.
      bucket: how much motion was asked for.

    Returns:
      bool `[N, 5]`, a column for each of `COUNTED`: both colors stay, both shapes stay and point
      where they did, both move where they point and as far as the bucket says, the ground stays.
    """
    if not len(videos) == len(images) == len(expected):
        raise ValueError(f"{len(videos)} videos, {len(images)} images, {len(expected)} scenes")
    right = [
        (*_objects_stay(sights, objects, bucket), _ground_stays(video, image))
        for sights, objects, video, image in zip(
            read(videos), expected, videos, images, strict=True
        )
    ]
    return np.array([(*parts, all(parts)) for parts in right])


def _objects_stay(
    sights: Sequence[Sight], expected: Sequence[Object], bucket: int
) -> tuple[bool, bool, bool]:
    """Whether the colors, the shapes and the motions are the expected ones."""
    seen = {sight.object.color: sight for sight in sights}
    if set(seen) != {wanted.color for wanted in expected}:
        return False, False, False
    travel = pixels.travel_of(np.asarray(bucket))
    pairs = [(seen[wanted.color], wanted) for wanted in expected]
    shapes = all(sight.object == wanted for sight, wanted in pairs)
    motions = all(
        sight.motion == wanted.heading and abs(sight.travel - travel) < _TRAVEL_TOLERANCE * travel
        for sight, wanted in pairs
    )
    return True, shapes, motions


def _ground_stays(video: np.ndarray, image: np.ndarray) -> bool:
    """Whether each frame shows the image's ground where both show ground."""
    shown, first = video.astype(np.float32), image.astype(np.float32)
    is_ground = np.linalg.norm(chroma_of(shown), axis=-1) < _GROUND_CHROMA
    is_ground &= np.linalg.norm(chroma_of(first), axis=-1) < _GROUND_CHROMA
    difference = np.abs(shown - first).mean(-1)
    # Half of the picture at least: two shapes cover less, and what is no ground counts nowhere.
    enough = is_ground.mean((1, 2)) > 0.5
    mean = (difference * is_ground).sum((1, 2)) / np.maximum(is_ground.sum((1, 2)), 1)
    return bool((enough & (mean < _GROUND_TOLERANCE)).all())


def _accuracy(hits: np.ndarray, seeds: int) -> Figures:
    found = {}
    for name, column in zip(COUNTED, hits.T, strict=True):
        share = Proportion(int(column.sum()), len(column), independent_draws(column, seeds))
        found[name] = {"hits": share.hits, "value": share.value, "interval": share.interval()}
    return found
