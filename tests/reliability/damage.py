"""Damaged bytes and values, what a reader may make of them, and children that may die of them."""

from __future__ import annotations

import copy
import mmap
import os
import random
import re
import resource
import signal
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from captum_robust.data.sample import Sample

T = TypeVar("T")

NUMBERS = (
    *("-5", "0", "1e999", "-1e999", "NaN", "inf", "1e308", "-0.0", "2147483648", "1e-320", "0x10"),
    *(
        "",
        " ",
        "12,5",
        "1_0",
        "٣",
        "9" * 30,
        "9" * 5000,
        "true",
        "null",
        "None",
        "=1+1",
        "\x1b[31m",
    ),
)
"""What stands in files in the place of a number."""
NAMES = (
    *("", ".", "..", "../x.png", "/etc/passwd", "a\0b", "a\nb", "\x1b]0;x\x07", "\u2028", "\x85"),
    *("\ud800", "\udcff", "a" * 300, "=1+1", "@x", "/dev/zero", "C:\\x", "\u202ecod", "k" * 10**5),
)
"""What stands in files in the place of a name."""
VALUES = (
    *(None, True, 0, -1, -5, 1.5, 1e308, float("inf"), float("nan"), 10**30, 10**400, 2**63, ""),
    *([], {}, [[]], [None], {"size": [1, 1], "counts": [1]}, [0] * 1000, [1e9] * 6, {"a": {}}),
)
"""What stands in JSON in the place of anything."""
_SECONDS, _WAITING, _BYTES = 5, 60, 500 * 2**20
"""What a try may take: of a processor, of the clock on a machine that others use too, of memory."""
_LONGEST = 2000
_SHOWN = 5


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them flipped, cut, left out, repeated or overwritten by a number."""
    kind, at = rng.randrange(8), rng.randrange(len(data))
    if kind < 4:
        changed = bytearray(data)
        for _ in range(1 << kind):
            place = rng.randrange(len(data))
            changed[place] = rng.choice((data[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
        return bytes(changed)
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    if kind == 6:
        end = at + rng.randrange(1, 200)
        return data[:at] + data[at:end] * rng.randrange(2, 5) + data[end:]
    number = rng.choice((0, 1, 2**16, 10**9, 2**31, 2**32 - 1))
    return data[:at] + struct.pack(rng.choice("<>") + "I", number) + data[at + 4 :]


def damaged_text(text: str, rng: random.Random) -> bytes:
    """A text in which a number or a word is another one, or the bytes are damaged."""
    if rng.random() < 0.5:
        return damaged(text.encode(), rng)
    pattern, odd = rng.choice(((r"-?\d+(\.\d+)?", NUMBERS), (r"[\w.#]+", NAMES)))
    found = rng.choice([*re.finditer(pattern, text)] or [*re.finditer(r".+", text)])
    return f"{text[: found.start()]}{rng.choice(odd)}{text[found.end() :]}".encode(
        "utf-8", "surrogatepass"
    )


def damaged_value(value: Any, rng: random.Random) -> Any:
    """What JSON holds, with one or two parts left out, doubled, or of another kind."""
    value = copy.deepcopy(value)
    for _ in range(rng.randrange(1, 3)):
        places = list(_places(value))
        if places:
            inside, key = rng.choice(places)
            _change(inside, key, rng)
    return value


def _places(value: Any) -> Any:
    """Every list or object with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _change(inside: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, list):
        inside.insert(key, copy.deepcopy(inside[key]))
    elif kind == 2:
        inside[key] = str(rng.choice(NUMBERS))
    elif kind == 3:
        inside[key] = rng.choice(NAMES)
    elif kind == 4 and type(inside[key]) in (int, float) and abs(inside[key]) < 1e99:
        inside[key] = rng.choice((-1, 1e9, 0.5, 1)) * inside[key] + rng.choice((0, 1, -1))
    else:
        inside[key] = copy.deepcopy(rng.choice(VALUES))


def read(call: Callable[[], T], *names: str) -> T | None:
    """What a reader gives; None where it refuses, by a right error that has a name in it."""
    try:
        return call()
    except (ValueError, OSError) as error:
        refused = error
    check_message(str(refused), type(refused).__name__)
    assert any(name in str(refused) for name in names), f"no name in {refused!r}"[:500]
    return None


def check_message(text: str, kind: str) -> None:
    """A message of one line, that a terminal can show."""
    assert len(text) <= _LONGEST, f"{kind} of {len(text)} characters: {text[:200]}"
    odd = [c for c in text if not c.isprintable() and c != "\N{NO-BREAK SPACE}"]
    assert not odd, f"{kind} with {odd[:5]}: {text!r}"[:500]


def check_sample(sample: Sample, classes: int) -> None:
    """Finite pixels from 0 to 1, boxes inside the image with an area, a class that there is."""
    pixels, (height, width) = sample.image, sample.size
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1, "pixels beyond 0 to 1"
    for x0, y0, x1, y1 in sample.boxes.tolist():
        assert 0 <= x0 < x1 <= width, f"box of x {x0} to {x1} in {width}"
        assert 0 <= y0 < y1 <= height, f"box of y {y0} to {y1} in {height}"
    assert sample.label is None or 0 <= sample.label < classes, sample.label
    assert sample.mask is None or sample.mask.shape == sample.size


def tries_in_child(one: Callable[[random.Random], object], count: int) -> Callable[[int], int]:
    """``one`` so often with other numbers each time, in a forked child; the seed counts children.

    A try is lost that raises, warns wrongly, takes too long or too much, or ends the process.
    """

    def many(seed: int) -> int:
        with mmap.mmap(-1, 8) as now:
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                _in_child(one, range(seed * count, (seed + 1) * count), now, writing)
            os.close(writing)
            with os.fdopen(reading, encoding="utf-8") as pipe:
                lost = pipe.read()
            status = os.waitpid(child, 0)[1]
            at = int.from_bytes(now[:8], "little")
        killed = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else status
        assert not status, f"{lost}try {at}: the process ended: {killed}"
        assert not lost, lost
        return count

    return many


def _in_child(
    one: Callable[[random.Random], object], tries: range, now: mmap.mmap, writing: int
) -> None:
    """Do the tries and end the process, whatever happens."""
    code = 1
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("always")
        warnings.showwarning = _shown  # type: ignore[assignment]
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + 4 * _BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which a time limit of pytest's may have
        lost: list[str] = []
        for seed in tries:
            now[:8] = seed.to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # which end the process
            signal.setitimer(signal.ITIMER_REAL, _WAITING)
            try:
                one(random.Random(seed))
                took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - begin
                assert took < _BYTES, f"took {took / 2**20:.0f} MiB"
            except BaseException as error:
                lost.append(f"try {seed}: {type(error).__name__}: {error}"[:600])
                begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        text = f"{len(lost)} lost: " + "\n".join(lost[:_SHOWN]) + "\n" if lost else ""
        os.write(writing, text.encode("utf-8", "backslashreplace"))
        code = 0
    finally:
        os._exit(code)


def _shown(message: Warning | str, category: type[Warning], *_: object) -> None:
    check_message(str(message), category.__name__)
    assert not issubclass(category, RuntimeWarning), f"warning: {message}"
