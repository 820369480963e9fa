"""The methods that ``compare`` and ``explain`` know by name: ours, Captum's, and the baselines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import (
    Attribution,
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor

from captum_robust._names import unknown_name
from captum_robust.attr import RobustCAM
from captum_robust.metrics.functional import (
    center_box,
    center_box_map,
    random_map,
    whole_image_box,
    whole_image_map,
)
from captum_robust.models import Classifier


@dataclass(frozen=True)
class Method:
    """A heat map of each image, and, for a baseline, the box that it always draws."""

    explain: Callable[[Tensor, Tensor], Tensor]
    """Images N×C×H×W and classes N -> heat maps N×H×W, where larger means more important."""
    box: Callable[[tuple[int, int]], Tensor] | None = None
    """(H, W) -> (x0, y0, x1, y1), whatever the threshold; None: the box comes from the map."""


OCCLUSION_WINDOW = 64
OCCLUSION_STRIDE = 32
"""For 224 px: 6×6 positions, 36 forward passes. The window is the side that hides a typical part,
not the whole, of an object of half the image; half-window steps are the coarsest that leave no
pixel to one window alone. Other sizes scale both."""

INTEGRATED_GRADIENTS_STEPS = 20
SMOOTH_GRAD_SAMPLES = 8


def heat_map(attribution: Tensor, size: tuple[int, int], *, signed: bool = False) -> Tensor:
    """What an attribution says of each pixel, N×H×W.

    A layer attribution (one channel, or another size than the image) keeps its positive part and
    is upsampled bilinearly. An input attribution N×C×H×W is summed over the channels by magnitude,
    or, with ``signed``, keeps the positive part of its channel mean.

    >>> heat_map(torch.tensor([[[[1.0]], [[-2.0]]]]), (1, 1))
    tensor([[[3.]]])
    """
    if attribution.ndim == 3:
        attribution = attribution.unsqueeze(1)
    if attribution.ndim != 4:
        raise ValueError(f"attribution: expected N×H×W or N×C×H×W, got {tuple(attribution.shape)}")
    attribution = attribution.float()
    if attribution.shape[1] == 1 or attribution.shape[2:] != size:
        positive = attribution.mean(dim=1, keepdim=True).clamp(min=0)
        return F.interpolate(positive, size=size, mode="bilinear", align_corners=False)[:, 0]
    if signed:
        return attribution.mean(dim=1).clamp(min=0)
    return attribution.abs().sum(dim=1)


def from_attribution(attribution: Attribution, *, signed: bool = False, **arguments: Any) -> Method:
    """A method out of any Captum attribution; ``arguments`` go to its ``attribute``."""

    def explain(images: Tensor, target: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's notes on the hooks and gradients it sets
            result = attribution.attribute(images, target=target, **arguments)
        if isinstance(result, tuple):
            result = result[0]
        return heat_map(result.detach(), (images.shape[2], images.shape[3]), signed=signed)

    return Method(explain)


def _occlusion(model: Classifier) -> Method:
    occlusion = Occlusion(model)

    def explain(images: Tensor, target: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        window = tuple(max(1, OCCLUSION_WINDOW * side // 224) for side in (height, width))
        stride = tuple(max(1, OCCLUSION_STRIDE * side // 224) for side in (height, width))
        with torch.no_grad():
            result = occlusion.attribute(
                images,
                sliding_window_shapes=(channels, *window),
                strides=(channels, *stride),
                baselines=images.mean(dim=(2, 3), keepdim=True).expand_as(images),
                target=target,
                perturbations_per_eval=max(1, 64 // n),
            )
        return heat_map(result, (height, width), signed=True)

    return Method(explain)


def _random(images: Tensor, _: Tensor) -> Tensor:
    # From the global generator, which the runner seeds for each batch.
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
    return random_map(len(images), (images.shape[2], images.shape[3]), generator).to(images.device)


def _baseline(make: Callable[..., Tensor], box: Callable[[tuple[int, int]], Tensor]) -> Method:
    def explain(images: Tensor, _: Tensor) -> Tensor:
        return make(len(images), (images.shape[2], images.shape[3])).to(images.device)

    return Method(explain, box)


METHODS: dict[str, Callable[[Classifier], Method]] = {
    "robust_cam": lambda m: from_attribution(RobustCAM(m, m.cam_layer), upsample=True),
    "grad_cam": lambda m: from_attribution(_layer_grad_cam(m)),
    "guided_grad_cam": lambda m: from_attribution(GuidedGradCam(m, m.cam_layer)),
    "integrated_gradients": lambda m: from_attribution(
        IntegratedGradients(m), n_steps=INTEGRATED_GRADIENTS_STEPS, internal_batch_size=32
    ),
    "occlusion": _occlusion,
    "saliency": lambda m: from_attribution(Saliency(m)),
    "smooth_grad": lambda m: from_attribution(
        NoiseTunnel(Saliency(m)),
        nt_type="smoothgrad",
        nt_samples=SMOOTH_GRAD_SAMPLES,
        nt_samples_batch_size=2,
        stdevs=0.15,
    ),
    "guided_backprop": lambda m: from_attribution(GuidedBackprop(m)),
    "deconvolution": lambda m: from_attribution(Deconvolution(m)),
    "input_x_gradient": lambda m: from_attribution(InputXGradient(m)),
    "center_box": lambda _: _baseline(center_box_map, center_box),
    "whole_image": lambda _: _baseline(whole_image_map, whole_image_box),
    "random": lambda _: Method(_random),
}

FIXED_BOXES = ("center_box", "whole_image")
BASELINES = (*FIXED_BOXES, "random")


def _layer_grad_cam(model: Classifier) -> Attribution:
    if model.reshape_transform is not None:
        # Captum's class has no place for the reshape of a transformer's tokens; with one class
        # RobustCAM is the same map.
        return RobustCAM(model, model.cam_layer, base="gradcam")
    return LayerGradCam(model, model.cam_layer)


def build_methods(
    model: Classifier, methods: str | Sequence[str] | Mapping[str, Any]
) -> dict[str, Method]:
    """Name -> method, from names, or from a mapping to names, attributions and functions.

    A value of a mapping is a name of ``METHODS``, any Captum ``Attribution``, or a function
    ``(images N×C×H×W, target N) -> N×H×W or N×C×H×W``.

    Raises:
        ValueError: an unknown name, no method, or one name twice.
        TypeError: a value that is none of these.
    """
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Mapping):
        if not isinstance(methods, Sequence) or not all(isinstance(m, str) for m in methods):
            raise TypeError(
                "methods: expected names, or a mapping from your names to names, attributions "
                f"and functions, got {methods!r:.80}"
            )
        if len(set(methods)) < len(methods):
            raise ValueError(f"methods: each name once, got {list(methods)}")
        methods = {name: name for name in methods}
    if not methods:
        raise ValueError("methods: expected at least one")
    return {name: _build(model, name, value) for name, value in methods.items()}


def _build(model: Classifier, name: str, value: Any) -> Method:
    if isinstance(value, str):
        if value not in METHODS:
            raise unknown_name("method", value, METHODS)
        return METHODS[value](model)
    if isinstance(value, Attribution):
        return from_attribution(value)
    if callable(value):

        def explain(images: Tensor, target: Tensor) -> Tensor:
            result = value(images, target)
            if not isinstance(result, Tensor):
                raise TypeError(f"method {name!r}: expected a tensor, got {type(result).__name__}")
            return heat_map(result.detach(), (images.shape[2], images.shape[3]))

        return Method(explain)
    raise TypeError(
        f"method {name!r}: expected a name, a Captum Attribution or a function, "
        f"got {type(value).__name__}"
    )
