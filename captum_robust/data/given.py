"""Samples of what users have at hand: images, pairs with labels, batches, loaders, a folder."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import index as as_index
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from captum_robust._checks import check, shape_or_type, unknown_name
from captum_robust._orientation import orientation_of, turned_boxes
from captum_robust.data.classes import ClassIndex, imagenet_names, is_numbered
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.data.files import existing
from captum_robust.data.folder import ImageFolder
from captum_robust.data.frames import FrameImages, are_boxes, boxes_of, is_frame
from captum_robust.data.given_forms import as_pairs, in_usual_form
from captum_robust.data.images import pixels_of
from captum_robust.data.renumbered import renumbered
from captum_robust.data.sample import DataError, Sample

_EXPECTED = (
    "samples (captum_robust.data.Sample), images (of PIL, or tensors C×H×W with pixels in [0, 1]), "
    "pairs (image, class index), also with boxes M×4, batches of these, paths of image files, rows "
    "with the keys image and label, NumPy arrays H×W×3 of uint8, a DataLoader, a data frame with a "
    "column path, or the path of a folder"
)
_WRAP = "wrap each image as Sample(image, label, boxes, id)"
_IMAGENET = len(imagenet_names())
_PROBED = 16
"""So many items of a loader tell whether its ``collate_fn`` changes labels."""


class SampleSource(Protocol):
    """What a run needs of a data set: its length and its samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def sample_source(
    data: Any, class_names: Sequence[str] | None, count_classes: Callable[[], int]
) -> SampleSource:
    """The samples of a data set, or of what can be read as one.

    Data sets of samples are returned as they are; the labels of one that has ``class_names`` are
    found by name, see :func:`captum_robust.data.renumbered.renumbered`. A ``DataLoader`` gives the
    items of its data set in their own order, as its ``collate_fn`` makes them. Labels are class
    indices of the model. If a torchvision data set says which classes its labels count, these are
    found by name among those of the model; where the model has no names, they are the model's if
    there are as many. Images of classes that are not known to be the model's have no label, and a
    warning says so. With a ``target_transform``, or a ``collate_fn`` that changes them, labels are
    taken as they are.

    Args:
        data: samples, images (of PIL, or tensors C×H×W of one or three channels with pixels in
            [0, 1], or uint8), pairs (image, label), a list of batches of these, a ``DataLoader``,
            the path of a folder (see :class:`captum_robust.data.folder.ImageFolder`), or a data
            frame of pandas (:class:`captum_robust.data.frames.FrameImages`). Behind its label an
            image may have its boxes, M×4 or 4 numbers (x0, y0, x1, y1) in its pixels; where an EXIF
            tag turns these upright, the boxes turn with them. Images may also be paths of files,
            NumPy arrays H×W×3 of uint8, tuples of one, or rows with the keys "image" and "label",
            and "boxes"; and two lists or tensors be the images and their labels.
        class_names: of the model, if it has any.
        count_classes: says how many classes the model has; called only where it matters.

    Raises:
        TypeError: anything else.
        ValueError: a data set of which some classes are the model's and others are not; one joined
            from parts with different classes; a loader whose sampler has no fixed order.
        FileNotFoundError: no such folder.
    """
    if isinstance(data, LocalizationDataset):
        return renumbered(data, class_names)  # type: ignore[no-any-return]
    if isinstance(data, (str, Path)):
        advice = "a folder of images; of another data set give load_dataset(kind, path)"
        existing(data, "folder", advice)
        return folder_of_model(Path(data), class_names, count_classes)
    items = _loaders_items(data) if isinstance(data, DataLoader) else data
    if isinstance(items, LocalizationDataset):
        return renumbered(items, class_names)  # type: ignore[no-any-return]
    items = FrameImages(items) if is_frame(items) else as_pairs(items)
    is_list = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    got = f"dataset: expected {_EXPECTED}; {_WRAP}; got {type(data).__name__}"
    check(is_list and not isinstance(items, Mapping), got, TypeError)
    first = _first_readable(items)
    usual = in_usual_form(items, first)
    if usual is not items:
        items, first = usual, _first_readable(usual)
    if isinstance(first, Sample) or (first is None and hasattr(items, "ids")):
        source: SampleSource = renumbered(items, class_names)
        return source
    if isinstance(items, (list, tuple)) and first is not None and not _is_item(first):
        items = [item for batch in items for item in _items_of(batch, type(data).__name__)]
        first = items[0]
    check(first is None or _is_item(first), f"{got} of {_said(first)}", TypeError)
    if isinstance(first, (tuple, list)):
        _label_of(first[1], "dataset")
    own = _own_classes(items)
    names = _said_names(class_names)
    numbers = None if own is None else _class_numbers(own, names, count_classes)
    says_names = getattr(_base_of(items)[0], "labels_are_names", False)
    if own is not None and numbers != list(range(len(own))) and not says_names:
        _warn_of_other_numbers(items, [names[-1] for names in own])
    return GivenImages(data, items, numbers)


