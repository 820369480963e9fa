"""The top classes of each sample, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from captum_robust._captum import TargetType, select_targets
from captum_robust._checks import (
    as_number,
    check,
    check_callable,
    check_count,
    check_finite,
    shape_or_type,
)
from captum_robust._scores import ClassScores, as_target, at_least_float

Target: TypeAlias = TargetType | Callable[[Tensor], Tensor]
"""What is explained: a class in each form that Captum takes, or a function of the scores."""
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


def explained(scores: Tensor, target: Target) -> tuple[ClassScores, Tensor]:
    """How class scores are read, and the explained class of each sample: without a target the
    predicted one.

    Raises:
        ValueError: the target is a function.
    """
    refusal = "expected a class, which is weighed against the others, got a function"
    check(not callable(target), f"target: {refusal}")
    reading = ClassScores(scores, target)
    classes = reading(scores).argmax(dim=1) if reading.classes is None else reading.classes
    return reading, classes


def numbers_of(function: Callable[[Tensor], Any], scores: Tensor, *, finite: bool = True) -> Tensor:
    """The N numbers that a target which is a function makes of the scores of N samples.

    Raises:
        ValueError: it gives something else; where they have to be ``finite``, NaN or infinity.
    """
    n, numbers = len(scores), function(scores)
    fits = isinstance(numbers, Tensor) and numbers.shape in ((n,), (n, 1))
    wanted = f"{n} numbers of the scores of {n} samples"
    check(fits, f"target: expected a function that gives {wanted}, got {shape_or_type(numbers)}")
    if finite:
        check_finite(numbers, "target, numbers")
    return numbers.reshape(n)  # type: ignore[no-any-return]


class ExplainedScore:
    """Reads the explained number out of scores of any of N samples.

    It is the score of a class, without a target that of the predicted one, or what the function
    makes of the scores.
    """

    def __init__(self, scores: Tensor, target: Target) -> None:
        self._function: Callable[[Tensor], Tensor] | None = None
        if callable(target):
            self._function = target
            numbers_of(target, scores)
        elif target is None and scores.reshape(len(scores), -1).shape[1] == 1:
            self._function = Tensor.flatten
        else:
            if scores.ndim == 1:
                select_targets(scores, as_target(target))  # raises what Captum raises
            self._reading, self._classes = explained(scores, target)

    def __call__(self, scores: Tensor, rows: list[int]) -> Tensor:
        """n numbers of the scores of n samples, ``rows`` of all."""
        if self._function is not None:
            return numbers_of(self._function, scores)
        classes = self._classes[rows].to(scores.device)
        return self._reading(scores, rows).gather(1, classes.unsqueeze(1)).squeeze(1)


def top_classes(
    scores: Tensor, target: Target, k: int, ranking: Ranking | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scores N×k' of the target and the top classes behind it, and their indices N×k'.

    k' = min(k, K). Scores without classes (N, or N×1 without a target) have no indices, nor has
    what a target which is a function makes of them. The top classes are those of
    ``ranking(scores)``, if it is given.
    """
    if callable(target):
        return numbers_of(target, scores).unsqueeze(1), None
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
