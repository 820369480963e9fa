"""Does the cost of each operation grow as the work, and no faster?

    python studies/scaling.py                              # all of them, some minutes of a core
    python studies/scaling.py --only "RobustCAM,compare"   # some
    python studies/scaling.py --full --device cuda         # EfficientNet-Lite0, 224×224 pixels

Each operation of `operations.py` is run with a size that doubles, until a call takes `--seconds`:
the number of images, their side in pixels, the number of classes, the images of a batch (where
there are at least 64), k, the number of top classes, and the number of methods. The exponent is
the slope of log time against log size over the last three sizes; the side counts as side², the
pixels. 1 is linear, 0 is no cost at all. The verdict is "linear" from .75 to 1.3, "below", or
"above", with the reason. Time is the least of some calls, of the seconds on the core, which other
load disturbs least, and on a GPU by the clock. Memory is the peak above what was held before, at
the first and at the last size (Linux, or a GPU); "grows" is said of operations that stream their
images where it does. Timings never fail the script, but it ends with 1 where a cost grows faster
than the work without a reason that is known.

Below linear at the largest size means that what does not depend on it still costs more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
from operations import OPERATIONS, REASONS, Operation
from world import Sizes, World

from captum_robust._memory import kept_memory

AXES = tuple(axis.name for axis in fields(Sizes))
MOST = {"images": 2048, "side": 512, "classes": 1024, "batch": 64, "k": 256, "methods": 16}
"""What an axis goes up to."""
STEP = {"classes": 4, "k": 4}
"""By how much a size grows each time, where that is not two."""
GROWN = 4
"""How often the time of the first size more images take, at least, if not ten times `--seconds`."""
LARGE = 64.0
"""MiB at which an axis ends: with more, pages and caches are what is timed."""
ROUNDS = 3
"""Calls that are timed, of quick ones."""
ENOUGH = 0.1
"""Seconds after which no other call is timed."""
FITTED = 3
"""The last sizes, through which the line goes."""
LINEAR = (0.75, 1.3)
CACHE = 6.0
"""MiB up to which the memory of a call is in the caches of a core; behind them, it is slower."""
GROWS = 16.0
"""MiB that an operation which streams may take more at the last size than at the first."""


@dataclass(frozen=True)
class Point:
    """What one size cost."""

    size: int
    seconds: float
    mib: float


@dataclass(frozen=True)
class Curve:
    """What an operation cost along an axis."""

    name: str
    axis: str
    points: tuple[Point, ...]

    @property
    def exponent(self) -> float:
        """The slope of log time against log size over the last sizes; NaN of fewer than two."""
        return self._slope(self.points[-FITTED:])

    def _slope(self, points: Sequence[Point]) -> float:
        power = 2 if self.axis == "side" else 1
        if len(points) < 2:
            return math.nan
        x = [power * math.log(p.size) for p in points]
        return statistics.linear_regression(x, [math.log(p.seconds) for p in points]).slope

    @property
    def verdict(self) -> str:
        """ "below", "linear", "above", or "-" where there is only one size."""
        low, high = LINEAR
        if math.isnan(self.exponent):
            return "-"
        return "below" if self.exponent < low else "linear" if self.exponent <= high else "above"

    @property
    def reason(self) -> str:
        """Why it grows faster than the work; "" where that is not known."""
        small = [p for p in self.points if p.mib <= CACHE][-FITTED:]
        if len(small) == FITTED < len(self.points) and self._slope(small) <= LINEAR[1]:
            return f"leaves the caches; {self._slope(small):.2f} up to {small[-1].size}"
        return REASONS.get((self.name, self.axis), "")

    def line(self, operation: Operation) -> str:
        """Return one row of the table."""
        first, last = self.points[0], self.points[-1]
        word = self.verdict
        if word == "above":
            word += f": {self.reason or 'NO REASON IS KNOWN'}"
        if operation.streams and self.axis == "images" and last.mib - first.mib > GROWS:
            word += "; MEMORY GROWS"
        return (
            f"{self.name:28} {self.axis:8} {first.size:5d} to {last.size:5d} "
            f"{1000 * first.seconds:9.1f} {1000 * last.seconds:9.1f} {self.exponent:6.2f} "
            f"{first.mib:7.1f} {last.mib:7.1f}  {word}"
        )


class Memory:
    """The peak of the memory of this process, or of the GPU, above what is held before."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.status = Path("/proc/self/status")
        self.trim = None
        with contextlib.suppress(OSError, AttributeError):
            self.trim = ctypes.CDLL("libc.so.6").malloc_trim

    def mib_of(self, call: Callable[[], Any]) -> float:
        """Return the MiB that a call takes for a while; NaN where that can't be told."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if self.trim is None or not self.status.exists():
            call()
            return math.nan
        self.trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before_kib = self._kib("VmRSS")
        call()
        return (self._kib("VmHWM") - before_kib) / 2**10

    def _kib(self, name: str) -> int:
        line = next(text for text in self.status.read_text().splitlines() if name in text)
        return int(line.split()[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings and what is written on standard error are left out."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def point(call: Callable[[], Any], size: int, device: str) -> Point:
    """Return what a call costs; the first one warms up, and makes the inputs."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken: list[float] = []

    def timed() -> None:
        harness.wait_for(device)
        began = clock()
        call()
        harness.wait_for(device)
        taken.append(max(clock() - began, 1e-6))

    with quiet():
        call()
        mib = Memory(device).mib_of(timed)
        while len(taken) < ROUNDS and sum(taken) < ENOUGH:
            timed()
    return Point(size, min(taken), mib)


