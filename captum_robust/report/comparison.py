"""What a run says: tables, plots and the report, computed from its rows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._checks import unknown_name
from captum_robust.catalog.attacks import LEVELS, strength_of
from captum_robust.catalog.methods import FIXED_BOXES
from captum_robust.metrics.functional import (
    STABILITY_MEASURES,
    STRATEGIES,
    LocalizationResult,
    TunedSaliency,
    alpha_grid,
    bootstrap_interval,
    gap_closed,
    localization_error,
    maxboxacc_from_ious,
    pointing_game_accuracy,
    pxap_from_histograms,
    saliency_of,
    split_folds,
    tuned_saliency,
)
from captum_robust.report.outcomes import attack_series, attack_table, attacks_text
from captum_robust.runs.store import RunStore, unpack

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STRATEGY_ORDER = STRATEGIES
"""The families whose boxes follow each other in a row's overlaps."""

CLEAN = "clean"
TRUE_BOX = "true box"
"""The row of the largest annotated box in :meth:`Comparison.saliency_table`."""
ADAPTIVE_NOTE = (
    "adaptive: the attacker knows the transforms of a defended method; =: a method without a "
    "defence,\nof which the plain attack knows all there is: its value; -: the map has no gradient"
)
FEW = 50
"""With fewer images a table says that they are too few to rank methods."""

GALLERY_POOL = 512
"""Pictures and maps are kept for this many images, so that a run of any length stays small."""

ATTACK_POOL = 48
"""Attacked pictures, and what was changed in them, are kept for this many images."""


@dataclass(frozen=True)
class _Tuning:
    """How boxes are judged and their thresholds chosen, see :meth:`Comparison.table`."""

    protocol: str = "whi2020"
    oracle: bool = False
    strategies: tuple[str, ...] = STRATEGY_ORDER
    seed: int = 0


@dataclass(frozen=True)
class _Scored:
    """One method under one attack: a value a position, NaN where there is none."""

    positions: Tensor
    """M, the positions whose box was scored."""
    folds: Tensor
    """M, 0 or 1."""
    result: LocalizationResult
    ious: dict[str, Tensor]
    """M×A for each family."""

    @property
    def columns(self) -> list[tuple[str, float]]:
        return [(s, a) for s in self.ious for a in alpha_grid(s)]


@dataclass(frozen=True)
class _Crops:
    """The crops around the maps of one method, at the threshold of each image's half."""

    positions: list[int]
    """M."""
    tuned: TunedSaliency
    area: Tensor
    """M, like ``probability``."""
    probability: Tensor


