"""The checks on inputs and scores that every attribution makes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(tensor: Tensor, where: str, first_sample: int = 0) -> None:
    """Raise ``ValueError`` if a sample (a row of the first dimension) holds NaN or infinity.

    ``first_sample`` is the number of the first row in the caller's batch.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # Smallest and largest pass NaN and infinity on, without a copy of the tensor.
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    finite = torch.isfinite(rows.amin(dim=1)) & torch.isfinite(rows.amax(dim=1))
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"{where}: NaN or infinity in sample {first_sample + first} "
            f"({int((~finite).sum())} of {len(finite)} samples)"
        )


def check_batch(inputs: tuple[Tensor, ...]) -> int:
    """The batch size of finite, non-empty inputs; ``TypeError`` or ``ValueError`` otherwise."""
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs: expected tensors, got {type(x).__name__} at position {i}")
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(f"inputs: the batch is empty (shape {tuple(x.shape)})")
        check_finite(x, "inputs")
    return int(inputs[0].shape[0])
