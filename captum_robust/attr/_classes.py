"""The top classes of each sample, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from captum_robust._captum import TargetType, select_targets
from captum_robust._checks import as_number, check, check_callable, check_count, shape_or_type
from captum_robust._scores import ClassScores, as_target, at_least_float

Ranking = Callable[[Tensor], Tensor]
"""Class scores N×K -> numbers N×K, of which the largest are the top classes."""


def class_weights(k: int | None, weights: str | Sequence[float]) -> list[float]:
    """The weights of the top classes, from the first on; 5 without a ``k``."""
    check_count("k", k, 1, optional=True)
    if isinstance(weights, str):
        message = f"weights: expected 'exponential' or numbers, got {weights!r}"
        check(weights == "exponential", message)
        return [2.0**-i for i in range(1, (5 if k is None else k) + 1)]
    ladder = [as_number(w) for w in weights] if isinstance(weights, Iterable) else []
    finite = bool(ladder) and all(map(math.isfinite, ladder))
    check(finite, f"weights: expected at least one finite number, got {weights!r}")
    check(k in (None, len(ladder)), f"weights: expected k={k} of them, got {len(ladder)}")
    return ladder


def explained(scores: Tensor, target: TargetType) -> tuple[ClassScores, Tensor]:
    """How class scores are read, and the explained class of each sample: without a target the
    predicted one."""
    reading = ClassScores(scores, target)
    classes = reading(scores).argmax(dim=1) if reading.classes is None else reading.classes
    return reading, classes


def top_classes(
    scores: Tensor, target: TargetType, k: int, ranking: Ranking | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scores N×k' of the target and the top classes behind it, and their indices N×k'.

    k' = min(k, K). Scores without classes (N, or N×1 without a target) have no indices. The top
    classes are those of ``ranking(scores)``, if it is given.
    """
    if target is None and scores.reshape(len(scores), -1).shape[1] == 1:
        return scores.reshape(-1, 1), None
    if scores.ndim == 1:
        select_targets(scores, as_target(target))  # raises what Captum raises
    chosen = ClassScores(scores, target)
    scores, first = chosen(scores), chosen.classes
    k = min(k, scores.shape[1])
    ranked = at_least_float(scores.detach())
    if ranking is not None:
        check_callable("ranking", ranking)
        ranked = ranking(ranked)
        got, wanted = shape_or_type(ranked), tuple(scores.shape)
        check(got == wanted, f"ranking: expected numbers {wanted}, got {got}")
    if first is None:
        classes = ranked.topk(k, dim=1).indices
    else:
        first = first.unsqueeze(1)
        others = ranked.scatter(1, first, -math.inf).topk(k - 1, dim=1).indices
        classes = torch.cat([first, others], dim=1)
    return scores.gather(1, classes), classes
