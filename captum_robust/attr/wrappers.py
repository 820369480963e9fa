"""Attributions made of other attributions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    NoiseTunnel,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import (
    TargetType,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
)
from captum_robust._checks import check_batch, check_finite
from captum_robust._targets import model_scores

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


class Guided(Attribution):
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
        _check_attribution(attribution, "attribution", "an Attribution")
        super().__init__(attribution.forward_func)
        if isinstance(guide, str):
            if guide != "gradient":
                raise ValueError(f"guide: expected 'gradient' or an Attribution, got {guide!r}")
            guide = Saliency(attribution.forward_func)
        _check_attribution(guide, "guide", "'gradient' or an Attribution")
        if not (power > 0 and math.isfinite(power)):
            raise ValueError(f"power: expected a positive number, got {power!r}")
        self.attribution = attribution
        self.guide = guide
        self.power = power

    @property
    def explains_prediction(self) -> bool:
        """Whether the predicted class is found without a forward pass for that alone."""
        return not (_needs_target(self.attribution) or _needs_target(self.guide))

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the guided attribution does."""
        return bool(self.attribution.multiplies_by_inputs)

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
                target = _predicted(self.forward_func, inputs_tuple, additional_forward_args)
            shared = {"target": target, "additional_forward_args": additional_forward_args}
            shared = {name: value for name, value in shared.items() if value is not None}
            result = _attribute(self.attribution, inputs, shared | arguments)
            attributions, rest = _without_details(result, is_inputs_tuple)
            _check_shapes(attributions, inputs_tuple)
            guides = _one_each(
                _as_tuple(_attribute(self.guide, inputs, shared | of_guide)), inputs_tuple
            )
            try:
                for a in attributions:
                    check_finite(a, "attribution")
                for g in guides:
                    check_finite(g, "guide")
            except ValueError:
                _scores(
                    self.forward_func, inputs_tuple, additional_forward_args
                )  # is it they that are not?
                raise

            is_map = _is_of_layer(self.guide)
            product = tuple(
                _product(a.detach(), _scaled(g.detach(), x, is_map) ** self.power, x.dtype)
                for a, g, x in zip(attributions, guides, inputs_tuple, strict=True)
            )
        guided = format_output(is_inputs_tuple, product)
        return (guided, *rest) if rest else guided


class MultiScale(Attribution):
    r"""The average of an attribution over several sizes of the image.

    A network with global pooling takes larger images too, and its last map is then finer: the 7×7
    positions of a class activation map at 224 px are 12×12 at 384 px. The result of each size is
    brought back to the size of the inputs and divided by its largest magnitude.

    Args:
        attribution: any, of N×C×H×W inputs, whose result has their shape or is a map N×1×h×w.
        scales: factors of the height and width, 1 for the image as it is. Each costs about its
            square in classifier passes.

    Raises:
        TypeError: ``attribution`` is no attribution.
        ValueError: no scale, or one that is not positive.

    >>> from captum.attr import InputXGradient
    >>> brightness = InputXGradient(lambda x: x.sum(dim=(1, 2, 3)))
    >>> MultiScale(brightness, (1, 2)).attribute(torch.ones(1, 1, 2, 2))
    tensor([[[[1., 1.],
              [1., 1.]]]])
    """

    def __init__(self, attribution: Attribution, scales: Sequence[float] = (1, 12 / 7)) -> None:
        _check_attribution(attribution, "attribution", "an Attribution")
        super().__init__(attribution.forward_func)
        if not scales or not all(s > 0 and math.isfinite(s) for s in scales):
            raise ValueError(f"scales: expected positive numbers, at least one, got {scales!r}")
        self.attribution = attribution
        self.scales = tuple(scales)

    @property
    def explains_prediction(self) -> bool:
        """Never: the sizes could disagree on the class, so it is found on the inputs as given."""
        return False

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the averaged attribution does."""
        return bool(self.attribution.multiplies_by_inputs)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        **arguments: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The average, signed, in [-1, 1]: N×1×H×W for maps, else in the shape of the inputs.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×C×H×W, or a tuple of such, which are resized alike.
            target: None: the class that is predicted for the inputs as they are, found by one more
                forward pass.
            additional_forward_args: passed on as they are.
            arguments: those of the attribution's ``attribute``.

        Raises:
            ValueError: inputs or results that are not images; NaN or infinity in either.
        """
        is_inputs_tuple = is_tuple(inputs)
        inputs_tuple: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        n = check_batch(inputs_tuple)
        if any(x.ndim != 4 for x in inputs_tuple):
            raise ValueError(f"inputs: expected N×C×H×W, got {_listed(inputs_tuple)}")
        with torch.inference_mode(False), torch.enable_grad():
            if target is None and _takes_target(self.attribution):
                target = _predicted(self.forward_func, inputs_tuple, additional_forward_args)
            shared = {"target": target, "additional_forward_args": additional_forward_args}
            shared = {name: value for name, value in shared.items() if value is not None}
            sums: list[Tensor] = []
            for scale in self.scales:
                sized = tuple(_resized(x, _size(x, scale)) for x in _copied(inputs_tuple))
                result = _attribute(
                    self.attribution, format_output(is_inputs_tuple, sized), shared | arguments
                )
                parts = _as_tuple(result)
                for i, part in enumerate(parts):
                    if not isinstance(part, Tensor) or part.ndim != 4 or len(part) != n:
                        raise ValueError(
                            f"attribution: expected results N×C×H×W, got {_listed(parts)}"
                        )
                    try:
                        check_finite(part, "attribution")
                    except ValueError:
                        _scores(self.forward_func, sized, additional_forward_args)  # is it they?
                        raise
                    like = inputs_tuple[min(i, len(inputs_tuple) - 1)]
                    part = _of_largest_one(_resized(part.detach(), tuple(like.shape[2:])))
                    if len(sums) <= i:
                        sums.append(part)
                    else:
                        sums[i] = sums[i] + part
        dtype = inputs_tuple[0].dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        averages = tuple((s / len(self.scales)).to(dtype).contiguous() for s in sums)
        output: Tensor | tuple[Tensor, ...] = format_output(isinstance(result, tuple), averages)
        return output


