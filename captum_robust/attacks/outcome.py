"""What became of attacked images: misclassified before, fooled, and how far they were moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._scores import at_least_float


@dataclass(frozen=True)
class Outcome:
    """What became of each of n images; tensors on the device of the images."""

    already: Tensor
    """n booleans: misclassified before the attack, which is not credited with them."""
    fooled: Tensor
    """n booleans: right before and not any more, or with ``aimed`` now of that class."""
    linf: Tensor
    """n, the largest change of a pixel."""
    l2: Tensor
    """n, the Euclidean length of the change."""


def outcome(
    clean: Tensor,
    attacked: Tensor,
    label: Tensor,
    before: Tensor,
    after: Tensor,
    aimed: Tensor | None = None,
) -> Outcome:
    """The outcome of an attack on images.

    Args:
        clean, attacked: n×…, the images before and after.
        label: n, the classes that are right.
        before, after: n, the classes that the model gives them.
        aimed: n, the classes that a targeted attack moves towards.

    >>> clean, label = torch.zeros(3, 2), torch.tensor([0, 0, 0])
    >>> moved = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    >>> one = outcome(clean, moved, label, torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]))
    >>> one.already.tolist(), one.fooled.tolist()
    ([False, False, True], [True, False, False])
    >>> one.linf.tolist(), one.l2.tolist()
    ([4.0, 0.0, 1.0], [5.0, 0.0, 1.0])
    """
    already = before != label
    lost = after != label if aimed is None else after == aimed
    linf, l2 = sizes_of(at_least_float(attacked) - at_least_float(clean))
    return Outcome(already, ~already & lost, linf, l2)


def sizes_of(change: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element and the Euclidean length of each change n×…."""
    flat = change.reshape(len(change), -1)
    return flat.abs().amax(dim=1), torch.linalg.vector_norm(flat, dim=1)
