"""The cost of a method, counted in classifier passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._contexts import owned


@dataclass
class Passes:
    """Images that went through the classifier: forward, and backward to the input."""

    forward: int = 0
    backward: int = 0


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Passes]:
    """Count the images that pass through ``model`` while it lasts.

    A backward pass counts when its gradient reaches the model's input; one that stops at a layer,
    as for class activation maps, does not. Counting reads nothing back from the device.

    >>> net = nn.Linear(2, 1)
    >>> with count_passes(net) as passes:
    ...     x = torch.rand(3, 2, requires_grad=True)
    ...     net(x).sum().backward()
    >>> passes
    Passes(forward=3, backward=3)
    """
    passes = Passes()

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        x, n = args[0], len(args[0])
        passes.forward += n
        if not (x.requires_grad and torch.is_grad_enabled()):
            return None

        def on_gradient(_: Tensor) -> None:
            passes.backward += n

        # On a view of its own: the same input may go through several times.
        view = x.view_as(x)
        view.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return (view, *args[1:])

    handle = model.register_forward_pre_hook(owned(on_input))
    try:
        yield passes
    finally:
        handle.remove()
