"""What is known of explained images while the rest is measured beside the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_robust._contexts import owned
from captum_robust.benchmark.batches import Batch, Batches, Columns
from captum_robust.benchmark.beside import Pool
from captum_robust.benchmark.reading import Loaded
from captum_robust.runs.machine import is_of_machine
from captum_robust.runs.rows import ResultRow

Measuring: TypeAlias = list[Future[list[dict[str, Any]]]]
"""Columns of each image that are measured beside the model, part by part of a batch."""


def joined(parts: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All columns of each image."""
    return [dict(chain.from_iterable(map(dict.items, row))) for row in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Explained:
    """The columns of the images of a batch, and those that are still measured."""

    batch: Batch
    known: list[dict[str, Any]]
    coming: list[Measuring]

    def columns(self) -> Columns:
        """All of them, when they are there."""
        measured = ([row for part in parts for row in part.result()] for parts in self.coming)
        rows = joined([self.known, *measured])
        return dict(zip(self.batch, rows, strict=True))


@dataclass(frozen=True)
class MethodResults:
    """The rows of a method on a batch of positions under an attack."""

    method: str
    attack: str
    made: list[Explained]
    failed: Columns
    again: Callable[[Batch], Columns]
    """Makes the columns of a batch on which measuring fails."""

    def is_ready(self) -> bool:
        """Whether nothing of them is still measured."""
        return all(part.done() for one in self.made for part in chain.from_iterable(one.coming))

    def results(self) -> list[ResultRow]:
        """All of them, when they are there."""
        return self._rows

    @cached_property
    def _rows(self) -> list[ResultRow]:
        columns = dict(self.failed)
        for one in self.made:
            try:
                columns |= one.columns()
            except Exception as error:
                if is_of_machine(error):
                    raise
                columns |= self.again(one.batch)
        return [
            ResultRow(item.position, self.method, self.attack, item.image, **row)
            for item, row in columns.items()
        ]


@dataclass(frozen=True)
class Work:
    """What several methods need of one batch of positions, computed once."""

    start: int
    clean: Batches
    pool: Pool
    clean_rows: dict[str, MethodResults] = field(default_factory=dict)
    """By method."""
    clean_maps: dict[str, dict[Loaded, Tensor]] = field(default_factory=dict)
    """By method and by image, H×W."""
    decisions: dict[tuple[str, str], dict[Loaded, tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )
    """By attack and transforms, and by image: class and probability."""
    drops: dict[tuple[Loaded, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By image and explained class: the removed squares, and what each of them takes."""


def is_compiled(model: nn.Module) -> bool:
    """Whether passes for scores run other code than those of methods, which need hooks."""
    return any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
    )


@contextmanager
def scores_seen(model: nn.Module, images: Tensor) -> Iterator[list[Tensor]]:
    """It is given a list, which gets the scores of each pass of the images through the model."""
    seen: list[Tensor] = []

    def on_pass(_: nn.Module, given: tuple[Any, ...], scores: Any) -> None:
        if len(given) == 1 and torch.equal(given[0], images):
            seen.append(scores.detach().clone())

    handle = model.register_forward_hook(owned(on_pass))
    try:
        yield seen
    finally:
        handle.remove()


def now(device: torch.device) -> float:
    """Seconds of the clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
