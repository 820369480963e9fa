"""Errors of the machine, not of an image: of these a run stops, and no row holds them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class MachineError(OSError):
    """A run stopped, as its disk, its memory or its data are not there; the rows are kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU; a smaller batch may need less."""
    return any(
        isinstance(one, (MemoryError, torch.OutOfMemoryError))
        # What PyTorch says of the host's memory has no type of its own.
        or (isinstance(one, RuntimeError) and "DefaultCPUAllocator" in str(one))
        for one in _chain(error)
    )


def is_of_machine(error: BaseException) -> bool:
    """Whether another image would meet this error too: no memory, no room, too many open files."""
    return is_out_of_memory(error) or any(
        isinstance(one, OSError) and one.errno in _NO_ROOM for one in _chain(error)
    )


def is_of_files(error: BaseException) -> bool:
    """Whether the system could not open or read a file, whatever is in it."""
    return any(isinstance(one, OSError) and one.errno is not None for one in _chain(error))


@contextmanager
def stops() -> Iterator[None]:
    """Give an error of the machine its name.

    Raises:
        MachineError: for what :func:`is_of_machine` knows.
    """
    try:
        yield
    except Exception as error:
        if not is_of_machine(error):
            raise
        reason = str(error) or type(error).__name__
        remedy = "a smaller batch_size, another run" if is_out_of_memory(error) else "room"
        raise MachineError(
            f"the run stopped: {reason}; its rows are kept. It needs {remedy}"
        ) from error


class Reads:
    """How the reads of a run's images go.

    Args:
        root: of the images, if they have one.
    """

    _FEW, _MANY = 4, 8

    def __init__(self, root: Path | None) -> None:
        self._root = root if root is not None and root.exists() else None
        self._total = self._in_row = 0

    def check(self, errors: list[str | None]) -> None:
        """Take the error of each image that was read last, None where it is not of a file.

        Raises:
            MachineError: the root is gone, or the last eight images could not be opened, or the
                last four and half of all.
        """
        self._total += len(errors)
        for error in errors:
            self._in_row = 0 if error is None else self._in_row + 1
        if not self._in_row:
            return
        what = f"the run stopped: {errors[-1]}"
        if self._root is not None and not self._root.exists():
            raise MachineError(f"{what}; {self._root} is no longer there. The rows are kept")
        if self._in_row >= max(self._FEW, min(self._MANY, self._total / 2)):
            raise MachineError(
                f"{what}; the last {self._in_row} images could not be opened. The rows are kept; "
                "without retry (--no-retry) such images are passed over"
            )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised for."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
