"""The page of the demonstration: pictures first, then a short table, then what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_robust._files import write_whole
from captum_robust.draw import PREDICTED_COLOR, TRUTH_COLOR
from captum_robust.report.image_rows import image_rows
from captum_robust.report.page import page_template
from captum_robust.report.pictures import Pictured, build_matrix
from captum_robust.report.results import CLEAN, Results
from captum_robust.report.scoring import Scoring

LEVELS_CHANGED = 2
ATTACKED = f"pgd {LEVELS_CHANGED}/255"
DEFENDED = f"{ATTACKED}, jpeg"
STATES = {
    CLEAN: "clean",
    ATTACKED: f"attacked: PGD, {LEVELS_CHANGED}/255",
    DEFENDED: "attacked, defended by JPEG",
}
"""The sets of images of the run, in words."""

NEXT = (
    ("your own photographs", "captum-robust explain PHOTOS --methods robust_cam,box_vote_fast"),
    ("where the objects are", "captum-robust locate PHOTOS"),
    ("a report on your images", "captum-robust compare folder PHOTOS --attack pgd"),
    ("all methods on these seven", "captum-robust demo --all"),
)
"""What to do next, and the command."""


@dataclass(frozen=True)
class DemoRow:
    """How many boxes of a method miss, in each state; None where nothing was scored."""

    name: str
    misses: list[int | None]


class Demo:
    """The run of the demonstration, read.

    Args:
        folder: of the run.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(self, folder: Path) -> None:
        self.results = Results(folder)
        self.scoring = Scoring(self.results)
        self.frame = image_rows(self.scoring)
        self.n = len(self.results.pictured())

    def table(self) -> list[DemoRow]:
        """A row for each method of the run that is no baseline."""
        rows = []
        for method in self.results.compared:
            every = [self.scoring.score(method, state) for state in STATES]
            misses = [None if s is None else int(s.result.per_sample_error.sum()) for s in every]
            rows.append(DemoRow(self.results.words[method], misses))
        return rows

    def right(self) -> list[int]:
        """How many images the classifier gets right, in each state."""
        seen = self.frame.drop_duplicates(["image", "attack"])
        is_right = seen[seen["label"] == seen["predicted"]]["attack"]
        return [int((is_right == state).sum()) for state in STATES]

    def facts(self) -> dict[str, Any]:
        """The short table, as JSON takes it."""
        misses = {row.name: dict(zip(STATES, row.misses, strict=True)) for row in self.table()}
        right = dict(zip(STATES, self.right(), strict=True))
        return {"photographs": self.n, "classifier_right": right, "misses": misses}

    def to_text(self) -> str:
        """The short table for a terminal, and what to do next."""
        rows = [("", *STATES.values()), ("classifier right", *self.right())]
        rows += [(f"{row.name} misses", *row.misses) for row in self.table()]
        cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in cells
        ]
        lines += ["", f"of {self.n} photographs each: n = {self.n} ranks nothing", ""]
        length = max(len(what) for what, _ in NEXT)
        lines += [f"{what + ':':<{length + 1}} {command}" for what, command in NEXT]
        return "\n".join(lines)

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all, and return its path."""
        html = page_template("demo.html.j2").render(self._content())
        return write_whole(path, html.encode("utf-8", errors="replace"))

    def _content(self) -> dict[str, Any]:
        entries: list[Pictured] = build_matrix(self.results, self.frame, list(STATES))
        return {
            "model": self.results.configuration["model"]["name"],
            "states": STATES,
            "methods": [self.results.words[m] for m in self.results.compared],
            "entries": entries,
            "table": self.table(),
            "right": self.right(),
            "n": self.n,
            "next": NEXT,
            "colors": {"truth": TRUTH_COLOR, "predicted": PREDICTED_COLOR},
        }
