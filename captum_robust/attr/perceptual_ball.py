"""PerceptualBallPerturbation: the smallest change of an input that keeps mid-level features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import (
    TargetType,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
)
from captum_robust._checks import (
    as_number,
    check_batch,
    check_count,
    check_finite,
    check_inputs,
    check_number,
    checked_bounds,
)
from captum_robust._resize import blur_matrix
from captum_robust._scores import (
    ClassScores,
    arguments_of,
    depends_on,
    model_scores,
    one_row_a_sample,
    rows_of,
    target_of,
)
from captum_robust.attr._features import FeatureDistance
from captum_robust.optim import check_options, minimize

if TYPE_CHECKING:
    from captum_robust.attr.guided import Guided


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


PAPER = BallSettings(
    perceptual_weight=1e4, max_iterations=100, history_size=100, line_search="fixed"
)
"""The published code's: L-BFGS with fixed steps of 1, on inputs that are already normalised."""


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


class PerceptualBallPerturbation(Attribution):
    r"""x' - x, where x' is the nearest input in pixels and features that loses the class.

    .. math:: J(x') = (M(x') - T)^2 + \lambda' \sum_l \mathrm{MSE}(C^{(l)}(x'), C^{(l)}(x))
              + \lambda\, \mathrm{MSE}(x', x)

    with the margin M(x') = C_i(x') - max_{j≠i} C_j(x') of the explained class i. An adversarial
    perturbation alone is spread over the image; one that must keep the mid-level features has to
    change what the class is recognised by. Elliott, Law and Russell, "Explaining Classifiers using
    Adversarial Perturbations on the Perceptual Ball" (CVPR 2021), equations 3 to 5. The paper's
    text calls T "greater than zero", where no label changes; its code takes -2, and means over
    elements (MSE) where the text prints sums. So does this class.

    Every evaluation is one forward and one backward pass of all samples that still run, each with
    its own L-BFGS; the first serves as the reference of the features too.

    Args:
        forward_func: the model, or any function of the inputs that calls it. N×K×… scores (logits).
        layers: the layers C^(l) whose outputs are kept (``Classifier.perceptual_layers``).
            ``()``: no perceptual term.
        settings: what ``attribute`` takes where it is not told otherwise.

    Raises:
        TypeError: a layer that is no module.
        ValueError: a layer twice, or one that is not in ``forward_func``, if that is a module.
    """

    explains_prediction = True

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layers: nn.Module | Sequence[nn.Module],
        *,
        settings: BallSettings | None = None,
    ) -> None:
        super().__init__(forward_func)
        self.layers = _checked_layers(forward_func, layers)
        self.settings = BallSettings() if settings is None else settings

    @classmethod
    def paper_unguided(cls, model: nn.Module) -> PerceptualBallPerturbation:
        """The paper's unguided variant: VGG19 with batch normalization, ReLUs 5 to 10.

        Exactly so for torchvision's own ``vgg19_bn`` on inputs normalised by the ImageNet mean and
        deviation; around a ``Classifier`` the perturbation is one of pixels in [0, 1].

        Raises:
            ValueError: another network.
        """
        from captum_robust.models import paper_perceptual_layers

        return cls(model, paper_perceptual_layers(model, "unguided"), settings=PAPER)

    @classmethod
    def paper_guided(cls, model: nn.Module) -> Guided:
        """The paper's guided variant: ReLUs 2 to 13, and times the normalised input gradient.

        As :meth:`paper_unguided` otherwise.
        """
        from captum_robust.attr.guided import Guided
        from captum_robust.models import paper_perceptual_layers

        layers = paper_perceptual_layers(model, "guided")
        return Guided(cls(model, layers, settings=PAPER), "gradient")

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        perceptual_weight: float | None = None,
        pixel_weight: float | None = None,
        margin_target: float | None = None,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        history_size: int | None = None,
        step: float | None = None,
        line_search: str | None = None,
        normalize_layers: bool | None = None,
        map_tolerance: float | None = None,
        bounds: tuple[float, float] | None = None,
        counterfactual: int | Sequence[int] | Tensor | None = None,
        internal_batch_size: int | None = None,
        return_details: bool = False,
    ) -> Any:
        r"""The perturbation x' - x of each sample, signed, in the shape of the inputs.

        Shared arguments are explained in :mod:`captum_robust.attr`. An option that is None is
        taken from ``settings`` (the default is given here).

        Args:
            inputs: N×…, floating point, or a tuple.
            target: the explained class i; None: the predicted one.
            additional_forward_args: passed on to ``forward_func``. Of a tensor whose first
                dimension is N, each sample keeps its row.
            perceptual_weight: λ', 10. With 0 the smallest perturbation that moves the margin, as
                DeepFool looks for.
            pixel_weight: λ, 1.
            margin_target: T, -2; in the unit of the scores.
            max_iterations: of L-BFGS, 30; at most 1.25 times as many evaluations, and one more.
            tolerance: a sample is done once its objective, or every pixel, changes by less in an
                iteration; 1e-9. It also is where no component of the gradient exceeds 1e-7.
            history_size: of L-BFGS, 20.
            step: first trial step of an iteration, 1.
            line_search: ``"strong_wolfe"``, or ``"fixed"``: every step is ``step``. The latter is
                better under bfloat16 autocast, whose rounding hides the small first steps of a
                search: some samples then do not move at all.
            normalize_layers: divide each layer's term by the mean square of its features; False.
            map_tolerance: a sample is done once its map has settled: once an iteration changes the
                perturbation, scaled to length 1, by less (Euclidean). 0: never.
            bounds: (lowest, highest) value of a perturbed input, such as (0, 1); None: unbounded.
                Inputs have to lie within, which noisy ones, as of ``NoiseTunnel``, do not.
            counterfactual: a class, or one a sample, to move towards ("what would make it a
                lynx?"): the margin is that of the highest other class over it.
            internal_batch_size: samples that are worked on at once; None: all. Each takes memory
                for its history, 2 × min(``history_size``, ``max_iterations`` - 1) copies of the
                input (24 MB for 20 of 3×224×224), beside its features and their graph.
            return_details: return (attributions, :class:`BallDetails`).

        Raises:
            ValueError: a negative or NaN ``perceptual_weight``, a ``pixel_weight`` not above 0, a
                wrong option; inputs outside ``bounds``; a layer that does not run or that does not
                depend on the inputs; scores that do not depend on the inputs, or of one class; a
                counterfactual class that is out of range or the explained one. All these before
                the first step. A pass that gives NaN or infinity names its sample.
        """
        changes: dict[str, Any] = {
            name: value
            for name, value in {
                "perceptual_weight": perceptual_weight,
                "pixel_weight": pixel_weight,
                "margin_target": margin_target,
                "max_iterations": max_iterations,
                "tolerance": tolerance,
                "history_size": history_size,
                "step": step,
                "line_search": line_search,
                "normalize_layers": normalize_layers,
                "map_tolerance": map_tolerance,
            }.items()
            if value is not None
        }
        settings = replace(self.settings, **changes)
        _check_settings(settings)
        is_inputs_tuple = is_tuple(inputs)
        inputs_tuple: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        n = check_batch(inputs_tuple)
        bounds = None if bounds is None else checked_bounds(bounds)
        check_inputs(inputs_tuple, bounds)
        size = n if internal_batch_size is None else internal_batch_size
        check_count("internal_batch_size", size, 1)
        layers = self.layers if settings.perceptual_weight > 0 else ()
        wanted = None if counterfactual is None else _checked_counterfactual(counterfactual, n)
        with torch.inference_mode(False):
            parts = []
            for first in range(0, n, size):
                rows = list(range(first, min(n, first + size)))
                ball = _Ball(
                    forward_func=self.forward_func,
                    layers=layers,
                    inputs=tuple(rows_of(x.detach(), rows, n) for x in inputs_tuple),
                    target=target_of(target, rows, n),
                    arguments=additional_forward_args,
                    settings=settings,
                    bounds=bounds,
                    counterfactual=None if wanted is None else wanted[rows],
                    first=first,
                    whole=n,
                )
                parts.append(ball.shrink())
        attributions = tuple(
            torch.cat([part[0][i] for part in parts]).contiguous() for i in range(len(inputs_tuple))
        )
        result = format_output(is_inputs_tuple, attributions)
        if not return_details:
            return result
        details = BallDetails(
            **{
                f.name: torch.cat([getattr(part[1], f.name) for part in parts])
                for f in fields(BallDetails)
            }
        )
        return result, details

    @staticmethod
    def saliency(attributions: Tensor, blur: float = 2.0) -> Tensor:
        """How much each pixel changed: N×H×W, from 0, out of perturbations N×C×H×W.

        The root mean square over the channels, smoothed by a Gaussian.

        Args:
            attributions: N×C×H×W.
            blur: standard deviation in pixels, cut off at 4 of them, the image mirrored at its
                border (``scipy.ndimage.gaussian_filter``). 0: none. The published code takes 2.

        Raises:
            ValueError: another number of dimensions, or a negative blur.
        """
        if attributions.ndim != 4:
            raise ValueError(
                f"attributions: expected N×C×H×W, got the shape {tuple(attributions.shape)}"
            )
        if not (blur >= 0 and math.isfinite(blur)):
            raise ValueError(f"blur: expected a number of pixels from 0, got {blur!r}")
        x = attributions.detach()
        x = x.float() if x.dtype.itemsize < 4 else x
        maps = x.square().mean(dim=1).sqrt()
        if blur == 0:
            return maps
        rows = blur_matrix(maps.shape[1], blur).to(maps)
        columns = blur_matrix(maps.shape[2], blur).to(maps)
        with torch.autocast(maps.device.type, enabled=False):
            blurred: Tensor = rows @ maps @ columns.T
        return blurred


