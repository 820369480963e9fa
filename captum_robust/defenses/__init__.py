"""Defences: input transforms, adversarial training, detection of attacks."""

from captum_robust._transform import Transform
from captum_robust.defenses.adaptive import DefendedModel, adaptive_attack
from captum_robust.defenses.adversarial_training import (
    EnsembleLoss,
    InnerAttack,
    MadryLoss,
    RobustAccuracy,
    adversarial_training,
    standard_loss,
)
from captum_robust.defenses.detection import SafetyNet
from captum_robust.defenses.jpeg import JPEG
from captum_robust.defenses.presets import PRESETS, default_transforms
from captum_robust.defenses.quilting import Quilting
from captum_robust.defenses.roc import ROC
from captum_robust.defenses.total_variation import TotalVariation
from captum_robust.defenses.transforms import (
    BitDepth,
    CropAndRescale,
    GaussianBlur,
    GaussianNoise,
    HorizontalFlip,
    Identity,
    MedianBlur,
    Resize,
    crop_ensemble,
)

__all__ = [
    "JPEG",
    "PRESETS",
    "ROC",
    "BitDepth",
    "CropAndRescale",
    "DefendedModel",
    "EnsembleLoss",
    "GaussianBlur",
    "GaussianNoise",
    "HorizontalFlip",
    "Identity",
    "InnerAttack",
    "MadryLoss",
    "MedianBlur",
    "Quilting",
    "Resize",
    "RobustAccuracy",
    "SafetyNet",
    "TotalVariation",
    "Transform",
    "adaptive_attack",
    "adversarial_training",
    "crop_ensemble",
    "default_transforms",
    "standard_loss",
]
