"""Some samples of the batch that are worked on at once, and what the model says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_count
from captum_robust._progress import counted
from captum_robust._scores import (
    FastScores,
    arguments_of,
    finite_scores,
    rows_of,
    target_of,
    two_classes,
)
from captum_robust.attr._classes import Target, numbers_of


@dataclass
class Samples:
    """n samples, and how the model is run on them."""

    forward_func: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    target: Target
    """A function is kept as ``function``: what it gives is the one logit of class 1."""
    arguments: Any
    """Those of the whole batch."""
    first: int
    """The number of the first sample in the caller's batch."""
    whole: int
    """How many samples the caller's batch has."""
    function: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if callable(self.target):
            self.function, self.target = self.target, 1
        self.n = len(self.inputs[0])
        self.everyone = list(range(self.n))
        # On the CPU, convolutions run some 20 % faster on channels_last.
        on_cpu = all(x.device.type == "cpu" for x in self.inputs)
        self.model = FastScores(self.forward_func, channels_last=on_cpu)

    def run(self, inputs: Iterable[Tensor], rows: list[int]) -> Tensor:
        """The model's output for copies of inputs, which stand for the samples ``rows``.

        One logit a sample is read as two classes.
        """
        places = [self.first + row for row in rows]
        scores = self.model.run(inputs, arguments_of(self.arguments, places, self.whole))
        if self.function is not None:
            scores = numbers_of(self.function, scores, finite=False)
        read: Tensor = two_classes(scores, len(rows))
        return read.to(self.inputs[0].device)  # a network may lie on several devices

    def checked_scores(self, scores: Tensor, purpose: str, copies: int = 1) -> Tensor:
        """Scores of the samples, or of copies of all, finite and of two classes or more."""
        scores = finite_scores(scores, self.n, copies=copies, first_sample=self.first)
        wanted, got = "scores N×K of at least two classes", tuple(scores.shape)
        message = f"forward_func: {purpose} needs {wanted}, got {got}"
        check(scores.ndim > 1 and scores.shape[1] > 1, message)
        return scores

    def check_not_constant(self, scores: Tensor, bounds: tuple[float, float] | None) -> None:
        """``ValueError`` where the scores are the same elsewhere within the bounds.

        Elsewhere is near and far away, by noise and all one way: a ReLU that is dead here, and
        around here, wakes up somewhere.
        """
        generator = torch.Generator().manual_seed(0)
        elsewhere = []
        for x in self.inputs:
            noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
            ways = [far * way for far in (1, 100) for way in (noise, 1, -1)]
            moved = torch.cat([x + (1 + x.abs().max()) * way for way in ways])
            elsewhere.append(moved if bounds is None else moved.clamp(*bounds))
        with torch.no_grad():
            others = self.run(elsewhere, self.everyone * len(ways))
        is_constant = all(torch.equal(scores, each) for each in torch.split(others, self.n))
        check(
            not is_constant, "forward_func: its scores are constant; they do not change with inputs"
        )


def in_batches(
    samples: Samples, size: int | None, explain: Callable[[Samples], tuple[tuple[Tensor, ...], Any]]
) -> tuple[Iterator[Tensor], Any]:
    """The attributions and the details that ``explain`` gives, of all samples.

    It is given ``size`` samples at a time; None: all at once.
    """
    n = samples.n
    size = n if size is None else size
    check_count("internal_batch_size", size, 1)
    results = []
    with torch.inference_mode(False), torch.enable_grad():
        for first in counted(range(0, n, size), "batch", None, "attribution"):
            rows = list(range(first, min(n, first + size)))
            inputs = tuple(rows_of(x.detach(), rows, n) for x in samples.inputs)
            target = target_of(samples.target, rows, n)
            results.append(explain(replace(samples, inputs=inputs, target=target, first=first)))
    attributions, details = zip(*results, strict=True)
    fields = zip(*(vars(each).values() for each in details), strict=True)
    whole = (torch.cat(parts).contiguous() for parts in zip(*attributions, strict=True))
    return whole, type(details[0])(*map(torch.cat, fields))
