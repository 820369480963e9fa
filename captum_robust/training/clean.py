"""Training a classifier on images as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from captum_robust._checks import check_type
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust.training.acceleration import training_device
from captum_robust.training.adversarial import standard_loss
from captum_robust.training.loop import TrainingResult, fit
from captum_robust.training.preparation import CheckedLabels, adamw, class_scores, count_classes
from captum_robust.training.schedule import Schedule
from captum_robust.training.settings import TrainingSettings


def clean_training(
    classifier: nn.Module,
    dataset: Dataset[Any],
    settings: TrainingSettings | None = None,
    *,
    held_out: Dataset[Any] | None = None,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a classifier, in place, on images as they are: what the two networks start from.

    Everything of :func:`captum_robust.training.fit` holds. The optimiser is AdamW.

    Args:
        classifier: images -> scores N×K.
        dataset: pairs (image with pixels in [0, 1], class).
        settings: 10 epochs of batches of 64 with a learning rate of .002 by default.
        held_out: more such pairs; ``clean_accuracy`` on them is measured before, during and after.
        out, configuration, progress: see :func:`captum_robust.training.fit`.

    Raises:
        TypeError: a classifier that is no module, or gives no scores N×K.
        ValueError: a label that is none of the classes; see also
            :func:`captum_robust.training.fit`.
    """
    settings = settings or TrainingSettings(epochs=10, learning_rate=2e-3, weight_decay=1e-3)
    check_type("classifier", classifier, nn.Module, "a torch.nn.Module")
    Schedule(dataset, settings)  # refuses too few images
    classifier.to(training_device(settings))
    classes = count_classes("classifier", classifier, dataset, settings.seed)
    return fit(
        classifier,
        CheckedLabels(dataset, classes),
        standard_loss,
        settings,
        optimizer=adamw(classifier.parameters(), settings),
        evaluate=None if held_out is None else partial(_accuracy, held_out),
        out=out,
        configuration=configuration,
        progress=progress,
    )


def _accuracy(images: Dataset[Any], classifier: nn.Module) -> dict[str, float]:
    device = device_of(classifier)
    right = []
    with torch.no_grad():
        loader = DataLoader(images, 64, generator=torch.Generator())
        for x, labels in counted(loader, "batch", None, "evaluation"):
            right.append(class_scores(classifier, x.to(device)).argmax(dim=1).cpu() == labels)
    return {"clean_accuracy": float(torch.cat(right).float().mean())}
