"""Guided: an attribution times another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import Attribution, Saliency
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import is_tuple
from captum_robust._checks import check, check_number
from captum_robust._scores import at_least_float
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import (
    MODES,
    as_given,
    as_tuple,
    checked,
    enlarged,
    in_dtype_of,
    of_largest_one,
)
from captum_robust.attr._wrapped import (
    Wrapper,
    check_attribution,
    is_of_layer,
    listed,
    needs_target,
    run,
    shapes,
    without_details,
)


class Guided(Wrapper):
    r"""An attribution times a guide that is scaled to [0, 1]: both have to point at a pixel.

    .. math:: a \odot \left(\frac{|g|}{\max |g|}\right)^p

    Elliott, Law and Russell, "Explaining Classifiers using Adversarial Perturbations on the
    Perceptual Ball" (CVPR 2021), guide their perturbation by the input gradient g of the class
    score. They take \|x' - x\|; here the product keeps the sign of the attribution. The
    normalisation is not stated there; it is by the maximum of each sample.

    Args:
        attribution: any, whose result has the shape of the inputs. The class is that of its
            ``forward_func``.
        guide: ``"gradient"``: ``Saliency(attribution.forward_func)``. Or any attribution. One whose
            result has the shape of the inputs counts by its magnitude. A map N×1×… (a
            ``LayerAttribution`` such as ``LayerGradCam`` or ``RobustCAM``, or of another shape than
            the inputs) counts with its positive part, bilinearly upsampled to the size of the
            inputs, in all channels. A guide without a positive value gives zeros.
        power: p, positive. Below 1 the guide is flatter, and more is left to the attribution.

    Raises:
        TypeError: ``attribution`` or ``guide`` is no attribution.
        ValueError: another word than ``"gradient"``, or a power that is not positive.

    >>> from captum.attr import InputXGradient
    >>> weight = torch.tensor([[1.0, -2.0, 4.0]])
    >>> guided = Guided(InputXGradient(lambda x: x @ weight.T))
    >>> guided.attribute(torch.ones(1, 3))
    tensor([[ 0.2500, -1.0000,  4.0000]])
    """

    def __init__(
        self, attribution: Attribution, guide: Attribution | str = "gradient", *, power: float = 1.0
    ) -> None:
        super().__init__(attribution)
        if isinstance(guide, str):
            message = f"guide: expected 'gradient' or an Attribution, got {guide!r}"
            check(guide == "gradient", message)
            guide = Saliency(attribution.forward_func)
        check_attribution(guide, "guide", "'gradient' or an Attribution")
        check_number("power", power, 0, open_low=True)
        self.guide = guide
        self.power = power

    @property
    def explains_prediction(self) -> bool:
        """Whether the predicted class is found without a forward pass for that alone."""
        return not (needs_target(self.attribution) or needs_target(self.guide))

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        *,
        guide_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        """The product, in the shape of the inputs.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×…, or a tuple. Each tensor of a tuple is guided by its own part of the guide,
                scaled by itself, or all by the one map there is.
            target: None: the predicted class, for attribution and guide alike. It takes one more
                forward pass, but where both have an attribute ``explains_prediction`` that is true.
            additional_forward_args: passed on to both.
            guide_arguments: keyword arguments of the guide's ``attribute``.
            arguments: those of the attribution's.

        Returns:
            The product, dtype of the inputs. (product, something) where the attribution gives
            (attributions, something), as with ``return_convergence_delta=True``.

        Raises:
            ValueError: an attribution that has not the shape of the inputs, or a guide that does
                not fit; NaN or infinity in either.
        """
        tensors = checked(inputs)
        # Also under the caller's inference_mode and no_grad: not every attribution that takes
        # gradients turns them on by itself.
        with torch.inference_mode(False), torch.enable_grad():
            if target is None and not self.explains_prediction:
                target = self._predicted(tensors, additional_forward_args)
            shared = (target, additional_forward_args)
            result = run(self.attribution, inputs, arguments, *shared)
            attributions, rest = without_details(
                result, self.attribution, is_tuple(inputs), arguments
            )
            wanted = f"a result of the inputs' shape, {listed(tensors)}"
            got = f"{listed(attributions)}; the map of a layer can be the guide"
            fits = shapes(attributions) == shapes(tensors)
            check(fits, f"attribution: expected {wanted}, got {got}")
            guide = run(self.guide, inputs, dict(guide_arguments or {}), *shared)
            guides = _one_each(as_tuple(guide), tensors)
            self._check_finite(
                tensors, additional_forward_args, attribution=attributions, guide=guides
            )
            is_map = is_of_layer(self.guide)
            each = zip(attributions, guides, tensors, strict=True)
            products = (
                in_dtype_of(x, a.detach() * _scaled(g.detach(), x, is_map) ** self.power)
                for a, g, x in each
            )
            guided = as_given(inputs, products)
        return (guided, *rest) if rest else guided


def _one_each(guides: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A guide for each input, where the shapes fit; else ``ValueError``."""
    each = guides * len(inputs) if len(guides) == 1 else guides
    wanted = f"a result of the inputs' shape, {listed(inputs)}"
    a_map = f"a map {len(inputs[0])}×1×… of as many dimensions"
    fit = len(each) == len(inputs) and all(map(_fits, each, inputs))
    check(fit, f"guide: expected {wanted}, or {a_map}, got {listed(guides)}")
    return each


def _fits(guide: Any, x: Tensor) -> bool:
    if not isinstance(guide, Tensor):
        return False
    is_map = guide.ndim == x.ndim and guide.ndim in MODES and guide.shape[:2] == (len(x), 1)
    return guide.shape == x.shape or is_map


def _scaled(guide: Tensor, x: Tensor, is_map: bool) -> Tensor:
    """In [0, 1], broadcastable to the input; the maximum of each sample is 1, or all is 0."""
    guide = at_least_float(guide).to(x.device)
    if guide.shape == x.shape and not is_map:
        return of_largest_one(guide.abs())
    guide = guide.clamp(min=0)
    return of_largest_one(guide if guide.shape[2:] == x.shape[2:] else enlarged(guide, x.shape[2:]))
