"""What a run of attacks says: its table, its text for a terminal, and its curves."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust._checks import printable
from captum_robust._files import write_whole
from captum_robust._plurals import amount
from captum_robust.report.outcomes import attack_series, attack_table, attacks_text, epsilon_of
from captum_robust.report.results import Results

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_FORMULAS = (*"=+-@\t\r\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last in full width
"""How a cell begins that a spreadsheet takes for a formula."""


class AttackRun:
    """The outcome of ``captum_robust.benchmark.attack_images``, read from the folder of its run.

    Args:
        folder: a run's folder; also one whose run was stopped half-way.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(self, folder: str | Path, *, _lazy: bool = False) -> None:
        self.folder = Path(folder)
        self._results = Results(self.folder, lazy=_lazy)
        self.configuration = self._results.configuration
        self.attacks: list[str] = list(self.configuration["attacks"])

    def table(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row an attack, see :meth:`captum_robust.benchmark.Comparison.attack_table`.

        Of a targeted attack ``fooled`` is the share that reached the class aimed at, and
        ``skipped`` are the images that are of it.
        """
        return attack_table(self._results.store, self.attacks, level=level, seed=seed)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each image and attack.

        Columns: ``image``, ``attack``, ``epsilon`` (in pixel units), ``label`` (without one the
        prediction), ``before`` and ``after`` (classes of the model), their names, ``confidence``
        in the class after, ``already_wrong``, ``fooled``, ``skipped``, ``linf`` and ``l2`` (of the
        change, in pixel units), ``without_gradient`` (right before and not fooled, but the
        attack had no gradient to go by), ``file`` (relative to the folder), ``error``.
        """
        import pandas as pd

        rows = self._rows()
        return pd.DataFrame(rows, columns=None if rows else ["image", "attack", "epsilon"])

    def _rows(self) -> list[dict[str, Any]]:
        """Those of the data frame, by image and attack."""
        turns = {attack: i for i, attack in enumerate(self.attacks)}
        rows = self._results.select(
            "SELECT a.image, a.attack, NULL AS epsilon, a.label, a.before, a.predicted AS after, "
            "l.name AS label_name, b.name AS before_name, p.name AS after_name, a.confidence, "
            "a.already AS already_wrong, a.fooled, a.skipped, a.linf, a.l2, a.without_gradient, "
            "a.file, a.error FROM attacked a LEFT JOIN classes l ON l.number = a.label "
            "LEFT JOIN classes b ON b.number = a.before "
            "LEFT JOIN classes p ON p.number = a.predicted ORDER BY a.position"
        )
        named = [dict(row, epsilon=epsilon_of(row["attack"])) for row in rows]
        at = {image: i for i, image in enumerate(dict.fromkeys(row["image"] for row in named))}
        return sorted(named, key=lambda row: (at[row["image"]], turns[row["attack"]]))

    def to_text(self, most: int) -> str:
        """The first rows for a terminal: what became of each image under each attack."""
        import pandas as pd

        rows = [row for row in self._rows() if row["error"] is None]
        left = len(rows) - most
        texts = [
            {
                "image": printable(row["image"]),
                "attack": row["attack"],
                **{which: _class_text(row, which) for which in ("label", "before", "after")},
                "confidence": f"{row['confidence']:.3f}",
                "Linf": f"{255 * row['linf']:.0f}/255",
                "L2": f"{row['l2']:.2f}",
                "outcome": _outcome_text(row),
            }
            for row in rows[:most]
        ]
        text = pd.DataFrame(texts).to_string(index=False) if texts else ""
        return text + (f"\nand {amount(left, 'row')} more, all in the table" if left > 0 else "")

    def table_text(self) -> str:
        """:meth:`table` for a terminal, with a line on what it counts."""
        target = self.configuration["settings"]["target"]
        aimed_at = None if target is None else self._results.class_name(target)
        return attacks_text(self.table(), aimed_at)

    def used(self) -> int:
        """How many images could be read."""
        counts = self._results.counts()
        return counts["read"] - counts["broken"]

    def failures(self) -> list[tuple[str, str]]:
        """Image and error of those that could not be read, and of those whose attack failed."""
        rows = self._results.select(
            "SELECT DISTINCT image, error FROM attacked WHERE error IS NOT NULL ORDER BY position"
        )
        return [(row["image"], row["error"]) for row in rows]

    def summary(self) -> str:
        """One line: how many images were read, and how many could not be used."""
        counts = self._results.counts()
        (files,) = self._results.select("SELECT count(file) AS n FROM attacked")
        broken = f"{counts['broken']} could not be used"
        return f"{amount(counts['read'], 'image')}: {broken}; {amount(files['n'], 'file')} written"

    def plot(self) -> Figure:
        """Robust accuracy with its interval against the strength, a line an attack."""
        from captum_robust.report.plots import plot_robust_accuracy

        return plot_robust_accuracy(attack_series(self.table()))

    def write_csv(self) -> Path:
        """Write :meth:`to_dataframe` as ``attacked.csv`` into the folder.

        Before text that a spreadsheet would take for a formula, for it begins with =, +, -, @, a
        tab or a line break, stands an apostrophe.
        """
        table = self.to_dataframe().apply(lambda column: column.map(_no_formula))
        text = table.to_csv(index=False)
        if "\r" in text:  # part of a name, which pandas quotes only where it ends lines
            text = table.to_csv(index=False, lineterminator="\r\n")
        return write_whole(self.folder / "attacked.csv", text)

    def write_curves(self) -> Path:
        """Write :meth:`plot` as ``curves.png`` into the folder.

        Raises:
            ImportError: matplotlib is missing.
        """
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=120)
        return write_whole(self.folder / "curves.png", buffer.getvalue())


def _no_formula(cell: Any) -> Any:
    """A cell of a table that a spreadsheet runs nothing of."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell


def _class_text(row: Mapping[str, Any], which: str) -> str:
    name = row[f"{which}_name"]
    return printable(str(row[which] if name is None else name))


def _outcome_text(row: Mapping[str, Any]) -> str:
    words = {"already_wrong": "already wrong", "without_gradient": "no gradient"}
    kinds = ("already_wrong", "skipped", "fooled", "without_gradient")
    return next((words.get(kind, kind) for kind in kinds if row[kind]), "-")
