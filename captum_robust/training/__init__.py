"""Training networks: one loop that goes on where it was killed, and its files."""

from captum_robust.training.images import (
    Augmented,
    CroppedImages,
    LabelledImages,
    held_out_split,
)
from captum_robust.training.loop import (
    TrainingResult,
    TrainingSettings,
    bare_module,
    fit,
)

__all__ = [
    "Augmented",
    "CroppedImages",
    "LabelledImages",
    "TrainingResult",
    "TrainingSettings",
    "bare_module",
    "fit",
    "held_out_split",
]
