"""Training networks: one loop that goes on where it was killed, its files, and whole recipes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from captum_robust.training.localization_recipe import LocalizationRecipe
    from captum_robust.training.loop import (
        TrainingResult,
        bare_module,
        fit,
    )
    from captum_robust.training.masking import (
        MaskingEvaluation,
        MaskingLoss,
        masking_training,
        warm_up,
    )
    from captum_robust.training.masking_recipe import MaskingRecipe
    from captum_robust.training.robust_recipe import RobustRecipe
    from captum_robust.training.settings import (
        LocalizationSettings,
        MaskingSettings,
        RobustSettings,
        TrainingSettings,
    )

__all__ = [
    "AreaPenalty",
    "Augmented",
    "CollapseWatch",
    "CroppedImages",
    "LabelledImages",
    "LocalizationEvaluation",
    "LocalizationRecipe",
    "LocalizationSettings",
    "MaskingEvaluation",
    "MaskingLoss",
    "MaskingRecipe",
    "MaskingSettings",
    "RobustRecipe",
    "RobustSettings",
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

_MODULES = (
    "settings",
    "loop",
    "image_sets",
    "clean",
    "masking",
    "localization",
    "localization_evaluation",
    "robust_recipe",
    "masking_recipe",
    "localization_recipe",
)


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: settings alone need no torch."""
    if name in __all__:
        for module in _MODULES:
            content = vars(import_module(f"{__name__}.{module}"))
            if name in content:
                return content[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
