"""The tables of a run as data frames: thresholds chosen, errors counted, intervals drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, known_name
from captum_robust._progress import counted
from captum_robust.catalog.attacks import LEVELS, strength_of
from captum_robust.catalog.thresholds import Threshold
from captum_robust.metrics.functional import (
    STABILITY_MEASURES,
    LocalizationResult,
    TunedSaliency,
    alpha_grid,
    bootstrap_interval,
    gap_closed,
    localization_error,
    pointing_game_accuracy,
    pxap_from_histograms,
    saliency_of,
    split_folds,
    tuned_saliency,
)
from captum_robust.metrics.functional.box_accuracy import read_levels
from captum_robust.report.certified_rows import certificate_means
from captum_robust.report.outcomes import attack_series, attack_table
from captum_robust.report.pairs import NO_VALUES, Values, paired, positions_of
from captum_robust.report.pseudo_boxes import every_threshold, placed_boxes, pseudo_threshold
from captum_robust.report.removal import mean_areas
from captum_robust.report.results import (
    CLEAN,
    FEW,
    STRATEGY_ORDER,
    USUAL_TUNING,
    WAYS,
    Results,
    Tuning,
)
from captum_robust.runs.level_hits import OVERLAPS, count_hits
from captum_robust.runs.store import unpack

T = TypeVar("T")

TRUE_BOX = "true box"
"""The row of the largest annotated box in the table of the saliency metric."""


@dataclass(frozen=True)
class Scored:
    """One method under one attack, on the M images whose box was scored."""

    positions: Tensor
    """M, ascending."""
    folds: Tensor
    """M, 0 or 1."""
    result: LocalizationResult
    columns: Tensor
    """M, the column among the thresholds of all families that scored each image."""
    overlaps: Tensor
    """M, of the box at that threshold."""
    curves: dict[str, Tensor]
    """The share of boxes that miss at each threshold of each family."""
    tuned: str
    """How the thresholds were chosen: of ``report.results.WAYS``, or "oracle" or "usual"."""
    top1_error: float
    """The error where the class must be right too, over the images that have a label."""


@dataclass(frozen=True)
class Crops:
    """The crops around the maps of one method, at the threshold of each image's half."""

    positions: Tensor
    """M, ascending."""
    tuned: TunedSaliency
    area: Tensor
    """M, like ``probability``."""
    probability: Tensor
    best: Tensor
    """M, the lowest value among the crops of each image."""


