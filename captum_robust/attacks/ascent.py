"""Steps up an objective within a ball: the one loop of all attacks that follow gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._captum import format_tensor_into_tuples
from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_number,
    checked_bounds,
)
from captum_robust._contexts import seeded
from captum_robust._progress import counted
from captum_robust._scores import check_rivals
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.losses import LOSSES, LossFunction, Reading
from captum_robust.attacks.norms import Tensors, of_mean_one, per_sample
from captum_robust.attacks.victim import Victim, check_losses, put_each, take, take_each


def ascend(
    x: Tensors,
    steps: int,
    look: Callable[[Tensors, int], tuple[Tensors, Tensors] | None],
    move: Callable[[Tensors, Tensors], Tensors],
) -> Tensors:
    """Look and move in turn, ``steps`` times; return the last iterates.

    Args:
        x: the iterates to begin with, n×….
        steps: at most so many.
        look: (iterates, number of the step) -> the iterates that go on and their gradients; None
            where none goes on.
        move: (iterates, gradients) -> the next iterates.
    """
    for step in counted(range(steps), "step", None, "attack"):
        seen = look(x, step)
        if seen is None:
            break
        x = move(*seen)
    return x


def changed(x: Tensors, clean: Tensors, direction: Tensors, length: float) -> Tensors:
    """Return the change of the clean inputs where x goes ``length`` along the direction."""
    return tuple(i - c + length * d for i, c, d in zip(x, clean, direction, strict=True))


class Stepping(Attack):
    """An attack of several steps; each part of a step is a hook."""

    steps: int
    step_size: float | None
    random_start: bool
    seed: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, 0)
        check_count("seed", self.seed, 0, optional=True)
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, open_low=True)

    def _generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def _step_count(self, epsilon: float) -> int:  # noqa: ARG002
        return self.steps

    def _step_length(self, epsilon: float) -> float:
        return 2.5 * epsilon / max(1, self.steps) if self.step_size is None else self.step_size

    def _direction(self, gradients: Tensors) -> Tensors:
        """Where one step of length 1 goes."""
        return self._norm.steepest(gradients)

    def _moved(
        self, victim: Victim, clean: Tensors, change: Tensors, rows: Tensor, epsilon: float
    ) -> Tensors:
        """The clean inputs with what is left of a change."""
        return victim.moved(clean, change, rows, self._ball(epsilon), self._norm)

    def _stepped(
        self, victim: Victim, rows: Tensor, epsilon: float, x: Tensors, gradients: Tensors
    ) -> Tensors:
        clean = take_each(victim.x, rows)
        length = self._step_length(epsilon)
        change = changed(x, clean, self._direction(gradients), length)
        return self._moved(victim, clean, change, rows, epsilon)


@dataclass(eq=False, repr=False, kw_only=True)
class GradientAscent(Stepping):
    """The base of attacks that raise a loss of the scores; see :class:`PGD` for the arguments."""

    norm: str = "Linf"
    random_start: bool = False
    restarts: int = 1
    momentum: float = 0.0
    loss: str = "log_odds"
    loss_func: LossFunction | None = None
    transform: Callable[..., Any] | None = None
    samples: int = 1
    bounds: tuple[float, float] | None = (0.0, 1.0)
    early_stop: bool = True
    keep_best: bool = True
    quantize: bool = True
    seed: int | None = 0
    lower_bound: float | None = None
    upper_bound: float | None = None

    def __post_init__(self) -> None:
        ends = self.lower_bound, self.upper_bound
        if ends != (None, None):
            self.bounds = self._bounds_by_captums_names(*ends)
        super().__post_init__()
        del self.lower_bound, self.upper_bound  # the class says None; vars() tell attacks apart
        check_count("restarts", self.restarts, 1)
        check_count("samples", self.samples, 1)
        check_number("momentum", self.momentum, 0)
        check_choice("loss", self.loss, LOSSES)
        check_callable("loss_func", self.loss_func, optional=True)
        check_callable("transform", self.transform, optional=True)
        can_draw = self.samples == 1 or self.transform is not None
        check(can_draw, f"samples: expected 1 without a transform to draw, got {self.samples}")

    def _bounds_by_captums_names(
        self, lower: float | None, upper: float | None
    ) -> tuple[float, float] | None:
        is_usual = self.bounds == GradientAscent.bounds
        check(is_usual, "lower_bound, upper_bound: bounds is the same; give one", TypeError)
        low, high = -math.inf if lower is None else lower, math.inf if upper is None else upper
        has_bounds = (low, high) != (-math.inf, math.inf)
        return checked_bounds((low, high), "lower_bound, upper_bound") if has_bounds else None

    def _losses(self, victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:
        """The n losses of scores n×K; of the cross-entropy the logarithms."""
        reading = victim.reading
        return self._loss_of(scores, victim.label[rows], reading, reading.units[rows])

    def _loss_of(self, scores: Tensor, label: Tensor, reading: Reading, units: Tensor) -> Tensor:
        if self.loss_func is not None:
            losses = self.loss_func(reading.scores(scores), label)
            check_losses(losses, len(scores))
            return losses
        if self.loss == "log_odds":
            scores = scores / units
        return LOSSES[self.loss](scores, label)

    @property
    def _are_logarithms(self) -> bool:
        """Whether the losses are logarithms of what is to be raised."""
        return self.loss_func is None and self.loss == "cross_entropy"

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        if epsilon is None:
            raise ValueError("epsilon: expected a number, got None")
        climb = _Climb(self, victim, epsilon)
        generator = self._generator()
        if self.random_start or self.transform is not None:
            victim.scores(victim.x, victim.everyone)
        for restart in counted(range(self.restarts), "restart", None, "attack"):
            rows = victim.everyone
            if victim.knows_labels and self.early_stop:
                rows = (~(victim.already | victim.fooled)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            start = take_each(victim.x, rows)
            if self.random_start or restart > 0:
                change = self._norm.random_points(start, epsilon, generator)
                start = self._moved(victim, start, change, rows, epsilon)
            climb.run(start, rows)
        return climb.best


class _Climb:
    """All steps of an attack, and the iterate of each sample to return."""

    def __init__(self, attack: GradientAscent, victim: Victim, epsilon: float) -> None:
        self.attack, self.victim, self.epsilon = attack, victim, epsilon
        self.steps = attack._step_count(epsilon)
        self.best = tuple(x.clone() for x in victim.x)
        self.highest: Tensor | None = None
        """N, the objectives of the best."""
        self.draw = -1
        """The number of the transform's draw."""

    def run(self, start: Tensors, rows: Tensor) -> None:
        """All steps of samples ``rows`` from one start n×…."""
        self.rows = rows
        self.velocity = tuple(map(torch.zeros_like, start)) if self.attack.momentum else ()
        first = self.draw + 1
        ascend(start, self.steps + 1, self.look, self.move)
        self.draw = first + self.steps

    def look(self, x: Tensors, step: int) -> tuple[Tensors, Tensors] | None:
        """Judge the iterates; return those not done, and their gradients."""
        is_last = step == self.steps
        self.draw += 1
        victim, rows, early_stop = self.victim, self.rows, self.attack.early_stop
        is_clean = not victim.knows_labels
        tried = x, rows
        leaves, scores, objective = self._evaluate(*tried, graph=not is_last)
        done = fooled = torch.zeros_like(rows, dtype=torch.bool)
        if early_stop and is_clean:
            done = victim.already[rows]
        elif early_stop:
            done = fooled = self._verified(scores, x)
        self._keep(x, objective, fooled, is_last)
        if is_last:
            return None
        every = torch.arange(len(rows), device=rows.device)
        left = (~done).nonzero()[:, 0] if early_stop else every  # to count them waits for a GPU
        if len(left) == 0:
            return None
        x, self.rows = take_each(x, left), take(rows, left)
        self.velocity = take_each(self.velocity, left)
        if len(left) <= len(rows) // 2:
            # The backward pass runs through the whole batch. Where few are left, a fresh
            # forward pass of those costs less than that.
            rows, left = self.rows, torch.arange(len(left), device=left.device)
            tried = x, rows
            leaves, _, objective = self._evaluate(*tried, graph=True)

        def again() -> tuple[Tensor, Tensors]:
            leaves, _, objective = self._evaluate(*tried, graph=True)
            return objective, leaves

        times = self.attack.samples
        gradients = victim.gradients(objective, leaves, rows, times, again=again)
        gradients = victim.masked(take_each(gradients, left), self.rows)
        if momentum := self.attack.momentum:
            units = zip(self.velocity, of_mean_one(gradients), strict=True)
            gradients = self.velocity = tuple(momentum * v + g for v, g in units)
        return x, gradients

    def move(self, x: Tensors, gradients: Tensors) -> Tensors:
        """One step of all that go on."""
        return self.attack._stepped(self.victim, self.rows, self.epsilon, x, gradients)

    def _evaluate(self, x: Tensors, rows: Tensor, graph: bool) -> tuple[Tensors, Tensor, Tensor]:
        """The leaves of the graph, the scores n×K that judge, and the objective n to raise."""
        victim, samples = self.victim, self.attack.samples
        with torch.set_grad_enabled(graph):
            leaves = tuple(t.detach().requires_grad_(graph) for t in x)
            if self.attack.transform is None or not victim.knows_labels:
                scores = victim.scores(leaves, rows)
                return leaves, scores.detach(), self._objective(scores, rows)
            many = rows.repeat_interleave(samples)
            scores = victim.scores(self._transformed(self.attack.transform, leaves), many)
            objective = self._objective(scores, many, samples)
            probabilities = scores.detach().softmax(dim=1)
            mean = probabilities.reshape(len(rows), samples, -1).mean(dim=1)
            return leaves, mean, objective

    def _transformed(self, transform: Callable[..., Any], x: Tensors) -> Tensors:
        """All samples of this draw of the transform: those of an input in a row."""
        # The same draws for whatever is left of the batch.
        seed = None if self.attack.seed is None else self.attack.seed + 1_000_003 * self.draw
        with seeded(seed, x[0].device):
            draws = [
                format_tensor_into_tuples(transform(*(t.clone() for t in x)))
                for _ in range(self.attack.samples)
            ]
        return tuple(torch.stack(each, dim=1).flatten(0, 1) for each in zip(*draws, strict=True))

    def _objective(self, scores: Tensor, rows: Tensor, draws: int = 1) -> Tensor:
        """What is raised: the loss, or the mean of so many draws in a row."""
        check_rivals(scores)
        losses = self.attack._losses(self.victim, scores, rows).reshape(-1, draws)
        if self.attack._are_logarithms:
            loss = losses.logsumexp(dim=1) - math.log(draws)
        else:
            loss = losses.mean(dim=1)
        return -loss if self.victim.targeted else loss

    def _verified(self, scores: Tensor, x: Tensors) -> Tensor:
        """n booleans: fooled, and with ``quantize`` as an 8-bit image too."""
        victim, rows = self.victim, self.rows
        fooled = victim.succeeds(scores, rows)
        if not victim.quantize or not bool(fooled.any()):
            return fooled
        at = fooled.nonzero()[:, 0]
        floats = take_each(x, at)
        rounded = victim.to_bytes(floats, rows[at])
        if all(torch.equal(f, r) for f, r in zip(floats, rounded, strict=True)):
            return fooled
        _, scores, _ = self._evaluate(rounded, rows[at], graph=False)
        return fooled.index_put((at,), victim.succeeds(scores, rows[at]))

    def _keep(self, x: Tensors, objective: Tensor, fooled: Tensor, is_last: bool) -> None:
        """Judge iterates n×…: a fooled one is final, else the highest objective counts."""
        victim, rows, objective = self.victim, self.rows, objective.detach()
        if self.highest is None:
            self.highest = objective.new_full((victim.n,), -torch.inf)
        better = torch.full_like(fooled, is_last)
        if self.attack.keep_best:
            better = objective > self.highest[rows]
        # Chosen without counting them, which would wait for a GPU in each step.
        chosen = (fooled | better) & ~victim.fooled[rows]
        self.highest[rows] = torch.where(chosen, objective, self.highest[rows])
        pairs = zip(x, take_each(self.best, rows), strict=True)
        kept = tuple(torch.where(per_sample(chosen, t).bool(), t, b) for t, b in pairs)
        put_each(self.best, rows, kept)
        victim.fooled[rows] |= chosen & fooled
