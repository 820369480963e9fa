"""Iterates with their scores and graph, from which several gradients can be taken."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from captum_robust.attacks.norms import Tensors
from captum_robust.attacks.victim import Victim, take, take_each


class Point:
    """Iterates of samples ``rows``, n of them, their scores n×K, and the graph of these."""

    def __init__(self, victim: Victim, x: Tensors, rows: Tensor, graph: bool) -> None:
        self.victim = victim
        self._all_rows = rows
        self._places = torch.arange(len(rows), device=rows.device)
        self._look(x, graph)

    def _look(self, x: Tensors, graph: bool = True) -> None:
        self._is_used = False
        with torch.set_grad_enabled(graph):
            self._leaves = tuple(t.detach().requires_grad_(graph) for t in x)
            self._scores = self.victim.scores(self._leaves, self._all_rows)

    @property
    def rows(self) -> Tensor:
        """n, the samples."""
        return take(self._all_rows, self._places)

    @property
    def scores(self) -> Tensor:
        """n×K, without their graph."""
        return take(self._scores.detach(), self._places)

    @property
    def x(self) -> Tensors:
        """n×…, the iterates."""
        return take_each(tuple(t.detach() for t in self._leaves), self._places)

    def at(self, kept: Tensor) -> Point:
        """Only some of the samples."""
        fewer = copy(self)
        fewer._places = self._places[kept]
        # A backward pass runs through the whole graph. Where few samples are left, a fresh forward
        # pass of those costs less than that.
        if len(fewer._places) <= len(self._all_rows) // 2:
            return Point(self.victim, fewer.x, fewer.rows, graph=True)
        return fewer

    def gradients(self, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensors]:
        """The n values of an objective of the scores n×K, and its gradients n×….

        These are zero where the mask is.
        """

        def evaluated() -> tuple[Tensor, Tensors]:
            with torch.enable_grad():
                return objective(take(self._scores, self._places)).reshape(-1), self._leaves

        def again() -> tuple[Tensor, Tensors]:
            self._look(self._leaves)
            return evaluated()

        victim = self.victim
        values, leaves = again() if self._is_used and victim.donates else evaluated()
        gradients = victim.gradients(
            values, leaves, self.rows, keep_graph=True, places=self._places, again=again
        )
        self._is_used = True  # also the graph of another try
        return values.detach(), victim.masked(gradients, self.rows)
