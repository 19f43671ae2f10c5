"""Evaluation: models sample the same inputs from the same noise, and figures tell them apart.

Example:
    models = {name: qvd_jax.load(name) for name in ("shapes", "shapes-w8a8")}
    comparison = evaluation.compare(models, evaluation.Cases(["a red circle", "a blue square"]))
    print(evaluation.write_comparison(comparison, Path("results")))
"""

from qvd_jax.evaluation.cases import Cases, Judge
from qvd_jax.evaluation.page import write_calibration, write_comparison
from qvd_jax.evaluation.pairs import Comparison, compare

__all__ = ["Cases", "Comparison", "Judge", "compare", "write_calibration", "write_comparison"]
