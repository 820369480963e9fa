"""Input transforms, which a defended classifier is shown images through."""

from captum_robust.transforms.denoising import TotalVariation
from captum_robust.transforms.filters import (
    BitDepth,
    GaussianBlur,
    GaussianNoise,
    Identity,
    MedianBlur,
)
from captum_robust.transforms.geometry import CropAndRescale, HorizontalFlip, Resize, crop_ensemble
from captum_robust.transforms.jpeg import JPEG
from captum_robust.transforms.presets import PRESETS, default_transforms
from captum_robust.transforms.quilting import Quilting
from captum_robust.transforms.transform import Transform

__all__ = [
    "JPEG",
    "PRESETS",
    "BitDepth",
    "CropAndRescale",
    "GaussianBlur",
    "GaussianNoise",
    "HorizontalFlip",
    "Identity",
    "MedianBlur",
    "Quilting",
    "Resize",
    "TotalVariation",
    "Transform",
    "crop_ensemble",
    "default_transforms",
]
