"""The smallest change that fools, by box-constrained L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import torch
from torch import Tensor

from captum_robust._checks import check_count, check_number
from captum_robust._contexts import without_autocast
from captum_robust._progress import counted
from captum_robust._scores import at_least_float, check_rivals
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.losses import cross_entropy, others_of
from captum_robust.attacks.norms import Norm, Tensors, minus
from captum_robust.attacks.point import Point
from captum_robust.attacks.segments import MULTIPLES, Segment
from captum_robust.attacks.victim import Victim, put_each, take, take_each
from captum_robust.optim import minimize


@dataclass(eq=False, repr=False)
class LBFGSAttack(Attack):
    """The smallest L2 change that fools, by box-constrained L-BFGS.

    Szegedy et al., "Intriguing properties of neural networks" (https://arxiv.org/abs/1312.6199):
    minimise c ‖r‖² + L(x + r, ŷ) for the cross-entropy L, and look for the largest c whose minimum
    still fools. Scores are in units of a tenth of their deviation over the classes of the clean
    input, r in units of the bounds' width (without bounds, of the range of the input's values), so
    that neither's scale matters. Every sample has its own L-BFGS and its own c: multiplied or
    divided by ten until one fools and another does not, then their geometric mean. The result is
    the shortest change of all that were evaluated and fooled, shortened along its own line.

    ŷ is the target; without ``targeted`` the most likely class of the clean input that is not the
    label. A sample is fooled as by every attack, when the label is lost, whichever class wins.

    A sample takes at most 1 + ``searches`` × (1.25 ``max_iterations``) forward and backward passes,
    and 3 forward passes (with ``quantize`` up to 13). Under autocast the searches run without it,
    as half precision hides their small first steps; what they find is enlarged until it fools under
    autocast too, for up to 10 more forward passes.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`. The bounds hold by
            clipping inside of the objective. With ``quantize`` a multiple of the change is looked
            for as in :class:`DeepFool`.
        epsilon: None: no limit. Otherwise a larger change is projected on the L2 ball of that
            radius, where it mostly does not fool any more.
        searches: how many values of c a sample tries.
        max_iterations: of L-BFGS for each of them.
        constant: the first c.
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
        rounds = torch.is_autocast_enabled(victim.x[0].device.type)
        if rounds:  # the labels are those of the model as it is used
            victim.scores(victim.x, victim.everyone)
        # Half precision hides the small first steps of a line search.
        with without_autocast(*victim.x):
            segment = self._searched(victim, epsilon)
        return segment.shortened(MULTIPLES if victim.quantize else 3, is_new=rounds)

    def _searched(self, victim: Victim, epsilon: float | None) -> Segment:
        """The way to the shortest change that fools of all that the searches evaluate."""
        objective = _PenalisedLoss(victim, self._norm, epsilon)
        segment = objective.segment
        value, gradient, extra = objective.start
        rows = (~victim.already).nonzero()[:, 0]
        c = torch.full_like(value, self.constant)
        fools, fails = torch.zeros_like(c), torch.full_like(c, torch.inf)
        searches = range(self.searches if len(rows) > 0 else 0)
        for _ in counted(searches, "search", None, "L-BFGS attack"):
            minimum = minimize(
                partial(objective.evaluate, rows, c[rows]),
                take(objective.x, rows),
                max_iterations=self.max_iterations,
                history_size=self.history_size,
                # At the clean inputs ‖r‖² and its gradient are 0, whatever c.
                start=(take(value, rows), take(gradient, rows), take(extra, rows)),
            )
            assert minimum.extra is not None
            fooled = minimum.extra[:, 0] > 0
            objective.settle_for(rows, minimum.x)
            fools[rows] = torch.where(fooled, c[rows], fools[rows])
            fails[rows] = torch.where(fooled, fails[rows], c[rows])
            between = (fools * fails).sqrt()
            c = torch.where(fails.isinf(), 10 * c, torch.where(fools == 0, c / 10, between))
        victim.fooled = segment.lengths.isfinite()
        return segment


class _PenalisedLoss:
    """c ‖r‖² + L(x + r, ŷ) of vectors x + r, n×D, in units of the width of what pixels can be.

    Its segment ends at the shortest r that fooled.
    """

    def __init__(self, victim: Victim, norm: Norm, epsilon: float | None) -> None:
        self.victim = victim
        self.width = self._width()
        self.x = self._joined(victim.x, victim.everyone)  # N×D
        point = Point(victim, victim.x, victim.everyone, graph=True)
        check_rivals(point.scores)
        self.segment = Segment(victim, norm, epsilon, point.scores)
        others = others_of(point.scores, victim.label).argmax(dim=1)
        self.goal = victim.label if victim.targeted else others
        value, gradient = self._loss(point, victim.everyone)
        self.start = value, gradient, torch.zeros_like(value)[:, None]
        """Values N, gradients N×D and what is kept at the clean inputs."""

    def evaluate(
        self, rows: Tensor, c: Tensor, points: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values n, gradients n×D and n×1 whether it fooled, at ``places`` among ``rows``."""
        # A victim takes its samples in order; the optimiser mixes them.
        places = places.to(rows.device)
        order = places.argsort()
        points, places = points[order], places[order]
        rows, factors = rows[places], c[places].to(points.dtype)
        inside = self._inside(points, rows)
        change = inside - take(self.x, rows)
        point = Point(self.victim, self._split(inside, rows), rows, graph=True)
        loss, gradient = self._loss(point, rows)
        gradient = gradient + 2 * factors[:, None] * change
        # Beyond the bounds nothing changes, so there is no slope either.
        gradient = torch.where(inside == points, gradient, 0.0)
        fools, margins = self.segment.judge(point.scores, rows)
        self.segment.keep_shorter(point.x, rows, fools, margins)
        value = loss + factors * change.square().sum(dim=1)
        back = order.argsort()
        return value[back], gradient[back], fools[back][:, None].to(loss.dtype)

    def _loss(self, point: Point, rows: Tensor) -> tuple[Tensor, Tensor]:
        goal, units = self.goal[rows], self.victim.reading.units[rows]
        loss, gradients = point.gradients(lambda scores: cross_entropy(scores / units, goal))
        return loss, self._joined(gradients, rows) * self.width[rows] ** 2

    def settle_for(self, rows: Tensor, points: Tensor) -> None:
        """End at the points n×D of ``rows`` where nothing has fooled yet."""
        at = self.segment.lengths[rows].isinf().nonzero()[:, 0]
        rows, points = rows[at], take(points, at)
        end = self._split(self._inside(points, rows), rows)
        put_each(self.segment.change, rows, minus(end, take_each(self.victim.x, rows)))

    def _width(self) -> Tensor:
        """N×1, of the bounds; without any, from the least to the largest pixel of each sample."""
        x, bounds = torch.cat([t.flatten(1) for t in self.victim.x], dim=1), self.victim.bounds
        if bounds is not None:
            return torch.full_like(x[:, :1], bounds[1] - bounds[0])
        width = x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
        return torch.where(width > 0, width, 1.0)

    def _inside(self, points: Tensor, rows: Tensor) -> Tensor:
        width = self.width[rows]
        return self.victim.within((points * width,))[0] / width

    def _split(self, vectors: Tensor, rows: Tensor) -> Tensors:
        """n×D as the inputs are, n×…."""
        sizes = [x[0].numel() for x in self.victim.x]
        parts = torch.split(vectors * self.width[rows], sizes, dim=1)
        return tuple(
            part.reshape(-1, *x.shape[1:]).to(x.dtype)
            for part, x in zip(parts, self.victim.x, strict=True)
        )

    def _joined(self, tensors: Tensors, rows: Tensor) -> Tensor:
        flat = [at_least_float(t).flatten(1) for t in tensors]
        return torch.cat(flat, dim=1) / self.width[rows]
