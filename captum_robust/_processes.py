"""Processes that share a run, the devices they run on, and their progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model runs: its first parameter's or buffer's device, or the CPU."""
    tensors = (t for group in (model.parameters(), model.buffers()) for t in group)
    return next(tensors, torch.empty(0)).device


def world_size() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes, of those that share the batches."""
    return int(os.environ.get("RANK", "0")) == 0


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
        yield bar.update
