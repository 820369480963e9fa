"""The thresholds that place boxes best, for images without boxes to tune them on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor

from captum_robust.metrics.functional import largest_component, mask_to_box, threshold


@dataclass(frozen=True)
class Threshold:
    """Which pixels of a map the box is drawn around, see ``metrics.functional.threshold``."""

    strategy: str
    alpha: float
    is_shipped: bool = False
    """It was chosen on annotated images, see :func:`shipped_facts`."""

    def __str__(self) -> str:
        return f"{self.strategy} {self.alpha:g}"

    def kept(self, maps: Tensor) -> Tensor:
        """Boolean N×H×W: the pixels of maps N×H×W that are kept."""
        return threshold(maps, self.strategy, self.alpha)

    def boxes(self, maps: Tensor) -> Tensor:
        """N×4, the box around the largest component of each map's pixels, in pixels of the map."""
        return mask_to_box(largest_component(self.kept(maps)))


USUAL_THRESHOLD = Threshold("value", 0.2)
"""A fifth of the map's range, as for class activation maps (Zhou et al., 2016)."""


@cache
def shipped_facts() -> dict[str, Any]:
    """What the file of shipped thresholds says: images, date, and of each method.

    Of a method: ``strategy`` and ``alpha``, chosen on half of the images (``n_chosen_on``) by the
    mean error over some ``models``, and the localization ``errors`` that these have on the other
    half (``n_scored``).
    """
    text = (files("captum_robust.catalog") / "thresholds.json").read_text("utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts


def shipped_threshold(kind: str) -> Threshold:
    """The threshold of a method of the catalogue; the usual one of any other."""
    one = shipped_facts()["methods"].get(kind)
    return USUAL_THRESHOLD if one is None else Threshold(one["strategy"], one["alpha"], True)
