"""Comparison of attribution methods over a data set, and of a model's robustness to attacks."""

from captum_robust.benchmark.attack_images import attack_images
from captum_robust.benchmark.compare import RunWarning, compare
from captum_robust.benchmark.robust_accuracy import robust_accuracy
from captum_robust.catalog.attacks import ATTACKS, AttackOptions, build_attacks
from captum_robust.catalog.certification import Certification
from captum_robust.catalog.methods import BASELINES, METHODS
from captum_robust.report.attack_run import AttackRun
from captum_robust.report.comparison import Comparison
from captum_robust.report.outcomes import AttackSummary, summarize_attack
from captum_robust.report.plots import plot_robust_accuracy

__all__ = [
    "ATTACKS",
    "BASELINES",
    "METHODS",
    "AttackOptions",
    "AttackRun",
    "AttackSummary",
    "Certification",
    "Comparison",
    "RunWarning",
    "attack_images",
    "build_attacks",
    "compare",
    "plot_robust_accuracy",
    "robust_accuracy",
    "summarize_attack",
]
