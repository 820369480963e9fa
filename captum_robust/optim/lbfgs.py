"""L-BFGS on a batch of independent problems: one history, one step and one stop a sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_count, check_number
from captum_robust._contexts import without_autocast
from captum_robust._progress import progress_bar
from captum_robust.optim.line_search import Point, Search, fixed_step, strong_wolfe

Evaluation = tuple[Tensor, Tensor, Tensor | None]
"""Values n, gradients n×…, and n×A numbers to keep of the point, or None."""

LINE_SEARCHES = ("strong_wolfe", "fixed")
_SMALLEST_CURVATURE = 1e-10


@dataclass(frozen=True)
class Minimum:
    """Where each of N samples ended."""

    x: Tensor
    """N×…, the last iterate; without a line search the best one."""
    value: Tensor
    """N, the objective there."""
    extra: Tensor | None
    """N×A, what the objective returned beside the value there."""
    iterations: Tensor
    """N, steps taken."""
    evaluations: Tensor
    """N, of value and gradient together, the first one included."""


@dataclass
class _Sample:
    """The scalars of one sample."""

    row: int  # its place in the caller's batch
    value: float
    evaluations: int = 1
    iterations: int = 0
    pairs: int = 0  # how often the history was written to
    step: float = 0.0
    search: Search | None = None
    met_finite: bool = False  # in this search, away from its start
    met_other: bool = False  # NaN or infinity
    best: float = math.inf


def minimize(
    objective: Callable[[Tensor, Tensor], Evaluation],
    x: Tensor,
    *,
    step: float = 1.0,
    max_iterations: int = 20,
    max_evaluations: int | None = None,
    tolerance_gradient: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search: str = "strong_wolfe",
    start: Evaluation | None = None,
    stop: Callable[[Tensor, Tensor, list[int]], Tensor] | None = None,
    first_sample: int = 0,
) -> Minimum:
    """Minimise N independent functions, each as ``torch.optim.LBFGS`` would alone.

    One call of ``objective`` evaluates one trial point of every sample that still runs. A sample
    in the middle of its line search does not hold up the others, which go on with their next
    iteration, and a sample that has converged leaves the batch. The options mean what they mean in
    ``torch.optim.LBFGS``; up to rounding, so do the iterates.

    The two-loop recursion (Nocedal and Wright, algorithm 7.4) runs on inner products, as in Chen
    et al., "Large-scale L-BFGS using MapReduce" (2014): the vectors are read twice an iteration,
    in two batched matrix products, whatever the length of the history.

    Args:
        objective: (points n×…, rows n) -> values n, gradients n×…, and n×A numbers to keep or
            None. It is called without autocast, and without gradients, which it turns on where it
            needs them. ``rows``, on
            the CPU, says which samples of ``x`` the points belong to; the order changes from
            call to call.
        x: N×…, where to start, floating point. It is not written to.
        step: the first trial step of an iteration (torch's ``lr``).
        max_iterations: of a sample.
        max_evaluations: of a sample; 1.25 × ``max_iterations`` by default.
        tolerance_gradient: stop at a smaller largest component of the gradient.
        tolerance_change: stop where value, or every component, changes by less.
        history_size: how many pairs of steps and gradient changes a sample remembers.
        line_search: ``"strong_wolfe"``, or ``"fixed"``: ``step`` is taken as it is. Unlike
            torch's, the last point is evaluated too.
        start: the evaluation at ``x``, if it is known.
        stop: (points n×…, rows n, iterations) of the samples that finished an iteration -> n
            booleans; True ends the sample.
        first_sample: the number that an error message gives to the first sample.

    Raises:
        ValueError: a wrong option, an empty batch, or a value or gradient that is not finite (at
            the start, after a fixed step, or at every trial of a line search); says which sample.
    """
    check(x.is_floating_point(), f"x: expected floating point, got {x.dtype}")
    shape = tuple(x.shape)
    check(x.ndim > 1 and x.numel() > 0, f"x: expected N×… with at least one number, got {shape}")
    options: dict[str, Any] = {
        "step": step, "max_iterations": max_iterations, "max_evaluations": max_evaluations,
        "tolerance_gradient": tolerance_gradient, "tolerance_change": tolerance_change,
        "history_size": history_size, "line_search": line_search,
    }  # fmt: skip
    check_options(**options)
    run = _Run(objective, x.detach(), stop, first_sample, **options)
    # Of the objective too: half precision hides the small first steps of a search.
    with torch.no_grad(), without_autocast(x):
        return run.minimize(start)


@dataclass
class _Run:
    """A minimisation at work; see :func:`minimize` for the settings."""

    objective: Callable[[Tensor, Tensor], Evaluation]
    start: Tensor
    stop: Callable[[Tensor, Tensor, list[int]], Tensor] | None
    first_sample: int
    step: float
    max_iterations: int
    max_evaluations: int | None
    tolerance_gradient: float
    tolerance_change: float
    history_size: int
    line_search: str

    def __post_init__(self) -> None:
        x = self.start
        self.has_line_search = self.line_search == "strong_wolfe"
        most = self.max_evaluations
        self.evaluation_limit = self.max_iterations * 5 // 4 if most is None else most
        n = len(x)
        self.active = n  # the rows [0, active) of every array below belong to running samples
        self.samples: list[_Sample] = []
        self.x = x.reshape(n, -1).clone()  # n×D
        self.gradient = torch.empty_like(self.x)  # where the iteration began
        self.low = torch.empty_like(self.x)  # at the best point of the line search so far
        self.direction = torch.zeros_like(self.x)
        self.extra: Tensor | None = None
        pairs = min(self.history_size, max(1, self.max_iterations - 1))
        self.history = _History(n, self.x.shape[1], pairs, self.x)
        # Where the samples ended; without a line search, their best so far.
        self.result_x = self.x.clone()
        self.result_value = torch.zeros(n, dtype=torch.float64)
        self.result_extra: Tensor | None = None
        self.iterations = torch.zeros(n, dtype=torch.long)
        self.evaluations = torch.zeros(n, dtype=torch.long)

    def minimize(self, start: Evaluation | None) -> Minimum:
        rows = torch.arange(self.active)
        value, gradient, extra = self._evaluated(self.x, rows) if start is None else start
        gradient = gradient.detach().reshape(self.x.shape)
        self.gradient[:], self.low[:] = gradient, gradient
        if extra is not None:
            self.extra = extra.detach().clone()
            self.result_extra = extra.detach().clone()
        scalars = _to_host(value, gradient.abs().amax(dim=1))
        for row, (v, largest) in enumerate(scalars):
            place = f"at the start, in sample {self.first_sample + row}"
            check(_are_finite(v, largest), f"objective: NaN or infinity {place}")
            self.samples.append(_Sample(row, v))
            self._keep(row)
        self._remove([i for i, (_, g) in enumerate(scalars) if g <= self.tolerance_gradient])
        fresh = list(range(self.active))
        with progress_bar(None, "evaluation", None, "L-BFGS") as advance:
            while self.active:
                if fresh:
                    self._begin_iterations(fresh)
                if self.active:
                    fresh = self._evaluate_trials()
                    advance(1)
        value = self.result_value.to(self.x.dtype).to(self.x.device)
        x = self.result_x.reshape(self.start.shape)
        return Minimum(x, value, self.result_extra, self.iterations, self.evaluations)

    def _evaluated(self, x: Tensor, rows: Tensor) -> Evaluation:
        value, gradient, extra = self.objective(self._points(x), rows)
        return value.detach(), gradient.detach(), None if extra is None else extra.detach()

    def _points(self, x: Tensor) -> Tensor:
        """Vectors n×D as the caller's points n×…."""
        return x.reshape(-1, *self.start.shape[1:])

    def _begin_iterations(self, fresh: list[int]) -> None:
        """New directions and line searches for the samples at these places."""
        n = self.active
        gradient = self.gradient[:n]
        new = self.history.directions(gradient, [s.pairs for s in self.samples])
        if len(fresh) == n:
            self.direction[:n] = new
        else:
            at = torch.tensor(fresh, device=new.device)
            self.direction[at] = new[at]
        d = self.direction[:n]
        scalars = _to_host(_dot(gradient, d), gradient.abs().sum(dim=1), d.abs().amax(dim=1))
        ended = []
        for i in fresh:
            sample = self.samples[i]
            slope, size, largest = scalars[i]
            sample.iterations += 1
            sample.step = self.step
            sample.met_finite = sample.met_other = False
            if sample.iterations == 1:
                sample.step *= min(1.0, 1.0 / size)
            if not slope <= -self.tolerance_change:
                ended.append(i)
                continue
            start = Point(0.0, sample.value, slope)
            if self.has_line_search:
                left, tolerance = self.evaluation_limit - sample.evaluations, self.tolerance_change
                sample.search = strong_wolfe(sample.step, start, largest, left, tolerance)
            else:
                sample.search = fixed_step(sample.step)
            sample.step = next(sample.search).step
        self._remove(ended)

    def _evaluate_trials(self) -> list[int]:
        """One evaluation of every running sample; the places of those that begin an iteration."""
        n = self.active
        d, x = self.direction[:n], self.x[:n]
        trial = torch.addcmul(x, d, _column([s.step for s in self.samples], x))
        rows = torch.tensor([s.row for s in self.samples])
        value, gradient, extra = self._evaluated(trial, rows)
        gradient = gradient.reshape(n, -1).to(x.dtype)
        # A step too short to change any component finds the start again, and that is finite.
        moved = (trial != x).any(dim=1)
        scalars = _to_host(value, _dot(gradient, d), moved, gradient.abs().amax(dim=1))
        improved, accepted = [], []
        for i, sample in enumerate(self.samples):
            v, slope, has_moved, largest = scalars[i]
            assert sample.search is not None
            sample.evaluations += 1
            if not _are_finite(v, slope, largest):
                v = math.nan
                sample.met_other = True
            elif has_moved:
                sample.met_finite = True
            try:
                answer = sample.search.send((v, slope))
            except StopIteration as end:
                answer = end.value
                if sample.met_other and not sample.met_finite:
                    raise ValueError(
                        f"objective: NaN or infinity in sample {self.first_sample + sample.row}, "
                        f"at every step tried in iteration {sample.iterations}"
                    ) from None
                sample.value, previous = end.value.point.value, sample.value
                accepted.append((i, abs(sample.value - previous)))
            sample.step = answer.step
            if answer.improved:
                improved.append(i)
        if improved:
            at = torch.tensor(improved, device=gradient.device)
            self.low[at] = gradient[at]
            if extra is not None and self.extra is not None:
                self.extra[at] = extra[at].to(self.extra.dtype)
        return self._accept(accepted)

    def _accept(self, accepted: list[tuple[int, float]]) -> list[int]:
        """Move the samples whose line search ended; the places of those that go on."""
        if not accepted:
            return []
        places = [i for i, _ in accepted]
        at = torch.tensor(places, device=self.x.device)
        steps = _column([self.samples[i].step for i in places], self.x)
        s = self.direction[at] * steps
        y = self.low[at] - self.gradient[at]
        self.x[at] += s
        low = self.low[at]
        self.gradient[at] = low
        scalars = _to_host(low.abs().amax(dim=1), s.abs().amax(dim=1), _dot(y, s))
        settled = [False] * len(places)
        if self.stop is not None:
            samples = [self.samples[i] for i in places]
            rows = torch.tensor([sample.row for sample in samples])
            counts = [sample.iterations for sample in samples]
            settled = self.stop(self._points(self.x[at]), rows, counts).tolist()
        ended, going_on, writes = [], [], []
        for j, (i, change) in enumerate(accepted):
            sample = self.samples[i]
            largest_gradient, largest_move, curvature = scalars[j]
            sample.search = None
            if not self.has_line_search:
                self._keep(i)
            if (
                settled[j]
                or sample.iterations >= self.max_iterations
                or sample.evaluations >= self.evaluation_limit
                or largest_gradient <= self.tolerance_gradient
                or largest_move <= self.tolerance_change
                or change < self.tolerance_change
            ):
                ended.append(i)
                continue
            going_on.append(i)
            if curvature > _SMALLEST_CURVATURE:
                writes.append((i, j, sample.pairs))
                sample.pairs += 1
        self.history.write(writes, s, y)
        moved = self._remove(ended)
        return [moved.get(i, i) for i in going_on]

    def _keep(self, i: int) -> None:
        """Note the sample's iterate as its result, if it is its best."""
        sample = self.samples[i]
        if self.has_line_search or sample.value < sample.best:
            sample.best = sample.value
            self.result_x[sample.row] = self.x[i]
            self.result_value[sample.row] = sample.value
            if self.result_extra is not None and self.extra is not None:
                self.result_extra[sample.row] = self.extra[i]

    def _remove(self, places: list[int]) -> dict[int, int]:
        """Take samples out of the batch; the last ones move into their places: old -> new."""
        moved: dict[int, int] = {}
        for i in sorted(places, reverse=True):
            sample = self.samples[i]
            self._keep(i)
            self.iterations[sample.row] = sample.iterations
            self.evaluations[sample.row] = sample.evaluations
            last = self.active - 1
            if i != last:
                self.samples[i] = self.samples[last]
                for array in (self.x, self.gradient, self.low, self.direction, self.extra):
                    if array is not None:
                        array[i] = array[last]
                self.history.move(last, i)
                origin = next((old for old, new in moved.items() if new == last), last)
                moved[origin] = i
            self.samples.pop()
            self.active = last
        return moved


class _History:
    """The last m steps s and gradient changes y of each sample, and their inner products.

    The vectors lie where the gradients are; the products, a few hundred numbers, on the CPU.
    """

    def __init__(self, n: int, dimension: int, size: int, like: Tensor) -> None:
        self.size = size
        self.used = 0  # slots written to by any sample
        # n×2m×D: s and y of slot k in the rows 2k and 2k+1
        self.vectors = like.new_empty(n, 2 * size, dimension)
        self.sy = torch.zeros(n, size, size, dtype=torch.float64)  # [k, l]: s of k times y of l
        self.yy = torch.zeros(n, size, size, dtype=torch.float64)

    def write(self, writes: list[tuple[int, int, int]], s: Tensor, y: Tensor) -> None:
        """``writes``: (place, row of ``s`` and ``y``, how many pairs the place has had)."""
        if not writes:
            return
        slots = [count % self.size for _, _, count in writes]
        if (needed := max(slots) + 1) > self.used:
            # Zeros, not what the memory held: 0 × NaN is NaN.
            self.vectors[:, 2 * self.used : 2 * needed] = 0
            self.used = needed
        place, slot = torch.tensor([i for i, _, _ in writes]), torch.tensor(slots)
        source = torch.tensor([j for _, j, _ in writes])
        device = self.vectors.device
        at, of = place.to(device), source.to(device)
        vectors = self.vectors[: int(place.max()) + 1, : 2 * self.used]
        pair = vectors.new_zeros(len(vectors), 2, vectors.shape[2])
        for k, new in enumerate((s[of], y[of])):
            pair[at, k] = self.vectors[at, (2 * slot + k).to(device)] = new
        # The long factor second and transposed: twice as fast on the CPU as the other way round.
        products = torch.bmm(pair, vectors.transpose(1, 2)).cpu().double()[place]  # w×2×2u
        with_s, with_y = products.unbind(dim=1)
        u = self.used
        self.sy[place, :u, slot] = with_y[:, 0::2]
        self.sy[place, slot, :u] = with_s[:, 1::2]
        self.yy[place, :u, slot] = self.yy[place, slot, :u] = with_y[:, 1::2]

    def move(self, source: int, target: int) -> None:
        for array in (self.vectors, self.sy, self.yy):
            array[target] = array[source]

    def directions(self, gradient: Tensor, pairs: list[int]) -> Tensor:
        """-H g of each sample, n×D: the gradient reversed where nothing is remembered yet."""
        n = len(gradient)
        if self.used == 0:
            return -gradient
        vectors = self.vectors[:n, : 2 * self.used]
        products = torch.bmm(gradient.unsqueeze(1), vectors.transpose(1, 2)).squeeze(1)  # n×2u
        products = products.cpu().double()
        sg, yg = products[:, 0::2], products[:, 1::2]
        of_s, of_y, of_g = self._coefficients(sg, yg, pairs)
        of_vectors = torch.stack([of_s, of_y], dim=2).flatten(1)  # n×2u
        coefficients = torch.cat([of_vectors, of_g.unsqueeze(1)], dim=1).to(gradient.dtype)
        coefficients = coefficients.to(gradient.device)
        combined = torch.bmm(coefficients[:, None, :-1], vectors).squeeze(1)
        return combined.addcmul_(gradient, coefficients[:, -1:])

    def _coefficients(
        self, sg: Tensor, yg: Tensor, pairs: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-H g as a combination of the s (n×u), the y (n×u) and g (n)."""
        n, u = sg.shape
        sy, yy = self.sy[:n, :u, :u], self.yy[:n, :u, :u]
        count = torch.tensor(pairs)
        held = count.clamp(max=self.size)
        all_rows = torch.arange(n)
        # q = a combination of the y and -g; first that of -g alone
        of_y = torch.zeros(n, u, dtype=torch.float64)
        of_s = torch.zeros(n, u, dtype=torch.float64)
        longest = int(held.max())
        alphas = torch.zeros(n, longest, dtype=torch.float64)
        for age in range(longest):  # the newest first
            rows = all_rows[held > age]
            k = (count[rows] - 1 - age) % self.size
            s_times_q = (sy[rows, k] * of_y[rows]).sum(dim=1) - sg[rows, k]
            alphas[rows, age] = s_times_q / sy[rows, k, k]
            of_y[rows, k] -= alphas[rows, age]
        scale = torch.ones(n, dtype=torch.float64)
        rows = all_rows[held > 0]
        newest = (count[rows] - 1) % self.size
        scale[rows] = sy[rows, newest, newest] / yy[rows, newest, newest]
        of_y *= scale.unsqueeze(1)
        of_g = -scale
        for age in range(longest - 1, -1, -1):
            rows = all_rows[held > age]
            k = (count[rows] - 1 - age) % self.size
            y_times_r = (
                (yy[rows, k] * of_y[rows]).sum(dim=1)
                + (sy[rows, :, k] * of_s[rows]).sum(dim=1)
                + of_g[rows] * yg[rows, k]
            )
            beta = y_times_r / sy[rows, k, k]
            of_s[rows, k] += alphas[rows, age] - beta
        return of_s, of_y, of_g


def _are_finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _to_host(*columns: Tensor) -> list[list[float]]:
    """The columns' rows as numbers, in one copy."""
    dtype = columns[-1].dtype
    rows: list[list[float]] = torch.stack([c.detach().to(dtype) for c in columns], dim=1).tolist()
    return rows


def check_options(
    *,
    step: float,
    max_iterations: int,
    max_evaluations: int | None = None,
    tolerance_gradient: float = 0.0,
    tolerance_change: float = 0.0,
    history_size: int,
    line_search: str,
) -> None:
    """Raise ``ValueError`` for an option that :func:`minimize` can't work with."""
    check_number("step", step, 0, open_low=True)
    check_count("max_iterations", max_iterations, 1)
    check_count("max_evaluations", max_evaluations, 1, optional=True)
    check_count("history_size", history_size, 1)
    check_number("tolerance_gradient", tolerance_gradient, 0)
    check_number("tolerance_change", tolerance_change, 0)
    check_choice("line_search", line_search, LINE_SEARCHES)
