"""Training networks: one loop that goes on where it was killed, and its files."""

from captum_robust.training.images import LabelledImages
from captum_robust.training.loop import (
    TrainingResult,
    TrainingSettings,
    bare_module,
    fit,
)

__all__ = ["LabelledImages", "TrainingResult", "TrainingSettings", "bare_module", "fit"]
