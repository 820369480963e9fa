"""Classifiers with the facts that attributions, attacks and metrics need; finders of layers."""

from captum_robust.models.classifier import Classifier, takes_size
from captum_robust.models.layers import (
    find_cam_layer,
    find_perceptual_layers,
    paper_perceptual_layers,
    tokens_to_map,
)
from captum_robust.models.zoo import (
    LITE_NAMES,
    SMALL_NETWORKS,
    load_classifier,
    save_classifier,
)

__all__ = [
    "LITE_NAMES",
    "SMALL_NETWORKS",
    "Classifier",
    "find_cam_layer",
    "find_perceptual_layers",
    "load_classifier",
    "paper_perceptual_layers",
    "save_classifier",
    "takes_size",
    "tokens_to_map",
]
