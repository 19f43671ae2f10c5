"""Videos that somebody else sampled, beside each other and beside real ones."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from qvd_jax.environment import environment
from qvd_jax.evaluation.pairs import Comparison
from qvd_jax.evaluation.sets import REAL, Measures, check_sources, compare_videos
from qvd_jax.evaluation.videos import Source, VideoSet

_SHOWN = 12


def compare_generated(
    sources: Mapping[str, Source],
    measures: Measures,
    real: Source | None = None,
    prompts: Sequence[str] = (),
) -> Comparison:
    """Measures videos from arrays or folders, and gives what a page of them needs.

    Args:
      sources: by name; the first is what the others are compared with.
      measures: what is measured.
      real: the videos that FVD is taken to.
      prompts: of the videos in the order of their names, for CLIP's score.

    Raises:
      InputError: as of `compare_videos`.
    """
    sets, beside = check_sources(sources, measures, real=real)
    found = compare_videos(
        {videos.name: videos for videos in sets},
        measures,
        real=beside.get(REAL),
        prompts=prompts,
    )
    models = [{"name": model.name, **model.figures()} for model in found.models]
    models[0] |= found.floors()
    results = {
        **environment(),
        "backend": jax.default_backend(),
        "prompts": len(sets[0]),
        "inputs": "videos",
        "seeds": 1,
        "notes": list(found.notes),
        "models": models,
    }
    shown = _shown(sets)
    titles = list(sets[0].names[:_SHOWN])
    return Comparison(results, shown, titles, {videos.name: [] for videos in sets})


def _shown(sets: Sequence[VideoSet]) -> dict[str, np.ndarray]:
    """The first videos of each set, `[N, F, H, W, 3]`; none where their shapes differ."""
    count = min(_SHOWN, *map(len, sets))
    if len({shape for videos in sets for shape in videos.shapes[:count]}) > 1:
        return {}
    return {videos.name: np.stack([videos.read(i) for i in range(count)]) for videos in sets}
