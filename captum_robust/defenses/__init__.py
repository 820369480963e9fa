"""Defences: input transforms, adversarial training, detection of attacks."""

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
from captum_robust.transforms.denoising import TotalVariation
from captum_robust.transforms.jpeg import JPEG
from captum_robust.transforms.pixels import (
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
from captum_robust.transforms.presets import PRESETS, default_transforms
from captum_robust.transforms.quilting import Quilting
from captum_robust.transforms.transform import Transform

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