class GivenImages(Dataset[Sample]):
    """Images, alone, with labels, or with labels and boxes, as samples.

    Args:
        data: what was given.
        items: the images, pairs (image, label), or these and boxes, of ``data``.
        numbers: the model's class of each label; of a label whose class is not known None. None:
            labels are the model's classes.
    """

    def __init__(
        self, data: Any, items: Sequence[Any], numbers: Sequence[int | None] | None
    ) -> None:
        base, positions = _base_of(items)
        self._items, self._numbers = items, numbers
        self.kind = type(data).__name__
        self.ids = [str(position) for position in positions]
        self.transform = re.sub(r" at 0x[0-9a-f]+", "", repr(getattr(base, "transform", None)))
        files, root = getattr(base, "samples", None), getattr(base, "root", None)
        if isinstance(root, (str, Path)):
            self.root = Path(root)
            if isinstance(files, list) and len(files) == len(base):
                paths = [files[position][0] for position in positions]
                self._files = [Path(path) for path in paths]
                self.ids = [Path(os.path.relpath(path, root)).as_posix() for path in paths]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        id, item = self.ids[index], self._items[index]
        if isinstance(item, Sample):
            return item
        check(_is_item(item), f"{id}: expected {_EXPECTED}, got {_said(item)}; {_WRAP}", DataError)
        image, label, *boxes = (item, None) if _is_image(item) else item
        label = _label_of(label, id)
        if label is not None and self._numbers is not None:
            there = 0 <= label < len(self._numbers)
            known = f"{id}: class index {label}, but its data set has {len(self._numbers)} classes"
            check(there, known, DataError)
            label = self._numbers[label]
        placed = boxes_of(boxes[0] if boxes else None, f"{id}: boxes")
        pixels = unit_pixels(image, id)
        # An image of Pillow is turned by that.
        orientation = orientation_of(image) if isinstance(image, Image.Image) else 1
        height, width = pixels.shape[1:]
        placed = turned_boxes(placed, orientation, (height, width))
        return Sample(pixels, label, placed, id, orientation=orientation)


class _Collated(Dataset[Any]):
    """The items of a loader, each as its ``collate_fn`` makes a batch of it alone."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item, made = self._item(index)
        before, after = _class_index(item), _class_index(made)
        is_same = self.makes_labels or before is None or before == after
        said = f"collate_fn made the label {before} {after}, but left those of other images"
        check(is_same, f"dataset: {said}; give the data set itself", DataError)
        return made

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        items = _items_of(self._collate([item]), "DataLoader")
        check(len(items) == 1, f"dataset: a batch of 1 was made {len(items)} items by collate_fn")
        return item, items[0]

    @cached_property
    def makes_labels(self) -> bool:
        """Whether labels do not count the data set's classes, as far as items all over it show."""
        if _own_classes(self.dataset) is None:
            return True
        for position in sorted({i * len(self) // _PROBED for i in range(_PROBED)}):
            try:
                item, made = self._item(position)
            except (ValueError, OSError, RuntimeError, SyntaxError):  # its row will say so
                continue
            if _class_index(item) != _class_index(made):
                return True
        return False


def _class_index(item: Any) -> int | None:
    """The label of a pair, where it is a class index."""
    try:
        return as_index(item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else None
    except (TypeError, ValueError):
        return None


def _loaders_items(loader: DataLoader[Any]) -> Any:
    """The items of a loader's data set that it draws from, in the order of the data set."""
    dataset, sampler = loader.dataset, loader.sampler
    is_plain = type(loader.batch_sampler) is BatchSampler
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement
    )
    whole = whole and len(sampler) == len(dataset)  # type: ignore[arg-type]
    some = isinstance(sampler, SubsetRandomSampler)
    is_fixed = is_plain and not isinstance(dataset, IterableDataset) and (whole or some)
    drawn = "batch_size=None" if loader.batch_size is None else type(sampler).__name__
    advice = "give the data set itself, or a list of the batches"
    check(is_fixed, f"dataset: a DataLoader with {drawn} has no fixed items; {advice}")
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, sorted(sampler.indices))
    as_they_are = loader.collate_fn in (default_collate, list, tuple)
    return dataset if as_they_are else _Collated(dataset, loader.collate_fn)


def _first_readable(items: Any) -> Any:
    """The first item that can be read and is something; None where there is none."""
    for position in range(len(items)):
        try:
            item = items[position]
        except (ValueError, OSError, RuntimeError, SyntaxError):  # its row will say so
            continue
        if item is not None:
            return item
    return None


def _is_image(item: object) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, Tensor) and item.ndim == 3)


