"""Metrics of localization, faithfulness, stability and certificates as torchmetrics classes.

Each is a thin state on top of :mod:`captum_robust.metrics.functional`: ``update`` adds up what a
batch gives, ``compute`` reads the sum, and torchmetrics reduces the sums over the processes of a
distributed run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_robust.metrics.attribution_stability import AttributionStability
    from captum_robust.metrics.certified_scores import (
        CertifiedLocalizationError,
        CertifiedPointing,
        CertifiedShare,
    )
    from captum_robust.metrics.localization_error import LocalizationError
    from captum_robust.metrics.maxboxacc import MaxBoxAcc, MaxBoxAccV2
    from captum_robust.metrics.pixel_removal import (
        ROAD,
        Deletion,
        Infidelity,
        Insertion,
        ModelRandomization,
        Sensitivity,
    )
    from captum_robust.metrics.pointing_game import PointingGame
    from captum_robust.metrics.pxap import PxAP
    from captum_robust.metrics.saliency_metric import SaliencyMetric

__all__ = [
    "ROAD",
    "AttributionStability",
    "CertifiedLocalizationError",
    "CertifiedPointing",
    "CertifiedShare",
    "Deletion",
    "Infidelity",
    "Insertion",
    "LocalizationError",
    "MaxBoxAcc",
    "MaxBoxAccV2",
    "ModelRandomization",
    "PointingGame",
    "PxAP",
    "SaliencyMetric",
    "Sensitivity",
]

_MODULES = {
    "AttributionStability": "attribution_stability",
    "CertifiedLocalizationError": "certified_scores",
    "CertifiedPointing": "certified_scores",
    "CertifiedShare": "certified_scores",
    "Deletion": "pixel_removal",
    "Infidelity": "pixel_removal",
    "Insertion": "pixel_removal",
    "LocalizationError": "localization_error",
    "MaxBoxAcc": "maxboxacc",
    "MaxBoxAccV2": "maxboxacc",
    "ModelRandomization": "pixel_removal",
    "PointingGame": "pointing_game",
    "PxAP": "pxap",
    "ROAD": "pixel_removal",
    "SaliencyMetric": "saliency_metric",
    "Sensitivity": "pixel_removal",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first asked for: the functions do not need torchmetrics."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
