"""What a run measures on request, and with which settings."""

from __future__ import annotations

from typing import Any

from captum_robust.catalog.certification import Certification
from captum_robust.metrics import functional as metrics
from captum_robust.metrics.functional import REMOVAL_STEPS, SALIENCY_THRESHOLDS

REMOVAL = {"steps": REMOVAL_STEPS, "deletion_fill": "mean", "insertion_fill": "blur"}
SQUARES = {"squares": metrics.INFIDELITY_SQUARES, "fill": "mean", "seed": 0}
ROAD: dict[str, Any] = {"shares": [0.1, 0.3, 0.5, 0.7, 0.9], "noise": 0.01, "seed": 0}
STAGES: dict[str, Any] = {"stages": 3, "seed": 0}
NOISE: dict[str, Any] = {
    "radius": metrics.SENSITIVITY_RADIUS,
    "samples": metrics.SENSITIVITY_SAMPLES,
    "seed": 0,
}


def described_measures(
    saliency_metric: bool,
    faithfulness: bool,
    sensitivity: bool,
    randomization: bool,
    certify: Certification | None,
) -> dict[str, Any]:
    """Their settings; a run without one has no such entry, as those of earlier versions."""
    settings: dict[str, Any] = {}
    if saliency_metric:
        settings["saliency_metric"] = SALIENCY_THRESHOLDS
    if faithfulness:
        settings["faithfulness"] = {**REMOVAL, "road": ROAD, "infidelity": SQUARES}
    if sensitivity:
        settings["sensitivity"] = NOISE
    if randomization:
        settings["randomization"] = STAGES
    if certify is not None:
        settings["certificates"] = certify.facts()
    return settings