class _Ball:
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
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
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


def _checked_layers(
    forward_func: Callable[..., Tensor], layers: nn.Module | Sequence[nn.Module]
) -> tuple[nn.Module, ...]:
    found = (layers,) if isinstance(layers, nn.Module) else tuple(layers)
    for i, layer in enumerate(found):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layers: expected modules, got {type(layer).__name__} at position {i}")
        if any(layer is other for other in found[:i]):
            raise ValueError(f"layers: number {i}, {type(layer).__name__}, was already given")
    if isinstance(forward_func, nn.Module):
        inside = {id(m) for m in forward_func.modules()}
        for i, layer in enumerate(found):
            if id(layer) not in inside:
                is_new = len(children := list(layer.children())) > 0 and all(
                    id(child) in inside for child in children
                )
                raise ValueError(
                    f"layers: number {i}, {type(layer).__name__}, is not a part of the model"
                    + ("; its modules are: give list(...) of it" if is_new else "")
                )
    return found


def _check_settings(s: BallSettings) -> None:
    if not 0 <= as_number(s.perceptual_weight) < math.inf:
        raise ValueError(
            "perceptual_weight: expected a positive number, or 0 for no perceptual term, got "
            f"{s.perceptual_weight!r}"
        )
    check_number("pixel_weight", s.pixel_weight, 0, open_low=True)
    if not math.isfinite(as_number(s.margin_target)):
        raise ValueError(f"margin_target: expected a finite number, got {s.margin_target!r}")
    for name in ("tolerance", "map_tolerance"):
        if not as_number(getattr(s, name)) >= 0:
            raise ValueError(f"{name}: expected a number from 0, got {getattr(s, name)!r}")
    check_options(
        step=s.step,
        max_iterations=s.max_iterations,
        history_size=s.history_size,
        line_search=s.line_search,
    )


def _checked_counterfactual(counterfactual: Any, n: int) -> Tensor:
    """One class a sample."""
    given = torch.as_tensor(counterfactual)
    if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
        raise ValueError(
            f"counterfactual: expected a class or one a sample, got {counterfactual!r}"
        )
    if given.ndim == 1 and len(given) not in (1, n):
        raise ValueError(f"counterfactual: expected 1 or {n} classes, got {len(given)}")
    return given.long().reshape(-1).expand(n)
