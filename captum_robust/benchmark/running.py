"""What every run over a data set needs: checks of its settings, processes, a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from captum_robust.benchmark.batches import FITS, PRECISIONS, SampleSource
from captum_robust.models import Classifier


def check_classifier(model: Any) -> None:
    """``TypeError`` that says how to make one."""
    if not isinstance(model, Classifier):
        raise TypeError(
            f"model: expected a captum_robust.models.Classifier, got {type(model).__name__}; "
            "wrap yours with Classifier(module, mean, std, input_size)"
        )


def check_settings(
    dataset: SampleSource, limit: int | None, batch_size: int, fit: str, precision: str
) -> int:
    """How many samples a run has; ``ValueError`` for what is out of range."""
    check_choice("fit", fit, FITS)
    check_choice("precision", precision, PRECISIONS)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value is True or value < 1):
            raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise ValueError("dataset: it has no samples")
    return count


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """``ValueError`` for another value."""
    if value not in valid:
        raise ValueError(f"{name}: expected one of {tuple(valid)}, got {value!r}")


def world_size() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Rank and number of processes under ``torchrun``; leaves together, when all have finished."""
    if world_size() == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")  # only a barrier: no tensor is exchanged
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def progress_bar(total: int | None, unit: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with how much more is done; the bar goes to standard error."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=not show, smoothing=0.05) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance
