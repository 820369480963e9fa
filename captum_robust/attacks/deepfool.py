"""DeepFool: steps to the nearest class boundary of the linearised model.

Its phases: :meth:`DeepFool._walk` steps to the nearest boundary until the label is lost;
:meth:`DeepFool._nearest` finds that boundary with as few backward passes as it can;
:meth:`DeepFool._refine` moves the end along the boundary towards the clean input;
:meth:`Segment.shortened` takes the smallest multiple of the change that still fools.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from captum_robust._checks import check_count, check_number
from captum_robust._progress import counted
from captum_robust._scores import check_rivals
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.losses import others_of
from captum_robust.attacks.norms import Tensors, minus, plus, scaled
from captum_robust.attacks.point import Point
from captum_robust.attacks.segments import MULTIPLES, Segment, margins_of
from captum_robust.attacks.victim import Victim, put_each, take, take_each

_SLACK = 2.0
"""How many times longer than expected a gradient may be, before a boundary is overlooked."""


@dataclass(eq=False, repr=False)
class DeepFool(Attack):
    """Steps to the nearest class boundary of the linearised model, until the label is lost.

    Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks"
    (https://arxiv.org/abs/1511.04599). With f the scores, f_0 that of the label, w_k the gradient
    of f_k - f_0 and q the dual norm, the class k that minimises ``d_k = |f_k - f_0| / ‖w_k‖_q``
    says the step: ``(d_k + 1e-4) w_k / ‖w_k‖_2``, for ``"Linf"`` ``(d_k + 1e-4) sign(w_k)``.

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

    forward_func: Callable[..., Tensor]
    norm: str = "L2"
    _: KW_ONLY
    candidates: int = 10
    max_iterations: int = 50
    overshoot: float = 0.02
    epsilon: float | None = None
    bounds: tuple[float, float] | None = (0.0, 1.0)
    quantize: bool = False
    refine: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("candidates", self.candidates, 2)
        check_count("max_iterations", self.max_iterations, 1)
        check_count("refine", self.refine, 0)
        check_number("overshoot", self.overshoot, 0)

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        segment = self._walk(victim, epsilon)
        self._refine(victim, segment)
        return segment.shortened(MULTIPLES if victim.quantize else 0)

    def _walk(self, victim: Victim, epsilon: float | None) -> Segment:
        """Every sample until it is fooled, stuck or out of iterations."""
        sums = tuple(torch.zeros_like(t) for t in victim.x)

        def moved(rows: Tensor) -> Tensors:
            steps = tuple((1 + self.overshoot) * t for t in take_each(sums, rows))
            return victim.within(plus(take_each(victim.x, rows), steps))

        rows = victim.everyone
        for iteration in counted(range(self.max_iterations + 1), "iteration", None, "DeepFool"):
            is_last = iteration == self.max_iterations
            point = Point(victim, moved(rows), rows, graph=not is_last)
            if iteration == 0:
                segment = Segment(victim, self._norm, epsilon, point.scores)
                others = self._others(victim, point.scores)
                norms = torch.full_like(others, torch.nan, dtype=point.scores.dtype)
                goes_on = ~victim.already
            else:
                fooled = victim.succeeds(point.scores, rows)
                victim.fooled[rows] = fooled
                segment.end_margins[rows] = margins_of(point.scores, victim, rows)
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
            put_each(sums, rows, plus(take_each(sums, rows), take_each(steps, moves)))
        segment.change = minus(moved(victim.everyone), victim.x)
        segment.lengths = self._norm.lengths(segment.change)
        return segment

    def _others(self, victim: Victim, scores: Tensor) -> Tensor:
        """N×C, the classes that a sample may be moved to."""
        check_rivals(scores)
        if victim.targeted:
            return victim.label[:, None]
        ranked = others_of(scores, victim.label)
        return ranked.topk(min(self.candidates, scores.shape[1]) - 1, dim=1).indices

    def _nearest(
        self, point: Point, others: Tensor, norms: Tensor
    ) -> tuple[Tensor, Tensors, Tensor]:
        """The n distances to the nearest boundary, infinite if there is none; the steps n×… to it;
        the norms n×C of the gradients, computed or expected.

        ``norms``: those of the last iterate, NaN where nothing is known.
        """
        victim, rows, scores = point.victim, point.rows, point.scores.detach()
        start = scores.argmax(dim=1) if victim.targeted else victim.label[rows]
        start_scores = scores.gather(1, start[:, None])
        gaps = (scores.gather(1, others) - start_scores).abs()  # n×C
        # Ties, and what the scores are too coarse to tell from one.
        gaps = gaps.maximum(victim.resolution * start_scores.abs())
        width = 1.0 if self.bounds is None else self.bounds[1] - self.bounds[0]
        best = torch.full_like(gaps[:, 0], torch.inf)
        steps = tuple(torch.zeros_like(x) for x in point.x)

        def look(point: Point, at: Tensor, column: Tensor) -> Tensor:
            """At candidate ``column`` (m) of the samples ``at``: the m norms of its gradients."""
            _, gradients = point.gradients(_difference(others[at, column], start[at]))
            norm = self._norm.dual_lengths(gradients).to(gaps.dtype)
            distance = torch.where(norm > 0, gaps[at, column] / norm, torch.inf)
            nearer = (distance < best[at]).nonzero()[:, 0]
            best[at[nearer]] = distance[nearer]
            direction = self._norm.steepest(take_each(gradients, nearer), norm[nearer])
            # 1e-4 as in the paper's code, of pixels in [0, 1]: a step has to cross the boundary.
            put_each(steps, at[nearer], scaled(direction, distance[nearer] + 1e-4 * width))
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

    def _refine(self, victim: Victim, segment: Segment) -> None:
        """Shorten the changes of the samples that are fooled."""
        rows = victim.fooled.nonzero()[:, 0]
        for _ in range(self.refine):
            if len(rows) == 0:
                return
            clean, change = take_each(victim.x, rows), take_each(segment.change, rows)
            point = Point(victim, victim.within(plus(clean, change)), rows, graph=True)
            label = victim.label[rows]
            rival = others_of(point.scores, label).argmax(dim=1)
            up, down = (label, rival) if victim.targeted else (rival, label)
            _, gradients = point.gradients(_difference(up, down))
            margins = margins_of(point.scores, victim, rows)
            del point
            norms = self._norm.dual_lengths(gradients).clamp(min=torch.finfo(torch.float32).tiny)
            # From the clean input straight to where the linearised margin is zero.
            distance = (_inner(gradients, change) - margins) / norms
            direct = scaled(self._norm.steepest(gradients, norms), distance)
            halfway = tuple(c / 2 for c in plus(change, direct))
            slope = _inner(gradients, halfway).clamp(min=1e-12)
            factors = torch.ones_like(slope)
            shorter = torch.zeros_like(rows, dtype=torch.bool)
            for _trial in range(2):
                moved = victim.within(plus(clean, scaled(halfway, factors)))
                fools, margins = segment.judge(victim.scores(moved, rows), rows)
                shorter |= segment.keep_shorter(moved, rows, fools, margins)
                # A Newton step on the factor, to ten times the margin that is asked for.
                factors = (factors - (margins - 10 * segment.spare[rows]) / slope).clamp(0.5, 2)
            rows = rows[shorter]


def _difference(up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores n×K -> n×1, that of class ``up`` (n) less that of ``down``."""
    return lambda scores: scores.gather(1, up[:, None]) - scores.gather(1, down[:, None])


def _inner(a: Tensors, b: Tensors) -> Tensor:
    """n, the inner products over all tensors of a tuple together."""
    n = len(a[0])
    products = [(s * t).reshape(n, -1).sum(dim=1) for s, t in zip(a, b, strict=True)]
    return torch.stack(products).sum(dim=0)
