"""Training a classifier on images as they are, and the labels that it may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from captum_robust._contexts import frozen, seeded
from captum_robust.training.loop import (
    Batch,
    TrainingResult,
    check_dataset,
    fit,
    training_device,
)
from captum_robust.training.settings import TrainingSettings


def clean_training(
    classifier: nn.Module,
    dataset: Dataset[Any],
    settings: TrainingSettings | None = None,
    *,
    held_out: Dataset[Any] | None = None,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train a classifier, in place, on images as they are: what the two networks start from.

    Everything of :func:`captum_robust.training.fit` holds. The optimiser is AdamW.

    Args:
        classifier: images -> scores N×K.
        dataset: of (image with pixels in [0, 1], class).
        settings: 10 epochs of batches of 64 with a learning rate of .002 by default.
        held_out: of the same; ``clean_accuracy`` on them is measured before, during and after.
        out, configuration, progress: see :func:`captum_robust.training.fit`.

    Raises:
        TypeError: a classifier that is no module, or gives no scores N×K.
        ValueError: one class, a label that is none of the classes; see also
            :func:`captum_robust.training.fit`.
    """
    if settings is None:
        settings = TrainingSettings(epochs=10, learning_rate=2e-3, weight_decay=1e-3)
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"classifier: expected a torch.nn.Module, got {type(classifier).__name__}")
    check_dataset(dataset, settings)
    classifier.to(training_device(settings))
    return fit(
        classifier,
        CheckedLabels(
            dataset, count_classes(classifier, dataset, settings.seed), superpixels=False
        ),
        _cross_entropy,
        settings,
        optimizer=torch.optim.AdamW(
            classifier.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        ),
        evaluate=None if held_out is None else _Accuracy(held_out),
        out=out,
        configuration=configuration,
        progress=progress,
    )


def _cross_entropy(classifier: nn.Module, batch: Batch, _: int) -> Tensor:
    images, labels = batch
    return F.cross_entropy(classifier(images).float(), labels)


@dataclass(frozen=True)
class _Accuracy:
    images: Dataset[Any]

    def __call__(self, classifier: nn.Module) -> dict[str, float]:
        device = next(classifier.parameters()).device
        right = []
        with torch.no_grad():
            for x, labels in DataLoader(self.images, 64, generator=torch.Generator()):
                right.append(classifier(x.to(device)).argmax(dim=1).cpu() == labels)
        return {"clean_accuracy": float(torch.cat(right).float().mean())}


def count_classes(classifier: nn.Module, dataset: Dataset[Any], seed: int) -> int:
    """As many as scores of the first image."""
    like = next(classifier.parameters(), torch.empty(0))
    with seeded(seed, like.device), torch.no_grad(), frozen(classifier):
        scores = classifier(torch.as_tensor(dataset[0][0])[None].to(like))
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"classifier: expected scores N×K, got {got}")
    if scores.shape[1] < 2:
        raise ValueError("classifier: expected two or more classes, it has one")
    return int(scores.shape[1])


class CheckedLabels(Dataset[Any]):
    """Refuses a label that is no class before it gets to a GPU, where it ends the process."""

    def __init__(self, dataset: Dataset[Any], classes: int, superpixels: bool) -> None:
        self.dataset, self.classes, self.superpixels = dataset, classes, superpixels

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        image, *maps, label = self.dataset[index]
        if not 0 <= int(label) < self.classes:
            raise ValueError(
                f"dataset: image {index} has class {int(label)}, but there are {self.classes} "
                "classes"
            )
        return (image, maps[0], label) if self.superpixels else (image, label)
