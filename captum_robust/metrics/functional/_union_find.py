"""The numba kernels: pixels are inserted from the largest down into a union-find forest.

Importing this module imports numba, so its callers do it inside their functions. Every kernel
works on a grid with a border of one pixel that is never inserted: no bounds to check.
"""

from typing import Any

import numpy as np
from numba import njit

ABSENT = -1
# The columns of what is known of a component, kept at its root: its half-open box, its pixels,
# the first of them, and the step at which the box last changed.
X0, Y0, X1, Y1, AREA, FIRST, SINCE = range(7)


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
def largest_boxes(
    order: np.ndarray, counts: np.ndarray, height: int, width: int, connectivity: int
) -> np.ndarray:
    """Return the box of the largest component of the first pixels of each row.

    ``order`` is N×P; ``counts`` N×A ascending. Of components of one size, the one whose first
    pixel comes first in raster order. No pixels: the whole image. N×A×4 int32, half-open.
    """
    n, pixels = order.shape
    boxes = np.empty((n, counts.shape[1], 4), np.int32)
    parent = np.empty((height + 2) * (width + 2), np.int32)
    facts = np.empty((parent.size, 7), np.int32)
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
                root, _, x0, y0, x1, y1, area, first = _insert(
                    parent, facts, order[i, inserted], width, connectivity, near, 0
                )
                inserted += 1
                _write(facts, root, x0, y0, x1, y1, area)
                facts[root, FIRST] = first
                # Only the component that grew can overtake.
                if (
                    largest < 0
                    or area > facts[largest, AREA]
                    or (area == facts[largest, AREA] and first < facts[largest, FIRST])
                ):
                    largest = root
            box = facts[largest, :4]
            boxes[i, a] = box
            # More than half of all pixels can't be overtaken, and the box can't grow further.
            is_whole = box[X0] == box[Y0] == 0 and box[X1] == width and box[Y1] == height
            settled = is_whole and 2 * facts[largest, AREA] > pixels
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
    counts: np.ndarray,
    truth: np.ndarray,
    truth_start: np.ndarray,
    height: int,
    width: int,
    inclusive: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best overlap of any component of the first pixels with any ground-truth box.

    ``order`` is N×P; ``counts`` N×A ascending; ``truth`` is ΣM_i×4 float64 and row i owns
    ``truth_start[i]`` to ``truth_start[i + 1]``. Components have 8 neighbours. N×A float32.
    Behind them what :func:`largest_boxes` gives, which costs little here.

    A component keeps its box over a run of steps. Its overlap is worked out once, when the
    box is about to change or at the end, and noted for the whole run.
    """
    n, steps = counts.shape
    overlaps = np.zeros((n, steps), np.float32)
    largest_of = np.empty((n, steps, 4), np.int32)
    parent = np.empty((height + 2) * (width + 2), np.int32)
    facts = np.empty((parent.size, 7), np.int32)
    near = np.empty(8, np.int64)
    for i in range(n):
        best = overlaps[i]
        boxes = truth[truth_start[i] : truth_start[i + 1]]
        parent[:] = ABSENT
        largest = -1
        inserted = 0
        for step in range(steps):
            while inserted < counts[i, step]:
                root, joined, x0, y0, x1, y1, area, first = _insert(
                    parent, facts, order[i, inserted], width, 8, near, step
                )
                inserted += 1
                for k in range(joined):
                    if facts[near[k], SINCE] < step:
                        _note(facts, near[k], step, best, boxes, height, width, inclusive)
                facts[root, AREA], facts[root, FIRST] = area, first
                if (
                    largest < 0
                    or area > facts[largest, AREA]
                    or (area == facts[largest, AREA] and first < facts[largest, FIRST])
                ):
                    largest = root
                if (
                    x0 < facts[root, X0]
                    or y0 < facts[root, Y0]
                    or x1 > facts[root, X1]
                    or y1 > facts[root, Y1]
                ):
                    if facts[root, SINCE] < step:
                        _note(facts, root, step, best, boxes, height, width, inclusive)
                    _write(facts, root, x0, y0, x1, y1, area)
            if largest < 0:
                largest_of[i, step] = (0, 0, width, height)
            else:
                largest_of[i, step] = facts[largest, :4]
        for node in range(parent.size):
            if parent[node] == node:
                _note(facts, node, steps, best, boxes, height, width, inclusive)
    return overlaps, largest_of


@njit(cache=True, nogil=True)
def _starts(histogram: np.ndarray) -> None:
    total = 0
    for digit in range(histogram.size):
        count = histogram[digit]
        histogram[digit] = total
        total += count


@njit(cache=True, nogil=True, inline="always")
def _insert(
    parent: np.ndarray,
    facts: np.ndarray,
    pixel: Any,
    width: int,
    connectivity: int,
    near: np.ndarray,
    step: int,
) -> Any:
    """Put a pixel into the forest, and the components that it touches into one.

    Returns its root; how many others it took in, whose roots are in ``near``; and what the root's
    facts, yet unchanged, become: box, pixels and first pixel.
    """
    stride = width + 2
    # A product is many times faster than an integer division, and as exact with the half.
    y: Any = np.int64((pixel + 0.5) * (1 / width))
    x = pixel - y * width
    here = (y + 1) * stride + x + 1
    x0, y0, x1, y1, area, first = x, y, x + 1, y + 1, 1, here
    root: Any = here
    joined = 0
    for k in range(_neighbours(parent, here, stride, connectivity, near)):
        other = _root(parent, near[k])
        if other != root:
            x0, y0 = min(x0, facts[other, X0]), min(y0, facts[other, Y0])
            x1, y1 = max(x1, facts[other, X1]), max(y1, facts[other, Y1])
            area += facts[other, AREA]
            first = min(first, facts[other, FIRST])
            if root == here:
                root = other
                continue
            if facts[root, AREA] < facts[other, AREA]:
                root, other = other, root
            parent[other] = root
            near[joined] = other
            joined += 1
    parent[here] = root
    if root == here:
        _write(facts, here, x0, y0, x1, y1, area)
        facts[here, FIRST], facts[here, SINCE] = here, step
    return root, joined, x0, y0, x1, y1, area, first


@njit(cache=True, nogil=True, inline="always")
def _root(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True, nogil=True, inline="always")
def _write(facts: np.ndarray, root: Any, x0: Any, y0: Any, x1: Any, y1: Any, area: Any) -> None:
    facts[root, X0], facts[root, Y0] = x0, y0
    facts[root, X1], facts[root, Y1] = x1, y1
    facts[root, AREA] = area


@njit(cache=True, nogil=True, inline="always")
def _neighbours(
    parent: np.ndarray, here: int, stride: int, connectivity: int, near: np.ndarray
) -> int:
    """Write the parents of the inserted neighbours into ``near``; return how many there are.

    Next to an inserted edge neighbour, a corner belongs to its component already.
    """
    count = 0
    for edge in (-stride, -1, 1, stride):
        if parent[here + edge] != ABSENT:
            near[count] = parent[here + edge]
            count += 1
    if connectivity == 4:
        return count
    for down in (-stride, stride):
        if parent[here + down] == ABSENT:
            for across in (-1, 1):
                if parent[here + across] == ABSENT and parent[here + down + across] != ABSENT:
                    near[count] = parent[here + down + across]
                    count += 1
    return count


@njit(cache=True, nogil=True)
def _note(
    facts: np.ndarray,
    root: int,
    step: int,
    best: np.ndarray,
    boxes: np.ndarray,
    height: int,
    width: int,
    inclusive: bool,
) -> None:
    """Note a component's overlap for the steps since its box last changed, if there are any."""
    x0, y0, x1, y1 = facts[root, X0], facts[root, Y0], facts[root, X1], facts[root, Y1]
    extra = 0.0
    if inclusive:
        x1, y1 = min(x1, width - 1), min(y1, height - 1)
        extra = 1.0
    own = (x1 - x0 + extra) * (y1 - y0 + extra)
    overlap = 0.0
    for m in range(boxes.shape[0]):
        across = min(x1, boxes[m, 2]) - max(x0, boxes[m, 0]) + extra
        down = min(y1, boxes[m, 3]) - max(y0, boxes[m, 1]) + extra
        if across > 0 and down > 0:
            other = (boxes[m, 2] - boxes[m, 0] + extra) * (boxes[m, 3] - boxes[m, 1] + extra)
            overlap = max(overlap, across * down / (own + other - across * down))
    if overlap > 0:
        for held in range(facts[root, SINCE], step):
            best[held] = max(best[held], np.float32(overlap))
    facts[root, SINCE] = step
