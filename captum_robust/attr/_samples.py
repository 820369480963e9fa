"""Some samples of the batch that are worked on at once, and what the model says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import check, check_count, check_finite
from captum_robust._scores import arguments_of, model_scores, one_row_a_sample, rows_of, target_of

T = TypeVar("T")


@dataclass
class Samples:
    """n samples, and how the model is run on them."""

    forward_func: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    target: TargetType
    arguments: Any
    """Those of the whole batch."""
    first: int
    """The number of the first sample in the caller's batch."""
    whole: int
    """How many samples the caller's batch has."""

    def __post_init__(self) -> None:
        self.n = len(self.inputs[0])
        # On the CPU, convolutions run some 20 % faster on channels_last.
        self.channels_last = all(x.device.type == "cpu" for x in self.inputs)

    def run(self, inputs: Iterable[Tensor], rows: list[int]) -> Tensor:
        """The model's output for copies of inputs, which stand for the samples ``rows``."""
        copies = tuple(x.clone(memory_format=self._layout(x)) for x in inputs)
        places = [self.first + row for row in rows]
        return model_scores(
            self.forward_func, copies, arguments_of(self.arguments, places, self.whole)
        )

    def _layout(self, x: Tensor) -> torch.memory_format:
        is_last = self.channels_last and x.ndim == 4
        return torch.channels_last if is_last else torch.contiguous_format

    def in_fitting_layout(self, run: Callable[[], T]) -> T:
        """What ``run`` returns, without channels_last where the model does not take that."""
        try:
            return run()
        except RuntimeError:
            if not self.channels_last:
                raise
            # A model that calls view() on a channels_last tensor.
            self.channels_last = False
            return run()

    def checked_scores(self, scores: Tensor, count: int, purpose: str) -> Tensor:
        """Scores of ``count`` samples, or copies of samples, finite and of two classes or more."""
        scores = one_row_a_sample(scores, count)
        for part in torch.split(scores, self.n):
            check_finite(part, "forward_func, scores", self.first)
        wanted, got = "scores N×K of at least two classes", tuple(scores.shape)
        message = f"forward_func: {purpose} needs {wanted}, got {got}"
        check(scores.ndim > 1 and scores.shape[1] > 1, message)
        return scores

    def check_not_constant(self, scores: Tensor, elsewhere: Tensor) -> None:
        """``ValueError`` where the scores of other inputs are the same."""
        message = "forward_func: its scores are constant; they do not change with inputs"
        check(not torch.equal(scores, elsewhere), message)


def in_batches(
    forward_func: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target: TargetType,
    arguments: Any,
    size: int | None,
) -> Iterator[Samples]:
    """The samples, ``size`` at a time; None: all at once."""
    n = len(inputs[0])
    size = n if size is None else size
    check_count("internal_batch_size", size, 1)
    for first in range(0, n, size):
        rows = list(range(first, min(n, first + size)))
        own = tuple(rows_of(x.detach(), rows, n) for x in inputs)
        yield Samples(forward_func, own, target_of(target, rows, n), arguments, first, n)


def joined(results: Iterable[tuple[tuple[Tensor, ...], Any]]) -> tuple[Iterator[Tensor], Any]:
    """The attributions and the details of all batches, tensor by tensor along the samples."""
    attributions, details = zip(*results, strict=True)
    fields = zip(*(vars(each).values() for each in details), strict=True)
    whole = (torch.cat(parts).contiguous() for parts in zip(*attributions, strict=True))
    return whole, type(details[0])(*map(torch.cat, fields))
