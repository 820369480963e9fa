"""Comparison of attribution methods over a data set, and of a model's robustness to attacks."""

from captum_robust.benchmark.adversarial import AttackRun, attack_images
from captum_robust.benchmark.attacks import ATTACKS, AttackOptions, build_attacks
from captum_robust.benchmark.compare import compare
from captum_robust.benchmark.comparison import Comparison
from captum_robust.benchmark.methods import BASELINES, METHODS
from captum_robust.benchmark.plots import plot_robust_accuracy
from captum_robust.benchmark.robustness import AttackSummary, robust_accuracy, summarize_attack

__all__ = [
    "ATTACKS",
    "BASELINES",
    "METHODS",
    "AttackOptions",
    "AttackRun",
    "AttackSummary",
    "Comparison",
    "attack_images",
    "build_attacks",
    "compare",
    "plot_robust_accuracy",
    "robust_accuracy",
    "summarize_attack",
]
