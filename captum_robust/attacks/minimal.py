"""Attacks that look for the smallest change that fools."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import as_number, check_count, check_number
from captum_robust._scores import at_least_float, check_rivals
from captum_robust.attacks._attack import (
    Attack,
    Tensors,
    Victim,
    cross_entropy,
    divided,
    l2_norms,
    per_sample,
    project,
    take,
    take_each,
)
from captum_robust.optim import minimize

_SLACK = 2.0
"""How many times longer than expected a gradient may be, before a boundary is overlooked."""
_SPARE_MARGIN = 1e-3
"""A change is not shortened further than to this share of the clean margin: between batches of
other sizes the scores of a sample differ by rounding."""
_DOUBLINGS = 8
"""Up to this power of two, a change is enlarged until it survives the rounding to 8 bits."""
_MULTIPLES = 4
"""How many passes look for the smallest multiple that does."""


class DeepFool(Attack):
    """Steps to the nearest class boundary of the linearised model, until the label is lost.

    Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks"
    (https://arxiv.org/abs/1511.04599). With f the scores, f_0 that of the label, w_k the gradient
    of f_k - f_0 and q the dual norm, the class k that minimises d_k = |f_k - f_0| / ‖w_k‖_q says
    the step: (d_k + 1e-4) w_k / ‖w_k‖_2, for ``"Linf"`` (d_k + 1e-4) sign(w_k).

    One forward pass an iteration tells whether a sample is fooled and is what its step is taken
    from. A fooled sample leaves the batch; where half of it or less is left, that gets a forward
    pass of its own, which is cheaper than backward passes through all. A backward pass is only made
    for classes that can be the nearest: after the first one of a sample those are left out whose
    boundary would be farther away even if their gradient were twice as long as expected, that is
    as at the sample's last iterate (before it is known: as that of the class with the smallest
    difference of scores).

    That ends on a boundary, but not at the point of it that is nearest. So each round of ``refine``
    goes half the way from there to the foot of the perpendicular from the clean input on the
    linearised boundary, the backward step of Croce and Hein, "Minimally distorted Adversarial
    Examples with a Fast Adaptive Boundary Attack" (https://arxiv.org/abs/1907.02044), and puts
    right by what the model says there. A point that is farther away or does not fool is dropped.
    ``refine=0`` is DeepFool as published.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`. A change this small does
            not survive the rounding to 8 bits: with ``quantize`` the multiple of it is looked for,
            up to 256, whose rounded image is fooled, and the rounded image is the result.
        norm: of the change that is to be small, ``"L2"`` or ``"Linf"``.
        candidates: how many of the clean input's top classes, the label included.
        max_iterations: at most so many.
        overshoot: the sum of steps is multiplied by one plus this.
        epsilon: None: no limit. Otherwise a larger change is projected on the ball of that radius,
            where it mostly does not fool any more.
        refine: how many rounds, of one forward and one backward pass and two forward passes
            without gradients.

    With ``targeted`` the target is the only candidate.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> attack = DeepFool(model, bounds=None, refine=0)
    >>> attack.perturb(torch.tensor([[3.0, 4.0]]))  # 5 from the boundary
    tensor([[-0.0601, -0.0801]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        norm: str = "L2",
        *,
        candidates: int = 10,
        max_iterations: int = 50,
        overshoot: float = 0.02,
        epsilon: float | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        quantize: bool = False,
        refine: int = 2,
    ) -> None:
        super().__init__(forward_func, epsilon=epsilon, norm=norm, bounds=bounds, quantize=quantize)
        check_count("candidates", candidates, 2)
        check_count("max_iterations", max_iterations, 1)
        check_count("refine", refine, 0)
        if not 0 <= as_number(overshoot) < float("inf"):
            raise ValueError(f"overshoot: expected a number from 0, got {overshoot!r}")
        self.candidates = candidates
        self.max_iterations = max_iterations
        self.overshoot = overshoot
        self.refine = refine

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        segment = self._walk(victim)
        self._refined(victim, segment)
        passes = _MULTIPLES if victim.quantize else 0
        return _shortened(victim, segment, passes, self.norm, epsilon)

    def _walk(self, victim: Victim) -> _Segment:
        """Every sample until it is fooled, stuck or out of iterations."""
        x, sums = victim.x, tuple(torch.zeros_like(t) for t in victim.x)
        rows = victim.everyone
        for iteration in range(self.max_iterations + 1):
            is_last = iteration == self.max_iterations
            point = _Point(victim, take_each(x, rows), rows, graph=not is_last)
            margins = _margins(point.scores, victim, rows)
            if iteration == 0:
                x = tuple(t.clone() for t in x)
                clean_margins, end_margins = margins, margins.clone()
                others = self._others(victim, point.scores)
                norms = torch.full_like(margins[:, None].expand(others.shape), torch.nan)
                goes_on = ~victim.already
            else:
                fooled = victim.succeeds(point.scores, rows)
                victim.fooled[rows], end_margins[rows] = fooled, margins
                goes_on = ~fooled
            if is_last or not bool(goes_on.any()):
                break
            point = point.at(goes_on.nonzero()[:, 0])
            rows = point.rows
            distances, steps, norms[rows] = self._nearest(
                point, take(others, rows), take(norms, rows)
            )
            del point
            moves = distances.isfinite().nonzero()[:, 0]
            rows = rows[moves]
            if len(rows) == 0:  # no gradient leads anywhere
                break
            for total, step in zip(sums, steps, strict=True):
                total[rows] += take(step, moves)
            moved = tuple(
                take(c, rows) + (1 + self.overshoot) * take(total, rows)
                for c, total in zip(victim.x, sums, strict=True)
            )
            for old, new in zip(x, victim.within(moved), strict=True):
                old[rows] = new
        change = tuple(e - c for e, c in zip(x, victim.x, strict=True))
        return _Segment(change, clean_margins, end_margins)

    def _others(self, victim: Victim, scores: Tensor) -> Tensor:
        """N×C, the classes that a sample may be moved to."""
        classes = scores.shape[1]
        check_rivals(scores)
        label = victim.label[:, None]
        if victim.targeted:
            return label
        ranked = scores.detach().scatter(1, label, -torch.inf)
        return ranked.topk(min(self.candidates, classes) - 1, dim=1).indices

    def _nearest(
        self, point: _Point, others: Tensor, norms: Tensor
    ) -> tuple[Tensor, Tensors, Tensor]:
        """The n distances to the nearest boundary, infinite if there is none; the steps n×… to it;
        the norms n×C of the gradients, computed or expected.

        ``norms``: those of the last iterate, NaN where nothing is known.
        """
        victim, rows, scores = point.victim, point.rows, point.scores.detach()
        start = scores.argmax(dim=1) if victim.targeted else victim.label[rows]
        gaps = (scores.gather(1, others) - scores.gather(1, start[:, None])).abs()  # n×C
        best = torch.full_like(gaps[:, 0], torch.inf)
        steps = tuple(torch.zeros_like(x) for x in point.x)

        def look(point: _Point, at: Tensor, column: Tensor) -> Tensor:
            """At candidate ``column`` (m) of the samples ``at``: the m norms of its gradients."""
            gradients = point.gradients(others[at, column], start[at])
            norm = self._dual_norms(gradients).to(gaps.dtype)
            distance = torch.where(norm > 0, gaps[at, column] / norm, torch.inf)
            nearer = (distance < best[at]).nonzero()[:, 0]
            best[at[nearer]] = distance[nearer]
            for step, gradient in zip(steps, gradients, strict=True):
                g = take(gradient, nearer)
                unit = self._unit(g, norm[nearer])
                # 1e-4 as in the paper's code: a step has to cross the boundary.
                step[at[nearer]] = unit * per_sample(distance[nearer] + 1e-4, g)
            return norm

        at = torch.arange(len(rows), device=rows.device)
        first = (gaps / norms.nan_to_num(nan=1.0)).nan_to_num(nan=torch.inf).argmin(dim=1)
        norm = look(point, at, first)
        known = norms.gather(1, first[:, None])
        # If this gradient grew since the last iterate, the others are expected to have.
        expected = norm[:, None] * torch.where(known > 0, norms / known, 1.0)
        lower = gaps / (_SLACK * expected)
        # Nothing is expected of a sample whose first gradient was zero.
        lower[norm == 0] = 0.0
        lower.scatter_(1, first[:, None], torch.inf)
        expected[at, first] = norm
        lower, order = lower.sort(dim=1)
        for place in range(others.shape[1] - 1):
            possible = (lower[at, place] < best[at]).nonzero()[:, 0]
            if len(possible) == 0:
                break
            point, at = point.at(possible), at[possible]
            column = order[at, place]
            expected[at, column] = look(point, at, column)
        return best, steps, expected

    def _refined(self, victim: Victim, segment: _Segment) -> None:
        """Shorten the changes of the samples that are fooled."""
        rows = victim.fooled.nonzero()[:, 0]
        for _ in range(self.refine):
            if len(rows) == 0:
                return
            clean, change = take_each(victim.x, rows), take_each(segment.change, rows)
            lengths = _lengths(change, self.norm)
            x = tuple(c + d for c, d in zip(clean, change, strict=True))
            point = _Point(victim, victim.within(x), rows, graph=True)
            label = victim.label[rows]
            rival = point.scores.scatter(1, label[:, None], -torch.inf).argmax(dim=1)
            up, down = (label, rival) if victim.targeted else (rival, label)
            gradients = point.gradients(up, down)
            margins = _margins(point.scores, victim, rows)
            del point
            norms = self._dual_norms(gradients).clamp(min=torch.finfo(torch.float32).tiny)
            # From the clean input straight to where the linearised margin is zero.
            distance = (_inner(gradients, change) - margins) / norms
            direct = tuple(self._unit(g, norms) * per_sample(distance, g) for g in gradients)
            halfway = tuple((c + d) / 2 for c, d in zip(change, direct, strict=True))
            spare = _SPARE_MARGIN * segment.clean_margins[rows].abs()
            slope = _inner(gradients, halfway).clamp(min=1e-12)
            factors = torch.ones_like(lengths)
            shorter = torch.zeros_like(rows, dtype=torch.bool)
            for _trial in range(2):
                moved = victim.within(
                    tuple(
                        c + per_sample(factors, c) * h for c, h in zip(clean, halfway, strict=True)
                    )
                )
                scores = victim.scores(moved, rows)
                margins = _margins(scores, victim, rows)
                found = tuple(m - c for m, c in zip(moved, clean, strict=True))
                length = _lengths(found, self.norm)
                better = victim.succeeds(scores, rows) & (margins >= spare) & (length < lengths)
                lengths = torch.where(better, length, lengths)
                shorter |= better
                at = better.nonzero()[:, 0]
                segment.end_margins[rows[at]] = margins[at]
                for kept, new in zip(segment.change, found, strict=True):
                    kept[rows[at]] = take(new, at)
                # A Newton step on the factor, to ten times the margin that is asked for.
                factors = (factors - (margins - 10 * spare) / slope).clamp(0.5, 2)
            rows = rows[shorter]

    def _unit(self, gradients: Tensor, norms: Tensor) -> Tensor:
        """The change of length 1 that gains most along the gradient."""
        if self.norm == "Linf":
            return gradients.sign()
        return divided(gradients, norms)

    def _dual_norms(self, gradients: Tensors) -> Tensor:
        if self.norm == "L2":
            return l2_norms(gradients)
        n = len(gradients[0])
        sums = [at_least_float(g.reshape(n, -1)).abs().sum(dim=1) for g in gradients]
        return torch.stack(sums).sum(dim=0)


class LBFGSAttack(Attack):
    """The smallest L2 change that fools, by box-constrained L-BFGS.

    Szegedy et al., "Intriguing properties of neural networks" (https://arxiv.org/abs/1312.6199):
    minimise c ‖r‖² + L(x + r, ŷ) for the cross-entropy L, and look for the largest c whose minimum
    still fools. Every sample has its own L-BFGS and its own c: multiplied or divided by ten until
    one fools and another does not, then their geometric mean. The result is the shortest change of
    all that were evaluated and fooled, shortened along its own line.

    ŷ is the target; without ``targeted`` the most likely class of the clean input that is not the
    label. A sample is fooled as by every attack, when the label is lost, whichever class wins.

    A sample takes at most 1 + ``searches`` × (1.25 ``max_iterations``) forward and backward passes,
    and 3 forward passes (with ``quantize`` up to 13).

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`. The bounds hold by
            clipping inside of the objective. With ``quantize`` a multiple of the change is looked
            for as in :class:`DeepFool`.
        epsilon: None: no limit. Otherwise a larger change is projected on the L2 ball of that
            radius, where it mostly does not fool any more.
        searches: how many values of c a sample tries.
        max_iterations: of L-BFGS for each of them.
        constant: the first c, for pixels in [0, 1].
        history_size: of L-BFGS; each takes memory for two copies of the inputs.
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        epsilon: float | None = None,
        searches: int = 6,
        max_iterations: int = 20,
        constant: float = 10.0,
        history_size: int = 10,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        quantize: bool = False,
    ) -> None:
        super().__init__(forward_func, epsilon=epsilon, norm="L2", bounds=bounds, quantize=quantize)
        check_count("searches", searches, 1)
        check_count("max_iterations", max_iterations, 1)
        check_count("history_size", history_size, 1)
        check_number("constant", constant, 0, open_low=True)
        self.searches = searches
        self.max_iterations = max_iterations
        self.constant = constant
        self.history_size = history_size

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        objective = _PenalisedLoss(victim)
        value, gradient, extra = objective.start()
        rows = (~victim.already).nonzero()[:, 0]
        c = torch.full_like(value, self.constant)
        fools, fails = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches if len(rows) > 0 else 0):
            objective.rows, objective.c = rows, c[rows]
            found = minimize(
                objective,
                take(objective.x, rows),
                max_iterations=self.max_iterations,
                history_size=self.history_size,
                # At the clean inputs ‖r‖² and its gradient are 0, whatever c.
                start=(take(value, rows), take(gradient, rows), take(extra, rows)),
            )
            assert found.extra is not None
            fooled = found.extra[:, 0] > 0
            objective.settle_for(found.x)
            fools[rows] = torch.where(fooled, c[rows], fools[rows])
            fails[rows] = torch.where(fooled, fails[rows], c[rows])
            between = (fools * fails).sqrt()
            c = torch.where(fails.isinf(), 10 * c, torch.where(fools == 0, c / 10, between))
        segment = objective.best()
        victim.fooled = objective.lengths.isfinite()
        passes = _MULTIPLES if victim.quantize else 3
        return _shortened(victim, segment, passes, "L2", epsilon)


