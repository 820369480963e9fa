"""Other forms in which users have images and labels, as images and pairs (image, label)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from captum_robust._checks import check
from captum_robust._orientation import turned_boxes
from captum_robust.data.frames import BOX_FORM, boxes_of, names_of_boxes
from captum_robust.data.images import load_oriented
from captum_robust.data.sample import DataError

_IMAGE_KEYS = ("image", "img")
_LABEL_WORDS = ("label", "target", "class")


def in_usual_form(items: Any, first: Any) -> Any:
    """Items as images, or pairs (image, label), where the first one is in another form.

    Those are paths of image files, rows with the keys "image" (or "img"), "label" and "boxes",
    NumPy arrays H×W×3 of uint8, these with labels and boxes, and tuples of one image. The items
    themselves where it is none of them.
    """
    if isinstance(items, (list, tuple)) and items and all(map(_is_file, items)):
        return _Files(items)
    return items if usual_item(first) is first else _Rows(items)


def as_pairs(data: Any) -> Any:
    """Pairs (image, label) of two equally long parts: images, and a class index for each.

    The data themselves where they are anything else.
    """
    if not (_is_pair(data) and _are_labels(data[1])):
        return data
    images, labels = data
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    is_batch = is_batch and len(images) == len(labels)
    return list(zip(images, labels, strict=True)) if is_batch else data


def usual_item(item: Any) -> Any:
    """The item as an image or a pair; itself where it is in no other form that is known."""
    if isinstance(item, Mapping):
        keys = [key for key in _IMAGE_KEYS if key in item]
        others = [k for k in item if any(word in str(k).lower() for word in _LABEL_WORDS)]
        if len(keys) != 1 or not (others == [] or "label" in item):
            return item
        image, label = _usual_image(item[keys[0]]), item.get("label")
        boxes = [] if "boxes" in item else _boxes_elsewhere(item)
        got = f"got {', '.join(boxes)}; rename it"
        check(not boxes, f"row: expected the key {BOX_FORM}, {got}", DataError)
        if item.get("boxes") is not None:
            return image, label, item["boxes"]
        return (image, label) if others else image
    if isinstance(item, tuple) and len(item) == 1 and _is_image(item[0]):
        return _usual_image(item[0])
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and isinstance(item[0], np.ndarray):
        return (_usual_image(item[0]), *item[1:])
    return _usual_image(item)


def _boxes_elsewhere(row: Mapping[Any, Any]) -> list[str]:
    """The keys that boxes usually have, of the row itself and of what is in it."""
    found = names_of_boxes(map(str, row))
    for key, value in row.items():
        inner = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(inner, Mapping):
            found += [f"{key}.{name}" for name in names_of_boxes(map(str, inner))]
    return found


def _usual_image(image: Any) -> Any:
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    return torch.tensor(image).permute(2, 0, 1) if is_array and image.shape[2:] == (3,) else image


def _is_image(item: Any) -> bool:
    image = _usual_image(item)
    return isinstance(image, Image.Image) or (isinstance(image, Tensor) and image.ndim == 3)


def _is_file(item: Any) -> bool:
    return isinstance(item[0] if _is_labelled(item) else item, (str, Path))


def _is_labelled(item: Any) -> bool:
    """Whether it may be an image with its label, and boxes; two paths are a list of images."""
    return isinstance(item, (tuple, list)) and len(item) in (2, 3)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _are_labels(part: Any) -> bool:
    if isinstance(part, np.ndarray):
        return part.ndim == 1 and part.dtype.kind in "iu"
    if isinstance(part, Tensor):
        return part.ndim == 1 and not (part.is_floating_point() or part.is_complex())
    return isinstance(part, (list, tuple)) and all(isinstance(label, int) for label in part)


class _Files:
    """Image files, or these with labels and boxes; named as those of torchvision's data sets."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        parts = [item if _is_labelled(item) else (item, None) for item in items]
        self.samples = [(os.path.abspath(path), label) for path, label, *_ in parts]
        self.root = os.path.commonpath([os.path.dirname(path) for path, _ in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        image, orientation = load_oriented(path)
        item = self._items[index]
        if _is_labelled(item) and len(item) == 3:
            height, width = image.shape[1:]
            boxes = boxes_of(item[2], f"{path}: boxes")
            return image, label, turned_boxes(boxes, orientation, (height, width))
        return (image, label) if _is_labelled(item) else image


class _Rows(Subset[Any]):
    """The items of a data set, each in the usual form."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, range(len(dataset)))
        # How the data sets of Hugging Face name the classes that their labels count.
        features = getattr(dataset, "features", None)
        label = features.get("label") if isinstance(features, Mapping) else None
        self.classes = getattr(label, "names", None)

    def __getitem__(self, index: int) -> Any:
        return usual_item(self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]
