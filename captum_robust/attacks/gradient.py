"""Attacks that follow the gradient of the loss within a ball of given size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._captum import TargetType, format_tensor_into_tuples
from captum_robust._checks import as_number, check_batch, check_count, check_inputs
from captum_robust._contexts import seeded
from captum_robust._scores import at_least_float, check_rivals
from captum_robust.attacks._attack import (
    Attack,
    LossFunction,
    Tensors,
    Victim,
    cross_entropy,
    divided,
    l2_norms,
    per_sample,
    steepest,
    take,
    take_each,
)


class PGD(Attack):
    """Projected gradient descent: small steps up the loss, each projected on the ball.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (https://arxiv.org/abs/1706.06083). With ``momentum`` the iterates of Dong et al., "Boosting
    Adversarial Attacks with Momentum" (https://arxiv.org/abs/1710.06081); with ``transform`` the
    expectation over transformations of Athalye et al. (https://arxiv.org/abs/1707.07397).

    A step needs one forward and one backward pass. An image that is fooled leaves the working
    batch, so the rest of the steps cost it nothing.

    Args:
        forward_func: as for all attacks, see :mod:`captum_robust.attacks`; so are ``bounds``,
            ``quantize`` and ``seed``.
        epsilon: radius of the ball in units of the inputs.
        steps: at most so many.
        step_size: 2.5 ``epsilon`` / ``steps`` by default.
        norm: ``"Linf"``: steps along the sign of the gradient; ``"L2"``: along the gradient,
            of length ``step_size``.
        random_start: begin at a random point of the ball. Every sample gets the same draw.
        restarts: how often to begin; from the second time on at a random point, and only with
            the samples that are not fooled yet.
        momentum: decay of the sum of normalised gradients; 0: none.
        loss_func: (scores n×K, classes n) -> n losses. Cross-entropy by default.
        transform: the attack averages the loss over ``samples`` draws of it, of one size. It takes
            the inputs n×… and returns the like, the same transform of each or one of its own. A
            sample counts as fooled when the mean of the probabilities says so. It draws from
            torch's global generators, which are seeded for each step and put back. What it draws
            for a row depends on the rows before, so draw once for all where a batch shall give
            what its samples give one by one.
        samples: how often a step calls the transform.
        early_stop: a fooled sample leaves the batch, so its change is often smaller than the ball
            allows. False: every sample takes all steps, also one that was misclassified to begin
            with.
        keep_best: return the iterate with the highest loss (targeted: lowest) instead of the last.

    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> attack = PGD(model, epsilon=0.25, steps=4)
    >>> attack.perturb(torch.tensor([[0.6, 0.4, 0.5]]), target=0)
    tensor([[0.4438, 0.5562, 0.5000]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        epsilon: float = 8 / 255,
        steps: int = 10,
        step_size: float | None = None,
        *,
        norm: str = "Linf",
        random_start: bool = False,
        restarts: int = 1,
        momentum: float = 0.0,
        loss_func: LossFunction | None = None,
        transform: Callable[..., Any] | None = None,
        samples: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = True,
        keep_best: bool = True,
        quantize: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(forward_func, epsilon=epsilon, norm=norm, bounds=bounds, quantize=quantize)
        check_count("steps", steps, 0)
        check_count("restarts", restarts, 1)
        check_count("samples", samples, 1)
        if step_size is not None and not as_number(step_size) > 0:
            raise ValueError(f"step_size: expected a positive number or None, got {step_size!r}")
        if not 0 <= as_number(momentum) < float("inf"):
            raise ValueError(f"momentum: expected a number from 0, got {momentum!r}")
        for name, function in (("loss_func", loss_func), ("transform", transform)):
            if function is not None and not callable(function):
                kind = type(function).__name__
                raise TypeError(f"{name}: expected a function or None, got {kind}")
        if seed is not None:
            check_count("seed", seed, 0)
        if samples > 1 and transform is None:
            raise ValueError("samples: there is no transform to draw")
        self.steps = steps
        self.step_size = step_size
        self.random_start = random_start
        self.restarts = restarts
        self.momentum = momentum
        self.loss_func = cross_entropy if loss_func is None else loss_func
        self.transform = transform
        self.samples = samples
        self.early_stop = early_stop
        self.keep_best = keep_best
        self.seed = seed

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        if epsilon is None:
            raise ValueError("epsilon: expected a number, got None")
        best = _Best(victim, self.keep_best)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        if self.random_start or self.transform is not None:
            victim.scores(victim.x, victim.everyone)
        for restart in range(self.restarts):
            is_random = self.random_start or restart > 0
            rows = victim.everyone
            if victim.knows_labels and self.early_stop:
                rows = (~(victim.already | victim.fooled)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            start = take_each(victim.x, rows)
            if is_random:
                change = random_points(start, epsilon, self.norm, generator)
                start = self._moved(victim, start, change, rows, epsilon)
            self._climb(victim, best, start, rows, epsilon, restart)
        return best.x

    def _climb(
        self,
        victim: Victim,
        best: _Best,
        x: Tensors,
        rows: Tensor,
        epsilon: float,
        restart: int,
    ) -> None:
        """From x, n×…, all steps of samples ``rows``."""
        steps, length = self._step_count(epsilon), self._step_length(epsilon)
        velocity: Tensors | None = None
        for step in range(steps + 1):
            is_last = step == steps
            is_clean = not victim.knows_labels
            draw = restart * (steps + 1) + step
            leaves, scores, objective = self._evaluate(victim, x, rows, draw, graph=not is_last)
            done = fooled = torch.zeros_like(rows, dtype=torch.bool)
            if self.early_stop and is_clean:
                done = victim.already[rows]
            elif self.early_stop:
                done = fooled = self._verified(victim, scores, x, rows, draw)
            best.see(x, rows, objective, fooled, is_last)
            if is_last:
                return
            if self.early_stop and bool(done.any()):
                left = (~done).nonzero()[:, 0]
                if len(left) == 0:
                    return
                # The backward pass runs through the whole batch. Where few are left, a fresh
                # forward pass of those costs less than that.
                again = len(left) <= len(rows) // 2
                gradients = () if again else self._gradients(victim, objective, leaves, rows)
                x, rows = take_each(x, left), rows[left]
                velocity = None if velocity is None else take_each(velocity, left)
                if again:
                    leaves, _, objective = self._evaluate(victim, x, rows, draw, graph=True)
                    gradients = self._gradients(victim, objective, leaves, rows)
                else:
                    gradients = take_each(gradients, left)
            else:
                gradients = self._gradients(victim, objective, leaves, rows)
            del leaves, objective
            gradients = victim.masked(gradients, rows)
            if self.momentum:
                velocity = self._accumulated(velocity, gradients)
                gradients = velocity
            clean = take_each(victim.x, rows)
            change = tuple(
                i - c + length * d
                for i, c, d in zip(x, clean, self._direction(gradients), strict=True)
            )
            x = self._moved(victim, clean, change, rows, epsilon)

    def _evaluate(
        self, victim: Victim, x: Tensors, rows: Tensor, draw: int, graph: bool
    ) -> tuple[Tensors, Tensor, Tensor]:
        """The leaves of the graph, the scores n×K that judge, and the objective n to raise."""
        with torch.set_grad_enabled(graph):
            leaves = tuple(t.detach().requires_grad_(graph) for t in x)
            if self.transform is None or not victim.knows_labels:
                scores = victim.scores(leaves, rows)
                return leaves, scores.detach(), self._objective(victim, scores, rows)
            many = rows.repeat_interleave(self.samples)
            scores = victim.scores(self._transformed(leaves, draw), many)
            objective = self._objective(victim, scores, many)
            objective = objective.reshape(len(rows), self.samples).mean(dim=1)
            probabilities = scores.detach().softmax(dim=1)
            mean = probabilities.reshape(len(rows), self.samples, -1).mean(dim=1)
            return leaves, mean, objective

    def _transformed(self, x: Tensors, draw: int) -> Tensors:
        """All samples of draw number ``draw`` of the transform: those of an input in a row."""
        assert self.transform is not None
        # The same draws for whatever is left of the batch.
        seed = None if self.seed is None else self.seed + 1_000_003 * draw
        with seeded(seed, x[0].device):
            draws = [
                format_tensor_into_tuples(self.transform(*(t.clone() for t in x)))
                for _ in range(self.samples)
            ]
        return tuple(torch.stack(each, dim=1).flatten(0, 1) for each in zip(*draws, strict=True))

    def _gradients(
        self, victim: Victim, objective: Tensor, leaves: Tensors, rows: Tensor
    ) -> Tensors:
        times = 1 if self.transform is None else self.samples
        return victim.gradients(objective, leaves, rows, times)

    def _objective(self, victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:
        check_rivals(scores)
        loss = self.loss_func(scores, victim.label[rows])
        if not isinstance(loss, Tensor) or loss.shape != (len(rows),):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"loss_func: expected {len(rows)} losses, one a sample, got {got}; give it "
                "reduction='none'"
            )
        return -loss if victim.targeted else loss

    def _verified(
        self, victim: Victim, scores: Tensor, x: Tensors, rows: Tensor, draw: int
    ) -> Tensor:
        """n booleans: fooled, and with ``quantize`` as an 8-bit image too."""
        fooled = victim.succeeds(scores, rows)
        if not victim.quantize or not bool(fooled.any()):
            return fooled
        at = fooled.nonzero()[:, 0]
        floats = take_each(x, at)
        rounded = victim.to_bytes(floats)
        if all(torch.equal(f, r) for f, r in zip(floats, rounded, strict=True)):
            return fooled
        _, scores, _ = self._evaluate(victim, rounded, rows[at], draw, graph=False)
        return fooled.index_put((at,), victim.succeeds(scores, rows[at]))

    def _step_count(self, epsilon: float) -> int:  # noqa: ARG002
        return self.steps

    def _step_length(self, epsilon: float) -> float:
        return 2.5 * epsilon / max(1, self.steps) if self.step_size is None else self.step_size

    def _direction(self, gradients: Tensors) -> Tensors:
        """Where one step of length 1 goes."""
        return steepest(gradients, self.norm)

    def _moved(
        self, victim: Victim, clean: Tensors, change: Tensors, rows: Tensor, epsilon: float
    ) -> Tensors:
        return victim.moved(clean, change, rows, epsilon, self.norm)

    def _accumulated(self, velocity: Tensors | None, gradients: Tensors) -> Tensors:
        """Momentum: the decayed sum of gradients of mean absolute value 1."""
        n = len(gradients[0])
        sums = [at_least_float(g.reshape(n, -1)).abs().sum(dim=1) for g in gradients]
        mean = torch.stack(sums).sum(dim=0) / sum(g[0].numel() for g in gradients)
        mean = mean.clamp(min=1e-30)
        scaled = tuple(divided(g, mean) for g in gradients)
        if velocity is None:
            return scaled
        return tuple(self.momentum * v + s for v, s in zip(velocity, scaled, strict=True))


class _Best:
    """The iterate of each sample to return."""

    def __init__(self, victim: Victim, keep_best: bool) -> None:
        self.victim = victim
        self.keep_best = keep_best
        self.x = tuple(x.clone() for x in victim.x)
        self.objective: Tensor | None = None

    def see(
        self, x: Tensors, rows: Tensor, objective: Tensor, fooled: Tensor, is_last: bool
    ) -> None:
        """Iterates n×… of ``rows``: a fooled one is final, else the highest objective counts."""
        victim = self.victim
        if self.objective is None:
            self.objective = objective.new_full((victim.n,), -torch.inf)
        objective = objective.detach()
        better = objective > self.objective[rows] if self.keep_best else torch.tensor(is_last)
        chosen = (fooled | better.to(fooled.device)) & ~victim.fooled[rows]
        at = chosen.nonzero()[:, 0]
        where = rows[at]
        self.objective[where] = objective[at]
        for kept, new in zip(self.x, x, strict=True):
            kept[where] = take(new, at)
        victim.fooled[where] = fooled[at]


class FGSM(PGD):
    """Fast gradient sign method: one step of ``epsilon`` along the sign of the gradient.

    Goodfellow et al., "Explaining and Harnessing Adversarial Examples"
    (https://arxiv.org/abs/1412.6572). Unlike Captum's class of the same name it takes the
    cross-entropy of the scores by default. With ``norm="L2"`` the step goes along the gradient.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`.
        epsilon: length of the step in units of the inputs.
        norm, loss_func: as for :class:`PGD`.
        early_stop: a sample that is misclassified to begin with stays as it is.
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        epsilon: float = 8 / 255,
        *,
        norm: str = "Linf",
        loss_func: LossFunction | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = True,
        quantize: bool = True,
    ) -> None:
        super().__init__(
            forward_func,
            epsilon,
            steps=1,
            norm=norm,
            loss_func=loss_func,
            bounds=bounds,
            early_stop=early_stop,
            keep_best=False,
            quantize=quantize,
        )


class GradientStep(FGSM):
    """One step along the gradient itself: x + ``epsilon`` ∇L, neither signed nor normalised.

    Args:
        forward_func, bounds, quantize, loss_func, early_stop: as for :class:`FGSM`.
        epsilon: the factor η of the gradient; not the size of the change, and without a limit.
    """

    def _step_length(self, epsilon: float) -> float:
        return epsilon

    def _direction(self, gradients: Tensors) -> Tensors:
        return gradients

    def _moved(
        self,
        victim: Victim,
        clean: Tensors,
        change: Tensors,
        rows: Tensor,
        epsilon: float,  # noqa: ARG002 – no ball
    ) -> Tensors:
        change = victim.masked(change, rows)
        return victim.within(tuple(c + d for c, d in zip(clean, change, strict=True)))

    def _check_epsilon(self, epsilon: float, inputs: Tensors | None) -> None:  # noqa: ARG002
        if not 0 <= as_number(epsilon) < float("inf"):
            raise ValueError(f"epsilon: expected a finite number from 0, got {epsilon!r}")


class LeastLikelyClass(PGD):
    """Steps down the loss of the class with the lowest score of the clean input.

    Kurakin et al., "Adversarial Machine Learning at Scale" (https://arxiv.org/abs/1611.01236).
    ``target`` is still the label: a sample that is misclassified to begin with stays as it is. In
    the details, ``label`` is the least likely class and ``fooled`` says that it was reached.

    Args:
        forward_func, epsilon, norm, loss_func, bounds, early_stop, quantize: as for :class:`PGD`.
        steps: 1: a single step of ``epsilon``. None: the iterated attack, steps of one level of
            an 8-bit image, min(ε + 4, 1.25 ε) of them with ε in such levels.
        step_size: as for :class:`PGD`, where ``steps`` is given.
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        epsilon: float = 8 / 255,
        steps: int | None = 1,
        step_size: float | None = None,
        *,
        norm: str = "Linf",
        loss_func: LossFunction | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = True,
        quantize: bool = True,
    ) -> None:
        super().__init__(
            forward_func,
            epsilon,
            steps=1 if steps is None else steps,
            step_size=step_size,
            norm=norm,
            loss_func=loss_func,
            bounds=bounds,
            early_stop=early_stop,
            keep_best=False,
            quantize=quantize,
        )
        self.iterated = steps is None
        if self.iterated and (bounds is None or step_size is not None):
            raise ValueError("steps: None sets steps and step size by the bounds; leave both")

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        if victim.targeted:
            raise ValueError("targeted: this attack chooses the class itself; give the label")
        scores = victim.scores(victim.x, victim.everyone)
        check_rivals(scores)
        # Where all scores are equal, another one than the label still.
        others = scores.scatter(1, victim.label[:, None], torch.inf)
        victim.label, victim.targeted = others.argmin(dim=1), True
        return super()._attack(victim, epsilon)

    def _step_count(self, epsilon: float) -> int:
        if not self.iterated or self.bounds is None:
            return self.steps
        levels = epsilon * 255 / (self.bounds[1] - self.bounds[0])
        return math.ceil(min(levels + 4, 1.25 * levels) - 1e-9)

    def _step_length(self, epsilon: float) -> float:
        if self.iterated and self.bounds is not None:
            return (self.bounds[1] - self.bounds[0]) / 255
        return super()._step_length(epsilon)


@dataclass(frozen=True)
class MostLikelyClassMap:
    """What a signed step towards a class says about the pixels."""

    classes: Tensor
    """N, the class."""
    magnitude: Tensor
    """N×…, the absolute gradient of its loss."""
    sign: Tensor
    """N×…, 1 where a brighter pixel supports the class, -1 where a darker one does."""


def most_likely_class_map(
    forward_func: Callable[..., Tensor],
    inputs: Tensor,
    target: TargetType = None,
    additional_forward_args: object | None = None,
    *,
    loss_func: LossFunction | None = None,
) -> MostLikelyClassMap:
    """The step of the fast gradient sign method towards the predicted class, read as a map.

    The same arithmetic that fools a classifier, with the class that it gives already: the sign of
    the step says which pixels support it. This is the link between attacks and gradient saliency
    (Simonyan et al., https://arxiv.org/abs/1312.6034).

    Args:
        forward_func, additional_forward_args: see :mod:`captum_robust.attacks`.
        inputs: N×…, of any range.
        target: the class to support instead of the most likely one.
        loss_func: cross-entropy by default.
    """
    check_batch((inputs,))
    check_inputs((inputs,), None)
    with torch.inference_mode(False), torch.no_grad():
        normal = inputs.clone() if inputs.is_inference() else inputs.detach()
        victim = Victim(
            forward_func, (normal,), target, additional_forward_args, False, None, None, False
        )
        with torch.enable_grad():
            leaf = victim.x[0].detach().requires_grad_()
            scores = victim.scores((leaf,), victim.everyone)
            loss = (cross_entropy if loss_func is None else loss_func)(scores, victim.label)
        (gradient,) = victim.gradients(loss, (leaf,), victim.everyone)
        gradient = gradient.contiguous()
    return MostLikelyClassMap(victim.label, gradient.abs(), -gradient.sign())


def random_points(
    like: Tensors, epsilon: float, norm: str, generator: torch.Generator | None
) -> Tensors:
    """A point of the ball, uniformly drawn; the same for every sample: 1×… for each n×…."""
    if norm == "Linf":
        drawn = [torch.rand(1, *x.shape[1:], generator=generator) * 2 - 1 for x in like]
    else:
        drawn = [torch.randn(1, *x.shape[1:], generator=generator) for x in like]
        dimensions = sum(x[0].numel() for x in like)
        radius = torch.rand(1, generator=generator) ** (1 / dimensions)
        factor = radius / l2_norms(tuple(drawn))
        drawn = [d * per_sample(factor, d) for d in drawn]
    return tuple((epsilon * d).to(x) for d, x in zip(drawn, like, strict=True))
