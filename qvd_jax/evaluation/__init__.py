"""Evaluation: models sample the same inputs from the same noise, and figures tell them apart.

Example:
    models = {name: qvd_jax.load(name) for name in ("shapes", "shapes-w8a8")}
    comparison = evaluation.compare(models, evaluation.Cases(["a red circle", "a blue square"]))
    print(evaluation.write_comparison(comparison, Path("results")))

Videos that were sampled elsewhere, or lie in arrays, are measured by `compare_videos`.
"""

from qvd_jax.evaluation.cases import Cases, Judge
from qvd_jax.evaluation.distances import Distance, Estimate
from qvd_jax.evaluation.generated import compare_generated
from qvd_jax.evaluation.page import write_calibration, write_comparison
from qvd_jax.evaluation.pairs import Comparison, compare
from qvd_jax.evaluation.sets import Measures, VideoComparison, VideoFigures, compare_videos

__all__ = [
    "Cases",
    "Comparison",
    "Distance",
    "Estimate",
    "Judge",
    "Measures",
    "VideoComparison",
    "VideoFigures",
    "compare",
    "compare_generated",
    "compare_videos",
    "write_calibration",
    "write_comparison",
]
