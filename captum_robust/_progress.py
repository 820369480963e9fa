"""What is said on standard error of work that takes a while: bars, and names of stages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from captum_robust._checks import printable

Item = TypeVar("Item")

_without_bars: ContextVar[bool] = ContextVar("without_bars", default=False)


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
        self._bar.update(more)

    def doing(self, what: str) -> None:
        """Say what runs now; a text of the user's is written out on one line."""
        self._bar.set_postfix_str(printable(what), refresh=not self._bar.disable)


@contextmanager
def progress_bar(
    total: int | None, unit: str, show: bool, name: str | None = None, done: int = 0
) -> Iterator[Advance]:
    """A function to call with how much more is done; the bar goes to standard error.

    Args:
        total: how much there is to do; None: not known.
        unit: of it.
        show: whether there is a bar at all.
        name: what runs, before the bar.
        done: how much was done before.
    """
    from tqdm import tqdm

    hidden = not show or _without_bars.get()
    facts = {"total": total, "unit": unit, "desc": name, "initial": done}
    with tqdm(**facts, disable=hidden, smoothing=0.05) as bar:
        yield Advance(bar)


def counted(
    items: Collection[Item], unit: str, show: bool, name: str | None = None
) -> Iterator[Item]:
    """The items of a sequence, one after the other, with a progress bar on standard error."""
    with progress_bar(len(items), unit, show, name) as advance:
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
