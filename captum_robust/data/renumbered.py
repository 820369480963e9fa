"""Samples whose labels count other classes than the model's, as labels that count the model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import index as as_index
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from captum_robust._checks import check
from captum_robust.data.classes import ClassIndex, imagenet_table, is_numbered
from captum_robust.data.sample import DataError, Sample


class Renumbered(Dataset[Sample]):
    """The samples of a data set, each with the model's class that has the name of its own one.

    Args:
        samples: a data set with ``class_names``, which its labels count.
        class_names: of the model.
        numbers: the model's class of each class of the data set, None: it has none.

    Raises:
        DataError: by a sample whose class the model does not have.
    """

    def __init__(
        self, samples: Any, class_names: Sequence[str], numbers: Sequence[int | None]
    ) -> None:
        self.samples, self._numbers = samples, list(numbers)
        self.class_names = list(class_names)
        if hasattr(samples, "ids"):
            self.ids: list[str] = samples.ids

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self.samples[index]
        if sample.label is None:
            return sample
        label, known = as_index(sample.label), f"{len(self._numbers)} classes of its data set"
        inside = 0 <= label < len(self._numbers)
        check(inside, f"{sample.id}: class index {label} is none of the {known}", DataError)
        number, name = self._numbers[label], self.samples.class_names[label]
        stranger = f"class {name!r} is not known to be one of the model's {len(self.class_names)}"
        advice = "give both the same names (class_names, --classes)"
        check(number is not None, f"{sample.id}: {stranger}; {advice}", DataError)
        return replace(sample, label=number)


def renumbered(samples: Any, class_names: Sequence[str] | None) -> Any:
    """The samples with labels that count the model's ``class_names``.

    Where data set and model both name their classes, a class of the data set is the model's of
    its name, as far as the model has it. The data set itself is returned where one of them has no
    names, where the names are the same, and where they are as many and those that both have are in
    the same places: the others are then spelled otherwise.
    """
    if isinstance(samples, Subset):
        return Subset(renumbered(samples.dataset, class_names), samples.indices)
    if isinstance(samples, ConcatDataset):
        return ConcatDataset([renumbered(part, class_names) for part in samples.datasets])
    own = getattr(samples, "class_names", None)
    if class_names is None or own is None or is_numbered(own) or is_numbered(class_names):
        return samples
    if list(own) == list(class_names):
        return samples
    find, wnids = ClassIndex(class_names), {name: wnid for wnid, name in imagenet_table().items()}
    fitting = [find.fitting(name) or find.fitting(wnids.get(name, name)) for name in own]
    is_found = [i in places for i, places in enumerate(fitting) if places]
    if len(own) == len(class_names) and is_found and all(is_found):
        return samples
    numbers = [i if i in places else _lone(places) for i, places in enumerate(fitting)]
    return Renumbered(samples, class_names, numbers)


def _lone(places: Sequence[int]) -> int | None:
    """The only place; None: there is none, or the name is that of several classes."""
    return places[0] if len(places) == 1 else None
