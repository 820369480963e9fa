"""A histogram of fixed size of each unit's activations, for quantiles with a known error."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 5
"""Of the mantissa: 32 bins from one power of two to the next."""
_LOW, _HIGH = -12, 12
"""Powers of two between which values are told apart."""
BINS = ((_HIGH - _LOW) << _BITS) + 1
RELATIVE_ERROR = 2.0**-_BITS
"""Of a quantile: a bin is at most so much wide, in parts of its lower edge."""
_FIRST = (127 + _LOW) << _BITS


def bins_of(values: Tensor) -> Tensor:
    """The bin of each number, int64: 0 for what is below 2^-12, also negative.

    From there to 2^12 a bin is at most 1/32 of its lower edge wide; the last holds all above. They
    are the first bits of a float32, which are in the order of the numbers.
    """
    bits = values.float().contiguous().view(torch.int32) >> (23 - _BITS)
    return (bits - (_FIRST - 1)).clamp(0, BINS - 1).long()


def edges() -> Tensor:
    """BINS, the lower edge of each bin; that of the first is 0."""
    bits = (torch.arange(BINS, dtype=torch.int32) + (_FIRST - 1)) << (23 - _BITS)
    lower = bits.view(torch.float32)
    lower[0] = 0
    return lower


class Sketch:
    """How often the activations of each of K units fell into each bin."""

    def __init__(self, units: int, counts: Tensor | None = None) -> None:
        self.counts = torch.zeros(units, BINS, dtype=torch.int64) if counts is None else counts

    def add(self, values: Tensor) -> None:
        """Count activations K×M."""
        from captum_robust.inspection._histogram import count_bins

        bits = values.float().contiguous().cpu().view(torch.int32)
        count_bins(bits.numpy(), self.counts.numpy(), 23 - _BITS, _FIRST - 1)

    def top_bins(self, share: float, total: float | None = None) -> Tensor:
        """K: the highest bin such that at least ``share`` of ``total`` values are in it or above.

        ``total`` is the number of values of a unit so far, or, for a bound that holds for good,
        the number that there will be. The first bin above 0 is the least.
        """
        whole = float(self.counts[0].sum()) if total is None else total
        reached = self.tails() >= share * whole
        return (reached * torch.arange(BINS)).amax(dim=1).clamp(min=1)

    def tails(self) -> Tensor:
        """K×BINS, how many values are in a bin or above."""
        return self.counts.flip(1).cumsum(1).flip(1)