def curve(name: str, axis: str, seconds: float, make: Callable[[Sizes], World]) -> Curve:
    """Return the cost of an operation along an axis, until a call takes so many seconds."""
    operation, points = OPERATIONS[name], []
    size = 1 if axis == "batch" else getattr(operation.least, axis)
    calls = []
    while True:
        w = make(replace(operation.least, **{axis: size}, **_also(operation.least, axis, size)))
        calls.append(partial(operation.call, w))
        points.append(point(calls[-1], size, w.device))
        first, last = points[0], points[-1]
        goal = seconds * operation.seconds
        if axis == "images":  # until the images cost more than what is done once
            goal = max(goal, min(GROWN * first.seconds, 10 * goal))
        is_large = last.seconds > goal or last.mib > LARGE
        size *= STEP.get(axis, 2)
        if (is_large and len(points) >= FITTED) or size > MOST[axis]:
            break
    found = Curve(name, axis, tuple(points))
    if found.verdict != "above" or found.reason:
        return found
    # Other load may have been what was timed: the least of two times counts.
    again = [point(call, p.size, w.device) for call, p in zip(calls, points, strict=True)]
    least = [
        replace(p, seconds=min(p.seconds, q.seconds)) for p, q in zip(points, again, strict=True)
    ]
    return Curve(name, axis, tuple(least))


def _also(least: Sizes, axis: str, size: int) -> dict[str, int]:
    """What else is more: classes than k, and images than the largest batch."""
    if axis == "batch":
        return {"images": max(MOST["batch"], least.images)}
    return {"classes": max(MOST["k"], size)} if axis == "k" else {}


def scaling(
    *,
    only: Annotated[tuple[str, ...], "operations", harness.listed(OPERATIONS)] = tuple(OPERATIONS),
    axes: Annotated[tuple[str, ...], "axes", harness.listed(AXES)] = AXES,
    seconds: Annotated[float, "of the largest call"] = 0.02,
    full: Annotated[bool, "EfficientNet-Lite0 in place of four small convolutions"] = False,
    device: str = "cpu",
) -> int:
    """Print a row for each operation and axis; return 1 if one grows too fast, without a reason."""
    print(
        f"{'operation':28} {'axis':8} {'sizes':14} {'ms first':>9} {'ms last':>9} {'slope':>6} "
        f"{'MiB':>7} {'MiB':>7}  verdict"
    )
    unexplained = []
    gc.freeze()  # what is imported need not be looked through again
    # Else each large tensor is new memory, and its pages cost more than what is timed.
    with kept_memory(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in only:
            operation = OPERATIONS[name]
            for axis in (a for a in operation.axes if a in axes):
                if full and axis == "classes":
                    continue
                make = partial(World, device=device, full=full, folder=folder)
                found = curve(name, axis, seconds, make)
                print(found.line(operation), flush=True)
                if found.verdict == "above" and not found.reason:
                    unexplained.append(f"{name} ({axis})")
    print(f"grow faster than the work, without a reason: {', '.join(unexplained) or 'none'}")
    return int(bool(unexplained))


if __name__ == "__main__":
    harness.study(__doc__, scaling, threads=1)
