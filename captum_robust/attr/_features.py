"""How far the features of chosen layers have moved, measured while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FeatureDistance:
    r"""Σ over layers of the mean squared change of a layer's output since the reference pass.

    The change is taken inside a forward hook, at the moment when the output is there, so that an
    in-place operation behind the layer does no harm. A layer that runs more than once counts with
    its last call, as in Captum.

    Args:
        layers: whose outputs, tensors with the batch first or tuples of such, are compared.
        normalize: divide the change of each sample's output by the mean square of its reference,
            so that every layer counts alike.
    """

    def __init__(self, layers: Sequence[nn.Module], normalize: bool = False) -> None:
        self.layers = list(layers)
        self.normalize = normalize
        self.total: Tensor | None = None
        """n, of the last pass under ``measured``; differentiable."""
        self._references: list[tuple[Tensor, ...]] = [() for _ in self.layers]
        self._selected: list[tuple[Tensor, ...]] = self._references
        self._rows: list[int] | None = None
        self._calls = [0] * len(self.layers)
        self._calls_now: list[int] = []

    @contextmanager
    def reference(self, n: int, outputs: list[list[Tensor]]) -> Iterator[None]:
        """While it lasts, a forward pass of n samples records the references.

        ``outputs`` receives, for each layer, the tensors of its last call.
        """
        self._calls = [0] * len(self.layers)
        outputs[:] = [[] for _ in self.layers]

        def record(i: int, output: Any) -> None:
            tensors = _tensors(self.layers[i], output, n)
            self._calls[i] += 1
            self._references[i] = tuple(t.detach().clone() for t in tensors)
            outputs[i] = list(tensors)

        with self._hooked(record):
            yield
        for i, calls in enumerate(self._calls):
            if calls == 0:
                raise ValueError(f"layers: {_described(i, self.layers)} did not run")
        self._select(list(range(n)))

    @contextmanager
    def measured(self, rows: list[int]) -> Iterator[None]:
        """While it lasts, a forward pass of these samples sums up their change in ``total``."""
        self._select(rows)
        self._calls_now = [0] * len(self.layers)
        self.total = None

        def compare(i: int, output: Any) -> None:
            self._calls_now[i] += 1
            if self._calls_now[i] != self._calls[i]:
                return
            tensors = _tensors(self.layers[i], output, len(rows))
            for tensor, reference in zip(tensors, self._selected[i], strict=True):
                change = _mean_square(tensor - reference)
                if self.normalize:
                    size = _mean_square(reference)
                    change = change / torch.where(size > 0, size, torch.ones_like(size))
                self.total = change if self.total is None else self.total + change

        with self._hooked(compare):
            yield
        if self._calls_now != self._calls:
            raise ValueError(
                "layers: they did not run as often as on the unperturbed inputs "
                f"({self._calls_now} and {self._calls} times)"
            )

    def _select(self, rows: list[int]) -> None:
        """Keep the references of these samples at hand."""
        if rows == self._rows:
            return
        self._rows = rows
        at = torch.tensor(rows)
        n = len(self._references[0][0]) if self._references and self._references[0] else 0
        whole = rows == list(range(n))
        self._selected = [
            tensors if whole else tuple(t[at.to(t.device)] for t in tensors)
            for tensors in self._references
        ]

    @contextmanager
    def _hooked(self, receive: Any) -> Iterator[None]:
        def hook_of(i: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                receive(i, output)

            return hook

        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                # A ScriptModule refuses a hook: the ones before it have to go then too.
                hooks.callback(layer.register_forward_hook(hook_of(i)).remove)
            yield


def _tensors(layer: nn.Module, output: Any, n: int) -> tuple[Tensor, ...]:
    tensors = output if isinstance(output, tuple) else (output,)
    # Attention without its weights returns (output, None).
    tensors = tuple(t for t in tensors if t is not None)
    for tensor in tensors or (output,):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                f"layers: the output of {type(layer).__name__} is no floating-point tensor or "
                f"tuple of them, but {getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(
                f"layers: the output of {type(layer).__name__} has the shape "
                f"{tuple(tensor.shape)}, expected {n}×… for a batch of {n}"
            )
    return tensors


def _mean_square(x: Tensor) -> Tensor:
    """Of each sample, in at least single precision."""
    x = x.float() if x.dtype.itemsize < 4 else x
    return x.square().flatten(1).mean(dim=1) if x.ndim > 1 else x.square()


def _described(i: int, layers: Sequence[nn.Module]) -> str:
    return f"number {i}, {type(layers[i]).__name__},"
