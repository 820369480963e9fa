"""COCO's segmentations as masks, pixel by pixel those of pycocotools: polygons and run lengths."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_robust._checks import check

_SCALE = 5
"""Outlines are drawn on a grid this much finer than the pixels."""
_DIGITS = 7
"""Of five bits each, in a compressed run length: more than any image has pixels."""
_AT_ONCE = 2**20
"""Points of outlines that are in memory together."""
_LONGEST = 2**24
"""Steps on the grid that the outlines of one mask may take, seconds of work: no drawn one has a
hundredth of that, a few points far outside of the image have more."""

_Points: TypeAlias = npt.NDArray[np.float64]
_Integers: TypeAlias = npt.NDArray[np.int64]


def union_mask(segmentations: Iterable[Any], size: tuple[int, int]) -> Tensor:
    """H×W bool: the pixels of any of the objects.

    Each segmentation is a list of polygons [x0, y0, x1, y1, …], of which the part inside the image
    of ``size`` (H, W) counts, or a run-length code, plain or compressed.

    Raises:
        ValueError: a polygon that isn't made of three or more finite points; outlines of millions
            of pixels; a run-length code of another size, or whose runs do not add up to it;
            something else.
    """
    height, width = size
    mask = np.zeros(height * width, dtype=bool)
    for runs in _runs(segmentations, size):
        mask |= np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # the first is background
    return torch.from_numpy(mask.reshape(width, height).T.copy())  # they go down the columns


def _runs(segmentations: Iterable[Any], size: tuple[int, int]) -> Iterator[_Integers]:
    total = 0
    for each in segmentations:
        if not isinstance(each, list):
            yield _decoded(each, size)
            continue
        for polygon in each:
            edges = _edges(_points(polygon), size)
            total += int(edges[2].sum())
            expected = f"expected outlines of at most {_LONGEST // _SCALE} pixels in all"
            check(total <= _LONGEST, f"polygon: {expected}, got {total // _SCALE} or more")
            yield _outlined(*edges, size)


def _decoded(code: Any, size: tuple[int, int]) -> _Integers:
    is_code = isinstance(code, dict) and {"size", "counts"} <= code.keys()
    check(is_code, "expected polygons, or a run-length code of size and counts")
    own, counts = code["size"], code["counts"]
    got = reprlib.repr(own)
    check(own == list(size), f"run-length code: expected one of size {list(size)}, got {got}")
    runs: Any = _decompressed(counts) if isinstance(counts, str) else counts
    if isinstance(runs, list):
        runs = [int(run) if type(run) is float and run.is_integer() else run for run in runs]
    are_counts = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    check(are_counts, "run lengths: expected whole numbers from 0")
    pixels, total = size[0] * size[1], sum(runs)
    check(total == pixels, f"run lengths: expected {pixels} pixels in all, got {total}")
    return np.array(runs, dtype=np.int64)


def _decompressed(text: str) -> list[int]:
    """The runs of a string: digits of five bits, from the character "0", the lowest first.

    The sixth bit of a character says that another follows, the fifth of the last is the sign. From
    the fourth run on, the number is the difference to the run before the last.
    """
    runs: list[int] = []
    number = place = 0
    for character in text:
        digit = ord(character) - 48
        is_digit = 0 <= digit < 64 and place < _DIGITS
        check(is_digit, "run lengths: the compressed text is damaged")
        number |= (digit & 31) << 5 * place
        place += 1
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << 5 * place
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = place = 0
    check(not place, "run lengths: the compressed text ends within a number")
    return runs


def _points(polygon: Any) -> _Points:
    """N×2 x, y, of pixel corners."""
    length = len(polygon) if isinstance(polygon, list) else 0
    fits = length >= 6 and length % 2 == 0
    check(fits, f"polygon: expected x, y of three or more points, got {length} numbers")
    try:
        points = np.array([float(value) for value in polygon]).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("polygon: expected numbers, got others") from None
    check(np.isfinite(points).all(), "polygon: expected finite numbers, got others")
    return points


def _edges(points: _Points, size: tuple[int, int]) -> tuple[_Integers, _Integers, _Integers]:
    """The corners N×2 on the finer grid, the way to the next one, and how many steps that takes."""
    corners = (_clipped(points, size) * _SCALE + 0.5).astype(np.int64)  # towards zero, as in C
    steps = np.roll(corners, -1, axis=0) - corners
    return corners, steps, np.abs(steps).max(axis=1, initial=0)


def _outlined(
    corners: _Integers, steps: _Integers, lengths: _Integers, size: tuple[int, int]
) -> _Integers:
    """The runs of the pixels inside the outline, by the even-odd rule, as COCO's own code finds it.

    That draws the outline point by point on the finer grid. Where it crosses the middle of a column
    of pixels, the pixels from there on, down this column and the next ones, change sides.
    """
    height, width = size
    blocks = np.flatnonzero(np.diff(np.cumsum(lengths) // _AT_ONCE)) + 1
    changes = [np.zeros(1, dtype=np.int64)]
    for block in np.split(np.arange(len(corners)), blocks):
        x, y = _crossings(corners[block], steps[block], lengths[block])
        is_inside = (x >= 0) & (x < width)
        changes.append(x[is_inside] * height + y[is_inside].clip(0, height))
    ends: _Integers = np.append(np.sort(np.concatenate(changes)), height * width)
    return ends[1:] - ends[:-1]


def _clipped(points: _Points, size: tuple[int, int]) -> _Points:
    """A polygon without what is many images away (Sutherland and Hodgman's algorithm).

    At the image's own border, cut edges would round otherwise than whole ones do.
    """
    far = 8.0 * max(size)
    for axis, limit in ((0, -far), (0, far), (1, -far), (1, far)):
        inside = points[:, axis] * np.sign(limit) <= far
        if inside.all():
            continue
        following = np.roll(points, -1, axis=0)
        with np.errstate(all="ignore"):  # of edges that do not cross the limit
            share = (limit - points[:, axis]) / (following[:, axis] - points[:, axis])
            crossing = points * (1 - share[:, None]) + following * share[:, None]
        crossing[:, axis] = limit
        kept = np.stack([inside, inside != np.roll(inside, -1)], axis=1)
        points = np.stack([points, crossing], axis=1)[kept]
    return points


def _crossings(
    corners: _Integers, steps: _Integers, lengths: _Integers
) -> tuple[_Integers, _Integers]:
    """Column and first row behind each place where edges cross the middle of a column."""
    edge = np.repeat(np.arange(len(corners)), lengths + 1)
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    along = np.arange(len(edge)) - starts[edge]
    # Each edge is drawn from its smaller end, so that two neighbours share it to the point.
    is_steep = np.abs(steps[:, 0]) < np.abs(steps[:, 1])
    flipped = np.where(is_steep, steps[:, 1], steps[:, 0]) < 0
    begins = np.where(flipped[:, None], corners + steps, corners)
    with np.errstate(invalid="ignore"):  # of edges without length
        slopes = np.where(flipped[:, None], -steps, steps) / lengths[:, None]
    along = np.where(flipped[edge], lengths[edge] - along, along)
    drawn = (begins[edge] + np.nan_to_num(slopes)[edge] * along[:, None] + 0.5).astype(np.int64)
    exact = begins[edge] + along[:, None]
    is_main = np.stack([~is_steep, is_steep], axis=1)[edge]
    u, v = np.where(is_main, exact, drawn).T
    left, upper = np.minimum(u[1:], u[:-1]), np.minimum(v[1:], v[:-1])
    middle = (_SCALE - 1) // 2
    is_crossing = (u[1:] != u[:-1]) & (edge[1:] == edge[:-1]) & (left % _SCALE == middle)
    # The middle of row y lies at 5y + 2 on the grid.
    rows = -((middle - upper[is_crossing]) // _SCALE)
    return left[is_crossing] // _SCALE, rows
