"""The batched L-BFGS against torch's, one sample at a time, and against solutions known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import rosen, rosen_der
from torch import Tensor

from captum_robust.optim import Minimum, minimize
from captum_robust.optim.lbfgs import Evaluation

Function = Callable[[Tensor], Tensor]
"""One sample -> its value."""


class Recorder:
    """A batched objective out of one function a sample, with the points it was asked for.

    The numbers to keep are the value and the first component of the point.
    """

    def __init__(self, *functions: Function) -> None:
        self.functions = functions
        self.calls: list[list[int]] = []
        self.points: list[list[Tensor]] = [[] for _ in functions]

    def __call__(self, x: Tensor, rows: Tensor) -> Evaluation:
        self.calls.append(rows.tolist())
        values, gradients = [], []
        for point, row in zip(x, rows.tolist(), strict=True):
            self.points[row].append(point.detach().clone())
            leaf = point.detach().clone().requires_grad_()
            with torch.enable_grad():
                value = self.functions[row](leaf)
                gradients.append(torch.autograd.grad(value, leaf)[0])
            values.append(value.detach())
        value = torch.stack(values)
        return value, torch.stack(gradients), torch.stack([value, x.flatten(1)[:, 0]], dim=1)


def torchs(function: Function, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor], int, int]:
    """Where torch.optim.LBFGS ends, the points it evaluates, its iterations and evaluations."""
    x = x.clone().requires_grad_()
    points = []
    line_search = options.pop("line_search", "strong_wolfe")
    renamed = {
        "step": "lr",
        "max_iterations": "max_iter",
        "max_evaluations": "max_eval",
        "tolerance_gradient": "tolerance_grad",
    }
    optimizer = torch.optim.LBFGS(
        [x],
        line_search_fn=None if line_search == "fixed" else line_search,
        **{renamed.get(name, name): value for name, value in options.items()},
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        points.append(x.detach().clone())
        value = function(x)
        value.backward()
        return value

    optimizer.step(closure)
    state = optimizer.state[x]
    return x.detach(), points, state["n_iter"], state["func_evals"]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(x: Tensor) -> Tensor:
    scale = torch.logspace(-1, 2, len(x), dtype=x.dtype)
    return (scale * (x - 1) ** 2).sum() / 2


def tanh_net(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(5)
    inputs = torch.randn(12, 2, generator=g, dtype=torch.float64).to(x.dtype)
    labels = torch.randn(12, generator=g, dtype=torch.float64).to(x.dtype)
    hidden = torch.tanh(inputs @ x[:8].reshape(2, 4))
    return ((hidden @ x[8:12] - labels) ** 2).mean() + 0.01 * (x**2).sum()


PROBLEMS: dict[str, tuple[Function, Tensor]] = {
    "rosenbrock": (rosenbrock, torch.tensor([-1.2, 1.0, -0.5, 0.8], dtype=torch.float64)),
    "quadratic": (quadratic, torch.linspace(-2, 2, 6, dtype=torch.float64)),
    "tanh_net": (
        tanh_net,
        torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    ),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


def compare_with_torch(name: str, **options: Any) -> None:
    function, x = PROBLEMS[name]
    recorder = Recorder(function)
    found = minimize(recorder, x[None], **options)
    end, points, iterations, evaluations = torchs(function, x, **options)
    seen = torch.stack(recorder.points[0])
    assert found.evaluations.tolist() == [len(seen)]
    assert found.iterations.tolist() == [iterations]
    if options.get("line_search") == "fixed":
        # Torch leaves the last point unevaluated, where the iterations are used up.
        assert len(seen) - evaluations == (iterations == options.get("max_iterations", 20))
        torch.testing.assert_close(seen[: len(points)], torch.stack(points), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(seen[-1], end, rtol=1e-6, atol=1e-8)
        best = min(recorder.points[0], key=lambda p: float(function(p)))
        torch.testing.assert_close(found.x[0], best)
        return
    assert len(seen) == evaluations
    torch.testing.assert_close(seen, torch.stack(points), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.x[0], end, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.value[0], function(found.x[0]))


@problems
@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
@pytest.mark.parametrize("history_size", [1, 3, 100])
@pytest.mark.parametrize("max_iterations", [1, 2, 7, 20])
def test_iterates_are_those_of_torch(
    name: str, line_search: str, history_size: int, max_iterations: int
) -> None:
    compare_with_torch(
        name,
        line_search=line_search,
        history_size=history_size,
        max_iterations=max_iterations,
        step=0.3 if line_search == "fixed" else 1.0,
    )


@problems
@pytest.mark.parametrize("step", [0.05, 0.7, 3.0])
def test_iterates_are_those_of_torch_for_any_first_step(name: str, step: float) -> None:
    compare_with_torch(name, step=step, max_iterations=12)


@problems
@pytest.mark.parametrize("max_evaluations", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
def test_evaluations_are_limited_as_in_torch(
    name: str, max_evaluations: int, line_search: str
) -> None:
    step = 0.1 if line_search == "fixed" else 1.0
    compare_with_torch(
        name,
        max_evaluations=max_evaluations,
        line_search=line_search,
        step=step,
        max_iterations=15,
    )


@problems
@pytest.mark.parametrize(
    "options",
    [{"tolerance_gradient": 0.1}, {"tolerance_change": 0.01}, {"tolerance_gradient": 1e4}],
    ids=str,
)
def test_it_stops_where_torch_stops(name: str, options: dict[str, Any]) -> None:
    function, x = PROBLEMS[name]
    found = minimize(Recorder(function), x[None], max_iterations=200, **options)
    # torch counts nothing in its state when it stops before the first iteration
    end, _, iterations, evaluations = torchs(function, x, max_iterations=200, **options)
    assert iterations < 200
    assert (found.iterations.item(), found.evaluations.item()) == (iterations, evaluations)
    torch.testing.assert_close(found.x[0], end, rtol=1e-5, atol=1e-7)


def test_rosenbrocks_valley_is_followed_to_its_end() -> None:
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        values = torch.tensor([rosen(p) for p in x.numpy()])
        return values, torch.from_numpy(np.stack([rosen_der(p) for p in x.numpy()])), None

    x = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    found = minimize(objective, x, max_iterations=100, tolerance_change=1e-14)
    torch.testing.assert_close(found.x, torch.ones_like(x), rtol=0, atol=1e-6)
    assert found.extra is None


def batch_of_six() -> tuple[list[Function], Tensor]:
    """Functions that need different numbers of iterations; the third starts at its minimum."""
    x = torch.linspace(-1.5, 1.5, 30, dtype=torch.float64).reshape(6, 5)
    goal = x[2].clone()
    functions: list[Function] = [
        rosenbrock,
        lambda p: (p**2).sum(),
        lambda p: ((p - goal) ** 2).sum(),
        quadratic,
        lambda p: (torch.cosh(p) * torch.arange(1, 6)).sum(),
        lambda p: rosenbrock(p) + (p**4).sum(),
    ]
    return functions, x


@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
@pytest.mark.parametrize("history_size", [2, 100])
def test_batch_equals_one_by_one(line_search: str, history_size: int) -> None:
    functions, x = batch_of_six()
    options: dict[str, Any] = {
        "line_search": line_search,
        "history_size": history_size,
        "max_iterations": 25,
        "step": 1.0 if line_search == "strong_wolfe" else 0.5,
        "tolerance_change": 1e-2,
    }
    batch = Recorder(*functions)
    found = minimize(batch, x, **options)
    for i, function in enumerate(functions):
        alone = Recorder(function)
        expected = minimize(alone, x[i : i + 1], **options)
        assert found.iterations[i] == expected.iterations[0]
        assert found.evaluations[i] == expected.evaluations[0]
        torch.testing.assert_close(found.x[i], expected.x[0], rtol=1e-6, atol=1e-8)
        seen, seen_alone = torch.stack(batch.points[i]), torch.stack(alone.points[0])
        torch.testing.assert_close(seen, seen_alone, rtol=1e-6, atol=1e-8)
    assert len(set(found.iterations.tolist())) > 2


def test_a_search_goes_on_undisturbed_when_another_sample_leaves() -> None:
    seen: list[float] = []

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        """Sample 0: a parabola. Sample 1: nothing beats the first trial, at 1."""
        values, gradients = [], []
        for (p,), row in zip(x.tolist(), rows.tolist(), strict=True):
            table = {0.0: (0.0, -1.0), 1.0: (-0.5, 2.0)}
            value, gradient = ((p - 2) ** 2, 2 * (p - 2)) if row == 0 else table.get(p, (0.3, 0.1))
            values.append(value)
            gradients.append([gradient])
            if row == 1:
                seen.append(p)
        return torch.tensor(values).double(), torch.tensor(gradients).double(), None

    x = torch.zeros(2, 1, dtype=torch.float64)
    found = minimize(objective, x, tolerance_change=1e-4, max_iterations=2, max_evaluations=99)
    assert found.x[0].item() == pytest.approx(2)
    after = next(p for p in seen[2:] if p < 0.5)  # the search stays close to 1
    assert seen.index(after) > found.evaluations[0]  # sample 0 has left by then
    # s = 1 and y = 2 - (-1), so that the next step from 1 is -2 · s / y.
    assert after == pytest.approx(1 - 2 / 3)


def test_batch_equals_one_by_one_where_kinks_make_searches_long() -> None:
    # A kink lets a search end at a point passed some trials ago, while others leave the batch.
    g = torch.Generator().manual_seed(8)
    scales = 10 ** torch.randn(12, 4, generator=g, dtype=torch.float64)
    x = torch.randn(12, 4, generator=g, dtype=torch.float64)
    functions: list[Function] = [
        lambda p, s=s: (s * p).abs().sum() + 0.1 * (p**2).sum() for s in scales
    ]
    options: dict[str, Any] = {"max_iterations": 12, "max_evaluations": 200}
    for tolerance in (1e-3, 1e-2, 0.05):
        batch = Recorder(*functions)
        found = minimize(batch, x, tolerance_change=tolerance, **options)
        for i, function in enumerate(functions):
            alone = Recorder(function)
            minimize(alone, x[i : i + 1], tolerance_change=tolerance, **options)
            torch.testing.assert_close(torch.stack(batch.points[i]), torch.stack(alone.points[0]))
        assert len(set(found.evaluations.tolist())) > 5


@given(order=st.permutations(range(6)), limit=st.integers(1, 30))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_order_of_the_samples_makes_no_difference(order: list[int], limit: int) -> None:
    functions, x = batch_of_six()
    expected = minimize(Recorder(*functions), x, max_iterations=limit)
    found = minimize(Recorder(*[functions[i] for i in order]), x[order], max_iterations=limit)
    assert torch.equal(found.iterations, expected.iterations[order])
    assert torch.equal(found.evaluations, expected.evaluations[order])
    torch.testing.assert_close(found.x, expected.x[order], rtol=1e-6, atol=1e-8)
    assert found.extra is not None
    torch.testing.assert_close(found.extra[:, 1], found.x[:, 0], rtol=1e-12, atol=1e-12)


def test_one_call_a_round_without_the_samples_that_are_done() -> None:
    functions, x = batch_of_six()
    recorder = Recorder(*functions)
    found = minimize(recorder, x, max_iterations=40)
    evaluations = found.evaluations.tolist()
    assert sum(len(rows) for rows in recorder.calls) == sum(evaluations)
    assert evaluations[2] == 1  # at its minimum from the start
    # Each call holds a sample once at most, and just the samples that still run.
    for k, rows in enumerate(recorder.calls):
        assert sorted(rows) == [i for i, count in enumerate(evaluations) if count > k]
    assert len(recorder.calls) == max(evaluations)


@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
@pytest.mark.parametrize("max_evaluations", [2, 3, 4, 6, 9, 14, 60])
@pytest.mark.parametrize("step", [0.02, 1.0])
def test_value_and_numbers_kept_belong_to_the_returned_point(
    line_search: str, max_evaluations: int, step: float
) -> None:
    functions, x = batch_of_six()
    wall: Function = lambda p: -p[0] + 1e3 * torch.relu(p[0] + 1.45) ** 2 + p[1:].abs().sum() * 1e-3  # noqa: E731
    functions[1] = wall
    found = minimize(
        Recorder(*functions),
        x,
        max_evaluations=max_evaluations,
        max_iterations=40,
        line_search=line_search,
        step=step * (0.01 if line_search == "fixed" else 1),
    )
    values = torch.stack([f(p) for f, p in zip(functions, found.x, strict=True)])
    torch.testing.assert_close(found.value, values, rtol=1e-12, atol=1e-12)
    assert found.extra is not None
    torch.testing.assert_close(found.extra[:, 0], values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.extra[:, 1], found.x[:, 0], rtol=1e-12, atol=1e-12)
    start = torch.stack([f(p) for f, p in zip(functions, x, strict=True)])
    assert (found.value <= start).all()


def test_a_search_cut_short_does_not_mix_two_points() -> None:
    def before_a_wall(p: Tensor) -> Tensor:
        return -p[0] if p[0] < 0.5 else p[0] * 100

    # 0, 0.1, and 1 behind the wall; torch returns to 0.
    found = minimize(
        Recorder(before_a_wall),
        torch.zeros(1, 1, dtype=torch.float64),
        step=0.1,
        max_evaluations=2,
    )
    assert found.x.item() == pytest.approx(0.1)
    assert found.value.item() == pytest.approx(-0.1)
    assert found.extra is not None
    assert found.extra[0].tolist() == pytest.approx([-0.1, 0.1])


def test_pairs_without_curvature_are_not_remembered() -> None:
    # |x|₁ is flat in its pieces: a pair within one has y = 0, and a fixed step of -sign(x)
    # follows, as without any history.
    points: list[list[float]] = []

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        points.append(x[0].tolist())
        return x.abs().sum(dim=1), x.sign(), None

    x = torch.tensor([[5.3, -7.2]], dtype=torch.float64)
    minimize(objective, x, line_search="fixed", max_iterations=5, max_evaluations=20)
    assert len(points) == 6
    # The first step is as long as 1 / (|1| + |1|).
    assert points[:2] == [[5.3, -7.2], pytest.approx([4.8, -6.7])]
    for k, point in enumerate(points[1:]):
        assert point == pytest.approx([4.8 - k, -6.7 + k])


def test_the_same_pairs_are_remembered_as_in_torch() -> None:
    def function(p: Tensor) -> Tensor:
        return p.abs().sum() + torch.relu(p[0] - p[1]) * 3

    x = torch.tensor([5.3, -7.2, 1.7], dtype=torch.float64)
    recorder = Recorder(function)
    minimize(recorder, x[None], line_search="fixed", max_iterations=20, step=0.4)
    _, points, _, _ = torchs(function, x, line_search="fixed", max_iter=20, step=0.4)
    assert len(points) > 10
    # Torch leaves the last point unevaluated.
    torch.testing.assert_close(torch.stack(recorder.points[0][: len(points)]), torch.stack(points))


@given(
    seed=st.integers(0, 10**6),
    dimension=st.integers(1, 40),
    condition=st.floats(1, 100),
    n=st.integers(1, 5),
    history_size=st.integers(5, 60),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_convex_quadratics_are_solved(
    seed: int, dimension: int, condition: float, n: int, history_size: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, dimension, dimension, generator=g, dtype=torch.float64))[0]
    eigenvalues = condition ** torch.rand(n, 1, dimension, generator=g, dtype=torch.float64)
    a = (q * eigenvalues) @ q.mT
    solution = torch.randn(n, dimension, generator=g, dtype=torch.float64)

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        gradient = (a[rows] @ (x - solution[rows]).unsqueeze(2)).squeeze(2)
        return ((x - solution[rows]) * gradient).sum(dim=1) / 2, gradient, None

    found = minimize(
        objective,
        torch.zeros(n, dimension, dtype=torch.float64),
        max_iterations=500,
        history_size=history_size,
        tolerance_change=0,
        tolerance_gradient=1e-4,
    )
    # The smallest eigenvalue is at least 1: |x - solution| <= |gradient|.
    torch.testing.assert_close(found.x, solution, rtol=0, atol=1e-4 * math.sqrt(dimension))


def test_a_barrier_is_no_obstacle() -> None:
    # f = c·x - Σ log x, x > 0, is lowest at 1/c. Beyond the barrier the logarithm is NaN, at it
    # infinite.
    c = torch.tensor([[0.5, 4.0], [100.0, 0.01], [1.0, 1.0]], dtype=torch.float64)

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        value = (c[rows] * x - x.log()).sum(dim=1)
        return value, c[rows] - 1 / x, None

    found = minimize(objective, torch.full_like(c, 0.3), max_iterations=100, step=10.0)
    torch.testing.assert_close(found.x, 1 / c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_nothing_finite_at_the_start_names_the_sample(bad: float, what: str) -> None:
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        value, gradient = (x**2).sum(dim=1), 2 * x
        (value[2:3] if what == "value" else gradient[2, 1:2]).fill_(bad)
        return value, gradient, None

    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="at the start, in sample 2"):
        minimize(objective, x)
    with pytest.raises(ValueError, match="at the start, in sample 12"):
        minimize(objective, x, first_sample=10)
    with pytest.raises(ValueError, match="at the start, in sample 2"):
        minimize(objective, x, start=objective(x, torch.arange(4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite_at_any_trial_names_the_sample(bad: float) -> None:
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        away = (x != 1).any(dim=1) & (rows == 3)
        value = torch.where(away, bad, (x**2).sum(dim=1))
        return value, 2 * x, None

    x = torch.ones(5, 2)
    for line_search in ("strong_wolfe", "fixed"):
        with pytest.raises(ValueError, match=r"sample 10, at every step tried in iteration 1"):
            minimize(objective, x, first_sample=7, line_search=line_search)


def test_fixed_steps_that_diverge_name_the_sample() -> None:
    # A pair that lies where the slope hardly changes makes the next step enormous.
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        steep = (rows == 1).unsqueeze(1)
        value = torch.where(steep, torch.exp(x**2), x**2).sum(dim=1)
        return value, torch.where(steep, 2 * x * torch.exp(x**2), 2 * x), None

    x = torch.full((3, 1), 2.0)
    with pytest.raises(ValueError, match=r"sample 1, at every step tried in iteration 1"):
        minimize(objective, x, line_search="fixed", step=30.0)
    minimize(objective, x)  # the search finds its way


def test_without_a_search_the_best_iterate_is_returned() -> None:
    x = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    recorder = Recorder(rosenbrock)
    found = minimize(recorder, x, line_search="fixed", max_iterations=3, max_evaluations=9)
    values = [float(recorder.functions[0](p)) for p in recorder.points[0]]
    assert values[-1] > min(values)
    assert found.value.item() == pytest.approx(min(values))
    torch.testing.assert_close(found.x[0], recorder.points[0][int(np.argmin(values))])


def test_a_known_start_saves_an_evaluation() -> None:
    functions, x = batch_of_six()
    full, spared = Recorder(*functions), Recorder(*functions)
    expected = minimize(full, x)
    start = Recorder(*functions)(x, torch.arange(6))
    found = minimize(spared, x, start=start)
    assert spared.calls == full.calls[1:]
    for a, b in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(a, b)


def test_stop_ends_single_samples() -> None:
    functions, x = batch_of_six()
    iterates: list[list[Tensor]] = [[] for _ in functions]

    def stop(points: Tensor, rows: Tensor, iterations: list[int]) -> Tensor:
        for point, row, count in zip(points, rows.tolist(), iterations, strict=True):
            iterates[row].append(point.clone())
            assert count == len(iterates[row])
        return torch.tensor(
            [row in (0, 3) and i >= 3 for row, i in zip(rows.tolist(), iterations, strict=True)]
        )

    found = minimize(Recorder(*functions), x, stop=stop, max_iterations=15)
    unstopped = minimize(Recorder(*functions), x, max_iterations=15)
    three = minimize(Recorder(*functions), x, max_iterations=3, max_evaluations=50)
    for i in range(6):
        same = three if i in (0, 3) else unstopped
        assert found.iterations[i] == same.iterations[i]
        if i not in (0, 3):
            assert found.evaluations[i] == same.evaluations[i]
            torch.testing.assert_close(found.x[i], same.x[i], rtol=1e-6, atol=1e-8)
        if iterates[i]:
            torch.testing.assert_close(found.x[i], iterates[i][-1], rtol=0, atol=0)


@pytest.mark.parametrize("line_search", ["strong_wolfe", "fixed"])
def test_nothing_of_the_callers_is_written_to(line_search: str) -> None:
    functions, x = batch_of_six()
    given = x.clone()
    recorder = Recorder(*functions)
    returned: list[tuple[Evaluation, Evaluation]] = []

    def objective(points: Tensor, rows: Tensor) -> Evaluation:
        result = recorder(points, rows)
        returned.append((result, tuple(t.clone() for t in result)))
        return result

    minimize(objective, x, line_search=line_search, step=0.05, max_iterations=15)
    assert torch.equal(x, given)
    for result, copy in returned:
        for a, b in zip(result, copy, strict=True):
            assert torch.equal(a, b)


def test_gradients_may_share_memory() -> None:
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        # 3·Σx + rows, cut off at 0 by a kink: an expanded gradient, as autograd returns it
        slope = torch.where(x.sum(dim=1) > 0, 3.0, -1.0 - rows)
        return slope * x.sum(dim=1), slope.unsqueeze(1).expand(len(x), x.shape[1]), None

    x = torch.tensor([[3.0, 4.0], [1.0, 1.0], [-2.0, 8.0]])
    found = minimize(objective, x)
    contiguous = minimize(lambda p, rows: (*_contiguous(objective(p, rows)), None), x)
    assert torch.equal(found.x, contiguous.x)


def _contiguous(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    return evaluation[0].clone(), evaluation[1].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (2, 7), (1, 1)])
def test_any_shape_and_precision(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    goal = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).reshape(shape)
    weight = torch.linspace(1, 5, math.prod(shape), dtype=dtype).reshape(shape)

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        assert x.shape == (len(rows), *shape[1:])
        assert x.dtype == dtype
        moved = x - goal[rows]
        value = (weight[rows] * moved**2).flatten(1).sum(dim=1)
        return value, 2 * weight[rows] * moved, None

    start = torch.zeros(shape, dtype=dtype).mT.contiguous().mT if len(shape) > 2 else goal * 0
    found = minimize(objective, start, max_iterations=50)
    assert found.x.shape == shape
    assert found.x.dtype == found.value.dtype == dtype
    torch.testing.assert_close(found.x, goal, rtol=0, atol=1e-4)


def test_the_search_and_its_objective_run_without_autocast() -> None:
    a = torch.diag(torch.linspace(1, 3, 8))
    seen: list[torch.dtype] = []

    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        seen.append((x @ a).dtype)
        gradient = (x - 1) @ a
        return ((x - 1) * gradient).sum(dim=1) / 2, gradient, None

    x = torch.zeros(2, 8)
    expected = minimize(objective, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = minimize(objective, x)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {torch.float32}
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_mode_makes_no_difference(mode: Any) -> None:
    def objective(x: Tensor, rows: Tensor) -> Evaluation:
        return (x**4).sum(dim=1), 4 * x**3, None

    x = torch.ones(2, 3, requires_grad=True)
    expected = minimize(objective, x)
    with mode():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = minimize(objective, x)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert torch.equal(found.x, expected.x)
    assert not found.x.requires_grad


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "step": [0, -1.0, math.nan, math.inf, "1", torch.ones(2)],
        "max_iterations": [0, -3, 2.5, True, "10", None],
        "max_evaluations": [0, -1, 1.5, False],
        "history_size": [0, 2.0, None],
        "tolerance_gradient": [-1e-9, math.nan],
        "tolerance_change": [-1.0, math.nan],
        "line_search": ["wolfe", None, "strong-wolfe"],
    }.items(),
)
def test_a_wrong_option_is_named_before_anything_runs(name: str, values: list[Any]) -> None:
    recorder = Recorder(rosenbrock)
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            minimize(recorder, torch.zeros(1, 3), **{name: value})
    assert recorder.calls == []


@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.long)],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)
def test_a_batch_without_numbers_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^x: expected"):
        minimize(Recorder(rosenbrock), x)


def test_a_minimum_is_left_at_once() -> None:
    found = minimize(Recorder(lambda p: (p**2).sum()), torch.zeros(1, 3))
    assert (found.iterations.item(), found.evaluations.item()) == (0, 1)
    assert torch.equal(found.x, torch.zeros(1, 3))
    assert isinstance(found, Minimum)
