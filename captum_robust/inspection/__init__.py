"""What a network has learned: its filters, what its units answer to, how it sorts images.

Each function returns a dataclass whose ``plot`` draws it. A model is a
:class:`captum_robust.models.Classifier`, or any network of images, which is then given pixels as
they are. It is left as it was.
"""

from captum_robust.inspection.activations import Activations, activations
from captum_robust.inspection.dissection import Detector, Dissection, dissect
from captum_robust.inspection.embedding import Embedding, embedding
from captum_robust.inspection.features import Features, penultimate_features, with_attacked
from captum_robust.inspection.first_layer import FirstLayerFilters, first_layer_filters
from captum_robust.inspection.neighbours import Neighbours, neighbours
from captum_robust.inspection.patches import MaximalPatches, maximal_patches
from captum_robust.inspection.receptive_field import ReceptiveField, receptive_field
from captum_robust.inspection.tour import Stop, Tour, tour

__all__ = [
    "Activations",
    "Detector",
    "Dissection",
    "Embedding",
    "Features",
    "FirstLayerFilters",
    "MaximalPatches",
    "Neighbours",
    "ReceptiveField",
    "Stop",
    "Tour",
    "activations",
    "dissect",
    "embedding",
    "first_layer_filters",
    "maximal_patches",
    "neighbours",
    "penultimate_features",
    "receptive_field",
    "tour",
    "with_attacked",
]
