"""Guided: an attribution times another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Attribution, Saliency
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import (
    TargetType,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
)
from captum_robust._checks import check_batch, check_finite, check_number
from captum_robust.attr._wrapped import (
    Wrapper,
    as_tuple,
    check_attribution,
    is_of_layer,
    listed,
    needs_target,
    of_largest_one,
    predicted_by,
    run,
    scores_of,
    shapes,
    without_details,
)

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


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
        self,
        attribution: Attribution,
        guide: Attribution | str = "gradient",
        *,
        power: float = 1.0,
    ) -> None:
        super().__init__(attribution)
        if isinstance(guide, str):
            if guide != "gradient":
                raise ValueError(f"guide: expected 'gradient' or an Attribution, got {guide!r}")
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
        target: TargetType = None,
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
        of_guide = {} if guide_arguments is None else dict(guide_arguments)
        is_inputs_tuple = is_tuple(inputs)
        inputs_tuple: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        check_batch(inputs_tuple)

        # Also under the caller's inference_mode and no_grad: not every attribution that takes
        # gradients turns them on by itself.
        with torch.inference_mode(False), torch.enable_grad():
            if target is None and not self.explains_prediction:
                target = predicted_by(self.forward_func, inputs_tuple, additional_forward_args)
            shared = {"target": target, "additional_forward_args": additional_forward_args}
            shared = {name: value for name, value in shared.items() if value is not None}
            result = run(self.attribution, inputs, shared | arguments)
            attributions, rest = without_details(
                result, self.attribution, is_inputs_tuple, arguments
            )
            _check_shapes(attributions, inputs_tuple)
            guides = _one_each(as_tuple(run(self.guide, inputs, shared | of_guide)), inputs_tuple)
            try:
                for a in attributions:
                    check_finite(a, "attribution")
                for g in guides:
                    check_finite(g, "guide")
            except ValueError:
                scores_of(
                    self.forward_func, inputs_tuple, additional_forward_args
                )  # is it they that are not?
                raise

            is_map = is_of_layer(self.guide)
            product = tuple(
                _product(a.detach(), _scaled(g.detach(), x, is_map) ** self.power, x.dtype)
                for a, g, x in zip(attributions, guides, inputs_tuple, strict=True)
            )
        guided = format_output(is_inputs_tuple, product)
        return (guided, *rest) if rest else guided


def _check_shapes(attributions: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    if shapes(attributions) != shapes(inputs):
        raise ValueError(
            f"attribution: expected a result of the inputs' shape, {listed(inputs)}, got "
            f"{listed(attributions)}; the map of a layer can be the guide"
        )


def _one_each(guides: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A guide for each input, where the shapes fit; else ``ValueError``."""
    each = guides * len(inputs) if len(guides) == 1 else guides
    if len(each) != len(inputs) or not all(map(_fits, each, inputs)):
        raise ValueError(
            f"guide: expected a result of the inputs' shape, {listed(inputs)}, or a map "
            f"{len(inputs[0])}×1×… of as many dimensions, got {listed(guides)}"
        )
    return each


def _fits(guide: Any, x: Tensor) -> bool:
    if not isinstance(guide, Tensor):
        return False
    is_map = guide.ndim == x.ndim and guide.ndim in _MODES and guide.shape[:2] == (len(x), 1)
    return guide.shape == x.shape or is_map


def _scaled(guide: Tensor, x: Tensor, is_map: bool) -> Tensor:
    """In [0, 1], broadcastable to the input; the maximum of each sample is 1, or all is 0."""
    guide = guide.float() if guide.dtype.itemsize < 4 else guide
    if guide.shape == x.shape and not is_map:
        guide = guide.abs()
    else:
        guide = guide.clamp(min=0)
        if guide.shape[2:] != x.shape[2:]:
            size = tuple(x.shape[2:])
            guide = F.interpolate(guide, size, mode=_MODES[guide.ndim], align_corners=False)
    return of_largest_one(guide)


def _product(attributions: Tensor, guide: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if dtype.is_floating_point else torch.float32
    return (attributions * guide).to(dtype).contiguous()
