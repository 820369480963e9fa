"""Some of the samples of a batch: their inputs, targets and forward arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_of(x: Tensor, rows: list[int], n: int) -> Tensor:
    x = x.clone() if x.is_inference() else x
    return x if rows == list(range(n)) else x[torch.tensor(rows, device=x.device)]


def target_of(target: Any, rows: list[int], n: int) -> Any:
    """The targets of some samples; what holds for all of them stays as it is."""
    is_tensor = isinstance(target, Tensor) and target.ndim == 1 and len(target) > 1
    if len(rows) == n or not (is_tensor or isinstance(target, list)):
        return target
    if len(target) != n:  # what Captum raises where it sees the whole batch
        raise AssertionError(f"target: expected one a sample, {n}, got {len(target)}")
    return target[rows] if is_tensor else [target[row] for row in rows]


def arguments_of(arguments: Any, rows: list[int], n: int) -> Any:
    """Of each tensor with N rows those of some samples, as Captum expands them."""
    if isinstance(arguments, tuple):
        return tuple(arguments_of(a, rows, n) for a in arguments)
    if not isinstance(arguments, Tensor):
        return arguments
    is_each = arguments.ndim > 0 and len(arguments) == n
    return rows_of(arguments, rows if is_each else list(range(n)), n)
