"""Processes that share a run, and the devices they run on."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_LONGEST_WAIT = timedelta(days=365)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model runs: its first parameter's or buffer's device, or the CPU."""
    tensors = (t for group in (model.parameters(), model.buffers()) for t in group)
    return next(tensors, torch.empty(0)).device


def world_size() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes ``torchrun`` started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among those that ``torchrun`` started on all machines."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that prints and writes, of those that share the batches."""
    return rank() == 0


def begin_worker(_: int) -> None:
    """What a process that loads images does first.

    Ctrl-C, which a terminal sends to all, is left to the process that it works for. In the files
    that a forked one finds open for reading it gets a place of its own: where a data set has opened
    one before, as most do at their first image, workers would else read from each other's places.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    opened = Path("/proc/self/fd")  # of Linux, the only system that forks by itself
    for number in [int(link.name) for link in opened.iterdir()] if opened.is_dir() else ():
        with suppress(OSError):  # that one has listed the folder
            _reopen(number, opened / str(number))


def _reopen(number: int, link: Path) -> None:
    import fcntl

    is_file = stat.S_ISREG(os.fstat(number).st_mode)
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    if not is_file or flags & os.O_ACCMODE != os.O_RDONLY:
        return
    own = os.open(link, flags)
    os.lseek(own, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
    os.dup2(own, number, inheritable=os.get_inheritable(number))
    os.close(own)


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Rank and number of processes under ``torchrun``; leaves together, when all have finished.

    Raises:
        ConnectionError: another process has ended before it had finished.
    """
    if world_size() == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    mine = not dist.is_initialized()
    with _named_losses():
        if mine:
            dist.init_process_group("gloo")  # only to wait: no tensor is exchanged
        try:
            with together() as wait:
                yield dist.get_rank(), dist.get_world_size()
                wait()
        finally:
            if mine:
                dist.destroy_process_group()


@contextmanager
def together() -> Iterator[Callable[[], object]]:
    """A function that waits until all processes have called it, however long one of them works.

    All enter at the same time. Of one process it is a function that does nothing.

    Raises:
        ConnectionError: another process has ended, or left this by an error.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        yield lambda: None
        return
    # The group of the process may have a limit of minutes, and keep a GPU busy with waiting. The
    # end of a process closes its connections, so that nobody waits for it.
    groups: list[Any] = [dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)]
    try:
        with _named_losses():
            yield lambda: dist.barrier(groups[0])
    finally:
        # Out of the list, as an error that passes keeps this frame, and so the connections.
        dist.destroy_process_group(groups.pop())


@contextmanager
def _named_losses() -> Iterator[None]:
    """Give what PyTorch says of processes that do not answer a name, ``ConnectionError``."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        # Of gloo they have no type of their own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(
            "another process of this run has ended, or can't be reached; what is done is kept, and "
            f"the same command goes on from here ({str(error).splitlines()[0]})"
        ) from error
