"""What moving shapes are judged by: held-out scenes, whether they are seen, how real they look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qvd_jax.errors import InputError
from qvd_jax.evaluation.cases import Cases, Figures
from qvd_jax.evaluation.intervals import (
    Proportion,
    frechet_ratio,
    independent_draws,
    paired_difference,
)
from qvd_jax.metrics import temporal
from qvd_jax.metrics.frechet import frechet_distance
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.shapes import pixels, reader
from qvd_jax.shapes.classifier import Classifier, load_classifier, video_features
from qvd_jax.shapes.prompts import prompt_of
from qvd_jax.shapes.scenes import Description, description_of, scenes_of

COUNTED = (*Description._fields, "all four")


def asks_for_shapes(prompts: Sequence[str]) -> bool:
    """Whether these example prompts are those of a model of moving shapes."""
    plain = {prompt_of(scene) for scene in scenes_of("held_out")}
    return bool(prompts) and plain.issuperset(prompts)


def held_out_cases(count: int, seed: int) -> Cases:
    """Scenes no model was trained on, each once before any twice, in random phrasings."""
    rng = np.random.default_rng([seed, count])
    held_out = scenes_of("held_out")
    rounds = [held_out[rng.permutation(len(held_out))] for _ in range(-(-count // len(held_out)))]
    scenes = np.concatenate(rounds)[:count]
    prompts = [prompt_of(scene, rng) for scene in scenes]
    return Cases(prompts, judge=ShapesJudge(scenes, load_classifier()))


@dataclass(frozen=True)
class ShapesJudge:
    """Prompt accuracy and Frechet distance, which only moving shapes have.

    Attributes:
      scenes: what each prompt asks for, `[J, 5]`.
      classifier: whose features are compared.
    """

    scenes: np.ndarray
    classifier: Classifier

    # A distance needs two videos, an interval one more, which is left out.
    least_cases = 3

    def check(self, want: VideoDefaults) -> None:
        """Raises `InputError` if the classifier reads videos of another size or length."""
        config, _ = self.classifier
        if (want.frames, want.height, want.width) != (config.frames, *2 * (config.size,)):
            raise InputError(
                f"held-out prompts are evaluated with {config.frames} frames of "
                f"{config.size}x{config.size}; pass --prompts-file FILE for others"
            )

    def real(self, count: int, seed: int) -> np.ndarray:
        """Rendered videos, uint8 `[count, F, H, W, 3]`."""
        return rendered_videos(count, seed, 0)

    def figures(self, videos: Mapping[str, np.ndarray], seed: int) -> dict[str, Figures]:
        """What each model's videos show, beside the first's and beside rendered ones.

        Args:
          videos: uint8 `[N, F, H, W, 3]` of each, all scenes once for each of N / J seeds.
          seed: of the rendered videos.
        """
        count = len(next(iter(videos.values())))
        rendered = [rendered_videos(count, seed, part) for part in range(2)]
        real = [video_features(*self.classifier, shown) for shown in rendered]
        seeds = count // len(self.scenes)
        expected = seeds * [description_of(scene) for scene in self.scenes]
        hits = {name: prompt_hits(shown, expected) for name, shown in videos.items()}
        features = {name: video_features(*self.classifier, v) for name, v in videos.items()}
        reference = next(iter(videos))
        found: dict[str, Figures] = {}
        for name in videos:
            found[name] = {
                "accuracy": {
                    what: {"hits": p.hits, "value": p.value, "interval": p.interval()}
                    for what, p in prompt_accuracy(hits[name], seeds).items()
                },
                "frechet": frechet_distance(features[name], real[0]),
                "frechet_real": frechet_distance(real[1], real[0]),
                "flicker_real": float(temporal.flicker(rendered[0]).mean()),
            }
            if name != reference:
                change = paired_difference(hits[reference][:, -1], hits[name][:, -1], seeds)
                ratio = frechet_ratio(features[reference], features[name], real[0], seeds)
                for what, (value, interval) in (
                    ("accuracy_change", change),
                    ("frechet_ratio", ratio),
                ):
                    found[name][what] = {"value": value, "interval": interval}
        return found


def rendered_videos(count: int, seed: int, part: int) -> np.ndarray:
    """Videos of held-out scenes as they should be, of other draws than the prompts'.

    Args:
      count: N.
      seed: of the draws.
      part: which of several sets of a seed.
    """
    rng = np.random.default_rng([seed, part])
    held_out = scenes_of("held_out")
    return pixels.render(held_out[rng.integers(len(held_out), size=count)], rng)


def prompt_hits(videos: np.ndarray, expected: Sequence[Description]) -> np.ndarray:
    """Which videos show what was expected.

    Args:
      videos: uint8 `[N, F, H, W, 3]`.
      expected: one for each.

    Returns:
      bool `[N, 5]`, a column for each of `COUNTED`.
    """
    if len(videos) != len(expected) or not len(videos):
        raise ValueError(f"{len(videos)} videos for {len(expected)} descriptions")
    right = np.array(
        [
            [a == b for a, b in zip(found, wanted, strict=True)]
            for found, wanted in zip(reader.read(videos), expected, strict=True)
        ]
    )
    return np.concatenate([right, right.all(1, keepdims=True)], axis=1)


def prompt_accuracy(hits: np.ndarray, seeds: int = 1) -> dict[str, Proportion]:
    """The share of hits of each of `COUNTED`.

    Args:
      hits: from `prompt_hits`, seed by seed.
      seeds: of each prompt.
    """
    return {
        name: Proportion(int(column.sum()), len(column), independent_draws(column, seeds))
        for name, column in zip(COUNTED, hits.T, strict=True)
    }
