"""Which threshold draws the best boxes of each method, where there are no boxes to tune it on?

Written down before the numbers: each method's threshold is the one that places the boxes of fold 0
best (rule: the smallest mean error over the classifiers, then the largest mean overlap), its scores
are those of fold 1, classifier by classifier; the other way round beside it, and what the first
classifier alone would have chosen. Nothing else is chosen.

``python studies/thresholds.py RUN …`` prints the table of runs of ``compare``, of one classifier or
of several on the same images, and writes the file that is shipped; with ``--keep`` the methods of
the file that the runs lack stay in it.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import harness
import numpy as np
import torch
from torch import Tensor

import captum_robust
from captum_robust.catalog.box_vote import VOTES
from captum_robust.catalog.methods import BASELINES
from captum_robust.catalog.thresholds import shipped_facts
from captum_robust.metrics.functional import alpha_grid
from captum_robust.report.comparison import Comparison
from captum_robust.report.results import STRATEGY_ORDER, Tuning
from captum_robust.runs.store import unpack

FILE = Path(captum_robust.__file__).parent / "catalog" / "thresholds.json"
THRESHOLDS = [(family, alpha) for family in STRATEGY_ORDER for alpha in alpha_grid(family)]


def ship(
    runs: tuple[Path, ...],
    *,
    keep: Annotated[bool, "keep the methods of the file that the runs lack"] = False,
) -> None:
    """Choose on fold 0, score on fold 1, and write the file."""
    by_method: dict[str, list[Comparison]] = {}
    for result in map(Comparison, runs):
        for method in result.methods:
            if method not in (*BASELINES, *VOTES):
                by_method.setdefault(method, []).append(result)
    facts: dict[str, Any] = dict(shipped_facts()["methods"]) if keep else {}
    print("method, threshold, errors on the other half of the images | the other way round")
    facts |= {method: chosen(method, results) for method, results in by_method.items()}
    described = {
        "images": "400 photographs of ImageNet's validation images",
        "date": date.today().isoformat(),
        "methods": dict(sorted(facts.items())),
    }
    FILE.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(f"-> {FILE.name}: {len(facts)} methods")


def chosen(method: str, results: list[Comparison]) -> dict[str, Any]:
    """What the file says of a method."""
    halves = [in_halves(result, method) for result in results]
    ways = []
    for here, there in ((0, 1), (1, 0)):
        best, first = best_of([half[here] for half in halves]), best_of([halves[0][here]])
        errors = [[error_at(half[there], at) for half in halves] for at in (best, first)]
        ways.append((THRESHOLDS[best], *errors))
    said = [
        f"{f'{family} {alpha:g}':16}{numbers(errors)} (first alone {numbers(alone)})"
        for (family, alpha), errors, alone in ways
    ]
    print(f"{method:24}" + " | ".join(said))
    (family, alpha), errors, _ = ways[0]
    return {
        "strategy": family,
        "alpha": alpha,
        "models": [result.configuration["model"]["name"] for result in results],
        "n_chosen_on": len(halves[0][0]),
        "errors": [round(error, 4) for error in errors],
        "n_scored": len(halves[0][1]),
    }


def numbers(errors: list[float]) -> str:
    """The errors of the classifiers in a line."""
    return " ".join(f"{error:.3f}" for error in errors)


def in_halves(result: Comparison, method: str) -> tuple[Tensor, Tensor]:
    """The overlaps of the boxes of fold 0, and of fold 1, at each threshold."""
    scored = result._scoring.score(method, "clean", Tuning(thresholds="two-fold"))
    rows = result._results.measured(method, "clean", "ious")
    assert scored is not None
    overlaps = torch.from_numpy(np.stack([unpack(row["value"]) for row in rows])).double()
    return overlaps[scored.folds == 0], overlaps[scored.folds == 1]


def best_of(halves: list[Tensor]) -> int:
    """Which threshold places boxes best, on average over classifiers."""
    errors = torch.stack([(half <= 0.5).double().mean(dim=0) for half in halves]).mean(dim=0)
    overlap = torch.stack([half.mean(dim=0) for half in halves]).mean(dim=0)
    return min(range(len(THRESHOLDS)), key=lambda at: (errors[at].item(), -overlap[at].item()))


def error_at(overlaps: Tensor, at: int) -> float:
    """The share of boxes with an overlap of .5 or less at one threshold."""
    return (overlaps[:, at] <= 0.5).double().mean().item()


if __name__ == "__main__":
    harness.study(__doc__, ship)
