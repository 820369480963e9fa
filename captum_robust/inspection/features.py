"""Images as points: what the last layer before the scores says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_finite, check_floating, check_shape
from captum_robust._contexts import evaluation
from captum_robust._processes import device_of
from captum_robust._resize import resize_image, size_within
from captum_robust.inspection.progress import Saved
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import as_classifier, penultimate, watch
from captum_robust.models.classifier import in_channels_of

THUMBNAIL = 56
"""Pixels of the longer side of a small picture."""


@dataclass(frozen=True, eq=False)
class Features:
    """Points of N images, on the CPU."""

    values: Tensor
    """N×D."""
    labels: Tensor
    """N class indices, -1 where none is known."""
    ids: list[str]
    thumbnails: Tensor | None = None
    """N×3×h×w uint8."""
    source: str = "given"
    """Which layer they come from."""
    origins: Tensor | None = None
    """N, the number of the image that an attacked one was made from, -1 of those that are as they
    were; None: all are."""

    @property
    def is_clean(self) -> Tensor:
        """N bool, whether an image is as it was."""
        if self.origins is None:
            return torch.ones(len(self.ids), dtype=torch.bool)
        return self.origins < 0

    @classmethod
    def of(cls, given: Any) -> Features:
        """Features as they are, or those of a tensor N×D.

        Raises:
            TypeError, ValueError: no tensor N×D of finite floating-point numbers.
        """
        if isinstance(given, Features):
            return given
        check_floating("features", given)
        check_shape("features", given, "N×D")
        values = given.detach().float().cpu()
        names = [str(i) for i in range(len(values))]
        return cls(values, torch.full((len(values),), -1), names)


def penultimate_features(
    model: nn.Module, images: Any, *, batch_size: int = 16, progress: bool | None = None
) -> Features:
    """Return what the last linear layer is given for each image, or the means of the last maps.

    Args:
        model: a classifier, or any network of images.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        batch_size: images at once.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: no image that could be used.
    """
    classifier = as_classifier(model)
    layer = penultimate(classifier)
    stream = ImageStream(classifier, images, batch_size=batch_size, progress=progress)
    collector = FeatureCollector(layer.name)
    with evaluation(classifier):
        for batch in stream.batches():
            (values,) = watch(classifier, [layer], batch.inputs)
            collector.add(batch, values)
    return collector.result()


def with_attacked(
    features: Features, model: nn.Module, numbers: Sequence[int], pixels: Tensor, attack: Any
) -> Features:
    """The features, and behind them those of some images when they are attacked.

    Args:
        features: the penultimate ones of the model.
        model: a classifier, or any network of images.
        numbers: of the M images in the features.
        pixels: these images M×3×H×W in [0, 1], at the model's input size.
        attack: by its ``perturb(images, classes)`` they are led away from the class that they are
            taken for.

    Raises:
        ValueError: numbers that are none of the features', or not one for each image; images of
            another size; NaN or infinity in what the attack makes of them.
    """
    classifier = as_classifier(model)
    height, width = classifier.input_size
    check_shape("pixels", pixels, f"{len(numbers)}×3×{height}×{width}")
    inside = all(0 <= number < len(features.ids) for number in numbers)
    check(inside, f"numbers: expected some from 0 to {len(features.ids) - 1}, got {numbers}")
    x = in_channels_of(classifier, pixels.to(device_of(classifier)))
    with torch.no_grad(), evaluation(classifier):
        classes = classifier(x).argmax(dim=1)
    x = attack.perturb(x, classes)
    check_finite(x, "attacked images")
    (values,) = watch(classifier, [penultimate(classifier)], classifier.normalised(x))
    chosen = torch.tensor(list(numbers))
    thumbnails = features.thumbnails
    if thumbnails is not None:
        colour = x.detach().float().cpu().expand(-1, 3, -1, -1)
        thumbnails = torch.cat([thumbnails, _thumbnails(colour)])
    return Features(
        torch.cat([features.values, values.float().cpu()]),
        torch.cat([features.labels, features.labels[chosen]]),
        [*features.ids, *(f"{features.ids[number]}, attacked" for number in numbers)],
        thumbnails,
        features.source,
        torch.cat([torch.full((len(features.ids),), -1), chosen]),
    )


def _thumbnails(pixels: Tensor) -> Tensor:
    """N×3×h×w uint8 of N×3×H×W in [0, 1]."""
    small = resize_image(pixels, size_within(pixels.shape[2:], THUMBNAIL))
    return small.mul(255).round().to(torch.uint8)


class FeatureCollector:
    """The features of one batch after another, of every ``step``-th image."""

    def __init__(self, source: str, step: int = 1) -> None:
        self._source, self._step, self._seen = source, step, 0
        self._values: list[Tensor] = []
        self._thumbnails: list[Tensor] = []
        self._labels: list[int] = []
        self._ids: list[str] = []
        self.positions: list[int] = []
        """The numbers of the images."""

    def add(self, batch: Batch, values: Tensor) -> None:
        """Take in features N×D.

        Raises:
            ValueError: NaN or infinity in them.
        """
        check_finite(values, f"features: {self._source}", int(batch.positions[0]))
        # Of the images that could be used: else none may be left.
        kept = torch.arange(self._seen, self._seen + len(values)) % self._step == 0
        self._seen += len(values)
        if not kept.any():
            return
        samples = [s for s, k in zip(batch.samples, kept.tolist(), strict=True) if k]
        self._values.append(values.cpu()[kept].float())
        self._thumbnails.append(_thumbnails(batch.pixels[kept]))
        self._labels += [-1 if s.label is None else s.label for s in samples]
        self._ids += [s.id for s in samples]
        self.positions += batch.positions[kept].tolist()

    def saved(self) -> Saved:
        """All of them."""
        if not self._ids:
            return {}, {"ids": [], "labels": [], "positions": [], "seen": 0}
        tensors = {"values": torch.cat(self._values), "thumbnails": torch.cat(self._thumbnails)}
        facts = {"ids": self._ids, "labels": self._labels, "positions": self.positions}
        return tensors, facts | {"seen": self._seen}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._ids, self._labels = list(facts["ids"]), list(facts["labels"])
        self.positions = list(facts["positions"])
        self._seen = facts.get("seen", len(self._ids) * self._step)  # none of an earlier version
        if self._ids:
            self._values, self._thumbnails = [tensors["values"]], [tensors["thumbnails"]]

    def result(self) -> Features:
        """All of them."""
        values, thumbnails = torch.cat(self._values), torch.cat(self._thumbnails)
        return Features(values, torch.tensor(self._labels), self._ids, thumbnails, self._source)
