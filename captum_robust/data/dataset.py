"""The base of every data set: ids that are known at once, samples that load when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from captum_robust._checks import check, valid_unicode
from captum_robust._orientation import is_transposed, turned, turned_boxes
from captum_robust.data.annotations import Box, checked_boxes
from captum_robust.data.files import Place
from captum_robust.data.images import load_oriented
from captum_robust.data.sample import DataError, Sample


class LocalizationDataset(Dataset[Sample], ABC):
    """Images with classes and boxes, loaded one by one.

    Construction reads folder listings and annotation files, never an image. What is wrong with the
    whole data set is raised there (``FileNotFoundError`` or ``ValueError``); what is wrong with one
    sample is raised by its ``dataset[i]`` as :class:`DataError`, and the others stay usable:

    - an annotation whose image is missing keeps its id, and ``dataset[i]`` raises;
    - an image without an annotation is a sample with zero boxes.

    Data sets can be pickled, and read from threads and from ``DataLoader`` workers, these with
    ``collate_fn=list`` because the images differ in size.
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
        inside = -len(self) <= position < len(self)
        check(inside, f"index {index} is outside a data set of {len(self)} samples", IndexError)
        return self._load(position % len(self))

    @abstractmethod
    def _load(self, index: int) -> Sample:
        """The sample at ``index``, 0 ≤ index < len(self)."""


@dataclass(frozen=True)
class Truth:
    """What the annotations say of one image."""

    label: int | None
    boxes: Sequence[tuple[Box, str]] = ()
    """Half-open boxes in pixels, each with the file and line that it comes from."""
    mask: Tensor | None = None


class AnnotatedImages(LocalizationDataset):
    """A data set of image files and annotations, each in its layout.

    Images are turned upright as their EXIF tag says, and boxes and masks with them.
    """

    exif_orientation = False
    """Whether boxes and masks were drawn on upright images, as viewers show them; else on the
    pixels as they are stored."""

    @abstractmethod
    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        """Where the image is, or its bytes, and its name in messages; or :class:`DataError`."""

    @abstractmethod
    def _truth(self, id: str, size: tuple[int, int], /) -> Truth:
        """What is known of the image that boxes and masks were drawn on, whose size is (H, W)."""

    def _load(self, index: int) -> Sample:
        id = self.ids[index]
        file, source = self._image_file(id)
        image, stored = load_oriented(file, name=source)
        orientation = 1 if self.exif_orientation else stored  # of the annotations
        height, width = image.shape[1:]
        drawn_on = (width, height) if is_transposed(orientation) else (height, width)
        truth = self._truth(id, drawn_on)
        boxes = checked_boxes(truth.boxes, drawn_on)
        boxes = turned_boxes(boxes, orientation, (height, width))
        mask = None if truth.mask is None else turned(truth.mask, orientation)
        return Sample(image, truth.label, boxes, id, mask, source=source, orientation=stored)


def listed_ids(
    images: Collection[str], annotated: Collection[str], skip_missing: bool
) -> list[str]:
    """The ids of the images and, unless ``skip_missing``, of annotations without one; sorted."""
    return sorted({*images, *(() if skip_missing else annotated)})


def place_of(images: Mapping[str, Place], id: str, annotation: object) -> Place:
    """Where the image is; :class:`DataError` that names its annotation if there is no image."""
    check(id in images, f"{annotation}: annotates {id}, but there is no such image", DataError)
    return images[id]


def entry_id(image: str, category: str) -> str:
    """The id of a sample that is one category of an image, or all of it where that is empty."""
    return valid_unicode(f"{image}#{category}" if category else image)
