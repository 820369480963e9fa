"""Does a box that several methods vote for place an object better than the box of one of them?

Written down before the numbers. Maps were averaged and multiplied before; here boxes are, which
carry how far each method thinks that the object reaches. Of a finished run of ``compare`` on
annotated photographs: each method's box at the threshold chosen on the other half of the images,
and of a set of methods

- the coordinate-wise mean and median of their boxes,
- the box that overlaps the others most (the medoid),
- the mean after the threshold of each method was chosen for the fused box, coordinate by
  coordinate, starting from its own (two rounds).

The sets are all pairs and triples of the run's methods that place boxes no worse than Grad-CAM,
with ``real_time_masking`` in them, and all of those. Set and way are chosen on one half (fewest
errors), and scored on the other, both ways; one alone is among the choices.

``python studies/box_fusion.py RUN``
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import harness
import torch
from torch import Tensor

from captum_robust.metrics.functional import best_iou
from captum_robust.report.comparison import Comparison
from captum_robust.report.pseudo_boxes import agreed_boxes, drawn_boxes

MAIN, NEIGHBOUR = "real_time_masking", "grad_cam"
WAYS = ("mean", "median", "medoid", "joint")
Boxes = dict[str, Tensor]


def fused(boxes: Tensor, way: str) -> Tensor:
    """N×4 of N×M×4."""
    if way == "median":
        return boxes.median(dim=1).values
    return agreed_boxes(boxes) if way == "medoid" else boxes.mean(dim=1)


def right(boxes: Tensor, truth: list[Tensor]) -> Tensor:
    """N, whether each box N×4 is right."""
    return best_iou(boxes[:, None], truth)[:, 0] > 0.5


def best_columns(drawn: Boxes, names: tuple[str, ...], truth: list[Tensor], half: Tensor) -> Boxes:
    """The boxes of each method, at the thresholds that are best for their mean on a half."""
    columns = {}
    for name in names:
        hits = best_iou(drawn[name], truth)[half]
        columns[name] = int(((hits > 0.5).sum(dim=0) + hits.mean(dim=0)).argmax())
    for _ in range(2):
        for name in names:
            others = [drawn[m][:, columns[m]] for m in names if m != name]
            mean = (sum(others)[:, None] + drawn[name]) / len(names)  # type: ignore[index]
            hits = best_iou(mean, truth)[half]
            columns[name] = int(((hits > 0.5).sum(dim=0) + hits.mean(dim=0)).argmax())
    return {name: drawn[name][:, columns[name]] for name in names}


def fusion(run: Path) -> None:
    """Choose a set of methods and a way on one half, score on the other."""
    result = Comparison(run)
    results, scoring = result._results, result._scoring
    compared = [m for m in results.compared if m not in results.fixed_boxes]
    scored = {m: scoring.score(m, "clean") for m in compared}
    positions = sorted(set.intersection(*(set(s.positions) for s in scored.values() if s)))
    folds = torch.zeros(0)
    drawn: Boxes = {}
    single: Boxes = {}
    for method, one in scored.items():
        assert one is not None
        rows = {r["position"]: r for r in results.measured(method, "clean", "predicted_boxes")}
        drawn[method] = drawn_boxes([rows[p] for p in positions])
        places = torch.tensor([one.positions.index(p) for p in positions])
        columns = one.columns()[places]
        single[method] = drawn[method][torch.arange(len(places)), columns]
        folds = one.folds[places]
    size = torch.tensor(result.configuration["model"]["input_size"][::-1] * 2)
    truth = [torch.tensor(results.image(p)["boxes"]).view(-1, 4) * size for p in positions]
    errors = {m: 1 - right(b, truth).double().mean() for m, b in single.items()}
    good = [m for m in compared if errors[m] <= errors[NEIGHBOUR] and m != MAIN]
    sets = [(MAIN, *more) for n in (1, 2) for more in combinations(good, n)]
    sets += [(MAIN, *good)] if len(good) > 2 else []
    tried: dict[tuple[str, ...], Tensor] = {(MAIN,): right(single[MAIN], truth)}
    for names in sets:
        stacked = torch.stack([single[m] for m in names], dim=1)
        for way in WAYS:
            if way == "medoid" and len(names) < 3:
                continue
            if way != "joint":
                tried[(way, *names)] = right(fused(stacked, way), truth)
                continue
            hits = torch.zeros(len(positions), dtype=torch.bool)
            for fold in (0, 1):
                own = best_columns(drawn, names, truth, folds != fold)
                mean = torch.stack(list(own.values()), dim=1).mean(dim=1)
                hits[folds == fold] = right(mean, truth)[folds == fold]
            tried[(way, *names)] = hits
    print(f"n={len(positions)}, error of each alone at two-fold thresholds:")
    for method, error in sorted(errors.items(), key=lambda one: one[1]):
        print(f"  {method:24}{error:.3f}")
    print("all that was tried, error on all images (thresholds two-fold):")
    for choice, hits in sorted(tried.items(), key=lambda one: -one[1].double().mean())[:12]:
        print(f"  {1 - hits.double().mean():.3f}  {' '.join(choice)}")
    missed = torch.zeros(len(positions), dtype=torch.float64)
    for fold in (0, 1):
        chosen = max(tried, key=lambda c: tried[c][folds != fold].double().mean())
        missed[folds == fold] = 1 - tried[chosen][folds == fold].double()
        here = missed[folds == fold].mean()
        print(f"chosen on half {1 - fold}: {' '.join(chosen)}; on half {fold}: {here:.3f}")
    alone = 1 - tried[(MAIN,)].double()
    print(f"both ways: {harness.mean(missed)}; less {MAIN}: {harness.difference(missed, alone)}")


if __name__ == "__main__":
    harness.study(__doc__, fusion)
