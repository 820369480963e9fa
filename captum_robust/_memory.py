"""Memory that this process keeps for its next need of it."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``."""
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# What glibc comes to by itself where tensors of some megabytes are freed.
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
_TOLD = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
_lock = threading.Lock()
_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, what is freed of the memory of the CPU stays with this process.

    Else glibc asks the system for each tensor of more than 32 MB, such as a batch's activations in
    a large layer, and gives it back behind the layer. The system clears every page of it each time,
    which takes up to half of the time of a forward pass. Without glibc, or where the environment
    says how it should allocate, nothing changes.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(_KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_USUAL)  # what is too much then goes back with the next that is freed


def _set(parameters: dict[int, int]) -> None:
    mallopt = _mallopt()
    if mallopt is not None:
        for name, value in parameters.items():
            mallopt(name, value)


@cache
def _mallopt() -> Any:
    """The function of the C library; None where it is not to be called."""
    is_told = _TOLD & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_told or sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
