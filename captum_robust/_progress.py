"""What is said on standard error of work that takes a while: bars, and names of stages.

What is long enough for a bar is long enough to keep its memory, see :func:`kept_memory`.

Who asks for a bar sees it from the start, and it stays. Where nobody says (``show=None``), the bar
comes after :data:`PATIENCE` and is cleared at the end, and only who watches sees it: on a terminal,
or below the cell of a notebook. Of such loops in each other the outer one has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any, TypeVar

from captum_robust._checks import printable
from captum_robust._memory import kept_memory

Item = TypeVar("Item")

PATIENCE = 2.0
"""Seconds until a bar appears that nobody asked for."""

_without_bars: ContextVar[bool] = ContextVar("without_bars", default=False)
_is_counting: ContextVar[bool] = ContextVar("is_counting", default=False)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, no progress bar of this thread is shown, whoever asks for one."""
    token = _without_bars.set(True)
    try:
        yield
    finally:
        _without_bars.reset(token)


class Advance:
    """Call it with how much more is done; ``doing`` says what comes next, behind the bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, more: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(more)

    def doing(self, what: str) -> None:
        """Say what runs now; a text of the user's is written out on one line."""
        if self._bar is not None:
            # To refresh it would show a bar before its time.
            self._bar.set_postfix_str(printable(what), refresh=not self._bar.delay)


@contextmanager
def progress_bar(
    total: int | None, unit: str, show: bool | None, name: str | None = None, done: int = 0
) -> Iterator[Advance]:
    """A function to call with how much more is done; the bar goes to standard error.

    Args:
        total: how much there is to do; None: not known.
        unit: of it.
        show: whether there is a bar at all; None: see above, and none for a single thing.
        name: what runs, before the bar.
        done: how much was done before.
    """
    outer = _is_counting.get()
    is_single = show is None and total is not None and total - done <= 1
    asked = not (outer or is_single) and _is_watched() if show is None else show
    _is_counting.set(outer or not is_single)
    try:
        with kept_memory():
            if not asked or _without_bars.get():
                yield Advance(None)
                return
            from tqdm import tqdm

            facts: dict[str, Any] = {"total": total, "unit": unit, "desc": name, "initial": done}
            if show is None:
                facts |= {"delay": PATIENCE, "leave": False, "mininterval": 0.5}
            with tqdm(**facts, smoothing=0.05) as bar:
                yield Advance(bar)
    finally:
        _is_counting.set(outer)  # a token would not do: a generator may be closed elsewhere


def _is_watched() -> bool:
    """Whether somebody sees standard error come: a terminal, or a notebook; of one process only."""
    from captum_robust._processes import is_first

    stream = sys.stderr
    if stream is None or not is_first():
        return False
    is_terminal = bool(getattr(stream, "isatty", bool)())
    return is_terminal or type(stream).__module__.startswith("ipykernel.")


def counted(
    items: Iterable[Item], unit: str, show: bool | None = None, name: str | None = None
) -> Iterator[Item]:
    """The items, one after the other, with a progress bar on standard error.

    Args:
        items: of a known number or not.
        unit, show, name: as for :func:`progress_bar`.
    """
    with progress_bar(length_hint(items) or None, unit, show, name) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say on a terminal what runs inside, where no bar can count it; then the line is cleared."""
    from tqdm import tqdm

    hidden = True if _without_bars.get() else None  # None: where standard error is no terminal
    with tqdm(desc=f"{printable(name)} …", bar_format="{desc}", leave=False, disable=hidden):
        yield