class Comparison:
    """The outcome of :func:`compare`, read from the folder of its run.

    Args:
        folder: a run's folder; also one whose run was stopped half-way.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(
        self, folder: str | Path, *, _keep_alive: TemporaryDirectory[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        self._temporary = _keep_alive  # the folder goes when the comparison goes
        self._store = RunStore(self.folder)
        self.configuration = self._store.configuration
        self.methods: list[str] = list(self.configuration["methods"])
        self._adaptive: dict[str, Any] = self.configuration.get("adaptive", {})
        self.attacks: list[str] = [CLEAN]
        for attack in self.configuration["attacks"]:
            self.attacks.append(attack)
            self.attacks += [a for a, case in self._adaptive.items() if case["of"] == attack]
        self.attacks += [a for a, case in self._adaptive.items() if case["of"] is None]
        self._scored: dict[Any, _Scored | None] = {}
        self._scored_rows = 0

    def __repr__(self) -> str:
        return f"Comparison({str(self.folder)!r}: {len(self)} images, {len(self.methods)} methods)"

    def __len__(self) -> int:
        """How many images the run has read so far, broken ones included."""
        rows = self._store.select("SELECT count(*) AS n FROM images")
        return int(next(rows)["n"])

    @property
    def attacked_sets(self) -> list[str]:
        """The sets of attacked images that are to change the class: an attack, or a case of it."""
        names: list[str] = []
        for attack in self.attacks[1:]:
            case = self._adaptive.get(attack)
            if case is None:
                names.append(attack)
            elif case["of"] is not None:
                names += dict.fromkeys(case["images"].values())
        return names

    def rows_of(self, method: str, attack: str) -> str | None:
        """The attack whose rows say how a method does under an attack.

        Itself; of an adaptive attack and a method without a defence, which that does not change,
        the plain one; None where there are no rows, as of an attack on a map that has no gradient.
        """
        case = self._adaptive.get(attack)
        if case is None or method in case["images"]:
            return attack
        plain: str | None = case["of"]
        return plain

    def select(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of the tables ``images``, ``results`` and ``attacked`` by a query of your own."""
        return [dict(row) for row in self._store.select(sql, parameters)]

    def table(
        self,
        *,
        protocol: str = "whi2020",
        oracle: bool = False,
        strategies: Sequence[str] = STRATEGY_ORDER,
        level: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """One row a method and attack, best localization first within each attack.

        Columns: ``n`` scored images; ``error``, the weak localization error in [0, 1], with its
        bootstrap interval ``error_low`` and ``error_high``; ``tuned``, "two-fold" when each half
        of the images was scored with the threshold (family and α) that does best on the other
        half, "oracle" when on itself, "-" for a baseline whose box is fixed; ``threshold``, those
        of the halves; ``top1_error``, where
        the class must be right too; ``maxboxacc``, ``maxboxacc_v2`` (best τ of all on the
        reported images, as published); ``pointing``, accuracy averaged over the classes; ``pxap``
        where there are masks; ``accuracy``, where a method is defended, the share of the labelled
        images whose class is right (of a defended method that of its averaged scores);
        ``forward`` and ``backward`` classifier passes an image; ``ms_per_image``; ``failed``,
        images without a map. Of a run with ``saliency_metric``, of clean images, ``saliency`` with
        its interval ``saliency_low`` and ``saliency_high`` over ``saliency_n`` images, as in
        :meth:`saliency_table`. Of methods that perturb the image ``flipped``, the share whose label
        they changed of the ``flippable`` images, those whose explained class was the prediction. Of
        attacked images ``n_right``, ``already_wrong``, ``fooled`` and ``robust_accuracy`` as in
        :meth:`attack_table`, the same for all methods that are shown the same images. Of a run
        with ``adaptive`` also ``same_as``, for a method without a defence under an adaptive attack:
        the plain attack, whose row is repeated.

        Args:
            protocol: what counts as a correct box, see
                :func:`~captum_robust.metrics.functional.localization_error`; overlaps are those of
                half-open boxes under every protocol.
            oracle: tune on the very images that are reported.
            strategies: the families of thresholds to choose from; one alone gives its own error.
            level: of the interval.
            seed: of the split in two halves and of the bootstrap.
        """
        import pandas as pd

        families = tuple(strategies)
        for strategy in families:
            if strategy not in STRATEGY_ORDER:
                raise unknown_name("family of thresholds", strategy, STRATEGY_ORDER)
        tuning = _Tuning(protocol, oracle, families, seed)
        attacked = self.attack_table(level=level, seed=seed).set_index("attack")
        shared = attacked[["n_right", "already_wrong", "fooled", "robust_accuracy"]]
        rows = []
        for attack in self.attacks:
            for method in self.methods:
                source = self.rows_of(method, attack)
                if source is None:
                    continue
                row = self._summary(method, source, tuning, level)
                case = self._adaptive.get(source, {"images": {}})
                images = case["images"].get(method, source)
                row |= shared.loc[images].to_dict() if images in shared.index else {}
                rows.append(
                    row | {"attack": attack, "same_as": None if source == attack else source}
                )
        table = pd.DataFrame(rows)
        if not self.select("SELECT 1 FROM results WHERE decided IS NOT NULL LIMIT 1"):
            table = table.drop(columns="accuracy")  # the classifier's alone
        order = {attack: i for i, attack in enumerate(self.attacks)}
        table = table.sort_values(
            ["attack", "error"],
            key=lambda c: c.map(order) if c.name == "attack" else c,
            ignore_index=True,
            kind="stable",
        )
        return table.dropna(axis="columns", how="all")

    def attack_table(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row an attack, whatever the methods; empty without attacks.

        In a row "pgd 2/255, adaptive" it is not the classifier that is fooled, but a defended
        method: the class of the scores averaged over its transforms.

        Columns: ``attack``; ``epsilon``, the strength in pixel units where the name says it, such
        as "pgd 2/255"; ``n`` attacked images; ``clean_accuracy``; ``n_right`` and
        ``already_wrong``, how many of them were classified right and wrong before; ``fooled``, the
        share of the former that the attack fooled; ``robust_accuracy``, the share of all n that
        was right before and still is, with its bootstrap interval ``robust_low`` and
        ``robust_high``; ``linf`` and ``l2``, the mean size of the change of those that were right
        before, in pixel units; ``unlabelled``, images whose label is not known, for which the
        prediction is the label; ``failed``, images on which the attack failed; ``skipped``, 0.

        Args:
            level: of the interval.
            seed: of the bootstrap.
        """
        return attack_table(self._store, self.attacked_sets, level=level, seed=seed)

    def to_text(self, *, protocol: str = "whi2020", oracle: bool = False) -> str:
        """The tables for a terminal, with a line on how thresholds were chosen.

        With attacks the first is of the clean images; then what each attack did, and the error of
        each method under each.
        """
        table = self.table(protocol=protocol, oracle=oracle)
        text = self._clean_text(table[table["attack"] == CLEAN], oracle)
        if len(self.attacks) == 1:
            return text + self._saliency_text(oracle)
        text = f"clean images\n{text}\n\nattacks\n{attacks_text(self.attack_table())}"
        if "error" in table:
            errors = self.error_by_attack(table)
            shown = errors.map(lambda e: "-" if math.isnan(e) else f"{e:.3f}")
            for method in shown.index:
                for attack in shown.columns:
                    if self.rows_of(method, attack) not in (attack, None):
                        shown.loc[method, attack] += "="
            shown.index.name = shown.columns.name = None
            text += f"\n\nerror under attack\n{shown.to_string()}"
            if self._adaptive:
                text += f"\n{ADAPTIVE_NOTE}"
        text += self._stability_text() + self._gap_text()
        return text + self._saliency_text(oracle)

    def _stability_text(self) -> str:
        table = self.stability_table()
        if table.empty:
            return ""
        shown = table.rename(columns={"top_k": "top-k", "box_iou": "box IoU", "ssim": "SSIM"})
        for column in shown.columns[3:]:
            shown[column] = ["-" if math.isnan(v) else f"{v:.3f}" for v in shown[column]]
        return f"\n\nmaps under attack, beside the clean ones\n{shown.to_string(index=False)}"

    def _saliency_text(self, oracle: bool) -> str:
        table = self.saliency_table(oracle=oracle)
        if table.empty:
            return ""
        import pandas as pd

        shown = pd.DataFrame({"method": table["method"], "n": table["n"]})
        shown["saliency metric"] = [
            f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            for mean, low, high in table[["saliency", "low", "high"]].to_numpy(float)
        ]
        shown["area"] = table["area"].map("{:.3f}".format)
        shown["probability"] = table["probability"].map("{:.3f}".format)
        note = (
            "saliency metric: log(max(area, .05)) - log probability of the class in the tightest "
            "crop, lower is better;\nthresholds tuned as above; clean images; true box: the largest"
            " one annotated"
        )
        return f"\n\nsaliency metric\n{shown.to_string(index=False)}\n{note}"

    def _gap_text(self) -> str:
        table = self.gap_table()
        if table.empty:
            return ""
        import pandas as pd

        shown = pd.DataFrame({"attack": table["attack"], "method": table["method"]})
        shown["n"] = table["n"]
        shown["gap"] = table["gap"].map("{:.3f}".format)
        shown["closed"] = [
            "-" if math.isnan(closed) else f"{closed:.2f} [{low:.2f}, {high:.2f}]"
            for closed, low, high in table[["closed", "low", "high"]].to_numpy(float)
        ]
        shown["no gap"] = table["without_gap"].map("{:.0%}".format)
        baseline = table["baseline"].iloc[0]
        note = (
            f"gap: error of {baseline} attacked less clean; closed: the part of it that the method "
            "does not lose\nunder the same attack (of an adaptive one: under its own); no gap: "
            "share of the bootstrap's draws\nwithout any, which are not in the interval"
        )
        return f"\n\ngap closed\n{shown.to_string(index=False)}\n{note}"

    def stability_table(self) -> pd.DataFrame:
        """How far the maps under each attack are those of the clean images: means over images.

        Columns: ``attack`` (the last, "worst", is the mean of each image's lowest value over all
        attacks, where there are several), ``method``, ``n``, ``spearman``, ``pearson``, ``ssim``,
        ``top_k`` and ``box_iou`` as of :func:`captum_robust.metrics.functional.stability`: of the
        largest tenth of the pixels, and of boxes at 0.2 of the map's range. Without baselines whose
        box is fixed, and empty for a run of a version that did not measure it.
        """
        import pandas as pd

        columns = ["attack", "method", "n", *STABILITY_MEASURES]
        means = ", ".join(f"avg({m}) AS {m}" for m in STABILITY_MEASURES)
        lowest = ", ".join(f"min({m}) AS {m}" for m in STABILITY_MEASURES)
        rows = []
        for attack in self.attacks[1:]:
            for method in self.methods:
                rows += [
                    {"attack": attack, "method": method, **row}
                    for row in self.select(
                        f"SELECT count(spearman) AS n, {means} FROM results "
                        "WHERE method = ? AND attack = ?",
                        (method, attack),
                    )
                    if row["n"]
                ]
        for method in self.methods if len(self.attacks) > 2 else []:
            rows += [
                {"attack": "worst", "method": method, **row}
                for row in self.select(
                    f"SELECT count(spearman) AS n, {means} FROM (SELECT {lowest} FROM results "
                    "WHERE method = ? AND attack <> ? AND spearman IS NOT NULL GROUP BY position)",
                    (method, CLEAN),
                )
                if row["n"]
            ]
        return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(STABILITY_MEASURES, float))

    def saliency_table(
        self, *, oracle: bool = False, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """How small a crop of the clean images the class survives, best first.

        Columns: ``method``; ``n`` images; ``saliency``, the mean of
        :func:`captum_robust.metrics.functional.saliency_metric` (lower is better, at least -3.0),
        with its bootstrap interval ``low`` and ``high``; ``area`` and ``probability``, the means of
        the share of the image that is cut out and of the explained class's probability there;
        ``tuned`` and ``threshold`` as in :meth:`table`: the threshold of each half of the images is
        that with the best mean on the other half. The last but not a method, ``"true box"``, is the
        largest annotated box of the images that have one. Empty for a run without
        ``saliency_metric``.

        Args:
            oracle: tune on the very images that are reported.
            level: of the interval.
            seed: of the split in two halves and of the bootstrap.
        """
        import pandas as pd

        columns = ["method", "n", "saliency", "low", "high", "area", "probability"]
        columns += ["tuned", "threshold"]
        found = [(m, self._crops(m, oracle=oracle, seed=seed)) for m in self.methods]
        found.append((TRUE_BOX, self._crops(None, oracle=oracle, seed=seed)))
        rows = [
            {
                "method": method,
                **_interval_of(crops.tuned.per_sample, level, seed),
                "area": float(crops.area.double().mean()),
                "probability": float(crops.probability.double().mean()),
                "tuned": self._how_tuned(crops.tuned),
                "threshold": self._saliency_thresholds(crops.tuned),
            }
            for method, crops in found
            if crops is not None
        ]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("saliency", ignore_index=True, kind="stable")

    @staticmethod
    def _how_tuned(tuned: TunedSaliency) -> str:
        if len(tuned.chosen) > 1:
            return "two-fold"
        return "oracle" if tuned.oracle else "-"

    def _saliency_thresholds(self, tuned: TunedSaliency) -> str:
        """Those of the halves; "-" of a fixed box."""
        if len(tuned.chosen) == 1 and not tuned.oracle:
            return "-"
        tried = self.configuration["settings"]["saliency_metric"]
        names = [f"{family} {alpha:g}" for family, alphas in tried.items() for alpha in alphas]
        return ", ".join(dict.fromkeys(names[column] for column in tuned.chosen))

    def _crops(self, method: str | None, *, oracle: bool = False, seed: int = 0) -> _Crops | None:
        """Of a method on the clean images, or of the true boxes; None where there are none."""
        if method is None:
            rows = self._store.select(
                "SELECT position, true_crop AS crops FROM images WHERE true_crop IS NOT NULL "
                "ORDER BY position"
            )
        else:
            rows = self._store.select(
                "SELECT position, crops FROM results WHERE method = ? AND attack = ? "
                "AND crops IS NOT NULL ORDER BY position",
                (method, CLEAN),
            )
        positions, packed = [], []
        for row in rows:
            positions.append(row["position"])
            packed.append(unpack(row["crops"]).reshape(2, -1))
        if not positions:
            return None
        area, log_probability = torch.from_numpy(np.stack(packed, axis=1))
        halves = self._halves(seed, boxed=False)
        folds = torch.tensor([halves[p] for p in positions])
        one_sided = bool((folds == folds[0]).all())
        tuned = tuned_saliency(
            saliency_of(area, log_probability), folds=folds, oracle=oracle or one_sided
        )
        at = tuned.columns[:, None]
        probability = log_probability.gather(1, at)[:, 0].exp()
        return _Crops(positions, tuned, area.gather(1, at)[:, 0], probability)

    def gap_table(
        self, baseline: str | None = None, *, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """How much of what each attack costs a baseline is not lost by each of the other methods.

        Columns: ``attack``, ``method``, ``baseline``, ``n`` images that both were scored on,
        ``closed`` with its bootstrap interval ``low`` and ``high``, ``gap``, ``without_gap`` and
        ``reason``, see :func:`captum_robust.metrics.functional.gap_closed`. Both methods are under
        the same attack; of an adaptive one each under its own. The errors, and thresholds, are
        those of :meth:`table`.

        Args:
            baseline: a method of the run; None: the one that is "grad_cam", and an empty table if
                there is none.
            level: of the interval.
            seed: of the bootstrap.

        Raises:
            ValueError: the run has no such method.
        """
        import pandas as pd

        if baseline is None:
            kinds = self.configuration["methods"]
            baseline = next((m for m in self.methods if kinds[m] == "grad_cam"), None)
        elif baseline not in self.methods:
            raise unknown_name("method", baseline, self.methods)
        columns = ["attack", "method", "baseline", "n", "closed", "low", "high"]
        columns += ["gap", "without_gap", "reason"]
        rows = []
        clean = {} if baseline is None else self._failures(baseline, CLEAN)
        for attack in self.attacks[1:]:
            if baseline is None:
                break
            hit = self._failures(baseline, attack)
            for method in self.methods:
                ours = self._failures(method, attack)
                if method == baseline:
                    continue
                shared = sorted(clean.keys() & hit.keys() & ours.keys())
                if not shared:
                    continue
                each = torch.tensor([[of[p] for p in shared] for of in (ours, hit, clean)])
                found = gap_closed(each[0], each[1], each[2], level=level, seed=seed)
                rows.append(
                    {
                        "attack": attack,
                        "method": method,
                        "baseline": baseline,
                        "closed": found.value,
                        **{c: getattr(found, c) for c in columns if hasattr(found, c)},
                    }
                )
        return pd.DataFrame(rows, columns=columns)

    def _failures(self, method: str, attack: str) -> dict[int, float]:
        """Position -> whether the box misses, of the images that were scored."""
        source = self.rows_of(method, attack)
        scored = None if source is None else self._score(method, source, _Tuning())
        if scored is None:
            return {}
        errors = scored.result.per_sample_error.tolist()
        return dict(zip(scored.positions.tolist(), errors, strict=True))

    def error_by_attack(self, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """The error of each method (rows) under each attack (columns, the first one clean).

        Args:
            table: of :meth:`table`; made with its defaults if it is not given.
        """
        table = self.table() if table is None else table
        errors = table.set_index(["method", "attack"])["error"].unstack()  # noqa: PD010
        order = table[table["attack"] == CLEAN]["method"]
        return errors.loc[list(order), self.attacks]

    def _clean_text(self, table: pd.DataFrame, oracle: bool) -> str:
        import pandas as pd

        shown = pd.DataFrame({"method": table["method"], "n": table["n"]})
        if "error" in table:
            shown["error"] = [
                f"{row.error:.3f} [{row.error_low:.3f}, {row.error_high:.3f}]" if row.n else "-"
                for row in table.itertuples()
            ]
        names = {
            "top1_error": "top-1 error",
            "maxboxacc": "MaxBoxAcc",
            "maxboxacc_v2": "V2",
            "pointing": "pointing",
            "pxap": "PxAP",
        }
        for column, name in names.items():
            if column in table:
                shown[name] = table[column].map("{:.3f}".format)
        if "flipped" in table:
            shown["flipped"] = [
                "-" if math.isnan(share) else f"{share:.3f} of {n:.0f}"
                for share, n in zip(table["flipped"], table["flippable"], strict=True)
            ]
        for column, name in {"forward": "forward", "backward": "backward"}.items():
            if column in table:
                shown[name] = table[column].map("{:.4g}".format)
        if "ms_per_image" in table:
            shown["ms/image"] = table["ms_per_image"].map("{:.1f}".format)
        if table["failed"].any():
            shown["failed"] = table["failed"]
        tuned = "on the reported images (oracle)" if oracle else "on the other half of the images"
        note = (
            f"error: share of boxes with IoU of .5 or less, 95 % bootstrap interval; thresholds "
            f"tuned {tuned}"
        )
        if table["n"].max() < FEW:
            note += f"\nfewer than {FEW} images are too few to rank methods: read the intervals"
        return f"{shown.to_string(index=False)}\n{note}"

    def to_dataframe(
        self, *, protocol: str = "whi2020", oracle: bool = False, first: int | None = None
    ) -> pd.DataFrame:
        """One row for each image, method and attack; with ``first``, only of the first images.

        Columns: ``image``, ``method``, ``attack``, ``label``, ``predicted``, ``explained``,
        ``confidence``, ``iou`` and ``localized`` (at the threshold that the table uses),
        ``x0``…``y1`` (that box, in pixels of the model's input), ``pointing``, ``seconds``,
        ``forward_passes``, ``backward_passes``, ``error``; ``source``, the set of images that the
        map is of (the attack, or a case of it); ``decided``, the class that a defended
        method takes the image for; of methods that perturb the image also
        ``new_class``, ``flipped`` and ``margin``; of attacked images also ``already_wrong``
        (misclassified before), ``fooled`` (right before, and not any more), and the size of the
        change ``linf`` and ``l2`` in pixel units, and how far the map is that of the clean image:
        ``spearman``, ``pearson``, ``ssim``, ``top_k`` and ``box_iou``. Of a run with
        ``saliency_metric``, of clean images ``saliency``, ``crop_area`` and ``crop_probability``,
        at the threshold of :meth:`saliency_table`. Rows that :meth:`table`
        repeats are there once, under the plain attack.
        """
        import pandas as pd

        stop = sys.maxsize if first is None else first
        rows = pd.DataFrame(
            self.select(
                "SELECT r.position, r.image, r.method, r.attack, i.label, r.predicted, r.explained,"
                " r.confidence, r.pointing, r.seconds, r.forward_passes, r.backward_passes,"
                " coalesce(r.source, r.attack) AS source, r.decided, r.new_class, r.flipped,"
                " r.margin, a.already AS already_wrong, a.fooled,"
                f" a.linf, a.l2, {', '.join('r.' + m for m in STABILITY_MEASURES)}, r.error"
                " FROM results r JOIN images i USING (position) LEFT JOIN attacked a"
                " ON a.position = r.position AND a.attack = coalesce(r.source, r.attack)"
                " WHERE r.position < ? ORDER BY r.position, r.attack, r.method",
                (stop,),
            )
        )
        parts = []
        for method in self.methods:
            for attack in self.attacks:
                has_own = self.rows_of(method, attack) == attack
                scored = self._score(method, attack, _Tuning(protocol, oracle)) if has_own else None
                if scored is None:
                    continue
                iou, boxes = self._at_threshold(scored, method, attack, stop)
                part = pd.DataFrame(boxes.numpy(), columns=["x0", "y0", "x1", "y1"])
                part.insert(0, "iou", iou.numpy())
                correct = scored.result.correct
                correct = correct if correct.dim() == 1 else correct[:, 0]
                part["localized"] = correct[: len(iou)].numpy()
                part["position"] = scored.positions[: len(iou)].numpy()
                parts.append(part.assign(method=method, attack=attack))
        if parts:
            rows = rows.merge(pd.concat(parts), how="left", on=["position", "method", "attack"])
        crops = [self._crops_frame(method, oracle, stop) for method in self.methods]
        crops = [part for part in crops if part is not None]
        if crops:
            rows = rows.merge(pd.concat(crops), how="left", on=["position", "method", "attack"])
        return rows

    def _crops_frame(self, method: str, oracle: bool, stop: int) -> pd.DataFrame | None:
        import pandas as pd

        crops = self._crops(method, oracle=oracle)
        if crops is None:
            return None
        frame = pd.DataFrame(
            {
                "position": crops.positions,
                "saliency": crops.tuned.per_sample.numpy(),
                "crop_area": crops.area.numpy(),
                "crop_probability": crops.probability.numpy(),
            }
        )
        return frame[frame["position"] < stop].assign(method=method, attack=CLEAN)

    def failures(self) -> pd.DataFrame:
        """The images that could not be used, and the methods that failed on an image: why."""
        import pandas as pd

        broken = self.select(
            "SELECT image, '(all)' AS method, error FROM images WHERE error IS NOT NULL "
            "ORDER BY position"
        )
        failed = self.select(
            "SELECT r.image, r.method, r.error FROM results r JOIN images i USING (position) "
            "WHERE r.error IS NOT NULL AND i.error IS NULL ORDER BY position, method"
        )
        return pd.DataFrame(broken + failed, columns=["image", "method", "error"])

    def summary(self) -> str:
        """One line: how many images were read, scored, without boxes and broken."""
        counts = self.select(
            "SELECT count(*) AS n, count(error) AS broken, "
            "sum(error IS NULL AND boxes = '[]') AS unboxed FROM images"
        )[0]
        failed = self.select(
            "SELECT count(*) AS n FROM results r JOIN images i USING (position) "
            "WHERE r.error IS NOT NULL AND i.error IS NULL"
        )[0]["n"]
        text = f"{counts['n']} images: {counts['broken']} could not be used, "
        text += f"{counts['unboxed'] or 0} without a box"
        return text + (f"; {failed} maps failed" if failed else "")

    def curves(self, attack: str = CLEAN) -> pd.DataFrame:
        """The error at every threshold: columns ``method``, ``strategy``, ``alpha``, ``error``."""
        import pandas as pd

        rows = []
        for method in self.methods:
            source = self.rows_of(method, attack)
            scored = None if source is None else self._score(method, source, _Tuning())
            for strategy, ious in (scored.ious if scored else {}).items():
                errors = 1 - (ious > 0.5).double().mean(dim=0)
                rows += [
                    {"method": method, "strategy": strategy, "alpha": alpha, "error": float(e)}
                    for alpha, e in zip(alpha_grid(strategy), errors, strict=True)
                ]
        return pd.DataFrame(rows, columns=["method", "strategy", "alpha", "error"])

    def plot(self) -> Figure:
        """Error of each method with its interval, beside error against threshold."""
        from captum_robust.report.plots import plot_comparison

        return plot_comparison(self)

    def plot_attacks(self) -> Figure:
        """Robust accuracy with its interval against the strength, a line an attack."""
        from captum_robust.report.plots import plot_robust_accuracy

        return plot_robust_accuracy(attack_series(self.attack_table()))

    def error_series(self) -> dict[str, pd.DataFrame]:
        """The localization error against the strength of each attack that has several.

        Name of an attack, such as "pgd" or "pgd, adaptive" -> rows of :meth:`table` with the column
        ``epsilon`` in pixel units, weakest first; the clean images are those of strength 0.
        """
        import pandas as pd

        table = self.table()
        if "error" not in table:
            return {}
        clean = table[table["attack"] == CLEAN].assign(epsilon=0.0)
        parts: dict[str, list[pd.DataFrame]] = {}
        for attack in self.attacks[1:]:
            name, levels = strength_of(attack)
            if levels:  # strength 0 is the clean images
                rows = table[table["attack"] == attack].assign(epsilon=levels / LEVELS)
                parts.setdefault(name, []).append(rows)
        series: dict[str, pd.DataFrame] = {}
        for name, blocks in parts.items():
            under = pd.concat(blocks)
            both = pd.concat([clean[clean["method"].isin(under["method"])], under])
            both = both[both["error"].notna()]
            series[name] = both.sort_values("epsilon", kind="stable", ignore_index=True)
        return series

    def plot_errors(self) -> Figure:
        """Localization error against the strength, a panel an attack, a line a method."""
        from captum_robust.report.plots import method_styles, plot_error_series

        return plot_error_series(self.error_series(), method_styles(self))

    def to_html(self, path: str | Path) -> Path:
        """Write the report, one self-contained file, and return its path."""
        from captum_robust.report.page import write_report

        return write_report(self, Path(path))

    @cached_property
    def _class_names(self) -> dict[int, str]:
        return {r["number"]: r["name"] for r in self._store.select("SELECT * FROM classes")}

    def class_name(self, number: int | None) -> str:
        """The name of a class of the model; its number where the model has no names."""
        return "unknown" if number is None else self._class_names.get(number, str(number))

    def _halves(self, seed: int, *, boxed: bool = True) -> dict[int, int]:
        """Position -> fold, for the images (with boxes): halves that all methods share."""
        only = " AND boxes <> '[]'" if boxed else ""
        rows = self._store.select(
            f"SELECT position FROM images WHERE error IS NULL{only} ORDER BY position"
        )
        positions = [row["position"] for row in rows]
        return dict(zip(positions, split_folds(len(positions), seed).tolist(), strict=True))

    def _score(self, method: str, attack: str, tuning: _Tuning) -> _Scored | None:
        if self._scored_rows != (now := self._store.total()):  # the run has gone on since
            self._scored_rows = now
            self._scored.clear()
        key = (method, attack, tuning)
        if key not in self._scored:
            self._scored[key] = self._score_now(*key)
        return self._scored[key]

    def _score_now(self, method: str, attack: str, tuning: _Tuning) -> _Scored | None:
        rows = self._store.select(
            "SELECT position, ious FROM results WHERE method = ? AND attack = ? "
            "AND ious IS NOT NULL ORDER BY position",
            (method, attack),
        )
        positions, packed = [], []
        for row in rows:
            positions.append(row["position"])
            packed.append(unpack(row["ious"]))
        if not positions:
            return None
        sizes = [len(alpha_grid(s)) for s in STRATEGY_ORDER]
        parts = np.split(np.stack(packed), np.cumsum(sizes)[:-1], axis=1)
        every = dict(zip(STRATEGY_ORDER, parts, strict=True))
        ious = {s: torch.from_numpy(every[s]) for s in tuning.strategies}
        halves = self._halves(tuning.seed)
        folds = torch.tensor([halves[p] for p in positions])
        one_sided = bool((folds == folds[0]).all())
        result = localization_error(
            ious, protocol=tuning.protocol, folds=folds, oracle=tuning.oracle or one_sided
        )
        return _Scored(torch.tensor(positions), folds, result, ious)

    def _at_threshold(
        self, scored: _Scored, method: str, attack: str, stop: int
    ) -> tuple[Tensor, Tensor]:
        """The overlap M and the box M×4 at its fold's threshold of each image before ``stop``."""
        before = int((scored.positions < stop).sum())
        chosen = self._chosen_columns(scored)[:before]
        overlaps = torch.cat([ious[:before] for ious in scored.ious.values()], dim=1)
        iou = overlaps.gather(1, chosen[:, None])[:, 0]
        rows = self._store.select(
            "SELECT predicted_boxes FROM results WHERE method = ? AND attack = ? "
            "AND ious IS NOT NULL AND position < ? ORDER BY position",
            (method, attack, stop),
        )
        boxes = [
            unpack(row["predicted_boxes"], np.int16).reshape(-1, 4)[column]
            for row, column in zip(rows, chosen.tolist(), strict=True)
        ]
        stacked = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        return iou, torch.from_numpy(stacked)

    def _chosen_columns(self, scored: _Scored) -> Tensor:
        """M, the column among all families' thresholds that scored each image."""
        index = {name: i for i, name in enumerate(scored.columns)}
        by_fold = [index[chosen[0]] for chosen in scored.result.chosen]
        if len(by_fold) == 1:
            return torch.full((len(scored.positions),), by_fold[0])
        return torch.tensor(by_fold)[scored.folds]

    def _summary(
        self,
        method: str,
        attack: str,
        tuning: _Tuning,
        level: float,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"attack": attack, "method": method, "n": 0, "error": float("nan")}
        scored = self._score(method, attack, tuning)
        if scored is not None:
            fixed = self.configuration["methods"][method] in FIXED_BOXES
            interval = bootstrap_interval(
                scored.result.per_sample_error, level=level, seed=tuning.seed
            )
            chosen = dict.fromkeys(f"{s} {a:g}" for c in scored.result.chosen for s, a in c)
            row |= {
                "n": scored.result.n,
                "error": scored.result.error,
                "error_low": interval.low,
                "error_high": interval.high,
                "tuned": "-" if fixed else "oracle" if scored.result.oracle else "two-fold",
                "threshold": "-" if fixed else ", ".join(chosen),
                "top1_error": self._top1_error(scored, method, attack),
                "maxboxacc": self._maxboxacc(method, attack, "maxboxacc", (0.5,)),
                "maxboxacc_v2": self._maxboxacc(method, attack, "maxboxacc_v2", (0.3, 0.5, 0.7)),
            }
        crops = None
        if attack == CLEAN:
            crops = self._crops(method, oracle=tuning.oracle, seed=tuning.seed)
        if crops is not None:
            found = _interval_of(crops.tuned.per_sample, level, tuning.seed)
            row |= {
                "saliency": found["saliency"],
                "saliency_low": found["low"],
                "saliency_high": found["high"],
                "saliency_n": found["n"],
            }
        row["accuracy"] = self._accuracy(method, attack)
        row["pointing"] = self._pointing(method, attack)
        row["pxap"] = self._pxap(method, attack)
        cost = self.select(
            "SELECT avg(forward_passes) AS forward, avg(backward_passes) AS backward, "
            "1000 * avg(seconds) AS ms_per_image, count(error) AS failed, "
            "avg(flipped) FILTER (WHERE predicted = explained) AS flipped, "
            "nullif(count(flipped) FILTER (WHERE predicted = explained), 0) AS flippable "
            "FROM results WHERE method = ? AND attack = ?",
            (method, attack),
        )[0]
        return row | cost

    def _top1_error(self, scored: _Scored, method: str, attack: str) -> float:
        rows = self._store.select(
            "SELECT i.label, coalesce(r.decided, r.predicted) AS predicted "
            "FROM results r JOIN images i USING (position) "
            "WHERE r.method = ? AND r.attack = ? AND r.ious IS NOT NULL ORDER BY position",
            (method, attack),
        )
        classes = [(row["label"], row["predicted"]) for row in rows]
        known = torch.tensor([label is not None for label, _ in classes])
        right = torch.tensor([label == predicted for label, predicted in classes])
        if not known.any():
            return float("nan")
        error = scored.result.per_sample_error[known]
        return float(torch.where(right[known], error, torch.ones_like(error)).mean())

    def _accuracy(self, method: str, attack: str) -> float:
        found = self.select(
            "SELECT avg(coalesce(r.decided, r.predicted) = i.label) AS accuracy FROM results r "
            "JOIN images i USING (position) WHERE method = ? AND attack = ? "
            "AND i.label IS NOT NULL AND r.predicted IS NOT NULL",
            (method, attack),
        )
        accuracy = found[0]["accuracy"]
        return float("nan") if accuracy is None else float(accuracy)

    def _maxboxacc(
        self, method: str, attack: str, column: str, iou_thresholds: tuple[float, ...]
    ) -> float:
        rows = self._store.select(
            f"SELECT {column} AS curve FROM results WHERE method = ? AND attack = ? "
            f"AND {column} IS NOT NULL ORDER BY position",
            (method, attack),
        )
        ious = torch.from_numpy(np.stack([unpack(row["curve"]) for row in rows]))
        return float(maxboxacc_from_ious(ious, iou_thresholds))

    def _pointing(self, method: str, attack: str) -> float:
        rows = self.select(
            "SELECT r.pointing, i.label FROM results r JOIN images i USING (position) "
            "WHERE r.method = ? AND r.attack = ? AND r.pointing IS NOT NULL",
            (method, attack),
        )
        if not rows:
            return float("nan")
        hits = torch.tensor([row["pointing"] for row in rows])
        if any(row["label"] is None for row in rows):
            return float(pointing_game_accuracy(hits))
        return float(pointing_game_accuracy(hits, torch.tensor([row["label"] for row in rows])))

    def _pxap(self, method: str, attack: str) -> float:
        total: np.ndarray[Any, Any] | None = None
        rows = self._store.select(
            "SELECT pxap FROM results WHERE method = ? AND attack = ? AND pxap IS NOT NULL",
            (method, attack),
        )
        for row in rows:
            counts = unpack(row["pxap"], np.int64).astype(np.float64)
            total = counts if total is None else total + counts
        if total is None or not total.reshape(2, -1)[1].any():  # no mask, or only empty ones
            return float("nan")
        return float(pxap_from_histograms(torch.from_numpy(total).reshape(2, -1)))


def _interval_of(values: Tensor, level: float, seed: int) -> dict[str, float]:
    found = bootstrap_interval(values, level=level, seed=seed)
    return {"n": found.n, "saliency": found.mean, "low": found.low, "high": found.high}


def boxes_of(text: str | None) -> list[list[float]]:
    """The ground-truth boxes of an image row, in fractions of width and height."""
    return json.loads(text) if text else []
