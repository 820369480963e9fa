"""Values of images by their positions, and those of the images that several have a value of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Values: TypeAlias = tuple[Tensor, Tensor]
"""Ascending positions M, and a value at each, M×…."""
NO_VALUES: Values = torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def positions_of(rows: Iterable[Mapping[str, Any]]) -> Tensor:
    """Those of rows with a ``position``."""
    return torch.tensor([row["position"] for row in rows], dtype=torch.int64)


def paired(each: Iterable[Values]) -> list[Tensor]:
    """The values at the positions that all have.

    >>> values = torch.tensor([5.0, 6.0])
    >>> paired([(torch.tensor([1, 3]), values), (torch.tensor([3, 4]), values)])
    [tensor([6.]), tensor([5.])]
    """
    pairs = list(each)
    common = reduce(np.intersect1d, [positions.numpy() for positions, _ in pairs])
    return [values[np.searchsorted(positions.numpy(), common)] for positions, values in pairs]
