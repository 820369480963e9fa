"""PerceptualBallPerturbation: the smallest change of an input that keeps mid-level features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._checks import as_number, check, check_number, check_shape, checked_bounds
from captum_robust._resize import blurred
from captum_robust._scores import at_least_float
from captum_robust.attr._ball import Ball, BallDetails, BallSettings, search_options
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import as_given, checked_numbers, module_of
from captum_robust.attr._samples import Samples, in_batches
from captum_robust.optim import check_options

if TYPE_CHECKING:
    from captum_robust.attr.guided import Guided


PAPER = BallSettings(
    perceptual_weight=1e4, max_iterations=100, history_size=100, line_search="fixed"
)
"""The published code's: L-BFGS with fixed steps of 1, on inputs that are already normalised."""


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

    The map is of use before the class is lost, and with the settings by default fewer than half of
    the photographs lose it: ``details.flipped`` tells. With ``perceptual_weight=1`` most do.

    Every evaluation is one forward and one backward pass of all samples that still run, each with
    its own L-BFGS; the first serves as the reference of the features too. They run without
    autocast: half precision hides the small first steps of a search.

    Args:
        forward_func: the model, or any function of the inputs that calls it. N×K×… scores (logits).
        layers: the layers C^(l) whose outputs are kept (``Classifier.perceptual_layers``), or
            their dotted names in the model. ``()``: no perceptual term.
        settings: what ``attribute`` takes for an option that is None there.

    Raises:
        TypeError: a layer that is no module and no name, or a name where ``forward_func`` is no
            model.
        ValueError: a layer twice, or one that is not in ``forward_func``, if that is a module.
    """

    explains_prediction = True

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layers: nn.Module | str | Sequence[nn.Module | str],
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
        target: Target = None,
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
            target: the explained class i; None: the predicted one. Of a function of the scores,
                M(x') is the number that it gives: above 0 counts as class 1 in the details, else 0.
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
            line_search: ``"strong_wolfe"``, or ``"fixed"``: every step is ``step``.
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
        given = locals()  # in which an option has the name of its setting
        names = [f.name for f in fields(BallSettings)]
        settings = replace(self.settings, **{n: given[n] for n in names if given[n] is not None})
        _check_settings(settings)
        bounds = None if bounds is None else checked_bounds(bounds)
        tensors = checked_numbers(inputs, bounds)
        n = len(tensors[0])
        whole = Samples(self.forward_func, tensors, target, additional_forward_args, 0, n)
        others = None if counterfactual is None else _checked_classes(counterfactual, n)
        layers = self.layers if settings.perceptual_weight > 0 else ()

        def shrink(samples: Samples) -> tuple[tuple[Tensor, ...], BallDetails]:
            own = None if others is None else others[samples.first :][: samples.n]
            return Ball(samples, layers, settings, bounds, own).shrink()

        perturbations, details = in_batches(whole, internal_batch_size, shrink)
        if others is not None and (missed := int((~details.flipped).sum())):
            warnings.warn(
                f"{missed} of {n} samples do not reach the counterfactual class: see "
                "details.flipped; a smaller perceptual_weight lets them move farther",
                stacklevel=3,
            )
        searched = (details.iterations > 0).to(details.flat.device) & ~details.flat
        stuck = int((searched & (details.pixel_distance == 0)).sum())
        if stuck and bounds is None:
            warnings.warn(
                f"{stuck} of {n} samples do not move, though their margin has a slope: the scores "
                "are too coarse for the small first steps of the search, as in half precision; "
                "give the model and the inputs in float32, and make the numbers of a target that "
                "is a function larger",
                stacklevel=3,
            )
        result = as_given(inputs, perturbations)
        return (result, details) if return_details else result

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
        check_shape("attributions", attributions, "N×C×H×W")
        check_number("blur", blur, 0)
        maps = at_least_float(attributions.detach()).square().mean(dim=1).sqrt()
        if blur == 0:
            return maps
        with torch.autocast(maps.device.type, enabled=False):
            return blurred(maps, blur)


def _checked_layers(
    forward_func: Callable[..., Tensor], layers: nn.Module | str | Sequence[nn.Module | str]
) -> tuple[nn.Module, ...]:
    given = (layers,) if isinstance(layers, (nn.Module, str)) else tuple(layers)
    several = tuple(module_of(forward_func, each, "layers") for each in given)
    inside = tuple(forward_func.modules()) if isinstance(forward_func, nn.Module) else several
    for i, layer in enumerate(several):
        kind = type(layer).__name__
        check(layer not in several[:i], f"layers: number {i}, {kind}, was already given")
        children = list(layer.children())
        is_new = bool(children) and all(child in inside for child in children)
        hint = "; its modules are: give list(...) of it" if is_new else ""
        message = f"layers: number {i}, {kind}, is not a part of the model{hint}"
        check(layer in inside, message)
    return several


def _check_settings(s: BallSettings) -> None:
    check_number("perceptual_weight", s.perceptual_weight, 0)
    check_number("pixel_weight", s.pixel_weight, 0, open_low=True)
    check_number("margin_target", s.margin_target)
    for name in ("tolerance", "map_tolerance"):  # with infinity one iteration is enough
        tolerance = getattr(s, name)
        check(as_number(tolerance) >= 0, f"{name}: expected a number from 0, got {tolerance!r}")
    check_options(**search_options(s))


def _checked_classes(counterfactual: Any, n: int) -> Tensor:
    """One class a sample."""
    classes = torch.as_tensor(counterfactual)
    is_whole = not (classes.is_floating_point() or classes.dtype == torch.bool)
    message = f"counterfactual: expected a class or one a sample, got {counterfactual!r}"
    check(is_whole and classes.ndim <= 1, message)
    count = classes.numel()
    fits = classes.ndim == 0 or count in (1, n)
    check(fits, f"counterfactual: expected 1 or {n} classes, got {count}")
    return classes.long().reshape(-1).expand(n)
