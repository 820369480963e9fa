"""What is drawn for samples: from one generator for all, or from one for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from captum_robust._checks import check

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator, or one for each sample, so that no draw depends on the batch that a sample is in;
None: torch's global one."""


def drawn(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers N×…, on the device of their generators; without any on ``device``.

    Args:
        draw: ``torch.rand`` or ``torch.randn``.
        shape: of the result.
        generator: see :data:`Generators`.
        device: where torch's global generator draws.
        dtype: of the numbers.

    Raises:
        ValueError: another number of generators than samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        place = device if generator is None else generator.device
        return draw(tuple(shape), generator=generator, device=place, dtype=dtype)
    n, count = shape[0], len(generator)
    check(count == n, f"generator: expected one, or one for each of {n} samples, got {count}")
    each = [draw(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(each) if each else torch.empty(tuple(shape), dtype=dtype)
