"""What attacks did to the images of a run: counts, shares, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_robust._progress import counted
from captum_robust.catalog.attacks import LEVELS, strength_of
from captum_robust.metrics.functional import bootstrap_interval
from captum_robust.report.results import attacked_rows
from captum_robust.report.tables import ATTACK_COLUMNS, text_table
from captum_robust.runs.store import RunStore

if TYPE_CHECKING:
    import pandas as pd


NOTHING_TO_ATTACK = (
    "the model classifies none of the {} images right, so there is nothing to attack; do the "
    "labels count the model's classes?"
)

NO_GRADIENT = (
    "so many images the attack could not try, as their gradient was zero or not finite in every "
    "step; they do not count as robust"
)


@dataclass(frozen=True)
class AttackSummary:
    """What an attack did to n images. Shares are in [0, 1], sizes in pixel units."""

    n: int
    clean_accuracy: float
    n_right: int
    """Classified right before the attack."""
    already_wrong: int
    """Misclassified before; these count as wrong, and the attack is not credited with them."""
    fooled: float
    """The share of those that were right before which the attack fooled; NaN if none was."""
    robust_accuracy: float
    """The share of all n that was right before, was tried by the attack and still is right."""
    robust_low: float
    robust_high: float
    """Its bootstrap interval over the images."""
    linf: float
    l2: float
    """Mean size of the change of those that were right before."""
    without_gradient: int = 0
    """How many were right before and are not fooled, though the attack had no gradient to go by:
    they do not count as robust."""


def summarize_attack(
    already: Tensor,
    fooled: Tensor,
    linf: Tensor,
    l2: Tensor,
    *,
    lost: Tensor | None = None,
    without_gradient: Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> AttackSummary:
    """Counts, shares and the interval of the robust accuracy.

    Args:
        already: n booleans, misclassified before.
        fooled: n booleans, right before and fooled.
        linf, l2: n, sizes of the change.
        lost: n booleans, right before and not after; None: those that are fooled. A targeted
            attack may lose an image the label without reaching the class aimed at.
        without_gradient: n booleans, right before and not fooled, but the attack had no gradient;
            None: none of them. They do not count as robust.
        level, seed: of the bootstrap.

    >>> no, yes = torch.tensor([False, False, False]), torch.tensor([True, False, False])
    >>> one = summarize_attack(yes, ~yes & torch.tensor([False, True, False]), no + 0.5, no + 2.0)
    >>> one.n, one.already_wrong, one.fooled, round(one.robust_accuracy, 3), one.l2
    (3, 1, 0.5, 0.333, 2.0)
    """
    right = ~already
    n, n_right = len(already), int(right.sum())
    untried = torch.zeros_like(right) if without_gradient is None else without_gradient
    robust = right & ~(fooled if lost is None else lost) & ~untried
    interval = bootstrap_interval(robust.double(), level=level, seed=seed) if n else None

    def mean_of_right(values: Tensor) -> float:
        return float(values.double()[right].mean()) if n_right else math.nan

    return AttackSummary(
        n=n,
        clean_accuracy=n_right / n if n else math.nan,
        n_right=n_right,
        already_wrong=n - n_right,
        fooled=mean_of_right(fooled),
        robust_accuracy=interval.mean if interval else math.nan,
        robust_low=interval.low if interval else math.nan,
        robust_high=interval.high if interval else math.nan,
        linf=mean_of_right(linf),
        l2=mean_of_right(l2),
        without_gradient=int(untried.sum()),
    )


def attack_table(
    store: RunStore, attacks: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """One row for each attack of a run, see :meth:`Comparison.attack_table`."""
    import pandas as pd

    rows = []
    for attack in counted(attacks, "attack", None, "attacks"):
        every = attacked_rows(store, attack)
        done = [row for row in every if row["error"] is None and not row["skipped"]]
        flags = ("already", "fooled", "lost", "without_gradient")
        columns = {f: torch.tensor([bool(row[f]) for row in done], dtype=torch.bool) for f in flags}
        columns |= {size: torch.tensor([row[size] for row in done]) for size in ("linf", "l2")}
        summary = summarize_attack(**columns, level=level, seed=seed)
        rows.append(
            {
                "attack": attack,
                "epsilon": epsilon_of(attack),
                **vars(summary),
                "unlabelled": sum(row["label"] is None for row in done),
                "skipped": sum(bool(row["skipped"]) for row in every),
                "failed": sum(row["error"] is not None for row in every),
            }
        )
    numbers = [field.name for field in fields(AttackSummary)]
    names = ["attack", "epsilon", *numbers, "unlabelled", "skipped", "failed"]
    return pd.DataFrame(rows, columns=names)


def epsilon_of(attack: str) -> float | None:
    """The strength in pixel units that the name of an attack says.

    >>> epsilon_of("pgd 51/255"), epsilon_of("deepfool")
    (0.2, None)
    """
    levels = strength_of(attack)[1]
    return None if levels is None else levels / LEVELS


def attack_series(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of an attack table by attack, weakest first; only of attacks with a strength."""
    rows = table[table["epsilon"].notna()]
    names = rows["attack"].map(lambda name: strength_of(name)[0])
    return {
        str(name): block.sort_values("epsilon", kind="stable")
        for name, block in rows.groupby(names, sort=False)
    }


def attacks_text(table: pd.DataFrame, aimed_at: str | None = None) -> str:
    """An attack table for a terminal, with a line on what it counts.

    Args:
        table: of :func:`attack_table`.
        aimed_at: the class of a targeted attack.
    """
    towards = "" if aimed_at is None else f", and now {aimed_at}"
    note = (
        f"fooled: of those classified right before{towards}; robust accuracy: share of all n "
        "still right, 95 % bootstrap interval;\nLinf, L2: mean change of those right before"
    )
    if unlabelled := int(table["unlabelled"].max()):
        note += f"\nwithout a label: {unlabelled}; there the prediction counts as the label"
    if table["without_gradient"].any():
        note += f"\nno gradient: {NO_GRADIENT}"
    return f"{text_table(table, ATTACK_COLUMNS, ['attack', 'n'])}\n{note}"
