"""Backward passes whose gradients neither vanish nor overflow in half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_robust._scores import where_the_graph_breaks
from captum_robust.attacks.norms import Tensors

FIRST_SCALE = 2.0**10
LEAST_EXPONENT, LARGEST_EXPONENT = -20, 30
"""Of the scales, which are powers of two."""


class ScaleSearch:
    """The scales of n samples at which the gradient neither vanishes nor overflows.

    Upwards from where it vanishes, downwards from where it overflows, then between the two. There
    may be none: the bracket shrinks, so that the search ends.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._low = torch.full((n,), -torch.inf, device=device)
        self._high = torch.full((n,), torch.inf, device=device)
        self.exponents = torch.zeros(n, device=device)
        """n, of two: the scales to try next, where it goes on."""
        self.goes_on = torch.zeros(n, dtype=torch.bool, device=device)

    def note(self, exponents: Tensor, vanished: Tensor, overflowed: Tensor) -> None:
        """What became of the gradients at scales of n exponents."""
        self._low = torch.where(vanished, exponents.maximum(self._low), self._low)
        self._high = torch.where(overflowed, exponents.minimum(self._high), self._high)
        middle = ((self._low + self._high) / 2).floor()
        up, down = (exponents + 10).minimum(middle), (exponents - 6).maximum(middle)
        following = torch.where(vanished, up, down)
        self.exponents = following.clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
        self.goes_on = (vanished | overflowed) & (self.exponents != exponents)


def gradients_or_zeros(
    objective: Tensor,
    inputs: Tensors,
    keep_graph: bool = False,
    scale: Tensor | None = None,
) -> Tensors | None:
    """The gradients of n objectives, times a scale of each; zeros for what they do not depend on.

    None: they depend on no input.
    """
    if not objective.requires_grad:
        return None
    ones = torch.ones_like(objective) if scale is None else scale
    some = torch.autograd.grad(objective, inputs, ones, retain_graph=keep_graph, allow_unused=True)
    if all(g is None for g in some):
        return None
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(some, inputs, strict=True))


def no_gradient(
    forward_func: Callable[..., Tensor], inputs: Tensors, arguments: object
) -> ValueError:
    """The error to raise where :func:`gradients_or_zeros` found none through the model."""
    where = where_the_graph_breaks(forward_func, inputs, arguments)
    flows = "no gradient flows from its scores to the inputs, and this attack needs one"
    return ValueError(f"forward_func: {flows}{where}")
