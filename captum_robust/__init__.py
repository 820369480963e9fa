"""Attributions for Captum that place the object and hold under attack."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_robust.attr import (
        RISE,
        AdversarialLocalization,
        BallDetails,
        BallSettings,
        ClassActivationMap,
        Defended,
        Guided,
        IterativeMask,
        MaskDetails,
        MultiScale,
        PerceptualBallPerturbation,
        RealTimeMasking,
        RobustCAM,
        ScoreCAM,
        TopClasses,
    )
    from captum_robust.draw import overlay
    from captum_robust.show.locate import locate

__all__ = [
    "RISE",
    "AdversarialLocalization",
    "BallDetails",
    "BallSettings",
    "ClassActivationMap",
    "Defended",
    "Guided",
    "IterativeMask",
    "MaskDetails",
    "MultiScale",
    "PerceptualBallPerturbation",
    "RealTimeMasking",
    "RobustCAM",
    "ScoreCAM",
    "TopClasses",
    "__version__",
    "locate",
    "overlay",
]
_ELSEWHERE = {"locate": "captum_robust.show.locate", "overlay": "captum_robust.draw"}
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import what is named when it is first asked for: the command line's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "captum_robust.attr")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
