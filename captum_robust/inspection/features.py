"""Images as points: what the last layer before the scores says of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check_floating, check_shape
from captum_robust._contexts import evaluation
from captum_robust._resize import resize_image, size_within
from captum_robust.inspection.progress import Saved
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import as_classifier, penultimate, watch

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
    model: nn.Module, images: Any, *, batch_size: int = 16, progress: bool = False
) -> Features:
    """Return what the last linear layer is given for each image, or the means of the last maps.

    Args:
        model: a classifier, or any network of images.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        batch_size: images at once.
        progress: whether a bar on standard error shows how far it is.

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


class FeatureCollector:
    """The features of one batch after another, of every ``step``-th image."""

    def __init__(self, source: str, step: int = 1) -> None:
        self._source, self._step = source, step
        self._values: list[Tensor] = []
        self._thumbnails: list[Tensor] = []
        self._labels: list[int] = []
        self._ids: list[str] = []

    def add(self, batch: Batch, values: Tensor) -> None:
        """Take in features N×D."""
        kept = batch.positions % self._step == 0
        if not kept.any():
            return
        samples = [s for s, k in zip(batch.samples, kept.tolist(), strict=True) if k]
        small = resize_image(batch.pixels[kept], size_within(batch.pixels.shape[2:], THUMBNAIL))
        self._values.append(values.cpu()[kept].float())
        self._thumbnails.append(small.mul(255).round().to(torch.uint8))
        self._labels += [-1 if s.label is None else s.label for s in samples]
        self._ids += [s.id for s in samples]

    def saved(self) -> Saved:
        """All of them."""
        if not self._ids:
            return {}, {"ids": [], "labels": []}
        tensors = {"values": torch.cat(self._values), "thumbnails": torch.cat(self._thumbnails)}
        return tensors, {"ids": self._ids, "labels": self._labels}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._ids, self._labels = list(facts["ids"]), list(facts["labels"])
        if self._ids:
            self._values, self._thumbnails = [tensors["values"]], [tensors["thumbnails"]]

    def result(self) -> Features:
        """All of them."""
        values, thumbnails = torch.cat(self._values), torch.cat(self._thumbnails)
        return Features(values, torch.tensor(self._labels), self._ids, thumbnails, self._source)
