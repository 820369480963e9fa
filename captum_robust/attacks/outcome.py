"""What became of attacked images: misclassified before, fooled, and how far they were moved."""

from __future__ import annotations

from collections.abc import Sequence
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
    without_gradient: Tensor
    """n booleans: right before and not fooled, but the attack had no gradient to go by."""


def outcome(
    clean: Tensor,
    attacked: Tensor,
    label: Tensor,
    before: Tensor,
    after: Tensor,
    aimed: Tensor | None = None,
    without_gradient: Tensor | None = None,
) -> Outcome:
    """The outcome of an attack on images.

    Args:
        clean, attacked: n×…, the images before and after.
        label: n, the classes that are right.
        before, after: n, the classes that the model gives them.
        aimed: n, the classes that a targeted attack moves towards.
        without_gradient: n booleans, of which the attack had no gradient to go by; None: of none.

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
    without = torch.zeros_like(already) if without_gradient is None else without_gradient
    return Outcome(already, ~already & lost, linf, l2, without & ~already & ~lost)


def last_of(ended: Sequence[Tensor], classes: Tensor) -> Tensor:
    """n booleans, of which images an attack had no gradient; False where it does not say.

    Args:
        ended: what :func:`captum_robust.attacks.attack.watched_gradients` saw. The last of n
            samples is the attack itself, the others are parts of it.
        classes: n, of the images.
    """
    own = [without for without in ended if len(without) == len(classes)]
    none = torch.zeros_like(classes, dtype=torch.bool)
    return own[-1].to(none.device) if own else none


def sizes_of(change: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element and the Euclidean length of each change n×…."""
    flat = change.reshape(len(change), -1)
    return flat.abs().amax(dim=1), torch.linalg.vector_norm(flat, dim=1)
