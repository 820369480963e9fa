"""Which of the 256 levels of a map localize, packed: all that MaxBoxAcc asks of their overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.runs.store import pack, unpack

OVERLAPS = {"maxboxacc": (0.5,), "maxboxacc_v2": (0.3, 0.5, 0.7)}
"""The overlaps that each of these columns of the rows asks for."""
_LEVELS = 256
_PART = 4096
"""Images whose levels are in memory."""


def pack_hits(ious: Tensor, asked: Sequence[float]) -> bytes:
    """Whether the overlaps of the 256 levels are at least each of those that are asked for."""
    hits = ious >= torch.tensor(asked, dtype=ious.dtype)[:, None]
    return pack(torch.from_numpy(np.packbits(hits.numpy(), axis=1)))


def count_hits(packed: Iterable[bytes], asked: Sequence[float]) -> np.ndarray[Any, Any]:
    """T×256, how many images have an overlap of at least each of T at each level.

    They are those of :func:`pack_hits`, or the overlaps themselves that earlier versions kept.

    Raises:
        ValueError: others, as in a damaged file.

    >>> two = [pack_hits(torch.linspace(0, 1, 256), (0.3, 0.7))] * 2
    >>> count_hits(two, (0.3, 0.7)).sum(axis=1).tolist()
    [358, 154]
    """
    total, coming = np.zeros((len(asked), _LEVELS), np.int64), iter(packed)
    while part := [unpack(data, np.uint8) for data in islice(coming, _PART)]:
        sizes = {len(values) for values in part}
        for size in sizes:
            values = np.stack([one for one in part if len(one) == size])
            if size == 4 * _LEVELS:
                ious = values.view(np.float32)
                total += np.stack([(ious >= np.float32(t)).sum(axis=0) for t in asked])
                continue
            damaged = f"rows.sqlite: damaged, or of something else ({size} bytes of levels)"
            check(size == len(asked) * _LEVELS // 8, damaged)
            total += np.unpackbits(values, axis=1).sum(axis=0, dtype=np.int64).reshape(total.shape)
    return total
