"""Whether one method is better than another beyond chance: paired, image by image."""

from __future__ import annotations

import torch

from captum_robust.metrics.functional import STABILITY_MEASURES, bootstrap_interval
from captum_robust.report.certified_rows import certification_of, certified_rows
from captum_robust.report.removal import measured_areas
from captum_robust.report.results import CLEAN, FEW, Tuning
from captum_robust.report.scoring import Scoring
from captum_robust.report.tables import COLUMNS, STABILITY_COLUMNS, certificate_columns


class Chance:
    """Compares methods on the images that both have a value of.

    Args:
        scoring: of the rows of a run.
        tuning: how thresholds are chosen.
    """

    def __init__(self, scoring: Scoring, tuning: Tuning) -> None:
        self.scoring, self.tuning = scoring, tuning
        how = certification_of(scoring.results)
        certified = certificate_columns(how.radii) if how else ()
        every = (*COLUMNS, *STABILITY_COLUMNS, *certified)
        self._better = {column.key: column.better for column in every}
        self._certified = {column.key for column in certified}

    def ahead(self, column: str, attack: str, method: str, other: str) -> bool:
        """Whether the 95 % bootstrap interval of the mean difference leaves out 0.

        False with fewer than :data:`FEW` common images, and for a column whose value is no mean
        over images.
        """
        first, second = (self._values(column, attack or CLEAN, m) for m in (method, other))
        common = sorted(first.keys() & second.keys())
        if len(common) < FEW:
            return False
        gains = torch.tensor([first[p] - second[p] for p in common], dtype=torch.float64)
        interval = bootstrap_interval(gains if self._better[column] == "high" else -gains)
        return interval.low > 0

    def _values(self, column: str, attack: str, method: str) -> dict[int, float]:
        """The value of each image by its position."""
        results = self.scoring.results
        if column == "error":
            scored = self.scoring.score(method, attack, self.tuning)
            errors = [] if scored is None else scored.result.per_sample_error.tolist()
            return dict(zip(scored.positions if scored else [], errors, strict=True))
        if column in STABILITY_MEASURES and attack in results.attacks:
            rows = results.measured(method, results.rows_of(method, attack) or "", column)
            return {row["position"]: row["value"] for row in rows}
        if column == "saliency" and attack == CLEAN:
            crops = self.scoring.crops(method, self.tuning)
            values = [] if crops is None else crops.tuned.per_sample.tolist()
            return dict(zip(crops.positions if crops else [], values, strict=True))
        if column in self._certified and attack == CLEAN:
            proven = certified_rows(results, method)
            values = proven.named()[column].tolist() if proven else []
            each = zip(proven.positions if proven else [], values, strict=True)
            return {position: value for position, value in each if value == value}
        if attack == CLEAN:
            positions, areas = measured_areas(results, method).get(column, ([], torch.empty(0)))
            return dict(zip(positions, areas.tolist(), strict=True))
        return {}
