"""Which of the 256 levels of a map localize, packed: all that MaxBoxAcc asks of their overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.runs.store import pack, unpack

OVERLAPS = {"maxboxacc": (0.5,), "maxboxacc_v2": (0.3, 0.5, 0.7)}
"""The overlaps that each of these columns of the rows asks for."""
_LEVELS = 256


def pack_hits(ious: Tensor, thresholds: Sequence[float]) -> bytes:
    """Whether the overlaps of the 256 levels are at least each of the thresholds.

    >>> hits = unpack_hits(pack_hits(torch.linspace(0, 1, 256), (0.3, 0.7)), (0.3, 0.7))
    >>> hits.sum(axis=1).tolist()
    [179, 77]
    """
    hits = ious >= torch.tensor(thresholds, dtype=ious.dtype)[:, None]
    return pack(torch.from_numpy(np.packbits(hits.numpy(), axis=1)))


def unpack_hits(data: bytes, thresholds: Sequence[float]) -> np.ndarray[Any, Any]:
    """T×256 Boolean of :func:`pack_hits`, or of the overlaps themselves that earlier versions kept.

    Raises:
        ValueError: others, as in a damaged file.
    """
    values = unpack(data, np.uint8)
    if values.nbytes == _LEVELS * 4:
        asked = np.array(thresholds, np.float32)[:, None]
        hits: np.ndarray[Any, Any] = (
            values.view(np.float32) >= np.array(thresholds, np.float32)[:, None]
        )
        return hits
    expected = len(thresholds) * _LEVELS // 8
    damaged = f"rows.sqlite: damaged, or of something else ({values.nbytes} bytes of levels)"
    check(values.nbytes == expected, damaged)
    return np.unpackbits(values.reshape(len(thresholds), -1), axis=1).astype(bool)
