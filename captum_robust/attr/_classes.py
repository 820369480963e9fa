"""The top classes of each sample, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from captum_robust._captum import TargetType, select_targets
from captum_robust._checks import as_number, check_count
from captum_robust._scores import ClassScores

Ranking = Callable[[Tensor], Tensor]
"""Class scores N×K -> numbers N×K, of which the largest are the top classes."""


def class_weights(k: int | None, weights: str | Sequence[float]) -> list[float]:
    if k is not None:
        check_count("k", k, 1)
    if isinstance(weights, str):
        if weights != "exponential":
            raise ValueError(f"weights: expected 'exponential' or numbers, got {weights!r}")
        return [2.0**-i for i in range(1, (5 if k is None else k) + 1)]
    ladder = [as_number(w) for w in weights] if isinstance(weights, Iterable) else []
    if not ladder or not all(math.isfinite(w) for w in ladder):
        raise ValueError(f"weights: expected at least one finite number, got {weights!r}")
    if k is not None and k != len(ladder):
        raise ValueError(f"weights: expected k={k} of them, got {len(ladder)}")
    return ladder


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
        select_targets(scores, target)  # raises what Captum raises
    chosen = ClassScores(scores, target)
    scores, first = chosen(scores), chosen.classes
    k = min(k, scores.shape[1])
    ranked = scores.detach()
    if ranking is not None:
        if not callable(ranking):
            raise TypeError(f"ranking: expected a function, got {type(ranking).__name__}")
        ranked = ranking(ranked)
        if not isinstance(ranked, Tensor) or ranked.shape != scores.shape:
            got = tuple(ranked.shape) if isinstance(ranked, Tensor) else type(ranked).__name__
            raise ValueError(f"ranking: expected numbers {tuple(scores.shape)}, got {got}")
    if first is None:
        classes = ranked.topk(k, dim=1).indices
    else:
        first = first.unsqueeze(1)
        others = ranked.scatter(1, first, -math.inf).topk(k - 1, dim=1).indices
        classes = torch.cat([first, others], dim=1)
    return scores.gather(1, classes), classes
