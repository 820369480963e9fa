"""Ctrl-C in a training: it waits until the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, raised where the state is whole."""


class Interrupts:
    """Inside, Ctrl-C is noted, and raises :class:`Interrupted` only where that is allowed.

    A second one raises a ``KeyboardInterrupt`` at once. Outside of the main thread, and where a
    program has a handler of its own, nothing is changed. Where Ctrl-C is ignored it still is, but
    not another signal that is passed on to its handler.
    """

    def __init__(self) -> None:
        self.is_pending = False
        self._is_allowed = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        usual = (signal.default_int_handler, signal.SIG_IGN)
        if is_main and signal.getsignal(signal.SIGINT) in usual:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self.is_pending and error is None:
            raise KeyboardInterrupt

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._previous is signal.SIG_IGN:
            return
        if self.is_pending:
            raise KeyboardInterrupt
        self.is_pending = True
        if self._is_allowed:
            raise Interrupted

    @contextmanager
    def allowed(self, is_allowed: bool) -> Iterator[None]:
        """Inside, Ctrl-C is raised at once, also one that was noted before."""
        self._is_allowed = is_allowed
        try:
            if is_allowed and self.is_pending:
                raise Interrupted
            yield
        finally:
            self._is_allowed = False
