"""The descent of the perceptual ball on one batch, its options and what it tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._captum import TargetType
from captum_robust._checks import check_finite
from captum_robust._scores import (
    ClassScores,
    arguments_of,
    at_least_float,
    depends_on,
    model_scores,
    one_row_a_sample,
)
from captum_robust.attr._features import FeatureDistance
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


class Ball:
    """The objective on one batch: its reference pass, and its value and gradient at x'."""

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layers: Sequence[nn.Module],
        inputs: tuple[Tensor, ...],
        target: TargetType,
        arguments: Any,
        settings: BallSettings,
        bounds: tuple[float, float] | None,
        counterfactual: Tensor | None,
        first: int,
        whole: int,
    ) -> None:
        self.forward_func = forward_func
        self.inputs = inputs
        self.target = target
        self.arguments = arguments
        self.settings = settings
        self.bounds = bounds
        self.counterfactual = counterfactual
        self.first = first  # of this batch in the caller's, of `whole` samples
        self.whole = whole
        self.n = len(inputs[0])
        self.features = FeatureDistance(layers, settings.normalize_layers)
        dtype = torch.float32
        for x in inputs:
            dtype = torch.promote_types(dtype, x.dtype)
        self.x = torch.cat([x.reshape(self.n, -1).to(dtype) for x in inputs], dim=1)  # N×D
        # On the CPU, convolutions run some 20 % faster on channels_last.
        self.channels_last = all(x.device.type == "cpu" for x in inputs)
        self.previous: Tensor | None = None  # N×D, each sample's last perturbation, of length 1
        self.scores_of: ClassScores
        self.classes: Tensor  # N, whose margin it is
        self.sign: int  # of the margin of `classes`

    def shrink(self) -> tuple[tuple[Tensor, ...], BallDetails]:
        s = self.settings
        minimum = minimize(
            self.evaluate,
            self.x,
            step=s.step,
            max_iterations=s.max_iterations,
            tolerance_gradient=1e-7,
            tolerance_change=s.tolerance,
            history_size=s.history_size,
            line_search=s.line_search,
            start=self.start(),
            stop=self._has_settled if s.map_tolerance > 0 else None,
            first_sample=self.first,
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
        )
        return tuple(self._split(moved)), details

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """The evaluation at x, where the features are recorded and nothing has moved yet."""
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            outputs: list[list[Tensor]] = []
            try:
                scores = self._reference_pass(x, outputs)
            except RuntimeError:
                if not self.channels_last:
                    raise
                # A model that calls view() on a channels_last tensor.
                self.channels_last = False
                scores = self._reference_pass(x, outputs)
            scores = one_row_a_sample(scores, self.n)
            check_finite(scores, "forward_func, scores", self.first)
            if scores.ndim == 1 or scores.shape[1] < 2:
                raise ValueError(
                    "forward_func: a margin needs scores N×K of at least two classes, got "
                    f"{tuple(scores.shape)}"
                )
            self.scores_of = ClassScores(scores, self.target)
            by_class = self.scores_of(scores)
            predicted = by_class.argmax(dim=1)
            self.original = predicted if self.scores_of.classes is None else self.scores_of.classes
            self.classes, self.sign = self.original, 1
            if self.counterfactual is not None:
                self.classes = self._other_classes(self.counterfactual, by_class)
                self.sign = -1
            if not depends_on(scores, x):
                raise ValueError("forward_func: its scores do not depend on the inputs")
            for i, tensors in enumerate(outputs):
                if not all(depends_on(t, x) for t in tensors):
                    raise ValueError(
                        f"layers: number {i}, {type(self.features.layers[i]).__name__}, does not "
                        "depend on the inputs differentiably"
                    )
            del outputs
            margin = self._margin(by_class, self.classes)
            value = (margin - self.settings.margin_target).square()
            (gradient,) = torch.autograd.grad(value.sum(), x)
        if not gradient.any():
            self._check_not_constant(scores.detach())
        zeros = torch.zeros_like(margin)
        extra = torch.stack([margin, predicted.to(margin.dtype), zeros], dim=1)
        return value.detach(), gradient, extra.detach()

    def _reference_pass(self, x: Tensor, outputs: list[list[Tensor]]) -> Tensor:
        with self.features.reference(self.n, outputs):
            scores: Tensor = self._run(x, None)
        return scores

    def evaluate(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J and its gradient at x' n×D, and (margin, class, feature distance) n×3."""
        s = self.settings
        places = rows.tolist()
        at = rows.to(x.device)
        whole = places == list(range(self.n))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            inside = self._within_bounds(x)
            with self.features.measured(places):
                scores = self._run(inside, None if whole else places)
            by_class = self.scores_of(scores, places)
            margin = self._margin(by_class, self.classes if whole else self.classes[at])
            distance = self.features.total
            moved = (inside - (self.x if whole else self.x[at])).square().mean(dim=1)
            value = (margin - s.margin_target).square() + s.pixel_weight * moved
            if distance is None:
                distance = torch.zeros_like(margin)
            else:
                value = value + s.perceptual_weight * distance
            (gradient,) = torch.autograd.grad(value.sum(), x)
        classes = by_class.detach().argmax(dim=1).to(margin.dtype)
        return value, gradient, torch.stack([margin, classes, distance], dim=1)

    def _run(self, x: Tensor, places: list[int] | None) -> Tensor:
        # Copies, which the model may write to.
        inputs = tuple(
            i.clone(
                memory_format=torch.channels_last
                if self.channels_last and i.ndim == 4
                else torch.contiguous_format
            )
            for i in self._split(x)
        )
        rows = [self.first + place for place in (range(self.n) if places is None else places)]
        arguments = arguments_of(self.arguments, rows, self.whole)
        return model_scores(self.forward_func, inputs, arguments)

    def _split(self, x: Tensor) -> list[Tensor]:
        """n×D in the shapes and types of the inputs."""
        sizes = [i[0].numel() for i in self.inputs]
        return [
            part.reshape(len(x), *i.shape[1:]).to(i.dtype)
            for part, i in zip(torch.split(x, sizes, dim=1), self.inputs, strict=True)
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
        k = scores.shape[1]
        given = counterfactual.to(scores.device)
        wrong = (given < 0) | (given >= k)
        if wrong.any():
            raise ValueError(
                f"counterfactual: expected classes from 0 to {k - 1}, got {int(given[wrong][0])}"
            )
        same = given == self.original
        if same.any():
            sample = self.first + int(same.nonzero()[0])
            raise ValueError(
                f"counterfactual: of sample {sample} it is the explained class, "
                f"{int(given[same][0])}"
            )
        return given

    def _check_not_constant(self, scores: Tensor) -> None:
        """A zero gradient of all samples: is the model constant, or only flat at these inputs?"""
        noise = torch.rand(self.x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        reach = 1 + self.x.abs().amax(dim=1, keepdim=True)
        with torch.no_grad():
            elsewhere = self._run(self._within_bounds(self.x + reach * noise.to(self.x)), None)
        if torch.equal(elsewhere, scores):
            raise ValueError(
                "forward_func: its scores are constant; they do not change with inputs"
            )

    def _has_settled(self, x: Tensor, rows: Tensor, _: list[int]) -> Tensor:
        at = rows.to(x.device)
        moved = self._within_bounds(x.reshape(len(x), -1)) - self.x[at]
        moved = moved / moved.norm(dim=1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
        if self.previous is None:
            self.previous = torch.zeros_like(self.x)
        turned = (moved - self.previous[at]).norm(dim=1)
        self.previous[at] = moved
        settled: Tensor = turned < self.settings.map_tolerance
        return settled
