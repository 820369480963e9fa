"""Training networks: one loop that goes on where it was killed, and its files."""

from captum_robust.training.clean import clean_training
from captum_robust.training.image_sets import (
    Augmented,
    CroppedImages,
    LabelledImages,
    SegmentedImages,
    Unlabelled,
    held_out_split,
)
from captum_robust.training.localization import (
    AreaPenalty,
    CollapseWatch,
    localization_training,
)
from captum_robust.training.localization_evaluation import LocalizationEvaluation
from captum_robust.training.loop import (
    TrainingResult,
    TrainingSettings,
    bare_module,
    fit,
)
from captum_robust.training.masking import (
    MaskingEvaluation,
    MaskingLoss,
    masking_training,
    warm_up,
)

__all__ = [
    "AreaPenalty",
    "Augmented",
    "CollapseWatch",
    "CroppedImages",
    "LabelledImages",
    "LocalizationEvaluation",
    "MaskingEvaluation",
    "MaskingLoss",
    "SegmentedImages",
    "TrainingResult",
    "TrainingSettings",
    "Unlabelled",
    "bare_module",
    "clean_training",
    "fit",
    "held_out_split",
    "localization_training",
    "masking_training",
    "warm_up",
]
