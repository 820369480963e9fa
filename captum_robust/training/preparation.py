"""What the trainings have in common around the loop: labels, classes, the optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from captum_robust._checks import check, shape_or_type
from captum_robust._contexts import frozen, seeded
from captum_robust._processes import device_of
from captum_robust._scores import copies_of, two_classes
from captum_robust.training.image_sets import CroppedImages, LabelledImages, WrappedImages
from captum_robust.training.settings import TrainingSettings

_FAST = 10.0
"""The learning rate of parameters that move a whole mask, in those of the weights."""


class CheckedLabels(WrappedImages[Any]):
    """Refuses a label that is no class before it gets to a GPU, where it ends the process.

    Labels that are known without reading the images are looked at once, at the start.

    Args:
        dataset: items (image, class), or with maps between the two.
        classes: how many there are.
        unknown: let labels below 0 pass, which stand for a class that is not known.
        maps: hand the maps on; False leaves them out.
    """

    def __init__(
        self, dataset: Dataset[Any], classes: int, *, unknown: bool = False, maps: bool = False
    ) -> None:
        super().__init__(dataset)
        self.classes, self.unknown, self.maps = classes, unknown, maps
        for index, label in enumerate(_known_labels(dataset)):
            self._check(index, label)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *maps, label = self.dataset[index]
        self._check(index, int(label))
        return (image, *maps, label) if self.maps else (image, label)

    def _check(self, index: int, label: int) -> None:
        is_class = label < self.classes and (self.unknown or label >= 0)
        there_are = f"there are {self.classes} classes"
        check(is_class, f"dataset: image {index} has class {label}, but {there_are}")


def _known_labels(dataset: Dataset[Any]) -> Sequence[int]:
    """Return the labels of all images, where they are known without reading these; else none."""
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return [labels[i] for i in dataset.indices] if labels else []
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1].flatten().tolist() if len(dataset.tensors) > 1 else []
    return dataset.labels if isinstance(dataset, (CroppedImages, LabelledImages)) else []


def class_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Return the float scores N×K of copies of images; one logit an image is read as two classes.

    Raises:
        TypeError: the model gives no scores N×K.
    """
    n = len(images)
    scores = two_classes(model(copies_of(images)), n, "model")
    fits = isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == n
    expected, got = f"scores {n}×K for a batch of {n}", shape_or_type(scores)
    check(fits, f"model: expected {expected}, got {got}", TypeError)
    result: Tensor = scores.float()
    return result


def count_classes(name: str, model: nn.Module, dataset: Dataset[Any], seed: int) -> int:
    """Return K of the scores N×K that a model gives for the first image; nothing stays changed.

    One logit an image is read as two classes.

    Raises:
        TypeError: the model, which the message calls ``name``, gives no scores N×K.
    """
    device = device_of(model)
    with seeded(seed, device), torch.no_grad(), frozen(model):
        image = torch.as_tensor(dataset[0][0])[None].to(device)
        scores = two_classes(model(copies_of(image)), 1, name)
    is_matrix = isinstance(scores, Tensor) and scores.ndim == 2
    check(is_matrix, f"{name}: expected scores N×K, got {shape_or_type(scores)}", TypeError)
    return int(scores.shape[1])


def adamw(
    parameters: Iterable[nn.Parameter],
    settings: TrainingSettings,
    fast: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return AdamW; the few ``fast`` numbers, which move a whole mask, faster and without decay."""
    quick = list(fast)
    rest = [p for p in parameters if all(p is not q for q in quick)]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if quick:
        rate = _FAST * settings.learning_rate
        groups.append({"params": quick, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
