"""What a run says: tables, plots and the report, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

from captum_robust._checks import check, known_name
from captum_robust._plurals import amount
from captum_robust.report.failures import complete_failures
from captum_robust.report.outcomes import attack_series, attack_table
from captum_robust.report.plots import (
    method_styles,
    plot_comparison,
    plot_error_series,
    plot_robust_accuracy,
)
from captum_robust.report.results import (
    CLEAN,
    EVERY,
    NOTHING_SCORED,
    STRATEGY_ORDER,
    Results,
    Tuning,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from captum_robust.report.run_tables import Tables
    from captum_robust.report.scoring import Scoring


class Comparison:
    """The outcome of :func:`compare`, read from the folder of its run.

    Args:
        folder: a run's folder; also one whose run was stopped half-way.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        _keep_alive: TemporaryDirectory[str] | None = None,
        _lazy: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._temporary = _keep_alive  # the folder goes when the comparison goes
        self._results = Results(self.folder, lazy=_lazy)
        self._store = self._results.store
        self.configuration = self._results.configuration
        self.methods = self._results.methods
        self.attacks = self._results.attacks
        self.attacked_sets = self._results.attacked_sets
        """The sets of attacked images that are to change the class: an attack, or a case of it."""

    @cached_property
    def _scoring(self) -> Scoring:
        from captum_robust.report.scoring import Scoring  # with pandas

        return Scoring(self._results)

    def _tables(
        self, protocol: str = "whi2020", oracle: bool = False, thresholds: str | None = None
    ) -> Tables:
        from captum_robust.report.run_tables import Tables

        return Tables(self._scoring, Tuning(protocol, oracle, thresholds))

    def __repr__(self) -> str:
        methods = amount(len(self.methods), "method")
        return f"Comparison({str(self.folder)!r}: {amount(len(self), 'image')}, {methods})"

    def _repr_html_(self) -> str:
        """The table of the methods in a notebook, with n and intervals."""
        from captum_robust.report.notebook import html_of

        return html_of(self._tables(), self.summary())

    def __len__(self) -> int:
        """How many images the run has read so far, broken ones included."""
        return self._results.counts()["read"]

    def rows_of(self, method: str, attack: str) -> str | None:
        """The attack whose rows say how a method does under an attack.

        Itself; of an adaptive attack and a method without a defence, which that does not change,
        the plain one; None where there are no rows, as of an attack on a map that has no gradient.
        """
        return self._results.rows_of(method, attack)

    def select(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of the tables ``images``, ``results`` and ``attacked`` by a query of your own.

        Raises:
            ValueError: it can't be run, or would change them.
        """
        return self._results.store.ask(sql, parameters)

    def table(
        self,
        *,
        protocol: str = "whi2020",
        oracle: bool = False,
        thresholds: str | None = None,
        strategies: Sequence[str] = STRATEGY_ORDER,
        level: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """One row a method and attack, best localization first within each attack.

        Columns: ``n`` scored images; ``error``, the weak localization error in [0, 1], with its
        bootstrap interval ``error_low`` and ``error_high``; ``tuned``, "two-fold" when each half
        of the images was scored with the threshold (family and α) that does best on the other
        half, "shipped" or "pseudo" as below, "usual" for a fifth of the map's range where none
        ships for the method, "oracle" when on itself, "-" for a baseline whose box is fixed;
        ``threshold``, those of the halves; ``top1_error``, where the class must be right too;
        ``maxboxacc``, ``maxboxacc_v2`` (best τ of all on the reported images, as published);
        ``pointing``, accuracy averaged over the classes; ``pxap`` where there are masks;
        ``accuracy``, where a method is defended, the share of the labelled
        images whose class is right (of a defended method that of its averaged scores);
        ``forward`` and ``backward`` classifier passes an image; ``ms_per_image``; ``failed``,
        images without a map. Of a run with ``saliency_metric``, of clean images, ``saliency`` with
        its interval ``saliency_low`` and ``saliency_high`` over ``saliency_n`` images, as in
        :meth:`saliency_table`. Of a run with ``faithfulness``, of clean images, the areas
        ``deletion`` and ``insertion`` of :func:`captum_robust.metrics.functional.removal_curves`
        ``road`` and ``infidelity``, of one with ``sensitivity`` that, of one with
        ``randomization`` ``randomized_spearman`` and ``randomized_ssim``, the means over the stages
        of :func:`captum_robust.metrics.functional.model_randomization`; all with their intervals,
        as in ``deletion_low`` and ``deletion_high``. Of a run with ``certify``, of clean images,
        with intervals: ``smoothed_error``, of the box whose sides are the medians of those of noisy
        copies, at the threshold that ships; for each radius, such as 0.25,
        ``certified_error_0.25``, the share of images whose box is not proven to be right, whatever
        changes the image by at most that, and ``certified_share_0.25`` of the pixels. Of methods
        that perturb the image ``flipped``, the share whose label they changed of the ``flippable``
        images, those whose explained class was the prediction. Of attacked images ``n_right``,
        ``already_wrong``, ``fooled`` and ``robust_accuracy`` as in :meth:`attack_table`, the same
        for all methods that are shown the same images. Of a run with ``adaptive`` also ``same_as``,
        for a method without a defence under an adaptive attack: the plain attack, whose row is
        repeated.

        Args:
            protocol: what counts as a correct box, see
                :func:`~captum_robust.metrics.functional.localization_error`; overlaps are those of
                half-open boxes under every protocol.
            oracle: tune on the very images that are reported.
            thresholds: ``"two-fold"``; ``"shipped"``, those of
                ``captum_robust.catalog.thresholds.shipped_threshold``; ``"pseudo"``, tuned on
                boxes that the other methods agree on, for images without boxes; None: shipped ones
                where fewer than 50 images have a box, else two-fold.
            strategies: the families of thresholds to choose from; one alone gives its own error.
            level: of the interval.
            seed: of the split in two halves and of the bootstrap.
        """
        tuning = Tuning(protocol, oracle, thresholds, tuple(strategies), seed)
        return self._scoring.table(tuning, level)

    def attack_table(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row an attack, whatever the methods; empty without attacks.

        In a row "pgd 2/255, adaptive" it is not the classifier that is fooled, but a defended
        method: the class of the scores averaged over its transforms.

        Columns: ``attack``; ``epsilon``, the strength in pixel units where the name says it, such
        as "pgd 2/255"; ``n`` attacked images; ``clean_accuracy``; ``n_right`` and
        ``already_wrong``, how many of them were classified right and wrong before; ``fooled``, the
        share of the former that the attack fooled; ``robust_accuracy``, the share of all n that
        was right before, was tried by the attack and still is right, with its bootstrap interval
        ``robust_low`` and ``robust_high``; ``linf`` and ``l2``, the mean size of the change of
        those that were right before, in pixel units; ``without_gradient``, how many of those that
        are right the attack could not try, as their gradient was zero or not finite in every step;
        ``unlabelled``, images whose label is not known, for which the
        prediction is the label; ``failed``, images on which the attack failed; ``skipped``, 0.

        Args:
            level: of the interval.
            seed: of the bootstrap.
        """
        return attack_table(self._store, self.attacked_sets, level=level, seed=seed)

    def to_text(
        self, *, protocol: str = "whi2020", oracle: bool = False, thresholds: str | None = None
    ) -> str:
        """The tables for a terminal, with a line on how thresholds were chosen.

        With attacks the first is of the clean images; then what each attack did, and the error of
        each method under each. At the end the most frequent reasons why images or maps failed.
        """
        from captum_robust.report.text import text_of

        return text_of(self._tables(protocol, oracle, thresholds))

    def stability_table(self) -> pd.DataFrame:
        """How far the maps under each attack are those of the clean images: means over images.

        Columns: ``attack`` (the last, "worst", is the mean of each image's lowest value over all
        attacks, where there are several), ``method``, ``n``, ``spearman``, ``pearson``, ``ssim``,
        ``top_k`` and ``box_iou`` as of :func:`captum_robust.metrics.functional.stability`: of the
        largest tenth of the pixels, and of boxes at 0.2 of the map's range. Without baselines whose
        box is fixed, and empty for a run of a version that did not measure it.
        """
        return self._scoring.stability_table()

    def saliency_table(
        self, *, oracle: bool = False, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """How small a crop of the clean images the class survives, best first.

        Columns: ``method``; ``n`` images; ``saliency``, the mean of
        :func:`captum_robust.metrics.functional.saliency_metric` (lower is better, at least -3.0),
        with its bootstrap interval ``low`` and ``high``; ``area`` and ``probability``, the means of
        the share of the image that is cut out and of the explained class's probability there;
        ``tuned`` and ``threshold`` as in :meth:`table`: the threshold of each half of the images is
        that with the best mean on the other half; ``best_crop``, the mean where each image has
        the crop that is best by the metric itself, which no box is needed for. The last but not a
        method, ``"true box"``, is the largest annotated box of the images that have one. Empty for
        a run without ``saliency_metric``.

        Args:
            oracle: tune on the very images that are reported.
            level: of the interval.
            seed: of the split in two halves and of the bootstrap.
        """
        return self._scoring.saliency_table(Tuning(oracle=oracle, seed=seed), level)

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
        return self._scoring.gap_table(baseline, level, seed)

    def error_by_attack(self, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """The error of each method (rows) under each attack (columns, the first one clean).

        Args:
            table: of :meth:`table`; made with its defaults if it is not given.
        """
        return self._scoring.error_by_attack(self.table() if table is None else table)

    @overload
    def to_dataframe(
        self,
        *,
        protocol: str = "whi2020",
        oracle: bool = False,
        first: int | None = None,
        chunksize: None = None,
    ) -> pd.DataFrame: ...

    @overload
    def to_dataframe(
        self, *, protocol: str = "whi2020", oracle: bool = False, chunksize: int
    ) -> Iterator[pd.DataFrame]: ...

    def to_dataframe(
        self,
        *,
        protocol: str = "whi2020",
        oracle: bool = False,
        first: int | None = None,
        chunksize: int | None = None,
    ) -> pd.DataFrame | Iterator[pd.DataFrame]:
        """One row for each image, method and attack; with ``first``, only of the first images.

        With ``chunksize`` an iterator of data frames of so many rows, the last one of what is
        left, as of ``pandas.read_sql``: of a run of any length one of them is in memory.

        Columns: ``image``, ``method``, ``attack``, ``label``, ``predicted``, ``explained``,
        ``confidence``, ``iou`` and ``localized`` (at the threshold that the table uses),
        ``x0``…``y1`` (that box, in pixels of the model's input), ``pointing``, ``seconds``,
        ``forward_passes``, ``backward_passes``, ``error``; ``source``, the set of images that the
        map is of (the attack, or a case of it); ``decided``, the class that a defended
        method takes the image for; of methods that perturb the image also
        ``new_class``, ``flipped`` and ``margin``; of attacked images also ``already_wrong``
        (misclassified before), ``fooled`` (right before, and not any more), ``without_gradient``
        (neither, but the attack had no gradient to go by), and the size of the
        change ``linf`` and ``l2`` in pixel units, and how far the map is that of the clean image:
        ``spearman``, ``pearson``, ``ssim``, ``top_k`` and ``box_iou``. Of a run with
        ``saliency_metric``, of clean images ``saliency``, ``crop_area`` and ``crop_probability``,
        at the threshold of :meth:`saliency_table`; of one with ``faithfulness`` the areas
        ``deletion`` and ``insertion``, ``road`` and ``infidelity``; of one with ``sensitivity``
        that; of one with ``randomization`` ``randomized_spearman`` and ``randomized_ssim``; of one
        with ``certify`` ``smoothed_iou`` and, for each radius, ``certified_iou_0.25``, the least
        overlap that is proven, and ``certified_share_0.25``. Rows
        that :meth:`table` repeats are there once, under the plain attack.

        Raises:
            ValueError: ``chunksize`` is no positive number, or comes with ``first``.
        """
        from captum_robust.report.image_rows import chunks_of_rows, image_rows

        tuning = Tuning(protocol, oracle)
        if chunksize is not None:
            check(first is None, "first and chunksize: give one of them")
            return chunks_of_rows(self._scoring, tuning, chunksize)
        return image_rows(self._scoring, tuning, EVERY if first is None else (0, first))

    def to_parquet(
        self, path: str | Path, *, protocol: str = "whi2020", oracle: bool = False
    ) -> Path:
        """Write the rows of :meth:`to_dataframe` as a Parquet file, and return its path.

        Memory does not grow with the number of images. Classes and positions are whole numbers,
        what is true or false Boolean, all other numbers floating point; what is not known is null.

        Raises:
            ImportError: pyarrow is missing.
            IsADirectoryError: the path is a folder.
            OSError: the file cannot be written; one that was there before stays.
        """
        from captum_robust.report.image_rows import write_parquet

        return write_parquet(self._scoring, Tuning(protocol, oracle), Path(path))

    def failures(self) -> pd.DataFrame:
        """The images that could not be used, and the methods that failed on an image: why."""
        return self._scoring.failures()

    def complete_failures(self) -> list[str]:
        """A sentence for each method that failed on every image, with its most frequent reason.

        One for all methods where no image could be used, or an attack failed on all of them.
        """
        return complete_failures(self._results)

    def left_unscored(self) -> list[str]:
        """A sentence, if no image has a box, so that no map was scored."""
        return [NOTHING_SCORED] if self._results.is_unscored() else []

    def summary(self) -> str:
        """One line: how many images were read, scored, broken, without boxes or a label."""
        counts = self._results.counts()
        text = f"{amount(counts['read'], 'image')}: {counts['broken']} could not be used, "
        text += f"{counts['unboxed']} without a box"
        text += f"; {amount(counts['failed'], 'map')} failed" if counts["failed"] else ""
        without = f"{counts['unlabelled']} without a label: there the prediction is explained"
        unlabelled = [without] if counts["unlabelled"] else []
        return "; ".join([text, *self.left_unscored(), *unlabelled])

    def curves(self, attack: str = CLEAN) -> pd.DataFrame:
        """The error at every threshold: columns ``method``, ``strategy``, ``alpha``, ``error``."""
        return self._scoring.curves(known_name("attack", attack, self.attacks))

    def plot(self) -> Figure:
        """Error of each method with its interval, beside error against threshold."""
        styles = method_styles(self._results.kinds)
        return plot_comparison(self.table(), self.curves(), styles)

    def plot_attacks(self) -> Figure:
        """Robust accuracy with its interval against the strength, a line an attack."""
        return plot_robust_accuracy(attack_series(self.attack_table()))

    def error_series(self) -> dict[str, pd.DataFrame]:
        """The localization error against the strength of each attack that has several.

        Name of an attack, such as "pgd" or "pgd, adaptive" -> rows of :meth:`table` with the column
        ``epsilon`` in pixel units, weakest first; the clean images are those of strength 0.
        """
        return self._scoring.error_series(self.table())

    def plot_errors(self) -> Figure:
        """Localization error against the strength, a panel an attack, a line a method."""
        return plot_error_series(self.error_series(), method_styles(self._results.kinds))

    def to_html(
        self, path: str | Path, *, oracle: bool = False, thresholds: str | None = None
    ) -> Path:
        """Write the report, one self-contained file, and return its path."""
        from captum_robust.report.page import write_report

        return write_report(self._tables(oracle=oracle, thresholds=thresholds), Path(path))

    def class_name(self, number: int | None) -> str:
        """The name of a class of the model; its number where the model has no names."""
        return self._results.class_name(number)
