"""All that is inspected of a network, layer by layer, from one pass over a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_robust._checks import check_count
from captum_robust._contexts import evaluation
from captum_robust.inspection.activations import Activations, activations
from captum_robust.inspection.concepts import Colours, Concepts, concepts_of
from captum_robust.inspection.dissection import Dissection, Dissector
from captum_robust.inspection.embedding import Embedding, embedding
from captum_robust.inspection.features import FeatureCollector, Features
from captum_robust.inspection.first_layer import FirstLayerFilters, first_layer_filters
from captum_robust.inspection.neighbours import Neighbours, neighbours
from captum_robust.inspection.patches import MaximalPatches, PatchCollector
from captum_robust.inspection.streaming import ImageStream
from captum_robust.inspection.watched import as_classifier, layers_of, penultimate, watch
from captum_robust.models.classifier import check_channels

_QUERIES = 8


@dataclass(frozen=True, eq=False)
class Stop:
    """One layer of a tour."""

    name: str
    channels: int
    patches: MaximalPatches
    dissections: list[Dissection]
    """By colours, then by the concepts that were given, if any; none without an annotation."""


@dataclass(frozen=True, eq=False)
class Tour:
    """What was found of a network."""

    model: str
    images: int
    """That could be used."""
    filters: FirstLayerFilters | None
    """None: the first layer has no filters that are pictures."""
    photograph: str
    """The id of the image whose activations these are."""
    activations: Activations
    stops: list[Stop]
    features: Features
    """Of at most so many images, evenly spread."""
    neighbours: Neighbours
    embeddings: list[Embedding]
    """By t-SNE and by PCA."""
    notes: list[str]
    """What to know of the whole."""
    unusable: dict[str, str]
    """Id of an image that could not be used -> why."""


def tour(
    model: nn.Module,
    images: Any,
    layers: Sequence[nn.Module | str] | None = None,
    *,
    concepts: Any = None,
    units: int = 48,
    top: int = 9,
    points: int = 400,
    batch_size: int = 16,
    progress: bool = False,
) -> Tour:
    """Inspect a network layer by layer, in one pass over images of any number.

    Args:
        model: a classifier, or any network of images.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        layers: parts of the model that give maps, or their dotted names; None: the last one of
            each scale.
        concepts: beside the colours, as for :func:`captum_robust.inspection.dissect`.
        units: how many units of each layer are looked at, evenly spread.
        top: how many patches of each.
        points: how many images are embedded and compared, evenly spread.
        batch_size: images at once.
        progress: whether a bar on standard error shows how far it is.

    Raises:
        ValueError: a layer without maps, or no image that could be used.
        ImportError: scikit-learn is missing.
    """
    check_count("units", units, 1)
    check_count("points", points, 1)
    classifier = as_classifier(model)
    check_channels(classifier)
    watched = layers_of(classifier, layers, argument="layers")
    head = penultimate(classifier)
    sources: list[Concepts] = [Colours()]
    sources += [] if concepts is None else [concepts_of(concepts, classifier.class_names)]
    stream = ImageStream(
        classifier,
        images,
        batch_size=batch_size,
        progress=progress,
        reads=tuple(source.read for source in sources),
    )
    spread = [_spread(layer.shape[0], units) for layer in watched]
    pairs = list(zip(watched, spread, strict=True))
    collectors = [PatchCollector(classifier, layer, chosen, top) for layer, chosen in pairs]
    dissectors = [
        [
            Dissector(classifier, layer, chosen, source, len(stream), number=number)
            for number, source in enumerate(sources)
        ]
        for layer, chosen in pairs
    ]
    points_of = FeatureCollector(head.name, step=-(-len(stream) // points))
    first = None
    with evaluation(classifier):
        for batch in stream.batches():
            first = first or batch.samples[0]
            *maps, values = watch(classifier, [*watched, head], batch.inputs)
            points_of.add(batch, values)
            for own, collector, some in zip(maps, collectors, dissectors, strict=True):
                collector.add(batch, own)
                for dissector in some:
                    dissector.add(batch, own)
    assert first is not None
    features = points_of.result()
    stops = [
        Stop(
            layer.name,
            layer.shape[0],
            collector.result(stream),
            [dissector.result(stream) for dissector in some if dissector.has_concepts],
        )
        for layer, collector, some in zip(watched, collectors, dissectors, strict=True)
    ]
    notes, filters = [], None
    try:
        filters = first_layer_filters(classifier)
    except ValueError as error:
        notes.append(f"There are no filters to show: {error}.")
    if any(not dissector.has_concepts for some in dissectors for dissector in some):
        notes.append("The concepts that were given occur on none of the images.")
    used = len(stream) - len(stream.unusable)
    if used > len(features.ids):
        notes.append(f"{len(features.ids)} of {used} images are embedded and compared.")
    return Tour(
        model=classifier.name,
        images=used,
        filters=filters,
        photograph=first.id,
        activations=activations(classifier, first, [layer.module for layer in watched]),
        stops=stops,
        features=features,
        neighbours=neighbours(features, queries=_spread(len(features.ids), _QUERIES)),
        embeddings=[embedding(features, "tsne"), embedding(features, "pca")],
        notes=notes,
        unusable=dict(stream.unusable),
    )


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below ``count``, evenly spread.

    >>> _spread(10, 4), _spread(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return [int(number) for number in torch.linspace(0, count - 1, most).round().tolist()]