def _is_item(item: Any) -> bool:
    """Whether it is a sample, an image, or an image with its label, or label and boxes."""
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and _is_image(item[0]):
        return not _is_image(item[1]) and all(map(are_boxes, item[2:]))
    return isinstance(item, Sample) or _is_image(item)


def _items_of(batch: Any, kind: str) -> list[Any]:
    """The items of a batch: N×C×H×W, (N×C×H×W or N images, N labels, N boxes), or items."""
    if isinstance(batch, Tensor) and batch.ndim == 4:
        return list(batch)
    if isinstance(batch, (tuple, list)):
        if all(map(_is_item, batch)):
            return list(batch)
        lengths = set(map(_length, batch))
        if len(batch) in (2, 3) and len(lengths) == 1 and None not in lengths:
            return [list(pair) for pair in zip(*batch, strict=True)]
    raise TypeError(f"dataset: expected {_EXPECTED}, got {kind} of {_said(batch)}; {_WRAP}")


def _length(part: object) -> int | None:
    is_list = isinstance(part, (tuple, list)) or (isinstance(part, Tensor) and part.ndim > 0)
    return len(part) if is_list else None  # type: ignore[arg-type]


def _said(item: object) -> str:
    """What a message calls an item: its type, with those of its parts, or its shape."""
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} ({', '.join(str(shape_or_type(part)) for part in item[:4])})"
    if isinstance(item, np.ndarray):
        return f"an array {item.shape} of {item.dtype}"
    return f"a tensor {shape_or_type(item)}" if isinstance(item, Tensor) else type(item).__name__


def _label_of(label: Any, where: str) -> int | None:
    """The class index, or None; ``TypeError`` for what is neither."""
    if label is None:
        return None
    try:
        return as_index(label)
    except (TypeError, ValueError):  # the latter of a tensor of several numbers
        what = f"expected class indices, got {_said(label)}; {_WRAP}"
        raise TypeError(f"{where}, labels: {what}") from None


def unit_pixels(image: Image.Image | Tensor, where: str) -> Tensor:
    """3×H×W float32 in [0, 1], of which float rounding by at most 1e-6 beyond is cut off."""
    if isinstance(image, Image.Image):
        return pixels_of(image)
    image = image.detach().cpu()
    channels, number = image.shape[0], image.dtype
    is_image = channels in (1, 3) and (number == torch.uint8 or image.is_floating_point())
    got = f"{'×'.join(map(str, image.shape))} of {number}"
    is_image = is_image and image.numel() > 0
    check(is_image, f"{where}: expected 1×H×W or 3×H×W, float or uint8, got {got}", DataError)
    pixels = image.float() / 255 if number == torch.uint8 else image.float()
    low, high = float(pixels.amin()), float(pixels.amax())
    is_unit = low >= -1e-6 and high <= 1 + 1e-6
    belongs = "the normalisation belongs into the Classifier(module, mean, std)"
    values = f"{where}: expected pixels in [0, 1], got {low:.4g} to {high:.4g}; {belongs}"
    check(is_unit, values, DataError)
    return pixels.clamp(0, 1).expand(3, -1, -1)


def _base_of(items: Any) -> tuple[Any, list[int]]:
    """The data set that the items are chosen from, and their positions in it."""
    positions = list(range(len(items)))
    while isinstance(items, (Subset, _Collated)):
        if isinstance(items, Subset):
            positions = [int(items.indices[position]) for position in positions]
        items = items.dataset
    return items, positions


