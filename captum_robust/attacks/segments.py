"""The way from clean inputs across a class boundary, and the smallest part of it that fools."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._progress import counted
from captum_robust.attacks.norms import Norm, Tensors, minus, per_sample, plus, scaled
from captum_robust.attacks.victim import Victim, leads_of, put_each, take, take_each

SPARE_MARGIN = 1e-3
"""A change is not shortened further than to this share of the clean margin: between batches of
other sizes the scores of a sample differ by rounding."""
DOUBLINGS = 8
"""Up to this power of two, a change is enlarged until it survives a rounding."""
MULTIPLES = 4
"""How many passes look for the smallest multiple that does."""


def margins_of(scores: Tensor, victim: Victim, rows: Tensor) -> Tensor:
    """n, negative until a sample is fooled: how far the label has fallen behind another class;
    targeted: how far the target is ahead of all others."""
    leads = leads_of(scores.detach(), victim.label[rows])
    return leads if victim.targeted else -leads


class Segment:
    """The way from clean inputs to where an attack has led, and the smallest part that fools.

    With ``quantize`` images of 8 bits are searched, beyond the end if need be, and those are the
    result.
    """

    def __init__(
        self, victim: Victim, norm: Norm, epsilon: float | None, clean_scores: Tensor
    ) -> None:
        self.victim, self.norm, self.epsilon = victim, norm, epsilon
        self.change = tuple(torch.zeros_like(x) for x in victim.x)
        """N×…, the whole way."""
        self.lengths = torch.full_like(norm.lengths(self.change), torch.inf)
        """N, of the changes that fool, as far as :meth:`keep_shorter` knows."""
        self.clean_margins = margins_of(clean_scores, victim, victim.everyone)
        """N, at the beginning."""
        self.end_margins = self.clean_margins.clone()
        """N."""
        self.spare = SPARE_MARGIN * self.clean_margins.abs()
        """N, what a margin has to be."""

    def judge(self, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """n booleans: samples ``rows`` are fooled, with a margin to spare; the n margins."""
        margins = margins_of(scores, self.victim, rows)
        return self.victim.succeeds(scores, rows) & (margins >= self.spare[rows]), margins

    def keep_shorter(self, x: Tensors, rows: Tensor, fools: Tensor, margins: Tensor) -> Tensor:
        """End at those of the iterates n×… that fool and are nearer; n booleans: which."""
        change = minus(x, take_each(self.victim.x, rows))
        lengths = self.norm.lengths(change)
        shorter = fools & (lengths < self.lengths[rows])
        at = shorter.nonzero()[:, 0]
        self.lengths[rows[at]], self.end_margins[rows[at]] = lengths[at], margins[at]
        put_each(self.change, rows[at], take_each(change, at))
        return shorter

    def shortened(self, passes: int, *, is_new: bool = False) -> Tensors:
        """The inputs changed by the smallest multiple that fools and so many passes find.

        Only samples that are fooled at the end take part. ``is_new``: the model now is not quite
        the one that was fooled, so the change is enlarged until it fools this one.
        """
        victim = self.victim
        low, high = torch.zeros_like(self.spare), torch.ones_like(self.spare)
        at_low, at_high = self.clean_margins - self.spare, self.end_margins - self.spare
        if victim.quantize or is_new:
            self._enlarge(low, high, at_low, at_high)
        rows = victim.fooled.nonzero()[:, 0]
        below, above = low[rows], high[rows]
        # How far from 0 the margins are; both ends of a bracket have some.
        short, over = at_low[rows].clamp(max=-1e-12).neg(), at_high[rows].clamp(min=1e-12)
        steps = range(passes if len(rows) > 0 else 0)
        for _ in counted(steps, "step", None, "smallest change"):
            # False position, a tenth towards the end that fools. The end that stays gets less
            # weight, or it could stay for ever (the Illinois variant).
            share = (0.1 + 0.9 * short / (short + over)).clamp(0.1, 0.95)
            factors = below + share * (above - below)
            fooled, margins = self._try(rows, factors)
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

    def _enlarge(self, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor) -> None:
        """Double each change until it fools (with ``quantize`` rounded); note its bracket."""
        victim = self.victim
        rows = victim.fooled.nonzero()[:, 0]
        victim.fooled = torch.zeros_like(victim.fooled)
        for doubling in range(DOUBLINGS + 1):
            if len(rows) == 0:
                break
            factors = torch.full_like(high[rows], 2.0**doubling)
            fooled, margins = self._try(rows, factors)
            reached, short = rows[fooled], rows[~fooled]
            victim.fooled[reached] = True
            high[reached], at_high[reached] = factors[fooled], margins[fooled]
            low[short], at_low[short] = factors[~fooled], margins[~fooled]
            rows = short

    def _try(self, rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """n booleans: fooled by these multiples; the n margins, less what is to spare."""
        x = self._multiples(rows, factors)
        if self.victim.quantize:
            x = self.victim.to_bytes(x, rows)
        scores = self.victim.scores(x, rows)
        fooled, margins = self.judge(scores, rows)
        return fooled, margins - self.spare[rows]

    def _multiples(self, rows: Tensor, factors: Tensor) -> Tensors:
        """The clean inputs n×… of ``rows`` changed by n multiples, clipped to the bounds.

        With ``quantize`` rounded, and in the ball.
        """
        victim = self.victim
        clean = take_each(victim.x, rows)
        moved = victim.within(plus(clean, scaled(take_each(self.change, rows), factors)))
        if not victim.quantize:
            return moved
        if self.epsilon is not None:
            moved = self._projected(moved, rows, self.epsilon)
        rounded = victim.to_bytes(moved, rows)
        if victim.masks is not None:
            rounded = tuple(
                torch.where(take(m, rows) == 0, x, r)
                for m, x, r in zip(victim.masks, clean, rounded, strict=True)
            )
        return rounded if self.epsilon is None else self._projected(rounded, rows, self.epsilon)

    def _projected(self, x: Tensors, rows: Tensor, epsilon: float) -> Tensors:
        """n×… of ``rows``: in the ball around the clean inputs; to the bit as they are if there."""
        clean = take_each(self.victim.x, rows)
        change = minus(x, clean)
        limited = self.norm.project(change, epsilon)
        return tuple(
            torch.where(short == long, t, c + short)
            for t, c, long, short in zip(x, clean, change, limited, strict=True)
        )
