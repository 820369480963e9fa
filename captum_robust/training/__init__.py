"""Training networks: one loop that goes on where it was killed, its files, and whole recipes."""

# ruff: noqa: F403, F405 (mypy knows what the stars stand for, and __all__ says what is public)

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_robust.training.clean import *
    from captum_robust.training.denoiser_training import *
    from captum_robust.training.denoising_recipe import *
    from captum_robust.training.image_sets import *
    from captum_robust.training.localization import *
    from captum_robust.training.localization_evaluation import *
    from captum_robust.training.localization_recipe import *
    from captum_robust.training.loop import *
    from captum_robust.training.masking import *
    from captum_robust.training.masking_recipe import *
    from captum_robust.training.robust_recipe import *
    from captum_robust.training.settings import *

__all__ = [
    "AreaPenalty",
    "Augmented",
    "CollapseWatch",
    "CroppedImages",
    "DenoisingEvaluation",
    "DenoisingLoss",
    "DenoisingRecipe",
    "DenoisingSettings",
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
    "denoising_training",
    "fit",
    "held_out_split",
    "localization_training",
    "masking_training",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for; the settings come first, as they need no torch."""
    if name in __all__:
        for module in ("settings", *(m.name for m in iter_modules(__path__))):
            content = vars(import_module(f"{__name__}.{module}"))
            if name in content:
                return content[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
