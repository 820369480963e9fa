"""The strong Wolfe line search of one sample, as a coroutine that asks for its next trial step."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9


@dataclass
class Point:
    """A point of the search line: the step, the value there, and its slope along the line."""

    step: float
    value: float
    slope: float


@dataclass
class Trial:
    """The step to evaluate next; ``improved``: the one before it is the best point so far."""

    step: float
    improved: bool


@dataclass
class Chosen:
    """How a line search ended. ``improved``: the last evaluation is the chosen point."""

    point: Point
    improved: bool
    evaluations: int

    @property
    def step(self) -> float:
        """The chosen step."""
        return self.point.step


Search = Generator[Trial, tuple[float, float], Chosen]
"""Yields trials, is sent (value, slope) of each, and returns the chosen point."""


def fixed_step(step: float) -> Search:
    """No search: the step is taken, wherever it leads."""
    value, slope = yield Trial(step, False)
    return Chosen(Point(step, value, slope), True, 1)


def strong_wolfe(
    step: float, start: Point, largest: float, max_trials: int, tolerance_change: float
) -> Search:
    r"""A step t with f(t) ≤ f(0) + c₁ t f'(0) and \|f'(t)\| ≤ c₂ \|f'(0)\|.

    Nocedal and Wright, *Numerical Optimization* (2006), algorithms 3.5 (a bracket is widened until
    it holds such a step) and 3.6 (it is narrowed by cubic interpolation), with the safeguards of
    ``torch.optim.LBFGS``, so that the trials are the same. A value that is not finite counts as
    infinitely high, and its slope as unknown, so that the search turns back.

    Args:
        step: the first trial.
        start: the point at step 0; its slope is negative.
        largest: the largest component of the direction, in magnitude.
        max_trials: of both phases together, after the first.
        tolerance_change: a bracket in which no component can change by more is not narrowed.
    """
    trials = 0

    def received(at: float, answer: tuple[float, float]) -> Point:
        value, slope = answer
        if not (math.isfinite(value) and math.isfinite(slope)):
            return Point(at, math.inf, math.nan)
        return Point(at, value, slope)

    def is_too_high(p: Point) -> bool:
        return p.value > start.value + SUFFICIENT_DECREASE * p.step * start.slope

    def is_flat(p: Point) -> bool:
        return abs(p.slope) <= -CURVATURE * start.slope

    # Bracketing. Each trial that is passed is lower than the one before it.
    before = start
    new = received(step, (yield Trial(step, False)))
    while True:
        if trials >= max_trials:
            # Where the last trial is no gain, torch goes back to the start, past the better points.
            low = new if new.value < start.value else before
            return Chosen(low, low is new, trials + 1)
        if is_too_high(new) or (trials > 1 and new.value >= before.value):
            break
        if is_flat(new):
            return Chosen(new, True, trials + 1)
        if new.slope >= 0:
            break
        step = _cubic_minimum(
            before, new, new.step + 0.01 * (new.step - before.step), new.step * 10
        )
        before = new
        new = received(step, (yield Trial(step, True)))
        trials += 1

    # Zoom. `low` is the best point so far, and the minimum lies between it and `high`.
    low, high = (before, new) if before.value <= new.value else (new, before)
    improved = low is new
    stuck = False
    while trials < max_trials:
        left, right = min(low.step, high.step), max(low.step, high.step)
        if (right - left) * largest < tolerance_change:
            break
        step = _cubic_minimum(low, high, left, right)
        margin = 0.1 * (right - left)
        if min(right - step, step - left) < margin:
            # Too close to an end. The second time in a row, or right on it: a tenth away from it.
            if stuck or step >= right or step <= left:
                step = right - margin if abs(step - right) < abs(step - left) else left + margin
                stuck = False
            else:
                stuck = True
        else:
            stuck = False
        new = received(step, (yield Trial(step, improved)))
        trials += 1
        if is_too_high(new) or new.value >= low.value:
            high = new
            # On equal values torch takes the one that holds the first place of its bracket; here
            # the older one stays, whose gradient is at hand.
            improved = new.value < low.value
            if improved:
                low, high = high, low
            continue
        improved = True
        if is_flat(new):
            low = new
            break
        if new.slope * (high.step - low.step) >= 0:
            high = low
        low = new
    return Chosen(low, improved, trials + 1)


def _cubic_minimum(a: Point, b: Point, lowest: float, highest: float) -> float:
    """Where the cubic through two points and their slopes is lowest, within the bounds."""
    if a.step > b.step:
        a, b = b, a
    middle = (lowest + highest) / 2
    if a.step == b.step:
        return middle
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:  # also where a slope is unknown
        return middle
    d2 = math.sqrt(square)
    numerator, denominator = b.slope + d2 - d1, b.slope - a.slope + 2 * d2
    if not math.isfinite(denominator) or numerator == denominator == 0:
        return middle
    if denominator == 0:  # a straight line
        return highest if numerator < 0 else lowest
    at = b.step - (b.step - a.step) * (numerator / denominator)
    return min(max(at, lowest), highest)
