"""The descent of the perceptual ball on one batch, its options and what it tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._contexts import without_autocast
from captum_robust._scores import at_least_float, depends_on, rows_of
from captum_robust.attr._classes import explained
from captum_robust.attr._features import FeatureDistance
from captum_robust.attr._samples import Samples
from captum_robust.optim import minimize


@dataclass(frozen=True)
class BallSettings:
    """The options of ``PerceptualBallPerturbation.attribute``, which explains them."""

    perceptual_weight: float = 10.0
    pixel_weight: float = 1.0
    margin_target: float = -2.0
    max_iterations: int = 30
    tolerance: float = 1e-9
    history_size: int = 20
    step: float = 1.0
    line_search: str = "strong_wolfe"
    normalize_layers: bool = False
    map_tolerance: float = 0.0


def search_options(settings: BallSettings) -> dict[str, Any]:
    """The options that L-BFGS takes under the same name."""
    names = ("step", "max_iterations", "history_size", "line_search")
    return {name: getattr(settings, name) for name in names}


@dataclass(frozen=True)
class BallDetails:
    """What ``return_details`` adds, for each of N samples."""

    flipped: Tensor
    """Whether the explained class is not in first place at x' (the counterfactual class: whether it
    is). A given target that is not the predicted class is not in first place to begin with."""
    original_class: Tensor
    """The explained class i."""
    new_class: Tensor
    """The class with the highest score at x'."""
    margin: Tensor
    """M(x'): the score of i less the highest other; with a counterfactual class, the highest other
    score less that of the counterfactual. Negative once flipped."""
    pixel_distance: Tensor
    r"""\|x' - x\|₂, in the inputs' unit."""
    feature_distance: Tensor
    """The perceptual term at x', without its weight."""
    objective: Tensor
    """J(x')."""
    iterations: Tensor
    evaluations: Tensor
    """Forward and backward passes, the one on x included."""
    flat: Tensor
    """Whether the margin has no slope at x, as behind a dead ReLU: the perturbation is zero then,
    which says nothing of the sample."""


