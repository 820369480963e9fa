"""Defences: input transforms, adversarial training, detection of attacks."""

from captum_robust import transforms
from captum_robust.defenses.adaptive_attack import DefendedModel, adaptive_attack
from captum_robust.defenses.detection import SafetyNet
from captum_robust.defenses.roc import ROC
from captum_robust.training.adversarial import (
    EnsembleLoss,
    InnerAttack,
    MadryLoss,
    RobustAccuracy,
    adversarial_training,
    standard_loss,
)
from captum_robust.transforms import *  # noqa: F403

__all__ = [
    "ROC",
    "DefendedModel",
    "EnsembleLoss",
    "InnerAttack",
    "MadryLoss",
    "RobustAccuracy",
    "SafetyNet",
    "adaptive_attack",
    "adversarial_training",
    "standard_loss",
]
__all__ += transforms.__all__
