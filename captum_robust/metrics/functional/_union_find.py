"""The numba kernels: pixels are inserted from the largest down into a union-find forest.

Importing this module imports numba, so its callers do it inside their functions. Every kernel
works on a grid with a border of one pixel that is never inserted: no bounds to check.
"""

from typing import Any

import numpy as np
from numba import njit

ABSENT = -1
# The columns of what is known of a component, kept at its root; x1 and y1 are its last pixels.
AREA, FIRST, X0, Y0, X1, Y1 = range(6)
# The sweep of overlaps has no use for the first pixel and keeps the step of the last change.
SINCE = FIRST


@njit(cache=True, nogil=True)
def descending_order(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort float32 rows N×P from the largest down, equal values in place: radix sort.

    Returns the positions (int32) and the values (float32).
    """
    n, pixels = keys.shape
    order = np.empty((n, pixels), np.int32)
    descending = np.empty((n, pixels), np.float32)
    code = np.empty(pixels, np.uint32)
    other_code = np.empty(pixels, np.uint32)
    other_order = np.empty(pixels, np.int32)
    low, middle, high = np.empty(2048, np.int32), np.empty(2048, np.int32), np.empty(1024, np.int32)
    for i in range(n):
        # Adding zero turns −0.0 into 0.0: the two are equal but differ in their bits.
        bits = (keys[i] + np.float32(0)).view(np.uint32)
        low[:], middle[:], high[:] = 0, 0, 0
        for p in range(pixels):
            bit = bits[p]
            # Positive floats order like their bits, negative ones backwards; then reversed.
            bit = bit ^ np.uint32(0x7FFFFFFF) if bit < np.uint32(0x80000000) else bit
            code[p] = bit
            low[bit & np.uint32(2047)] += 1
            middle[(bit >> np.uint32(11)) & np.uint32(2047)] += 1
            high[bit >> np.uint32(22)] += 1
        _starts(low)
        _starts(middle)
        _starts(high)
        final = order[i]
        for p in range(pixels):
            digit = code[p] & np.uint32(2047)
            at = low[digit]
            low[digit] += 1
            other_code[at] = code[p]
            final[at] = p
        for p in range(pixels):
            digit = (other_code[p] >> np.uint32(11)) & np.uint32(2047)
            at = middle[digit]
            middle[digit] += 1
            code[at] = other_code[p]
            other_order[at] = final[p]
        for p in range(pixels):
            digit = code[p] >> np.uint32(22)
            at = high[digit]
            high[digit] += 1
            final[at] = other_order[p]
            descending[i, at] = keys[i, other_order[p]]
    return order, descending


@njit(cache=True, nogil=True)
def descending_levels(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort uint8 rows N×P from the largest down, equal values in place: counting sort.

    Returns the positions (int32) and, N×256, how many pixels lie above each level.
    """
    n, pixels = levels.shape
    order = np.empty((n, pixels), np.int32)
    above = np.zeros((n, 256), np.int64)
    start = np.empty(256, np.int64)
    for i in range(n):
        count = np.zeros(256, np.int64)
        for p in range(pixels):
            count[levels[i, p]] += 1
        total = 0
        for level in range(255, -1, -1):
            above[i, level] = total
            start[level] = total
            total += count[level]
        for p in range(pixels):
            level = levels[i, p]
            order[i, start[level]] = p
            start[level] += 1
    return order, above


@njit(cache=True, nogil=True)
def largest_boxes(
    order: np.ndarray, counts: np.ndarray, height: int, width: int, connectivity: int
) -> np.ndarray:
    """Return the box of the largest component of the first pixels of each row.

    ``order`` is N×P; ``counts`` N×A ascending. Of components of one size, the one whose first
    pixel comes first in raster order. No pixels: the whole image. N×A×4 int32, half-open.
    """
    n, pixels = order.shape
    boxes = np.empty((n, counts.shape[1], 4), np.int32)
    stride = width + 2
    # A product is many times faster than an integer division, and as exact with the half.
    per_width = 1 / width
    parent = np.empty((height + 2) * stride, np.int32)
    facts = np.empty((parent.size, 6), np.int32)
    near = np.empty(8, np.int64)
    for i in range(n):
        parent[:] = ABSENT
        largest = -1
        inserted = 0
        settled = False
        for a in range(counts.shape[1]):
            count = counts[i, a]
            if count == 0 or count == pixels or settled:
                boxes[i, a] = (0, 0, width, height)
                continue
            while inserted < count:
                pixel = order[i, inserted]
                inserted += 1
                y = np.int64((pixel + 0.5) * per_width)
                x = pixel - y * width
                here = (y + 1) * stride + x + 1
                neighbours = _neighbours(parent, here, stride, connectivity, near)
                if neighbours == 0:
                    root = here
                    facts[root, AREA] = 0
                    facts[root, FIRST] = here
                    facts[root, X0] = facts[root, X1] = x
                    facts[root, Y0] = facts[root, Y1] = y
                else:
                    root = _root(parent, near[0])
                    for k in range(1, neighbours):
                        other = _root(parent, near[k])
                        if other != root:
                            if facts[root, AREA] < facts[other, AREA]:
                                root, other = other, root
                            parent[other] = root
                            facts[root, AREA] += facts[other, AREA]
                            facts[root, FIRST] = min(facts[root, FIRST], facts[other, FIRST])
                            own = facts[other]
                            _widen(facts, root, own[X0], own[Y0], own[X1], own[Y1])
                    facts[root, FIRST] = min(facts[root, FIRST], here)
                    _widen(facts, root, x, y, x, y)
                parent[here] = root
                facts[root, AREA] += 1
                # Only the component that grew can overtake.
                if (
                    largest < 0
                    or facts[root, AREA] > facts[largest, AREA]
                    or (
                        facts[root, AREA] == facts[largest, AREA]
                        and facts[root, FIRST] < facts[largest, FIRST]
                    )
                ):
                    largest = root
            boxes[i, a, 0] = facts[largest, X0]
            boxes[i, a, 1] = facts[largest, Y0]
            boxes[i, a, 2] = facts[largest, X1] + 1
            boxes[i, a, 3] = facts[largest, Y1] + 1
            # More than half of all pixels can't be overtaken, and the box can't grow further.
            settled = (
                2 * facts[largest, AREA] > pixels
                and facts[largest, X0] == 0
                and facts[largest, Y0] == 0
                and facts[largest, X1] == width - 1
                and facts[largest, Y1] == height - 1
            )
    return boxes


@njit(cache=True, nogil=True)
def extents(order: np.ndarray, counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the box of all of the first pixels of each row; arguments as above."""
    n = order.shape[0]
    boxes = np.empty((n, counts.shape[1], 4), np.int32)
    for i in range(n):
        x0, y0, x1, y1 = width, height, 0, 0
        inserted = 0
        for a in range(counts.shape[1]):
            while inserted < counts[i, a]:
                y, x = divmod(order[i, inserted], width)
                x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x + 1), max(y1, y + 1)
                inserted += 1
            boxes[i, a] = (x0, y0, x1, y1) if inserted else (0, 0, width, height)
    return boxes


@njit(cache=True, nogil=True)
def best_overlaps(
    order: np.ndarray,
    above: np.ndarray,
    truth: np.ndarray,
    truth_start: np.ndarray,
    height: int,
    width: int,
    inclusive: bool,
) -> np.ndarray:
    """Return the best overlap of any component with any ground-truth box at each of 256 levels.

    ``truth`` is ΣM_i×4 float64 and row i owns ``truth_start[i]`` to ``truth_start[i + 1]``.
    Components have 8 neighbours. N×256 float32; −1 where no pixel lies above the level.

    A component keeps its box over a run of levels. Its overlap is worked out once, when the
    box is about to change or at the end, and noted for the whole run.
    """
    n = order.shape[0]
    overlaps = np.empty((n, 256), np.float32)
    stride = width + 2
    # A product is many times faster than an integer division, and as exact with the half.
    per_width = 1 / width
    parent = np.empty((height + 2) * stride, np.int32)
    facts = np.empty((parent.size, 6), np.int32)
    near = np.empty(8, np.int64)
    # runs[p, s]: the best overlap that holds from step s on for 2^p steps.
    runs = np.empty((9, 256), np.float32)
    for i in range(n):
        boxes = truth[truth_start[i] : truth_start[i + 1]]
        parent[:] = ABSENT
        runs[:] = -1
        inserted = 0
        # Step s holds the pixels above level 255 − s.
        for step in range(256):
            while inserted < above[i, 255 - step]:
                pixel = order[i, inserted]
                inserted += 1
                y = np.int64((pixel + 0.5) * per_width)
                x = pixel - y * width
                here = (y + 1) * stride + x + 1
                neighbours = _neighbours(parent, here, stride, 8, near)
                if neighbours == 0:
                    parent[here] = here
                    facts[here, AREA] = 1
                    facts[here, SINCE] = step
                    facts[here, X0] = facts[here, X1] = x
                    facts[here, Y0] = facts[here, Y1] = y
                    continue
                root = _root(parent, near[0])
                x0, y0, x1, y1 = x, y, x, y
                area = 1
                for k in range(1, neighbours):
                    other = _root(parent, near[k])
                    if other != root:
                        if facts[root, AREA] < facts[other, AREA]:
                            root, other = other, root
                        if facts[other, SINCE] < step:
                            _note(facts, other, step, runs, boxes, height, width, inclusive)
                        parent[other] = root
                        area += facts[other, AREA]
                        x0, y0 = min(x0, facts[other, X0]), min(y0, facts[other, Y0])
                        x1, y1 = max(x1, facts[other, X1]), max(y1, facts[other, Y1])
                parent[here] = root
                facts[root, AREA] += area
                if (
                    x0 < facts[root, X0]
                    or y0 < facts[root, Y0]
                    or x1 > facts[root, X1]
                    or y1 > facts[root, Y1]
                ):
                    if facts[root, SINCE] < step:
                        _note(facts, root, step, runs, boxes, height, width, inclusive)
                    _widen(facts, root, x0, y0, x1, y1)
        for k in range(inserted):
            y = np.int64((order[i, k] + 0.5) * per_width)
            here = (y + 1) * stride + order[i, k] - y * width + 1
            if parent[here] == here:
                _note(facts, here, 256, runs, boxes, height, width, inclusive)
        for power in range(8, 0, -1):
            half = 1 << (power - 1)
            for step in range(257 - (1 << power)):
                held = runs[power, step]
                runs[power - 1, step] = max(runs[power - 1, step], held)
                runs[power - 1, step + half] = max(runs[power - 1, step + half], held)
        overlaps[i] = runs[0, ::-1]
    return overlaps


@njit(cache=True, nogil=True)
def _starts(histogram: np.ndarray) -> None:
    total = 0
    for digit in range(histogram.size):
        count = histogram[digit]
        histogram[digit] = total
        total += count


@njit(cache=True, nogil=True, inline="always")
def _root(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True, nogil=True, inline="always")
def _widen(facts: np.ndarray, root: Any, x0: Any, y0: Any, x1: Any, y1: Any) -> None:
    """Let the box of a component also hold the pixels from (x0, y0) to (x1, y1)."""
    facts[root, X0] = min(facts[root, X0], x0)
    facts[root, Y0] = min(facts[root, Y0], y0)
    facts[root, X1] = max(facts[root, X1], x1)
    facts[root, Y1] = max(facts[root, Y1], y1)


@njit(cache=True, nogil=True, inline="always")
def _neighbours(
    parent: np.ndarray, here: int, stride: int, connectivity: int, near: np.ndarray
) -> int:
    """Write the parents of the inserted neighbours into ``near``; return how many there are.

    Next to an inserted edge neighbour, a corner belongs to its component already.
    """
    count = 0
    north, west = parent[here - stride], parent[here - 1]
    east, south = parent[here + 1], parent[here + stride]
    if north != ABSENT:
        near[count] = north
        count += 1
    if west != ABSENT:
        near[count] = west
        count += 1
    if east != ABSENT:
        near[count] = east
        count += 1
    if south != ABSENT:
        near[count] = south
        count += 1
    if connectivity == 4:
        return count
    if north == ABSENT:
        if west == ABSENT and parent[here - stride - 1] != ABSENT:
            near[count] = parent[here - stride - 1]
            count += 1
        if east == ABSENT and parent[here - stride + 1] != ABSENT:
            near[count] = parent[here - stride + 1]
            count += 1
    if south == ABSENT:
        if west == ABSENT and parent[here + stride - 1] != ABSENT:
            near[count] = parent[here + stride - 1]
            count += 1
        if east == ABSENT and parent[here + stride + 1] != ABSENT:
            near[count] = parent[here + stride + 1]
            count += 1
    return count


@njit(cache=True, nogil=True)
def _note(
    facts: np.ndarray,
    root: int,
    step: int,
    runs: np.ndarray,
    boxes: np.ndarray,
    height: int,
    width: int,
    inclusive: bool,
) -> None:
    """Note a component's overlap for the steps since its box last changed, at least one.

    Two overlapping powers of two cover a run of any length.
    """
    x0, y0 = facts[root, X0], facts[root, Y0]
    x1, y1 = facts[root, X1] + 1, facts[root, Y1] + 1
    extra = 0.0
    if inclusive:
        x1, y1 = min(x1, width - 1), min(y1, height - 1)
        extra = 1.0
    own = (x1 - x0 + extra) * (y1 - y0 + extra)
    best = 0.0
    for m in range(boxes.shape[0]):
        across = min(x1, boxes[m, 2]) - max(x0, boxes[m, 0]) + extra
        down = min(y1, boxes[m, 3]) - max(y0, boxes[m, 1]) + extra
        if across > 0 and down > 0:
            other = (boxes[m, 2] - boxes[m, 0] + extra) * (boxes[m, 3] - boxes[m, 1] + extra)
            best = max(best, across * down / (own + other - across * down))
    since = facts[root, SINCE]
    power = 0
    while (2 << power) <= step - since:
        power += 1
    last = step - (1 << power)
    runs[power, since] = max(runs[power, since], np.float32(best))
    runs[power, last] = max(runs[power, last], np.float32(best))
    facts[root, SINCE] = step
