"""How far the features of chosen layers have moved, measured while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from captum_robust._checks import check
from captum_robust._contexts import DID_NOT_RUN, hooked
from captum_robust._scores import at_least_float, rows_of
from captum_robust.attr._inputs import divided


class FeatureDistance:
    r"""Σ over layers of the mean squared change of a layer's output since the reference pass.

    The change is taken inside a forward hook, at the moment when the output is there, so that an
    in-place operation behind the layer does no harm. A layer that runs more than once counts with
    its last call, as in Captum.

    Args:
        layers: whose outputs, tensors with the batch first, or tuples and dictionaries with such,
            are compared.
        normalize: divide the change of each sample's output by the mean square of its reference,
            so that every layer counts alike.
        device: where the sum is, as layers may lie on several; None: where the first layer is.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        normalize: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.layers = list(layers)
        self.normalize = normalize
        self.total: Tensor | float = 0.0
        """n, of the last pass under ``measured``; differentiable. 0 without layers."""
        self._device = device
        self._references: list[tuple[Tensor, ...]] = [() for _ in self.layers]
        self._selected: list[tuple[Tensor, ...]] = self._references
        self._n = 0
        self._rows: list[int] | None = None
        self._calls: list[int] = []

    @contextmanager
    def reference(self, n: int) -> Iterator[list[tuple[Tensor, ...]]]:
        """While it lasts, a forward pass of n samples records the references.

        It is given a list, which receives, for each layer, the tensors of its last call.
        """
        outputs: list[tuple[Tensor, ...]] = [() for _ in self.layers]

        def record(i: int, _: int, tensors: tuple[Tensor, ...]) -> None:
            self._references[i] = tuple(t.detach().clone() for t in tensors)
            outputs[i] = tensors

        with self._hooked(n, record) as self._calls:
            yield outputs
        for i, (layer, calls) in enumerate(zip(self.layers, self._calls, strict=True)):
            check(calls > 0, f"layers: number {i}, {type(layer).__name__}, {DID_NOT_RUN}")
        self._n = n

    @contextmanager
    def measured(self, rows: list[int]) -> Iterator[None]:
        """While it lasts, a forward pass of these samples sums up their change in ``total``."""
        if rows != self._rows:
            self._rows = rows
            self._selected = [
                tuple(rows_of(t, rows, self._n) for t in tensors) for tensors in self._references
            ]
        self.total = 0.0

        def compare(i: int, call: int, tensors: tuple[Tensor, ...]) -> None:
            if call != self._calls[i]:
                return
            # A segment of torch.utils.checkpoint counts what is saved within it, and runs again
            # without this hook: what is saved here is kept out of that.
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                for tensor, reference in zip(tensors, self._selected[i], strict=True):
                    change = _mean_square(tensor - reference)
                    if self.normalize:
                        change = divided(change, _mean_square(reference))
                    self.total = self.total + change.to(self._device)

        with self._hooked(len(rows), compare) as calls:
            yield
        times = f"{calls} and {self._calls} times"
        message = f"layers: they did not run as often as on the unperturbed inputs ({times})"
        check(calls == self._calls, message)

    @contextmanager
    def _hooked(
        self, n: int, receive: Callable[[int, int, tuple[Tensor, ...]], None]
    ) -> Iterator[list[int]]:
        """``receive`` gets the number of a layer that has run, which call it was, and its tensors.

        Yields the number of calls of each layer.
        """
        calls = [0] * len(self.layers)

        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            i = self.layers.index(layer)
            calls[i] += 1
            receive(i, calls[i], _tensors(layer, output, n))

        with hooked(self.layers, hook):
            yield calls


def _tensors(layer: nn.Module, output: Any, n: int) -> tuple[Tensor, ...]:
    # Attention without its weights returns (output, None); others, dictionaries.
    leaves = tree_leaves(output)
    tensors = tuple(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
    name = f"layers: the output of {type(layer).__name__}"
    got = getattr(output, "dtype", type(output).__name__)
    message = f"{name} is no floating-point tensor or tuple of them, but {got}"
    check(tensors, message, TypeError)
    for tensor in tensors:
        fits = tensor.ndim > 0 and len(tensor) == n
        shape = tuple(tensor.shape)
        check(fits, f"{name} has the shape {shape}, expected {n}×… for a batch of {n}")
    return tensors


def _mean_square(x: Tensor) -> Tensor:
    """The mean square n of each sample, in at least single precision."""
    x = at_least_float(x)
    return x.square().flatten(1).mean(dim=1) if x.ndim > 1 else x.square()
