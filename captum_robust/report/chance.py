"""Whether one method is better than another beyond chance: paired, image by image."""

from __future__ import annotations

import torch

from captum_robust.metrics.functional import STABILITY_MEASURES, bootstrap_interval
from captum_robust.report.certified_rows import certification_of, certified_rows
from captum_robust.report.pairs import NO_VALUES, Values, paired, positions_of
from captum_robust.report.removal import AREAS, measured_area
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
        values = (self._values(column, attack or CLEAN, one) for one in (method, other))
        first, second = paired(values)
        if len(first) < FEW:
            return False
        gains = first.double() - second.double()
        interval = bootstrap_interval(gains if self._better[column] == "high" else -gains)
        return interval.low > 0

    def _values(self, column: str, attack: str, method: str) -> Values:
        """The positions of the images that have a value, and the values."""
        results = self.scoring.results
        if column == "error":
            return self.scoring.misses(method, attack, self.tuning)
        if column in STABILITY_MEASURES and attack in results.attacks:
            rows = results.measured(method, results.rows_of(method, attack) or "", column)
            positions = positions_of(rows)
            return positions, torch.tensor([row["value"] for row in rows])
        if attack != CLEAN:
            return NO_VALUES
        if column == "saliency":
            crops = self.scoring.crops(method, self.tuning)
            return NO_VALUES if crops is None else (crops.positions, crops.tuned.per_sample)
        if column in self._certified:
            proven = certified_rows(results, method)
            if proven is None:
                return NO_VALUES
            values = proven.named()[column]
            return proven.positions[~values.isnan()], values[~values.isnan()]
        return measured_area(results, method, column) if column in AREAS else NO_VALUES
