"""All tables of a run, for its text and its page."""

from __future__ import annotations

from functools import cached_property

import pandas as pd

from captum_robust.report.outcomes import attack_table
from captum_robust.report.removal import mean_curves
from captum_robust.report.results import CLEAN, Tuning
from captum_robust.report.scoring import Scoring


class Tables:
    """All tables of a run for its text and its page, each made once, when it is asked for."""

    def __init__(self, scoring: Scoring, tuning: Tuning) -> None:
        self.scoring = scoring
        self.results = scoring.results
        self.tuning = tuning

    @cached_property
    def attacks(self) -> pd.DataFrame:
        """What each attack did to the images."""
        return attack_table(self.results.store, self.results.attacked_sets)

    @cached_property
    def methods(self) -> pd.DataFrame:
        """How each method does under each attack."""
        return self.scoring.table(self.tuning, attacked=self.attacks)

    @cached_property
    def clean(self) -> pd.DataFrame:
        """The rows of the clean images."""
        return self.methods[self.methods["attack"] == CLEAN]

    @cached_property
    def stability(self) -> pd.DataFrame:
        """How far maps under attack are the clean ones."""
        return self.scoring.stability_table()

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """The gap that each method closes."""
        return self.scoring.gap_table()

    @property
    def gap_baseline(self) -> str:
        """The method whose gap that is; empty without one."""
        return next(iter(self.gaps["baseline"]), "")

    @cached_property
    def saliency(self) -> pd.DataFrame:
        """How small a crop the class survives."""
        return self.scoring.saliency_table(self.tuning)

    @cached_property
    def removal(self) -> pd.DataFrame:
        """The mean curves of deletion and insertion."""
        return mean_curves(self.results)