class Scoring:
    """Scores the rows of a run, each method and attack once; anew when the run has gone on."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._known: dict[Hashable, Any] = {}
        self._version = results.store.version()

    def _once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        if self._version != (now := self.results.store.version()):
            self._version = now
            self._known.clear()
        key = (make, arguments)
        if key not in self._known:
            self._known[key] = make(*arguments)
        value: T = self._known[key]
        return value

    def _each(self, attacks: Sequence[Any], doing: str) -> Iterator[tuple[Any, str]]:
        """Each attack with each method, and a bar where that takes a while."""
        return counted(list(product(attacks, self.results.methods)), "row", None, doing)

    def score(self, method: str, attack: str, tuning: Tuning = USUAL_TUNING) -> Scored | None:
        """Judge the boxes of a method under an attack; None without any."""
        source = self.results.rows_of(method, attack)
        return None if source is None else self._once(self._score, method, source, tuning)

    def _score(self, method: str, attack: str, tuning: Tuning) -> Scored | None:
        rows = self.results.measured(method, attack, "ious")
        if not rows:
            return None
        every = torch.from_numpy(_values(rows))
        sizes = [len(alpha_grid(s)) for s in STRATEGY_ORDER]
        ious = dict(zip(STRATEGY_ORDER, torch.split(every, sizes, dim=1), strict=True))
        positions = positions_of(rows)
        folds, one_sided = self._folds(positions, tuning.seed)
        tuned, fixed = self._threshold(method, attack, tuning, len(rows), one_sided)
        judged, alphas = {s: ious[s] for s in tuning.strategies}, None
        if fixed is not None:
            column = alpha_grid(fixed.strategy).index(fixed.alpha)
            judged = {fixed.strategy: ious[fixed.strategy][:, [column]]}
            alphas = {fixed.strategy: [fixed.alpha]}
        result = localization_error(
            judged, protocol=tuning.protocol, alphas=alphas, folds=folds, oracle=tuned == "oracle"
        )
        index = {threshold: i for i, threshold in enumerate(every_threshold(STRATEGY_ORDER))}
        chosen = torch.tensor([index[of_fold[0]] for of_fold in result.chosen])
        columns = chosen[folds] if len(chosen) > 1 else chosen.expand(len(rows))
        return Scored(
            positions,
            folds,
            result,
            columns,
            every.gather(1, columns[:, None])[:, 0],
            {s: 1 - (own > 0.5).double().mean(dim=0) for s, own in ious.items()},
            tuned,
            _top1_error(rows, result),
        )

    def _threshold(
        self, method: str, attack: str, tuning: Tuning, n: int, one_sided: bool
    ) -> tuple[str, Threshold | None]:
        """How the threshold is chosen, and which it is unless the n images choose it."""
        way = tuning.thresholds
        if tuning.oracle:
            return "oracle", None
        if way is None:
            is_few = n < FEW and tuning.strategies == STRATEGY_ORDER
            way = "shipped" if is_few else "two-fold"
        check_choice("thresholds", way, WAYS)
        if way == "two-fold":
            return "oracle" if one_sided else way, None
        if way == "pseudo":
            return way, self._pseudo_threshold(method, attack)
        shipped = self.results.threshold(method)
        return way if shipped.is_shipped else "usual", shipped

    def _pseudo_threshold(self, method: str, attack: str) -> Threshold:
        def placed(other: str) -> Values:
            return self._once(placed_boxes, self.results, other, attack)

        return pseudo_threshold(self.results, method, attack, placed)

    def _folds(self, positions: Tensor, seed: int) -> tuple[Tensor, bool]:
        """The half of each image, which follows from its name, and whether all are in one."""
        folds = self._once(self._every_fold, seed)[positions]
        return folds, bool((folds == folds[0]).all())

    def _every_fold(self, seed: int) -> Tensor:
        """The half of the image at each position."""
        rows = self.results.select("SELECT position, image FROM images ORDER BY position")
        folds = torch.zeros(1 + rows[-1]["position"], dtype=torch.int64)
        folds[positions_of(rows)] = split_folds([row["image"] for row in rows], seed)
        return folds

    def crops(self, method: str | None, tuning: Tuning = USUAL_TUNING) -> Crops | None:
        """The crops of a method on the clean images; without a method, of the true boxes.

        None where there are none.
        """
        return self._once(self._crops, method, tuning.oracle, tuning.seed)

    def _crops(self, method: str | None, oracle: bool, seed: int) -> Crops | None:
        results = self.results
        rows = results.measured(method, CLEAN, "crops") if method else results.true_crops()
        if not rows:
            return None
        area, log_probability = torch.from_numpy(_values(rows)).reshape(len(rows), 2, -1).unbind(1)
        positions = positions_of(rows)
        folds, one_sided = self._folds(positions, seed)
        values = saliency_of(area, log_probability)
        tuned = tuned_saliency(values, folds=folds, oracle=oracle or one_sided)
        at = tuned.columns[:, None]
        probability = log_probability.gather(1, at)[:, 0].exp()
        best = values.amin(dim=1)
        return Crops(positions, tuned, area.gather(1, at)[:, 0], probability, best)

    def table(
        self,
        tuning: Tuning = USUAL_TUNING,
        level: float = 0.95,
        attacked: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """See :meth:`Comparison.table`; ``attacked`` is the attack table, if it is at hand."""
        results = self.results
        for strategy in tuning.strategies:
            check_choice("family of thresholds", strategy, STRATEGY_ORDER)
        if attacked is None:
            attacked = attack_table(
                results.store, results.attacked_sets, level=level, seed=tuning.seed
            )
        names = ["n_right", "already_wrong", "fooled", "robust_accuracy"]
        shared = attacked.set_index("attack")[names]
        rows = []
        for attack, method in self._each(results.attacks, "scoring"):
            source = results.rows_of(method, attack)
            if source is None:
                continue
            row = self._row(method, source, tuning, level)
            images = results.images_of(method, source)
            if images in shared.index:
                row |= {name: shared.loc[images, name] for name in names}
            same_as = None if source == attack else source
            rows.append(row | {"attack": attack, "same_as": same_as})
        table = pd.DataFrame(rows)
        if not results.is_defended():
            table = table.drop(columns="accuracy")  # the classifier's alone
        order = {attack: i for i, attack in enumerate(results.attacks)}
        table = table.sort_values(
            ["attack", "error"],
            key=lambda c: c.map(order) if c.name == "attack" else c,
            ignore_index=True,
            kind="stable",
        )
        known = set(table.columns[table.notna().any()])
        # The ends of an interval stay beside its value, also where there is none.
        ends = {f"{name}_{end}" for name in known for end in ("low", "high")}
        return table[[name for name in table if name in known | ends]]

    def _row(self, method: str, attack: str, tuning: Tuning, level: float) -> dict[str, Any]:
        row: dict[str, Any] = {"attack": attack, "method": method, "n": 0, "error": math.nan}
        if (scored := self.score(method, attack, tuning)) is not None:
            row |= self._localization(method, attack, scored, level, tuning.seed)
        elif tuning.thresholds == "pseudo" and method not in self.results.own_boxes:
            chosen = self._pseudo_threshold(method, attack)
            row |= {"tuned": tuning.thresholds, "threshold": str(chosen)}
        crops = self.crops(method, tuning) if attack == CLEAN else None
        if crops is not None:
            one = bootstrap_interval(crops.tuned.per_sample, level=level, seed=tuning.seed)
            row |= {"saliency": one.mean, "saliency_low": one.low}
            row |= {"saliency_high": one.high, "saliency_n": one.n}
        for means in (mean_areas, certificate_means) if attack == CLEAN else ():
            row |= means(self.results, method, level, tuning.seed)
        costs = self.results.means(method, attack)
        row["accuracy"] = costs.pop("accuracy")
        row["pointing"] = self._pointing(method, attack)
        row["pxap"] = self._pxap(method, attack)
        return row | costs

    def _localization(
        self, method: str, attack: str, scored: Scored, level: float, seed: int
    ) -> dict[str, Any]:
        result = scored.result
        fixed = method in self.results.own_boxes
        interval = bootstrap_interval(result.per_sample_error, level=level, seed=seed)
        chosen = dict.fromkeys(f"{s} {a:g}" for fold in result.chosen for s, a in fold)
        return {
            "n": result.n,
            "error": result.error,
            "error_low": interval.low,
            "error_high": interval.high,
            "tuned": "-" if fixed else scored.tuned,
            "threshold": "-" if fixed else ", ".join(chosen),
            "top1_error": scored.top1_error,
            **{name: self._best_level(method, attack, name) for name in OVERLAPS},
        }

    def _best_level(self, method: str, attack: str, name: str) -> float:
        """The accuracy at the best τ of all, averaged over the overlaps that are asked for."""
        rows = self.results.measured(method, attack, name)
        if not rows:  # of a damaged file
            return math.nan
        hits = count_hits((row["value"] for row in rows), OVERLAPS[name])
        share = torch.from_numpy(hits / len(rows))
        return float(read_levels(share).amax(dim=1).mean())

    def _pointing(self, method: str, attack: str) -> float:
        rows = self.results.measured(method, attack, "pointing")
        if not rows:
            return math.nan
        hits = torch.tensor([row["value"] for row in rows])
        labels = [row["label"] for row in rows]
        classes = None if None in labels else torch.tensor(labels)
        return float(pointing_game_accuracy(hits, classes))

    def _pxap(self, method: str, attack: str) -> float:
        total = torch.zeros(0, dtype=torch.float64)
        for row in self.results.measured(method, attack, "pxap"):
            counts = torch.from_numpy(unpack(row["value"], np.int64).astype(np.float64))
            total = total + counts if len(total) else counts
        total = total.reshape(2, -1)
        if not total[1].any():  # no mask, or only empty ones
            return math.nan
        return float(pxap_from_histograms(total))

    def stability_table(self) -> pd.DataFrame:
        """See :meth:`Comparison.stability_table`."""
        results = self.results
        worst = [None] if len(results.attacks) > 2 else []
        rows = [
            {"attack": attack or "worst", "method": m, **results.mean_stability(m, attack)}
            for attack, m in self._each([*results.attacks[1:], *worst], "stability")
        ]
        columns = ["attack", "method", "n", *STABILITY_MEASURES]
        table = pd.DataFrame([row for row in rows if row["n"]], columns=columns)
        return table.astype(dict.fromkeys(STABILITY_MEASURES, float))

    def saliency_table(self, tuning: Tuning = USUAL_TUNING, level: float = 0.95) -> pd.DataFrame:
        """See :meth:`Comparison.saliency_table`."""
        columns = ["method", "n", "saliency", "low", "high", "area", "probability"]
        columns += ["tuned", "threshold", "best_crop"]
        rows = []
        for method in counted([*self.results.methods, None], "method", None, "crops"):
            crops = self.crops(method, tuning)
            if crops is None:
                continue
            tuned, chosen = self._chosen_crops(crops.tuned)
            one = bootstrap_interval(crops.tuned.per_sample, level=level, seed=tuning.seed)
            rows.append(
                {
                    "method": TRUE_BOX if method is None else method,
                    "n": one.n,
                    "saliency": one.mean,
                    "low": one.low,
                    "high": one.high,
                    "area": float(crops.area.double().mean()),
                    "probability": float(crops.probability.double().mean()),
                    "tuned": tuned,
                    "threshold": chosen,
                    "best_crop": float(crops.best.double().mean()),
                }
            )
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("saliency", ignore_index=True, kind="stable")

    def _chosen_crops(self, tuned: TunedSaliency) -> tuple[str, str]:
        """How the thresholds of the crops were chosen, and which; "-" of a fixed box."""
        if len(tuned.chosen) == 1 and not tuned.oracle:
            return "-", "-"
        tried = self.results.configuration["settings"].get("saliency_metric", {})
        names = [f"{family} {alpha:g}" for family, alphas in tried.items() for alpha in alphas]
        expected = f"{self.results.store.folder / 'run.json'}: saliency_metric: expected more"
        check(max(tuned.chosen) < len(names), f"{expected} thresholds, got {len(names)}")
        chosen = ", ".join(dict.fromkeys(names[column] for column in tuned.chosen))
        return "two-fold" if len(tuned.chosen) > 1 else "oracle", chosen

    def gap_table(
        self, baseline: str | None = None, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """See :meth:`Comparison.gap_table`."""
        results = self.results
        if baseline is None:
            baseline = next((m for m in results.methods if results.kinds[m] == "grad_cam"), None)
        else:
            baseline = known_name("method", baseline, results.methods)
        columns = ["attack", "method", "baseline", "n", "closed", "low", "high"]
        columns += ["gap", "without_gap", "reason"]
        rows = []
        attacks = [] if baseline is None else results.attacks[1:]
        for attack, method in self._each(attacks, "gaps"):
            if method == baseline:
                continue
            cases = ((method, attack), (baseline, attack), (baseline, CLEAN))
            each = paired(self.misses(*case) for case in cases)
            if not len(each[0]):
                continue
            gap = gap_closed(each[0], each[1], each[2], level=level, seed=seed)
            row = {c: getattr(gap, c) for c in columns if hasattr(gap, c)}
            row |= {"attack": attack, "method": method, "baseline": baseline}
            rows.append(row | {"closed": gap.value})
        return pd.DataFrame(rows, columns=columns)

    def misses(self, method: str, attack: str, tuning: Tuning = USUAL_TUNING) -> Values:
        """The positions that were scored, and whether the box misses."""
        if (scored := self.score(method, attack, tuning)) is None:
            return NO_VALUES
        return scored.positions, scored.result.per_sample_error

    def error_by_attack(self, table: pd.DataFrame) -> pd.DataFrame:
        """See :meth:`Comparison.error_by_attack`."""
        errors = table.set_index(["method", "attack"])["error"].unstack()  # noqa: PD010
        order = table[table["attack"] == CLEAN]["method"]
        return errors.loc[list(order), self.results.attacks]

    def error_series(self, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """See :meth:`Comparison.error_series`."""
        if "error" not in table:
            return {}
        levels = [strength_of(attack)[1] for attack in table["attack"]]
        # Strength 0 is the clean images.
        table = table.assign(epsilon=[e / LEVELS if e else math.nan for e in levels])
        clean = table[table["attack"] == CLEAN].assign(epsilon=0.0)
        series = {}
        for name, under in attack_series(table).items():
            both = pd.concat([clean[clean["method"].isin(under["method"])], under])
            series[name] = both[both["error"].notna()].reset_index(drop=True)
        return series

    def curves(self, attack: str = CLEAN) -> pd.DataFrame:
        """See :meth:`Comparison.curves`."""
        rows = []
        for method in counted(self.results.methods, "method", None, "curves"):
            scored = self.score(method, attack)
            for strategy, errors in (scored.curves if scored else {}).items():
                rows += [
                    {"method": method, "strategy": strategy, "alpha": alpha, "error": float(e)}
                    for alpha, e in zip(alpha_grid(strategy), errors, strict=True)
                ]
        return pd.DataFrame(rows, columns=["method", "strategy", "alpha", "error"])

    def failures(self) -> pd.DataFrame:
        """See :meth:`Comparison.failures`."""
        return pd.DataFrame(self.results.failures(), columns=["image", "method", "error"])


def _values(rows: Sequence[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """The unpacked values, a line a row."""
    return np.stack([unpack(row["value"]) for row in rows])


def _top1_error(rows: Sequence[dict[str, Any]], result: LocalizationResult) -> float:
    """NaN without labels."""
    labelled = torch.tensor([row["label"] is not None for row in rows])
    is_other = torch.tensor([row["label"] != row["class"] for row in rows])
    misses = torch.where(is_other, 1.0, result.per_sample_error)
    return float(misses[labelled].mean())
