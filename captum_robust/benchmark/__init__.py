"""Comparison of attribution methods over a data set."""

from captum_robust.benchmark.compare import compare
from captum_robust.benchmark.comparison import Comparison
from captum_robust.benchmark.methods import BASELINES, METHODS

__all__ = ["BASELINES", "METHODS", "Comparison", "compare"]