class Ball:
    """The objective on one batch: its reference pass, and its value and gradient at x'."""

    def __init__(
        self,
        samples: Samples,
        layers: Sequence[nn.Module],
        settings: BallSettings,
        bounds: tuple[float, float] | None = None,
        counterfactual: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.settings = settings
        self.bounds = bounds
        self.counterfactual = counterfactual
        self.features = FeatureDistance(layers, settings.normalize_layers, samples.inputs[0].device)
        rows = [x.reshape(samples.n, -1) for x in samples.inputs]
        self.x = at_least_float(torch.cat(rows, dim=1))  # N×D
        self.previous = torch.zeros_like(self.x)  # each sample's last perturbation, of length 1
        self.classes: Tensor  # N, whose margin it is
        self.flat: Tensor  # N, whether it has no slope at x
        self.sign = 1 if counterfactual is None else -1  # of the margin of `classes`

    def shrink(self) -> tuple[tuple[Tensor, ...], BallDetails]:
        # Half precision hides the small first steps of a line search: most photographs, of which a
        # pixel has to change by 1e-5 or so at first, would not move at all.
        with without_autocast(self.x):
            return self._shrunk()

    def _shrunk(self) -> tuple[tuple[Tensor, ...], BallDetails]:
        s = self.settings
        minimum = minimize(
            self.evaluate,
            self.x,
            tolerance_gradient=1e-7,
            tolerance_change=s.tolerance,
            start=self.start(),
            stop=self._has_settled if s.map_tolerance > 0 else None,
            first_sample=self.samples.first,
            **search_options(s),
        )
        moved = self._within_bounds(minimum.x) - self.x
        assert minimum.extra is not None
        margin, new_class, features = minimum.extra.unbind(dim=1)
        new_class = new_class.long()
        won = new_class == self.classes
        details = BallDetails(
            flipped=won if self.sign < 0 else ~won,
            original_class=self.original,
            new_class=new_class,
            margin=margin,
            pixel_distance=moved.norm(dim=1),
            feature_distance=features,
            objective=minimum.value,
            iterations=minimum.iterations.to(margin.device),
            evaluations=minimum.evaluations.to(margin.device),
            flat=self.flat,
        )
        return tuple(self._split(moved)), details

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """The evaluation at x, where the features are recorded and nothing has moved yet."""
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            run = self.samples.model.in_fitting_layout
            scores, outputs = run(lambda: self._reference_pass(x))
            scores = self.samples.checked_scores(scores, "a margin")
            self.scores_of, self.original = explained(scores, self.samples.target)
            by_class = self.scores_of(scores)
            self.classes = self.original
            if self.counterfactual is not None:
                self.classes = self._other_classes(self.counterfactual, by_class)
            self._check_dependence(x, scores, outputs)
            del outputs
            # Not clamped: that would stop the gradient of what lies on a bound.
            evaluation = self._objective(x, x, by_class, self.samples.everyone, starts=True)
        self.flat = ~evaluation[1].flatten(1).any(dim=1)
        if self.flat.all():  # is the model constant, or only flat at these inputs?
            self.samples.check_not_constant(scores.detach(), self.bounds)
        return evaluation

    def _reference_pass(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The scores, and the outputs of each layer."""
        with self.features.reference(self.samples.n) as outputs:
            return self._run(x, self.samples.everyone), outputs

    def evaluate(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J and its gradient at x' n×D, and (margin, class, feature distance) n×3."""
        places = rows.tolist()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            inside = self._within_bounds(x)
            with self.features.measured(places):
                scores = self._run(inside, places)
            return self._objective(x, inside, self.scores_of(scores, places), places)

    def _objective(
        self, x: Tensor, inside: Tensor, scores: Tensor, places: list[int], *, starts: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`evaluate` gives, of class scores n×K at x', that is ``inside`` the bounds."""
        s, n = self.settings, self.samples.n
        margin = self._margin(scores, rows_of(self.classes, places, n))
        moved = inside - rows_of(self.x, places, n)
        distance = torch.zeros_like(margin) + self.features.total
        of_margin = (margin - s.margin_target).square()
        value = of_margin + s.pixel_weight * moved.square().mean(dim=1)
        value = value + s.perceptual_weight * distance
        # At x the other two terms have their minimum, so this is the whole gradient; there is none
        # where the scores have a graph through which no gradient flows, as of a quantised layer.
        descended = of_margin if starts else value
        (gradient,) = torch.autograd.grad(descended.sum(), x, allow_unused=starts)
        message = "forward_func: its scores do not depend on the inputs differentiably"
        check(gradient is not None, message)
        classes = scores.argmax(dim=1).to(margin.dtype)
        extra = torch.stack([margin, classes, distance], dim=1)
        return value.detach(), gradient, extra.detach()

    def _run(self, x: Tensor, places: list[int]) -> Tensor:
        return self.samples.run(self._split(x), places)

    def _split(self, x: Tensor) -> list[Tensor]:
        """n×D in the shapes and types of the inputs."""
        sizes = [i[0].numel() for i in self.samples.inputs]
        return [
            part.reshape(len(x), *i.shape[1:]).to(i.dtype)
            for part, i in zip(torch.split(x, sizes, dim=1), self.samples.inputs, strict=True)
        ]

    def _within_bounds(self, x: Tensor) -> Tensor:
        return x if self.bounds is None else x.clamp(*self.bounds)

    def _margin(self, scores: Tensor, classes: Tensor) -> Tensor:
        scores = at_least_float(scores)
        own = scores.gather(1, classes.unsqueeze(1)).squeeze(1)
        others = scores.scatter(1, classes.unsqueeze(1), -math.inf).amax(dim=1)
        margin: Tensor = self.sign * (own - others)
        return margin

    def _other_classes(self, counterfactual: Tensor, scores: Tensor) -> Tensor:
        """N, once they are known to be classes and not the explained ones."""
        count, first = scores.shape[1], self.samples.first
        pairs = zip(counterfactual.tolist(), self.original.tolist(), strict=True)
        for sample, (other, own) in enumerate(pairs, start=first):
            in_range = 0 <= other < count
            check(in_range, f"counterfactual: expected classes from 0 to {count - 1}, got {other}")
            message = f"counterfactual: of sample {sample} it is the explained class, {own}"
            check(other != own, message)
        return counterfactual.to(scores.device)

    def _check_dependence(
        self, x: Tensor, scores: Tensor, outputs: list[tuple[Tensor, ...]]
    ) -> None:
        """``ValueError`` where the scores, or a layer's outputs, have no gradient at x."""
        check(depends_on(scores, x), "forward_func: its scores do not depend on the inputs")
        for i, (layer, tensors) in enumerate(zip(self.features.layers, outputs, strict=True)):
            name = f"number {i}, {type(layer).__name__}"
            message = f"layers: {name}, does not depend on the inputs differentiably"
            check(all(depends_on(t, x) for t in tensors), message)

    def _has_settled(self, x: Tensor, rows: Tensor, _: list[int]) -> Tensor:
        at = rows.to(x.device)
        moved = self._within_bounds(x.reshape(len(x), -1)) - self.x[at]
        moved = F.normalize(moved, dim=1, eps=torch.finfo(moved.dtype).tiny)
        turned = (moved - self.previous[at]).norm(dim=1)
        self.previous[at] = moved
        settled: Tensor = turned < self.settings.map_tolerance
        return settled
