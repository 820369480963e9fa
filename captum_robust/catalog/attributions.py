"""Attributions that ``methods`` makes methods of as they are: of other authors, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr
from captum.attr import Attribution
from torch import Tensor

from captum_robust._scores import probabilities_of
from captum_robust.attr import RISE, ClassActivationMap, ScoreCAM
from captum_robust.models import Classifier

Made = tuple[Attribution, dict[str, Any]]
"""An attribution, and the arguments of its ``attribute``."""


class LargestChannel(captum.attr.Saliency):  # type: ignore[misc]  # untyped to mypy
    """The largest magnitude of the gradient over the channels of each pixel, N×1×H×W.

    Simonyan, Vedaldi and Zisserman, https://arxiv.org/abs/1312.6034, section 3.1.
    """

    def attribute(self, *arguments: Any, **options: Any) -> Tensor:
        """As Captum's, the largest of its channels."""
        gradients: Tensor = super().attribute(*arguments, **options)
        return gradients.amax(dim=1, keepdim=True)


def _rise(model: Classifier) -> Made:
    def probabilities(images: Tensor) -> Tensor:
        return probabilities_of(model(images))

    # The mean colour is what the paper's masks leave, which multiply the normalised image.
    return RISE(probabilities), {"baselines": model.mean}


def _cam(model: Classifier, kind: str) -> Made:
    return ClassActivationMap(model, model.cam_layer, kind), {"upsample": True}


ATTRIBUTIONS: dict[str, Callable[[Classifier], Made]] = {
    "rise": _rise,
    **{
        kind: partial(_cam, kind=kind)
        for kind in ("grad_cam_plus_plus", "layer_cam", "hires_cam", "eigen_cam")
    },
    # Over the later half of the network.
    "layer_cam_fused": lambda m: (ClassActivationMap(m, m.perceptual_layers), {}),
    "score_cam": lambda m: (ScoreCAM(m, m.cam_layer), {"upsample": True}),
    "saliency_max": lambda m: (LargestChannel(m), {}),
}
SLOW_ATTRIBUTIONS = ("rise", "score_cam")
IN_WORDS = {
    "rise": "mean of random masks by the score of what they leave (RISE)",
    "grad_cam_plus_plus": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "hires_cam": "HiResCAM",
    "eigen_cam": "EigenCAM, first principal component of the features, of no class",
    "layer_cam_fused": "LayerCAM, mean over the later half of the network",
    "score_cam": "Score-CAM, channels weighted by the score of what they show",
    "saliency_max": "gradient, largest magnitude over the channels",
}