def _size(x: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(scale * x.shape[2])), max(1, round(scale * x.shape[3]))


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear; smoothed before it is made smaller."""
    if tuple(x.shape[2:]) == size:
        return x
    x = x.float() if not x.is_floating_point() or x.dtype.itemsize < 4 else x
    resized = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    # Rounding would take white pixels past 1, out of an attribution's bounds.
    dims = (1, 2, 3)
    return resized.clamp(x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True))


def _of_largest_one(x: Tensor) -> Tensor:
    """Each sample divided by its largest magnitude; zeros stay zeros."""
    x = x.float() if x.dtype.itemsize < 4 else x
    top = x.flatten(1).abs().amax(dim=1).reshape(-1, 1, 1, 1)
    return x / torch.where(top > 0, top, torch.ones_like(top))


def _scores(
    forward_func: Callable[..., Tensor], inputs: tuple[Tensor, ...], additional_forward_args: object
) -> Tensor:
    with torch.no_grad():
        scores = model_scores(forward_func, _copied(inputs), _normal(additional_forward_args))
    scores = scores.reshape(1) if scores.ndim == 0 else scores
    check_finite(scores, "forward_func, scores")
    return scores


def _predicted(
    forward_func: Callable[..., Tensor], inputs: tuple[Tensor, ...], additional_forward_args: object
) -> Tensor | None:
    """N classes, or None for scores that have none; where N×K×…, Captum says what it wants."""
    scores = _scores(forward_func, inputs, additional_forward_args)
    return scores.argmax(dim=1) if scores.ndim == 2 and scores.shape[1] > 1 else None


def _check_attribution(value: object, name: str, expected: str) -> None:
    if not isinstance(value, Attribution):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, got {got}")


def _needs_target(attribution: Attribution) -> bool:
    """Whether it takes a target and, as Captum's own, does not find the predicted class itself."""
    return _takes_target(attribution) and not getattr(attribution, "explains_prediction", False)


def _takes_target(attribution: Attribution) -> bool:
    """Whether ``attribute`` takes a target: that of a neuron or of an activation does not."""
    parameters = inspect.signature(attribution.attribute).parameters
    return "target" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _is_of_layer(attribution: Attribution) -> bool:
    while isinstance(attribution, (NoiseTunnel, MultiScale)):
        is_tunnel = isinstance(attribution, NoiseTunnel)
        attribution = attribution.attribution_method if is_tunnel else attribution.attribution
    return isinstance(attribution, LayerAttribution)


def _attribute(
    attribution: Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    arguments: dict[str, Any],
) -> Any:
    """Run it on copies of the inputs, which it or the model may change."""
    copies = _copied(format_tensor_into_tuples(inputs))
    if isinstance(attribution, GradientAttribution):
        # It would turn them on by itself, but with a warning.
        copies = tuple(x.requires_grad_() if x.is_floating_point() else x for x in copies)
    passed = {
        name: _normal(value)
        for name, value in arguments.items()
        if name != "target" or _takes_target(attribution)
    }
    return attribution.attribute(format_output(is_tuple(inputs), copies), **passed)


def _copied(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone() for x in inputs)


def _normal(value: Any) -> Any:
    """Tensors from ``inference_mode`` as normal ones, which autograd can save; all else as is."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return tuple(map(_normal, value)) if type(value) is tuple else value


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _without_details(result: Any, is_inputs_tuple: bool) -> tuple[tuple[Any, ...], Any]:
    """The attributions, and what came behind them: (attributions, something) is a tuple too."""
    if isinstance(result, tuple) and isinstance(result[0], tuple) == is_inputs_tuple:
        return _as_tuple(result[0]), result[1:]
    return _as_tuple(result), ()


def _check_shapes(attributions: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    if _shapes(attributions) != _shapes(inputs):
        raise ValueError(
            f"attribution: expected a result of the inputs' shape, {_listed(inputs)}, got "
            f"{_listed(attributions)}; the map of a layer can be the guide"
        )


def _one_each(guides: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A guide for each input, where the shapes fit; else ``ValueError``."""
    each = guides * len(inputs) if len(guides) == 1 else guides
    if len(each) != len(inputs) or not all(map(_fits, each, inputs)):
        raise ValueError(
            f"guide: expected a result of the inputs' shape, {_listed(inputs)}, or a map "
            f"{len(inputs[0])}×1×… of as many dimensions, got {_listed(guides)}"
        )
    return each


def _fits(guide: Any, x: Tensor) -> bool:
    if not isinstance(guide, Tensor):
        return False
    is_map = guide.ndim == x.ndim and guide.ndim in _MODES and guide.shape[:2] == (len(x), 1)
    return guide.shape == x.shape or is_map


def _shapes(values: tuple[Any, ...]) -> list[Any]:
    return [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]


def _listed(values: tuple[Any, ...]) -> str:
    return " and ".join(map(str, _shapes(values)))


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
    top = guide.reshape(len(guide), -1).amax(dim=1).reshape(-1, *[1] * (guide.ndim - 1))
    return guide / torch.where(top > 0, top, torch.ones_like(top))


def _product(attributions: Tensor, guide: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if dtype.is_floating_point else torch.float32
    return (attributions * guide).to(dtype).contiguous()
