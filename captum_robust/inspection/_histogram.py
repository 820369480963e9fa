"""The numba kernel of the histograms; importing it imports numba, so callers do it inside."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(cache=True, nogil=True)
def count_bins(bits: Any, counts: Any, shift: int, first: int) -> None:
    """Add to ``counts`` K×B how often the bins occur of float32 numbers, whose bits are K×M int32.

    A bin is the number's first bits, less ``first``; what is below or above is in the outermost.
    """
    last = counts.shape[1] - 1
    for k in range(bits.shape[0]):
        for m in range(bits.shape[1]):
            place = (bits[k, m] >> shift) - first
            counts[k, min(max(place, 0), last)] += 1
