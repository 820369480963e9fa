"""The way from clean inputs across a class boundary, and the smallest part of it that fools."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust.attacks.attack import cross_entropy
from captum_robust.attacks.norms import Norm, Tensors, minus, per_sample, plus, scaled
from captum_robust.attacks.victim import Victim, take, take_each

SPARE_MARGIN = 1e-3
"""A change is not shortened further than to this share of the clean margin: between batches of
other sizes the scores of a sample differ by rounding."""
DOUBLINGS = 8
"""Up to this power of two, a change is enlarged until it survives the rounding to 8 bits."""
MULTIPLES = 4
"""How many passes look for the smallest multiple that does."""


class Point:
    """Iterates of samples ``rows``, n of them, their scores n×K, and the graph of these."""

    def __init__(self, victim: Victim, x: Tensors, rows: Tensor, graph: bool) -> None:
        self.victim = victim
        with torch.set_grad_enabled(graph):
            self._leaves = tuple(t.detach().requires_grad_(graph) for t in x)
            self._scores = victim.scores(self._leaves, rows)
        self._all_rows = rows
        self._places = torch.arange(len(rows), device=rows.device)

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
        places = self._places[kept]
        # A backward pass runs through the whole graph. Where few samples are left, a fresh forward
        # pass of those costs less than that.
        if len(places) <= len(self._all_rows) // 2:
            x = take_each(tuple(t.detach() for t in self._leaves), places)
            return Point(self.victim, x, self._all_rows[places], graph=True)
        fewer = copy(self)
        fewer._places = places
        return fewer

    def gradients(self, up: Tensor, down: Tensor) -> Tensors:
        """n×…, of the score of class ``up`` (n) less that of ``down``; zero where the mask is."""
        with torch.enable_grad():
            scores = take(self._scores, self._places)
            difference = scores.gather(1, up[:, None]) - scores.gather(1, down[:, None])
        return self._gradients_of(difference)

    def loss_to(self, classes: Tensor) -> tuple[Tensor, Tensors]:
        """The n cross-entropies, and their gradients n×…."""
        with torch.enable_grad():
            loss = cross_entropy(take(self._scores, self._places), classes)
        return loss.detach(), self._gradients_of(loss)

    def _gradients_of(self, objective: Tensor) -> Tensors:
        rows = self.rows
        gradients = self.victim.gradients(objective, self._leaves, rows, keep_graph=True)
        return self.victim.masked(take_each(gradients, self._places), rows)


def margins_of(scores: Tensor, victim: Victim, rows: Tensor) -> Tensor:
    """n, negative until a sample is fooled: how far the label has fallen behind another class;
    targeted: how far the target is ahead of all others."""
    scores = scores.detach()
    own = scores.gather(1, victim.label[rows][:, None])[:, 0]
    behind = others_of(scores, victim.label[rows]).amax(dim=1) - own
    return -behind if victim.targeted else behind


def others_of(scores: Tensor, label: Tensor) -> Tensor:
    """Scores n×K, that of the label -infinity."""
    return scores.detach().scatter(1, label[:, None], -torch.inf)


@dataclass(frozen=True)
class Segment:
    """From the clean inputs to where an attack has led."""

    victim: Victim
    change: Tensors
    """N×…, the whole way."""
    clean_margins: Tensor
    """N, at its beginning; see :func:`margins_of`."""
    end_margins: Tensor
    """N."""

    def multiples(self, rows: Tensor, factors: Tensor) -> Tensors:
        """The clean inputs n×… of ``rows`` changed by n multiples, clipped to the bounds."""
        change = scaled(take_each(self.change, rows), factors)
        return self.victim.within(plus(take_each(self.victim.x, rows), change))


@dataclass(frozen=True)
class Shortening:
    """The search for the smallest multiple of a change that fools.

    Only samples that are fooled at the end of their segment take part. With ``quantize`` images of
    8 bits are searched, beyond that end if need be, and those are the result.
    """

    segment: Segment
    norm: Norm
    epsilon: float | None

    def result(self, passes: int) -> Tensors:
        """The inputs changed by the smallest multiple that so many passes find."""
        victim, segment = self.segment.victim, self.segment
        spare = self._spare
        low, high = torch.zeros_like(spare), torch.ones_like(spare)
        at_low, at_high = segment.clean_margins - spare, segment.end_margins - spare
        if victim.quantize:
            self._enlarge(low, high, at_low, at_high)
        rows = victim.fooled.nonzero()[:, 0]
        below, above = low[rows], high[rows]
        # How far from 0 the margins are; both ends of a bracket have some.
        short, over = at_low[rows].clamp(max=-1e-12).neg(), at_high[rows].clamp(min=1e-12)
        for _ in range(passes if len(rows) > 0 else 0):
            # False position, a tenth towards the end that fools. The end that stays gets less
            # weight, or it could stay for ever (the Illinois variant).
            share = (0.1 + 0.9 * short / (short + over)).clamp(0.1, 0.95)
            factors = below + share * (above - below)
            fooled, margins = self._judge(rows, factors)
            below, above = torch.where(fooled, below, factors), torch.where(fooled, factors, above)
            short = torch.where(fooled, short / 2, margins.clamp(max=-1e-12).neg())
            over = torch.where(fooled, margins.clamp(min=1e-12), over / 2)
        high[rows] = above
        final = self._multiples(victim.everyone, high)
        if self.epsilon is not None and not victim.quantize:
            victim.fooled &= self.norm.lengths(minus(final, victim.x)) <= self.epsilon
            final = self._projected(final, victim.everyone, self.epsilon)
        return tuple(
            torch.where(per_sample(victim.already, f).bool(), x, f)
            for f, x in zip(final, victim.x, strict=True)
        )

    @property
    def _spare(self) -> Tensor:
        return SPARE_MARGIN * self.segment.clean_margins.abs()

    def _enlarge(self, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor) -> None:
        """Double each change until its 8-bit rounding is fooled; note the ends of its bracket."""
        victim = self.segment.victim
        rows = victim.fooled.nonzero()[:, 0]
        victim.fooled = torch.zeros_like(victim.fooled)
        for doubling in range(DOUBLINGS + 1):
            if len(rows) == 0:
                break
            factors = torch.full_like(high[rows], 2.0**doubling)
            fooled, margins = self._judge(rows, factors)
            reached, short = rows[fooled], rows[~fooled]
            victim.fooled[reached] = True
            high[reached], at_high[reached] = factors[fooled], margins[fooled]
            low[short], at_low[short] = factors[~fooled], margins[~fooled]
            rows = short

    def _judge(self, rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """n booleans: fooled by these multiples, with a margin to spare; the n margins."""
        victim = self.segment.victim
        x = self._multiples(rows, factors)
        scores = victim.scores(victim.to_bytes(x) if victim.quantize else x, rows)
        margins = margins_of(scores, victim, rows) - self._spare[rows]
        return victim.succeeds(scores, rows) & (margins >= 0), margins

    def _multiples(self, rows: Tensor, factors: Tensor) -> Tensors:
        """With ``quantize`` rounded, and in the ball."""
        victim = self.segment.victim
        moved = self.segment.multiples(rows, factors)
        if not victim.quantize:
            return moved
        rounded = victim.to_bytes(moved)
        if victim.masks is not None:
            rounded = tuple(
                torch.where(take(m, rows) == 0, take(x, rows), r)
                for m, x, r in zip(victim.masks, victim.x, rounded, strict=True)
            )
        return rounded if self.epsilon is None else self._projected(rounded, rows, self.epsilon)

    def _projected(self, x: Tensors, rows: Tensor, epsilon: float) -> Tensors:
        """n×… of ``rows``: in the ball around the clean inputs; to the bit as they are if there."""
        clean = take_each(self.segment.victim.x, rows)
        change = minus(x, clean)
        limited = self.norm.project(change, epsilon)
        return tuple(
            torch.where(short == long, t, c + short)
            for t, c, long, short in zip(x, clean, change, limited, strict=True)
        )
