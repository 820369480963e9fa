"""All that is inspected of a network, layer by layer, from one pass over a set of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_robust._checks import check_count
from captum_robust._contexts import evaluation
from captum_robust._files import sole_user
from captum_robust.inspection.activations import Activations, activations
from captum_robust.inspection.concepts import Colours, Concepts, Textures
from captum_robust.inspection.dissection import Dissection, Dissector, marked
from captum_robust.inspection.embedding import Embedding, embedding
from captum_robust.inspection.features import FeatureCollector, Features, with_attacked
from captum_robust.inspection.first_layer import FirstLayerFilters, first_layer_filters
from captum_robust.inspection.neighbours import Neighbours, neighbours
from captum_robust.inspection.patches import MaximalPatches, PatchCollector
from captum_robust.inspection.progress import Part, Progress, Saved, resumed, text_checksum
from captum_robust.inspection.segmentations import concepts_of
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import Watched, as_classifier, layers_of, penultimate, watch
from captum_robust.models import Classifier
from captum_robust.models.classifier import check_channels

_QUERIES = 8
_KINDS = ("colours", "textures", "concepts")
"""What the sources of concepts are called, in their order."""


@dataclass(frozen=True, eq=False)
class Stop:
    """One layer of a tour."""

    name: str
    channels: int
    patches: MaximalPatches
    dissections: dict[str, Dissection]
    """By ``"colours"``, ``"textures"`` and ``"concepts"``, those that were given, if any occurs."""


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
    attacked: Neighbours | None
    """Of the same images when they are attacked, among those that are not."""
    attack: str
    """The attack and its strength."""
    embeddings: list[Embedding]
    """By t-SNE, where there are enough images for it, and by PCA."""
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
    attack: Any = None,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> Tour:
    """Inspect a network layer by layer, in one pass over images of any number.

    Args:
        model: a classifier, or any network of images.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        layers: parts of the model that give maps, or their dotted names; None: the last one of
            each scale.
        concepts: beside colours and textures, as for :func:`captum_robust.inspection.dissect`.
        units: how many units of each layer are looked at, evenly spread.
        top: how many patches of each.
        points: how many images are embedded and compared, evenly spread.
        batch_size: images at once; it changes nothing else.
        attack: its ``perturb(images, classes)`` attacks eight of these, whose neighbours and points
            are looked at too; None: none are.
        folder: where the state is written every 50 batches, so that the same call goes on after a
            stop.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: a layer without maps, no image that could be used, or a ``folder`` that holds
            the state of another call.
        ImportError: scikit-learn is missing.
    """
    check_count("points", points, 1)
    classifier = as_classifier(model)
    check_channels(classifier)
    watched = layers_of(classifier, layers, argument="layers")
    sources: list[Concepts] = [Colours(), Textures()]
    sources += [] if concepts is None else [concepts_of(concepts, classifier.class_names)]
    stream = ImageStream(
        classifier,
        images,
        batch_size=batch_size,
        progress=progress,
        reads=tuple(source.read for source in sources),
    )
    survey = Survey(classifier, watched, stream, sources, units=units, top=top, points=points)
    path = None if folder is None else Path(folder)
    # Concepts are counted by their names, which those of the classes may be.
    every = [list(source.names) for source in sources]
    names = repr((every, classifier.class_names if concepts == "objects" else None))
    run = survey.run | {"concepts": _said(concepts), "names of concepts": text_checksum(names)}
    with evaluation(classifier), sole_user(path):
        state = None
        if path is not None:
            file = path / "tour.safetensors"
            state = Progress(file, classifier, stream, survey.collected, run)
        for batch in resumed(stream, state):
            survey.add(batch)
    return survey.result(attack)


def _said(concepts: Any) -> str:
    """What concepts a call is about, for its record."""
    if isinstance(concepts, Mapping):
        return ", ".join(f"{name}: {folder}" for name, folder in concepts.items())
    is_plain = concepts is None or isinstance(concepts, (str, Path))
    return str(concepts) if is_plain else type(concepts).__name__


class Survey:
    """What a tour takes in of each batch, by one run of the network.

    Args:
        model: a classifier.
        layers: parts that give maps.
        stream: the images, with what the sources read of them.
        sources: of concepts; without any there is no dissection.
        units, top, points: as for :func:`tour`.
    """

    def __init__(
        self,
        model: Classifier,
        layers: Sequence[Watched],
        stream: ImageStream,
        sources: Sequence[Concepts],
        *,
        units: int = 48,
        top: int = 9,
        points: int = 400,
    ) -> None:
        check_count("units", units, 1)
        self._model, self._layers, self._stream, self._sources = model, layers, stream, sources
        self._head = penultimate(model)
        self._first = _First()
        self._features = FeatureCollector(self._head.name, step=-(-len(stream) // points))
        self._patches = [
            PatchCollector(model, layer, _spread(layer.shape[0], units), top) for layer in layers
        ]
        # The sketch of the activations is that of the patches.
        self._dissectors = [
            Dissector(model, layer, own.units, sources, len(stream), sketch=own.sketch)
            for layer, own in zip(layers, self._patches, strict=True)
        ]
        self.run = {
            "layers": [layer.name for layer in layers],
            "units": units,
            "top": top,
            "points": points,
        }
        """What belongs to the state, beside model and images."""

    @property
    def collected(self) -> dict[str, Part]:
        """All that the state consists of."""
        return {
            "first": self._first,
            "features": self._features,
            **{f"patches {number}": part for number, part in enumerate(self._patches)},
            **{f"concepts {number}": part for number, part in enumerate(self._dissectors)},
        }

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        *maps, values = watch(self._model, [*self._layers, self._head], batch.inputs)
        self._first.add(batch)
        self._features.add(batch, values)
        found = marked(self._sources, batch, self._dissectors[0].size)
        for own, patches, dissector in zip(maps, self._patches, self._dissectors, strict=True):
            patches.add(batch, own)
            if self._sources:
                dissector.add(batch, own, found)

    def result(self, attack: Any = None) -> Tour:
        """What was found of all images of the stream; ``attack`` is as for :func:`tour`."""
        model, stream = self._model, self._stream
        features = self._features.result()
        stops = [
            Stop(
                layer.name,
                layer.shape[0],
                patches.result(stream),
                {
                    kind: own.result(stream, number)
                    for number, kind in enumerate(_KINDS[: len(self._sources)])
                    if own.has_concepts(number)
                },
            )
            for layer, patches, own in zip(
                self._layers, self._patches, self._dissectors, strict=True
            )
        ]
        notes, filters = [], None
        try:
            filters = first_layer_filters(model)
        except ValueError as error:
            notes.append(f"There are no filters to show: {error}.")
        if not all(map(self._dissectors[0].has_concepts, range(len(self._sources)))):
            notes.append("The concepts that were given occur on none of the images.")
        used = len(stream) - len(stream.unusable)
        if used > len(features.ids):
            notes.append(f"{len(features.ids)} of {used} images are embedded and compared.")
        first = stream.sample(self._first.position)
        queries, attacked, points = _spread(len(features.ids), _QUERIES), None, features
        if attack is not None:
            positions = [self._features.positions[number] for number in queries]
            pixels = torch.stack([stream.sample(position).image for position in positions])
            points = with_attacked(features, model, queries, pixels, attack)
            attacked = neighbours(points, queries=range(len(features.ids), len(points.ids)))
        planes = [embedding(points, "tsne")]
        if planes[0].method == "tsne":
            planes.append(embedding(points, "pca"))
        return Tour(
            model=model.name,
            images=used,
            filters=filters,
            photograph=first.id,
            activations=activations(model, first, [layer.module for layer in self._layers]),
            stops=stops,
            features=features,
            neighbours=neighbours(features, queries=queries),
            attacked=attacked,
            attack=_attack_name(attack),
            embeddings=planes,
            notes=notes,
            unusable=dict(stream.unusable),
        )


def _attack_name(attack: Any) -> str:
    strength = getattr(attack, "epsilon", None)
    return type(attack).__name__ + (f" of {255 * strength:g}/255" if strength else "")


class _First:
    """The number of the first image that can be used."""

    position = -1

    def add(self, batch: Batch) -> None:
        if self.position < 0:
            self.position = int(batch.positions[0])

    def saved(self) -> Saved:
        return {}, {"position": self.position}

    def restore(self, _: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.position = int(facts["position"])


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below ``count``, evenly spread.

    >>> _spread(10, 4), _spread(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return [int(number) for number in torch.linspace(0, count - 1, most).round().tolist()]
