"""The cost of a method, counted in classifier passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    >>> import torch
    >>> with count_passes(net) as passes:
    ...     x = torch.rand(3, 2, requires_grad=True)
    ...     net(x).sum().backward()
    >>> passes
    Passes(forward=3, backward=3)
    """
    passes = Passes()
    handles: list[Any] = []

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        passes.forward += len(x)
        if x.requires_grad:
            n = len(x)

            def on_gradient(_: Tensor) -> None:
                passes.backward += n

            handles.append(x.register_hook(on_gradient))  # type: ignore[no-untyped-call]

    pre_hook = model.register_forward_pre_hook(on_input)
    try:
        yield passes
    finally:
        pre_hook.remove()
        for handle in handles:
            handle.remove()
