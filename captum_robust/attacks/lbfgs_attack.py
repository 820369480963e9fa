"""The smallest change that fools, by box-constrained L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from captum_robust._checks import check_count, check_number
from captum_robust._scores import at_least_float, check_rivals
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.norms import Tensors
from captum_robust.attacks.segments import (
    MULTIPLES,
    SPARE_MARGIN,
    Point,
    Segment,
    Shortening,
    margins_of,
    others_of,
)
from captum_robust.attacks.victim import Victim, take
from captum_robust.optim import minimize


@dataclass(eq=False, repr=False)
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

    forward_func: Callable[..., Tensor]
    _: KW_ONLY
    epsilon: float | None = None
    searches: int = 6
    max_iterations: int = 20
    constant: float = 10.0
    history_size: int = 10
    bounds: tuple[float, float] | None = (0.0, 1.0)
    quantize: bool = False
    norm: str = field(default="L2", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("searches", self.searches, 1)
        check_count("max_iterations", self.max_iterations, 1)
        check_count("history_size", self.history_size, 1)
        check_number("constant", self.constant, 0, open_low=True)

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        objective = _PenalisedLoss(victim)
        value, gradient, extra = objective.start
        rows = (~victim.already).nonzero()[:, 0]
        c = torch.full_like(value, self.constant)
        fools, fails = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches if len(rows) > 0 else 0):
            objective.rows, objective.c = rows, c[rows]
            minimum = minimize(
                objective,
                take(objective.x, rows),
                max_iterations=self.max_iterations,
                history_size=self.history_size,
                # At the clean inputs ‖r‖² and its gradient are 0, whatever c.
                start=(take(value, rows), take(gradient, rows), take(extra, rows)),
            )
            assert minimum.extra is not None
            fooled = minimum.extra[:, 0] > 0
            objective.settle_for(minimum.x)
            fools[rows] = torch.where(fooled, c[rows], fools[rows])
            fails[rows] = torch.where(fooled, fails[rows], c[rows])
            between = (fools * fails).sqrt()
            c = torch.where(fails.isinf(), 10 * c, torch.where(fools == 0, c / 10, between))
        segment = objective.best()
        victim.fooled = objective.lengths.isfinite()
        return Shortening(segment, self._norm, epsilon).result(MULTIPLES if victim.quantize else 3)


class _PenalisedLoss:
    """c ‖r‖² + L(x + r, ŷ) of vectors x + r, n×D. Keeps the shortest r that it saw fool."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        n = victim.n
        self.x = self._joined(victim.x)  # N×D
        self.shortest = torch.zeros_like(self.x)
        self.lengths = torch.full((n,), torch.inf, device=self.x.device)
        self.rows = victim.everyone
        """n, the samples that the optimiser works on."""
        self.c = torch.zeros(n, device=self.x.device)
        """n."""
        point = Point(victim, victim.x, victim.everyone, graph=True)
        check_rivals(point.scores)
        others = others_of(point.scores, victim.label).argmax(dim=1)
        self.goal = victim.label if victim.targeted else others
        self.clean_margins = margins_of(point.scores, victim, victim.everyone)
        self.end_margins = self.clean_margins.clone()
        value, gradients = point.loss_to(self.goal)
        self.start = value, self._joined(gradients), torch.zeros_like(value)[:, None]
        """Values N, gradients N×D and what is kept at the clean inputs."""

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

    def best(self) -> Segment:
        """The ways to the shortest changes that fooled."""
        change = self._split(self.shortest)
        return Segment(self.victim, change, self.clean_margins, self.end_margins)

    def _inside(self, points: Tensor) -> Tensor:
        return self.victim.within((points,))[0]

    def _ordered(self, points: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows[places]
        victim, clean = self.victim, take(self.x, rows)
        inside = self._inside(points)
        change = inside - clean
        point = Point(victim, self._split(inside), rows, graph=True)
        loss, gradients = point.loss_to(self.goal[rows])
        squares = change.square().sum(dim=1)
        factors = self.c[places].to(change.dtype)
        gradient = self._joined(gradients) + 2 * factors[:, None] * change
        # Beyond the bounds nothing changes, so there is no slope either.
        gradient = torch.where(inside == points, gradient, 0.0)
        margins = margins_of(point.scores, victim, rows)
        spare = SPARE_MARGIN * self.clean_margins[rows].abs()
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
