"""Which threshold draws the best boxes of each method, where there are no boxes to tune it on?

Written down before the numbers: each method's threshold is the one that places the boxes of fold 0
of the run best (rule: fewest errors, then the largest mean overlap), its score that of fold 1; the
other way round beside it, and two-fold as ``compare`` does. Nothing else is chosen.

``python studies/thresholds.py RUN …`` prints the table of runs of ``compare``, and writes the file
that is shipped; with ``--add`` its methods stay as they are, and those that it lacks are added.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated

import harness

import captum_robust
from captum_robust.catalog.box_vote import VOTES
from captum_robust.catalog.methods import BASELINES
from captum_robust.catalog.thresholds import shipped_facts
from captum_robust.report.comparison import Comparison
from captum_robust.report.results import Tuning

FILE = Path(captum_robust.__file__).parent / "catalog" / "thresholds.json"


def ship(
    runs: tuple[Path, ...],
    *,
    add: Annotated[bool, "keep the methods of the file, and add those that it lacks"] = False,
) -> None:
    """Choose on fold 0, score on fold 1, and write the file."""
    facts: dict[str, object] = dict(shipped_facts()["methods"]) if add else {}
    kept = (*BASELINES, *VOTES, *facts)
    print(f"{'method':24}{'chosen':>16}{'other half':>11}{'  | the other way':>18}{'two-fold':>18}")
    for run in runs:
        result = Comparison(run)
        model = result.configuration["model"]["name"]
        for method in result.methods:
            if method not in kept:
                facts[method] = chosen(result, method)
    described = {
        "images": "400 photographs of ImageNet's validation images",
        "model": model,
        "date": date.today().isoformat(),
        "methods": dict(sorted(facts.items())),
    }
    FILE.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(f"-> {FILE.name}: {len(facts)} methods")


def chosen(result: Comparison, method: str) -> dict[str, object]:
    """What the file says of a method."""
    scored = result._scoring.score(method, "clean", Tuning(thresholds="two-fold"))
    assert scored is not None
    two_fold = scored.result
    # Fold 1 is scored with what is best on fold 0.
    (forth,), (back,) = two_fold.chosen[1], two_fold.chosen[0]
    misses = two_fold.per_sample_error
    here, there = (float(misses[scored.folds == fold].mean()) for fold in (1, 0))
    n = [int((scored.folds == fold).sum()) for fold in (0, 1)]
    one, other = (f"{family} {alpha:g}" for family, alpha in (forth, back))
    print(f"{method:24}{one:>16}{here:11.3f}  |{other:>15} {there:.3f}{two_fold.error:11.3f}")
    return {
        "strategy": forth[0],
        "alpha": forth[1],
        "n_chosen_on": n[0],
        "error": round(here, 4),
        "n_scored": n[1],
    }


if __name__ == "__main__":
    harness.study(__doc__, ship)