def _own_classes(data: Any) -> list[tuple[str, ...]] | None:
    """The names of each class that the labels of a data set count; None: it does not say."""
    makes_labels = isinstance(data, _Collated) and data.makes_labels
    if getattr(data, "target_transform", None) is not None or makes_labels:
        return None  # its labels are no longer those that the classes count
    classes, wnids = getattr(data, "classes", None), getattr(data, "wnids", None)
    if isinstance(classes, (list, tuple)) and classes:
        names = [name if isinstance(name, tuple) else (str(name),) for name in classes]
        if wnids is None or len(wnids) != len(names):
            return names
        return [(wnid, *name) for wnid, name in zip(wnids, names, strict=True)]
    parts = [data.dataset] if isinstance(data, (Subset, _Collated)) else []
    named = [*map(_own_classes, data.datasets if isinstance(data, ConcatDataset) else parts)]
    same = all(names == named[0] for names in named)
    advice = "give them one after the other, or each with a target_transform"
    check(same, f"dataset: its parts count different classes; {advice}")
    return named[0] if named else None


def _class_numbers(
    own: Sequence[tuple[str, ...]],
    class_names: Sequence[str] | None,
    count_classes: Callable[[], int],
) -> list[int | None]:
    """The model's class of each class of a data set, see :func:`sample_source`."""
    find = ClassIndex(_known_names(class_names, count_classes))
    numbers = [next((i for i in map(find, names) if i is not None), None) for names in own]
    unknown = [names[-1] for names, number in zip(own, numbers, strict=True) if number is None]
    if class_names is not None:
        if 0 < len(unknown) < len(own):
            raise unknown_name("class of the dataset", unknown[0], find.names)
        is_known = not unknown
    elif len(own) != count_classes():
        is_known = not unknown
    else:
        # In the order of its own unless the names, such as "10" before "2", say another one.
        is_known = all(number in (None, i) for i, number in enumerate(numbers))
        numbers = list(range(len(own)))
    if not is_known:
        _warn_of_strangers([names[-1] for names in own])
    return numbers if is_known else [None] * len(own)


def _said_names(class_names: Sequence[str] | None) -> Sequence[str] | None:
    """The names of the model's classes; None where they are but their numbers."""
    return None if class_names is None or is_numbered(class_names) else class_names


def _known_names(
    class_names: Sequence[str] | None, count_classes: Callable[[], int]
) -> Sequence[str]:
    """The names of the model's classes; without any, ImageNet's of 1,000 classes, else numbers."""
    if class_names is not None:
        return class_names
    count = count_classes()
    return imagenet_names() if count == _IMAGENET else [str(i) for i in range(count)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _warn_of_strangers(names: Sequence[str]) -> None:
    warnings.warn(
        f"dataset: its classes ({_some(names)}) are not known to be the model's, so its images "
        "have no label, and the prediction stands for it; name them as the model does, or give the "
        "model their names (class_names, --classes)",
        stacklevel=5,
    )


def _warn_of_other_numbers(items: Any, names: Sequence[str]) -> None:
    """Say that labels are changed, unless torchvision's own data sets made them."""
    base, _ = _base_of(items)
    makers = {type(part).__module__.partition(".")[0] for part in getattr(base, "datasets", [base])}
    if makers != {"torchvision"}:
        warnings.warn(
            f"dataset: its labels count its classes ({_some(names)}), so they are changed to the "
            "model's of these names; where they are the model's already, give it no attribute "
            "classes, or a target_transform",
            stacklevel=4,
        )


def folder_of_model(
    root: Path,
    class_names: Sequence[str] | None,
    count_classes: Callable[[], int],
    **options: Any,
) -> ImageFolder:
    """A folder; its sub-folders give labels where they are known to be the model's classes.

    ``options`` are those of :class:`ImageFolder`; the rest is as for :func:`sample_source`.
    """
    class_names = _said_names(class_names)
    known = _known_names(class_names, count_classes)
    images = ImageFolder(root, labels=None, class_names=known, **options)
    names = images.folders
    if not names:
        return images
    in_order = class_names is None and all(
        number is None for number in map(ClassIndex(known), names)
    )
    own = images.folders_in_order if in_order else names
    if None not in _class_numbers([(name,) for name in own], class_names, count_classes):
        images.read_labels("sorted" if in_order else "names")
    return images
