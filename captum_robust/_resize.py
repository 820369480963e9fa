"""Gaussian blur as a product of matrices: for any size, and the same on each device."""

from __future__ import annotations

import torch
from torch import Tensor


def blur_matrix(size: int, sigma: float) -> Tensor:
    """size×size: a Gaussian cut off at 4 sigma, what falls over the border mirrored back."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    rows = torch.arange(size).unsqueeze(1).expand(size, len(offsets))
    position = (rows + offsets.long()) % (2 * size)
    columns = torch.where(position < size, position, 2 * size - 1 - position)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.index_put_((rows, columns), weights.expand(size, -1), accumulate=True)
    return matrix
