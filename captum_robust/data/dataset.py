"""The base of every data set: ids that are known at once, samples that load when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index as as_index
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Dataset

from captum_robust.data.sample import Sample


class LocalizationDataset(Dataset[Sample], ABC):
    """Images with classes and boxes, loaded one by one.

    Construction reads folder listings and annotation files, never an image. What is wrong with the
    whole data set is raised there (``FileNotFoundError`` or ``ValueError``); what is wrong with one
    sample is raised by its ``dataset[i]`` as :class:`DataError`, and the others stay usable:

    - an annotation whose image is missing keeps its id, and ``dataset[i]`` raises;
    - an image without an annotation is a sample with zero boxes.

    Data sets can be pickled and read from ``DataLoader`` workers, with ``collate_fn=list`` because
    the images differ in size.
    """

    kind: ClassVar[str]
    """The name that :func:`load_dataset` knows it by."""
    root: Path
    ids: list[str]
    """One id a sample, in order."""
    class_names: Sequence[str] | None = None
    """Names of the classes that ``Sample.label`` counts, where the data set knows them."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        position = as_index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        return self._load(position % len(self))

    @abstractmethod
    def _load(self, index: int) -> Sample:
        """The sample at ``index``, 0 ≤ index < len(self)."""
