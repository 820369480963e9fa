"""What the trainings have in common around the loop: labels, classes, the optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_robust._checks import check
from captum_robust._contexts import frozen, seeded
from captum_robust._processes import device_of
from captum_robust.training.image_sets import WrappedImages
from captum_robust.training.settings import TrainingSettings

_FAST = 10.0
"""The learning rate of parameters that move a whole mask, in those of the weights."""


class CheckedLabels(WrappedImages[Any]):
    """Refuses a label that is no class before it gets to a GPU, where it ends the process.

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

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *maps, label = self.dataset[index]
        number, count = int(label), self.classes
        is_class = number < count and (self.unknown or number >= 0)
        check(is_class, f"dataset: image {index} has class {number}, but there are {count} classes")
        return (image, *maps, label) if self.maps else (image, label)


def first_scores(model: nn.Module, dataset: Dataset[Any], seed: int) -> Any:
    """Return what the model gives for the first image; nothing stays changed."""
    device = device_of(model)
    with seeded(seed, device), torch.no_grad(), frozen(model):
        return model(torch.as_tensor(dataset[0][0])[None].to(device))


def count_classes(classifier: nn.Module, dataset: Dataset[Any], seed: int) -> int:
    """Return the number of classes: that of the scores of the first image.

    Raises:
        TypeError: the classifier gives no scores N×K.
        ValueError: it has one class.
    """
    scores = first_scores(classifier, dataset, seed)
    is_matrix = isinstance(scores, Tensor) and scores.ndim == 2
    check(is_matrix, f"classifier: expected scores N×K, got {shape_or_type(scores)}", TypeError)
    count = int(scores.shape[1])
    check(count > 1, "classifier: expected two or more classes, it has one")
    return count


def shape_or_type(value: object) -> object:
    """Return what to say of a value that should have been a tensor of another shape."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


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
