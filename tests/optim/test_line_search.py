"""The line search against torch's own, and against the two conditions that it promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim.lbfgs import _strong_wolfe as torch_strong_wolfe

from captum_robust.optim.line_search import (
    Chosen,
    Point,
    Search,
    fixed_step,
    strong_wolfe,
)

Line = Callable[[float], tuple[float, float]]
"""Value and slope at a step."""


def drive(search: Search, line: Line) -> tuple[list[float], list[bool], Chosen]:
    """The steps asked for, the improvements reported, the end."""
    steps, improved = [], []
    request = next(search)
    while True:
        steps.append(request.step)
        try:
            request = search.send(line(request.step))
        except StopIteration as end:
            return steps, [*improved, end.value.improved], end.value
        improved.append(request.improved)


def searched(line: Line, step: float = 1.0, trials: int = 25, tolerance: float = 1e-9) -> Chosen:
    return drive(strong_wolfe(step, Point(0, *line(0)), 1.0, trials, tolerance), line)[2]


def torchs(line: Line, step: float, trials: int) -> tuple[list[float], float]:
    """The steps that torch tries, and the one that it takes."""
    steps = []

    def evaluate(_x: torch.Tensor, t: float, _d: torch.Tensor) -> tuple[float, torch.Tensor]:
        steps.append(float(t))
        value, slope = line(float(t))
        return value, torch.tensor([slope], dtype=torch.float64)

    value, slope = line(0)
    direction = torch.ones(1, dtype=torch.float64)
    gradient = torch.tensor([slope], dtype=torch.float64)
    _, _, taken, _ = torch_strong_wolfe(
        evaluate, None, step, direction, value, gradient, gradient.dot(direction), max_ls=trials
    )
    return steps, float(taken)


def polynomial(coefficients: list[float], end: float = math.inf, beyond: float = math.inf) -> Line:
    """Lowest power first; from ``end`` on the value ``beyond`` with an unknown slope."""
    p = np.polynomial.Polynomial(coefficients)
    q = p.deriv()
    return lambda t: (float(p(t)), float(q(t))) if t < end else (beyond, math.nan)


POLYNOMIALS = {
    "the first step is right": [0, -1, 0.5],
    "too short": [0, -1, 0.0005],
    "far too short": [0, -1, 1e-7],
    "too long": [0, -1, 20],
    "far too long": [0, -1, 4000],
    "flat start, steep end": [0, -0.01, 0, 0, 3],
    "two minima": [0, -1, 3, -2.6, 0.7],
    "a minimum behind a hill": [0, -1, 9, -14, 5.6],
    "concave first": [0, -1, -4, 0, 1],
    "unbounded": [0, -1],
}
names = pytest.mark.parametrize("name", POLYNOMIALS)


@names
@pytest.mark.parametrize("step", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("trials", [0, 1, 2, 3, 25])
def test_trials_and_choice_are_those_of_torch(name: str, step: float, trials: int) -> None:
    line = polynomial(POLYNOMIALS[name])
    steps, _, chosen = drive(strong_wolfe(step, Point(0, *line(0)), 1.0, trials, 1e-9), line)
    expected, taken = torchs(line, step, trials)
    assert steps == pytest.approx(expected, rel=1e-9)
    assert chosen.evaluations == len(expected)
    if taken == 0 and chosen.point.step > 0:
        # Out of trials torch forgets the points that it passed on its way; here the last one
        # that was lower than the start is kept.
        assert len(steps) == trials + 1
        assert chosen.point.value < line(0)[0]
    else:
        assert chosen.point.step == pytest.approx(taken, rel=1e-9)


@given(
    slope=st.floats(-100, -1e-3),
    rest=st.lists(st.floats(-10, 10), min_size=2, max_size=3),
    leading=st.floats(0.01, 10),
    step=st.floats(1e-3, 10),
    trials=st.integers(0, 30),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_trials_are_those_of_torch_on_any_polynomial(
    slope: float, rest: list[float], leading: float, step: float, trials: int
) -> None:
    line = polynomial([0, slope, *rest, leading] if len(rest) == 2 else [0, slope, *rest])
    steps, _, chosen = drive(strong_wolfe(step, Point(0, *line(0)), 1.0, trials, 1e-9), line)
    expected, _ = torchs(line, step, trials)
    assume(all(map(math.isfinite, expected)))
    # Where two values are equal up to rounding, the two may go different ways.
    values = np.sort([line(t)[0] for t in [0, *expected]])
    assume(np.diff(values).min() > 1e-9 * np.abs(values).max())
    assert steps == pytest.approx(expected, rel=1e-6)
    assert chosen.evaluations == len(expected)


@names
@pytest.mark.parametrize("end", [0.005, 0.3, 0.9])
@pytest.mark.parametrize("beyond", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_counts_as_infinitely_high(name: str, end: float, beyond: float) -> None:
    line = polynomial(POLYNOMIALS[name], end, beyond)
    steps, _, chosen = drive(strong_wolfe(1.0, Point(0, *line(0)), 1.0, 25, 1e-9), line)
    expected, taken = torchs(polynomial(POLYNOMIALS[name], end, math.inf), 1.0, 25)
    assert steps == pytest.approx(expected, rel=1e-9)
    assert chosen.point.step == pytest.approx(taken, rel=1e-9)
    assert chosen.point.step < end
    assert chosen.point.value < 0


def test_a_finite_value_with_an_unknown_slope_is_not_trusted() -> None:
    def line(t: float) -> tuple[float, float]:
        return -t, -1 if t < 0.3 else math.nan

    chosen = searched(line)
    assert chosen.point.step < 0.3
    assert math.isfinite(chosen.point.slope)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_search_that_meets_nothing_finite_stays_where_it_was(bad: float) -> None:
    chosen = searched(lambda t: (bad, bad) if t else (1.0, -1.0))
    assert chosen.point == Point(0, 1.0, -1.0)


@given(
    curvature=st.floats(0.01, 100),
    slope=st.floats(0.01, 100),
    height=st.floats(0, 10),
    frequency=st.floats(0.1, 10),
    phase=st.floats(0, 6.3),
    step=st.floats(1e-3, 100),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_step_satisfies_both_wolfe_conditions(
    curvature: float, slope: float, height: float, frequency: float, phase: float, step: float
) -> None:
    def line(t: float) -> tuple[float, float]:
        angle = frequency * t + phase
        return (
            curvature * t * t / 2 - slope * t + height * math.sin(angle),
            curvature * t - slope + height * frequency * math.cos(angle),
        )

    value, downhill = line(0)
    assume(downhill < -1e-3)
    chosen = searched(line, step, trials=100, tolerance=0)
    taken = chosen.point.step
    assert (chosen.point.value, chosen.point.slope) == line(taken)
    assert chosen.point.value <= value + 1e-4 * taken * downhill + 1e-12
    assert abs(chosen.point.slope) <= 0.9 * abs(downhill)


@given(
    slope=st.floats(-100, -1e-3),
    rest=st.lists(st.floats(-10, 10), min_size=2, max_size=2),
    leading=st.floats(0.01, 10),
    step=st.floats(1e-3, 10),
    trials=st.integers(0, 30),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_last_reported_improvement_is_the_chosen_point(
    slope: float, rest: list[float], leading: float, step: float, trials: int
) -> None:
    line = polynomial([0, slope, *rest, leading])
    steps, improved, chosen = drive(strong_wolfe(step, Point(0, *line(0)), 1.0, trials, 1e-9), line)
    best = [0.0] + [t for t, is_better in zip(steps, improved, strict=True) if is_better]
    assert chosen.point.step == best[-1]
    assert chosen.point.value <= 0


@pytest.mark.parametrize("trials", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("wall", [0.002, 0.02, 0.2, 2.0])
def test_a_search_cut_short_before_a_wall_keeps_what_it_has_passed(
    trials: int, wall: float
) -> None:
    def line(t: float) -> tuple[float, float]:
        return (-t, -1 + 1e-3 * t) if t < wall else (5.0, 50.0)

    steps, improved, chosen = drive(
        strong_wolfe(0.001, Point(0, *line(0)), 1.0, trials, 1e-9), line
    )
    passed = [t for t in steps if t < wall]
    assert chosen.point.step == max(passed)
    assert steps[max(k for k, is_better in enumerate(improved) if is_better)] == max(passed)


def test_an_unbounded_line_is_followed_until_the_trials_are_used_up() -> None:
    steps, _, chosen = drive(strong_wolfe(1.0, Point(0, 0, -1), 1.0, 6, 1e-9), lambda t: (-t, -1.0))
    assert steps == sorted(steps)
    assert chosen.point.step == steps[-1] > 1000
    assert chosen.evaluations == 7


def test_a_first_trial_that_nothing_beats_is_kept() -> None:
    def line(t: float) -> tuple[float, float]:
        return {0.0: (0.0, -1.0), 1.0: (-0.5, 2.0)}.get(t, (0.3, 0.1))

    steps, improved, chosen = drive(strong_wolfe(1.0, Point(0, 0, -1), 1.0, 9, 1e-9), line)
    assert chosen.point == Point(1.0, -0.5, 2.0)
    assert improved == [True] + [False] * (len(steps) - 1)


def test_no_trial_is_spent_in_a_bracket_too_small_to_matter() -> None:
    def line(t: float) -> tuple[float, float]:
        return (0.0, -1.0) if t == 0 else (1.0, 1.0)  # a jump: no step is low enough

    few = searched(line, tolerance=0.1)
    many = searched(line, tolerance=1e-6)
    assert few.evaluations < many.evaluations < 26
    assert few.point.step == many.point.step == 0


def test_the_fixed_step_is_taken_wherever_it_leads() -> None:
    steps, improved, chosen = drive(fixed_step(0.7), polynomial([0, -1, 100]))
    assert steps == [0.7]
    assert improved == [True]
    assert chosen.point.value == pytest.approx(48.3)
    assert drive(fixed_step(0.7), lambda t: (math.inf, 1.0))[2].point.step == 0.7