class _PenalisedLoss:
    """c ‖r‖² + L(x + r, ŷ) of vectors x + r, n×D. Keeps the shortest r that it saw fool."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        n = victim.n
        self.x = torch.cat([at_least_float(x).reshape(n, -1) for x in victim.x], dim=1)  # N×D
        self.shortest = torch.zeros_like(self.x)
        self.lengths = torch.full((n,), torch.inf, device=self.x.device)
        self.rows = victim.everyone
        """n, the samples that the optimiser works on."""
        self.c = torch.zeros(n, device=self.x.device)
        """n."""
        self.goal: Tensor
        self.clean_margins: Tensor
        self.end_margins: Tensor

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values N, gradients N×D and what is kept at the clean inputs."""
        victim = self.victim
        point = _Point(victim, victim.x, victim.everyone, graph=True)
        check_rivals(point.scores)
        others = point.scores.scatter(1, victim.label[:, None], -torch.inf).argmax(dim=1)
        self.goal = victim.label if victim.targeted else others
        self.clean_margins = _margins(point.scores, victim, victim.everyone)
        self.end_margins = self.clean_margins.clone()
        value, gradients = point.loss_to(self.goal)
        return value, self._joined(gradients), torch.zeros_like(value)[:, None]

    def __call__(self, points: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A victim takes its samples in order; the optimiser mixes them.
        places = places.to(self.rows.device)
        order = places.argsort()
        values, gradients, fooled = self._ordered(points[order], places[order])
        back = order.argsort()
        return values[back], gradients[back], fooled[back]

    def settle_for(self, points: Tensor) -> None:
        """Take the points n×D where nothing has fooled yet."""
        at = self.lengths[self.rows].isinf().nonzero()[:, 0]
        rows = self.rows[at]
        self.shortest[rows] = self._inside(take(points, at)) - take(self.x, rows)

    def best(self) -> _Segment:
        return _Segment(self._split(self.shortest), self.clean_margins, self.end_margins)

    def _inside(self, points: Tensor) -> Tensor:
        return points if self.victim.bounds is None else points.clamp(*self.victim.bounds)

    def _ordered(self, points: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows[places]
        victim, clean = self.victim, take(self.x, rows)
        inside = self._inside(points)
        change = inside - clean
        point = _Point(victim, self._split(inside), rows, graph=True)
        loss, gradients = point.loss_to(self.goal[rows])
        squares = change.square().sum(dim=1)
        factors = self.c[places].to(change.dtype)
        gradient = self._joined(gradients) + 2 * factors[:, None] * change
        # Beyond the bounds nothing changes, so there is no slope either.
        gradient = torch.where(inside == points, gradient, 0.0)
        margins = _margins(point.scores, victim, rows)
        spare = _SPARE_MARGIN * self.clean_margins[rows].abs()
        fooled = victim.succeeds(point.scores, rows) & (margins >= spare)
        lengths = squares.sqrt()
        at = (fooled & (lengths < self.lengths[rows])).nonzero()[:, 0]
        self.lengths[rows[at]] = lengths[at].to(self.lengths.dtype)
        self.shortest[rows[at]] = take(change, at)
        self.end_margins[rows[at]] = margins[at]
        return loss + factors * squares, gradient, fooled[:, None].to(loss.dtype)

    def _split(self, vectors: Tensor) -> Tensors:
        """n×D as the inputs are, n×…."""
        sizes = [x[0].numel() for x in self.victim.x]
        return tuple(
            part.reshape(-1, *x.shape[1:]).to(x.dtype)
            for part, x in zip(torch.split(vectors, sizes, dim=1), self.victim.x, strict=True)
        )

    def _joined(self, tensors: Tensors) -> Tensor:
        n = len(tensors[0])
        return torch.cat([at_least_float(t).reshape(n, -1) for t in tensors], dim=1)


class _Point:
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
        return take(self._all_rows, self._places)

    @property
    def scores(self) -> Tensor:
        return take(self._scores.detach(), self._places)

    @property
    def x(self) -> Tensors:
        return take_each(tuple(t.detach() for t in self._leaves), self._places)

    def at(self, kept: Tensor) -> _Point:
        """Only some of the samples."""
        places = self._places[kept]
        # A backward pass runs through the whole graph. Where few samples are left, a fresh forward
        # pass of those costs less than that.
        if len(places) <= len(self._all_rows) // 2:
            x = take_each(tuple(t.detach() for t in self._leaves), places)
            return _Point(self.victim, x, self._all_rows[places], graph=True)
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
        found = self.victim.gradients(objective, self._leaves, rows, keep_graph=True)
        return self.victim.masked(take_each(found, self._places), rows)


@dataclass(frozen=True)
class _Segment:
    """From the clean inputs to where an attack has led."""

    change: Tensors
    """N×…, the whole way."""
    clean_margins: Tensor
    """N, at its beginning; see :func:`_margins`."""
    end_margins: Tensor
    """N."""


def _margins(scores: Tensor, victim: Victim, rows: Tensor) -> Tensor:
    """n, negative until a sample is fooled: how far the label has fallen behind another class;
    targeted: how far the target is ahead of all others."""
    label = victim.label[rows][:, None]
    scores = scores.detach()
    behind = scores.scatter(1, label, -torch.inf).amax(dim=1) - scores.gather(1, label)[:, 0]
    return -behind if victim.targeted else behind


def _shortened(
    victim: Victim, segment: _Segment, passes: int, norm: str, epsilon: float | None
) -> Tensors:
    """The inputs changed by the smallest multiple of the change that is found to fool.

    Only of samples that are fooled at the end of their segment. With ``quantize`` it is found for
    images of 8 bits, beyond that end if need be, and those are the result.
    """
    spare = _SPARE_MARGIN * segment.clean_margins.abs()
    low, high = torch.zeros_like(spare), torch.ones_like(spare)
    at_low, at_high = segment.clean_margins - spare, segment.end_margins - spare

    def judge(rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        x = _multiples(victim, segment.change, rows, factors, norm, epsilon)
        scores = victim.scores(victim.to_bytes(x) if victim.quantize else x, rows)
        margins = _margins(scores, victim, rows) - spare[rows]
        return victim.succeeds(scores, rows) & (margins >= 0), margins

    if victim.quantize:
        rows = victim.fooled.nonzero()[:, 0]
        victim.fooled = torch.zeros_like(victim.fooled)
        for doubling in range(_DOUBLINGS + 1):
            if len(rows) == 0:
                break
            factors = torch.full_like(spare[rows], 2.0**doubling)
            fooled, margins = judge(rows, factors)
            reached, short = rows[fooled], rows[~fooled]
            victim.fooled[reached] = True
            high[reached], at_high[reached] = factors[fooled], margins[fooled]
            low[short], at_low[short] = factors[~fooled], margins[~fooled]
            rows = short
    rows = victim.fooled.nonzero()[:, 0]
    below, above = low[rows], high[rows]
    # How far from 0 the margins are; both ends of a bracket have some.
    short, over = at_low[rows].clamp(max=-1e-12).neg(), at_high[rows].clamp(min=1e-12)
    for _ in range(passes if len(rows) > 0 else 0):
        # False position, a tenth towards the end that fools. The end that stays gets less weight,
        # or it could stay for ever (the Illinois variant).
        share = (0.1 + 0.9 * short / (short + over)).clamp(0.1, 0.95)
        factors = below + share * (above - below)
        fooled, margins = judge(rows, factors)
        below, above = torch.where(fooled, below, factors), torch.where(fooled, factors, above)
        short = torch.where(fooled, short / 2, margins.clamp(max=-1e-12).neg())
        over = torch.where(fooled, margins.clamp(min=1e-12), over / 2)
    high[rows] = above
    found = _multiples(victim, segment.change, victim.everyone, high, norm, epsilon)
    if epsilon is not None and not victim.quantize:
        change = tuple(f - x for f, x in zip(found, victim.x, strict=True))
        victim.fooled &= _lengths(change, norm) <= epsilon
        found = _projected(victim, found, victim.everyone, norm, epsilon)
    return tuple(
        torch.where(per_sample(victim.already, f).bool(), x, f)
        for f, x in zip(found, victim.x, strict=True)
    )


def _multiples(
    victim: Victim,
    change: Tensors,
    rows: Tensor,
    factors: Tensor,
    norm: str,
    epsilon: float | None,
) -> Tensors:
    """The clean inputs n×… changed by n multiples; with ``quantize`` rounded, and in the ball."""
    clean = take_each(victim.x, rows)
    moved = victim.within(
        tuple(
            c + per_sample(factors, c) * take(d, rows) for c, d in zip(clean, change, strict=True)
        )
    )
    if not victim.quantize:
        return moved
    rounded = victim.to_bytes(moved)
    if victim.masks is not None:
        rounded = tuple(
            torch.where(take(m, rows) == 0, c, r)
            for m, c, r in zip(victim.masks, clean, rounded, strict=True)
        )
    return rounded if epsilon is None else _projected(victim, rounded, rows, norm, epsilon)


def _projected(victim: Victim, x: Tensors, rows: Tensor, norm: str, epsilon: float) -> Tensors:
    """n×… of ``rows``: in the ball around the clean inputs; to the bit as they are if they were."""
    clean = take_each(victim.x, rows)
    change = tuple(t - c for t, c in zip(x, clean, strict=True))
    limited = project(change, epsilon, norm)
    return tuple(
        torch.where(short == long, t, c + short)
        for t, c, long, short in zip(x, clean, change, limited, strict=True)
    )


def _lengths(changes: Tensors, norm: str) -> Tensor:
    """n, over all tensors of a tuple together."""
    if norm == "L2":
        return l2_norms(changes)
    n = len(changes[0])
    return torch.stack([c.reshape(n, -1).abs().amax(dim=1) for c in changes]).amax(dim=0)


def _inner(a: Tensors, b: Tensors) -> Tensor:
    """n, the inner products over all tensors of a tuple together."""
    n = len(a[0])
    products = [(s * t).reshape(n, -1).sum(dim=1) for s, t in zip(a, b, strict=True)]
    return torch.stack(products).sum(dim=0)
