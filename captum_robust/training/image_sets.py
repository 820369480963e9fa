"""Images with classes, read and checked once, as a training loop takes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from captum_robust._checks import check, check_choice, check_number
from captum_robust._progress import counted
from captum_robust.data import FITS, DataError, LocalizationDataset, Sample, fitted, resize

T = TypeVar("T", covariant=True)


class SomeSamples(LocalizationDataset):
    """Some samples of another data set, by their numbers there."""

    kind = "some"

    def __init__(self, dataset: LocalizationDataset, numbers: Sequence[int]) -> None:
        self.dataset, self.numbers = dataset, list(numbers)
        self.root, self.class_names = dataset.root, dataset.class_names
        self.ids = [dataset.ids[i] for i in self.numbers]

    def _load(self, index: int) -> Sample:
        return self.dataset[self.numbers[index]]


class _DecodedImages(Dataset[tuple[Tensor, int]]):
    """Images that were all decoded once, kept as bytes where all of them fit in ``memory``."""

    def __init__(self, dataset: LocalizationDataset, memory: int, progress: bool | None) -> None:
        self.dataset = dataset
        self.ids: list[str] = []
        self.labels: list[int] = []
        self.boxes: list[Tensor] = []
        """The boxes of each image, M×4, in its pixels when it is first decoded."""
        self.unusable: dict[str, str] = {}
        """Id -> why: it can't be decoded, or has no class."""
        self._positions: list[int] = []
        self._shapes: list[tuple[int, ...]] = []
        # One block of memory, not a tensor an image: a process that is spawned to load images gets
        # each tensor as an open file, of which there may be 1,024.
        pixels = bytearray()
        fits = True
        for i in counted(range(len(dataset)), "image", progress, "reading"):
            try:
                sample = self._sample(i)
                label = self._label(sample)
            except DataError as error:
                self.unusable[dataset.ids[i]] = str(error)
                continue
            if label is None:
                continue
            self.ids.append(sample.id)
            self.labels.append(label)
            self.boxes.append(sample.boxes)
            self._positions.append(i)
            if fits:
                image = self._bytes(sample)
                self._shapes.append(tuple(image.shape))
                pixels += image.numpy().tobytes()
                fits = len(pixels) <= memory
                if not fits:
                    pixels.clear()
        ends = torch.tensor([0, *map(math.prod, self._shapes)]).cumsum(dim=0)
        self._ends: list[int] = ends.tolist()
        self._pixels = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else None
        """The bytes of all images, one after the other; None: they are decoded again."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "boxes": [boxes.numpy() for boxes in self.boxes]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, boxes=[*map(torch.from_numpy, state["boxes"])])

    def _sample(self, position: int) -> Sample:
        return self.dataset[position]

    def _label(self, sample: Sample) -> int | None:
        """Return the class to train on; None: the image is left out without a word."""
        return -1 if sample.label is None else sample.label

    def _bytes(self, sample: Sample) -> Tensor:
        """3×h×w: the same bytes whether they are kept or decoded again."""
        return (sample.image * 255).round().to(torch.uint8)

    def _pixels_at(self, index: int) -> Tensor:
        if self._pixels is not None:
            part = self._pixels[self._ends[index] : self._ends[index + 1]]
            return part.view(self._shapes[index])
        return self._bytes(self._sample(self._positions[index]))

    def _first_trouble(self) -> str:
        return "".join(f"; {why}" for why in list(self.unusable.values())[:1])

    def __len__(self) -> int:
        return len(self.ids)


class LabelledImages(_DecodedImages):
    """The usable images of a data set at one size: (3×H×W in [0, 1], class) by number.

    Every image is decoded once when this is opened, so that one that can't be is known before the
    training begins; and again in each epoch unless all of them fit in ``memory``, as bytes.

    Args:
        dataset: its labels count the classes of its ``class_names``.
        size: (H, W), or one number for a square.
        fit: ``"squash"`` or ``"crop"``, see :func:`captum_robust.data.fitted`.
        classes: numbers of the classes to take, which count anew from 0 in this order; None: all.
        memory: bytes.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: an unknown ``fit``, classes that are none, or fewer than two classes of which
            there are images.
    """

    def __init__(
        self,
        dataset: LocalizationDataset,
        size: int | tuple[int, int],
        *,
        fit: str = "squash",
        classes: Sequence[int] | None = None,
        memory: int = 2**31,
        progress: bool | None = None,
    ) -> None:
        check_choice("fit", fit, FITS)
        names = list(dataset.class_names or [])
        chosen = list(range(len(names))) if classes is None else list(classes)
        n = len(names)
        are_classes = set(chosen) <= set(range(n)) and len(set(chosen)) == len(chosen)
        check(are_classes, f"classes: expected different numbers from 0 to {n - 1}, got {chosen}")
        self.size, self.fit = size, fit
        self.class_names = [names[c] for c in chosen]
        self._new_label = {c: i for i, c in enumerate(chosen)}
        super().__init__(dataset, memory, progress)
        present = sorted({self.class_names[label] for label in self.labels})
        check(
            len(present) > 1,
            f"{dataset.root}: expected images of at least two classes, found {len(present)} "
            f"({', '.join(present) or 'none'}) in {len(dataset)} images, of which "
            f"{len(self.unusable)} could not be used{self._first_trouble()}",
        )

    def _sample(self, position: int) -> Sample:
        return fitted(self.dataset[position], self.size, self.fit)

    def _label(self, sample: Sample) -> int | None:
        if sample.label is None:
            raise DataError(f"{sample.source or sample.id}: no class is known")
        return self._new_label.get(sample.label)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pixels_at(index).float() / 255, self.labels[index]


class WrappedImages(Dataset[T]):
    """As many images as in another data set."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class SegmentedImages(WrappedImages[tuple[Tensor, Tensor, int]]):
    """Images with their super-pixels: (3×H×W, segments H×W int64, class).

    Args:
        dataset: pairs (image, class).
        segments: N×H×W integers, those of image i at i.

    Raises:
        ValueError: segments of another number of images.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, int]], segments: Tensor) -> None:
        super().__init__(dataset)
        count = len(self)
        fits, got = segments.ndim == 3 and len(segments) == count, tuple(segments.shape)
        check(fits, f"segments: expected {count}×H×W, one map an image, got {got}")
        self.segments = segments

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.dataset[index]
        return image, self.segments[index].long(), label


class Augmented(WrappedImages[Any]):
    """Images mirrored in half of all cases and shifted by up to a tenth of their sides.

    What a shift leaves open is filled with the mirrored border. Draws from torch's global
    generator, which a training loop seeds for each image.

    Args:
        dataset: items (image, class) or (image, segments, class), whose segments go along.
    """

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *maps, label = self.dataset[index]
        mirror = bool(torch.rand(()) < 0.5)
        _, height, width = image.shape
        down, right = height // 10, width // 10
        top = int(torch.randint(0, 2 * down + 1, ()))
        left = int(torch.randint(0, 2 * right + 1, ()))

        def moved(x: Tensor) -> Tensor:
            x = x.flip(-1) if mirror else x
            rows = _mirrored(torch.arange(top - down, top - down + height), height)
            columns = _mirrored(torch.arange(left - right, left - right + width), width)
            return x.index_select(-2, rows).index_select(-1, columns)

        return moved(image), *(moved(m) for m in maps), label


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions outside of 0 to ``size`` - 1, by less than that, as those of a mirrored border."""
    positions = positions.abs()
    return torch.minimum(positions, 2 * (size - 1) - positions)


class CroppedImages(_DecodedImages):
    """Random parts of images, mirrored in half of all cases: (3×H×W in [0, 1], class).

    The class is -1 where none is known: a classifier can say it. Every image is decoded once when
    this is opened, so that one that can't be is known before the training begins; and again in each
    epoch unless all of them fit in ``memory``, as bytes, with a shorter side of at most 9/7 of the
    size's. Draws from torch's global generator, which a training loop seeds for each image.

    Args:
        dataset: with or without labels.
        size: (H, W), or one number for a square.
        area: smallest and largest share of an image; (1, 1) takes the whole image, squashed.
        aspect: smallest and largest ratio of the part's width to its height.
        mirror: also mirror.
        memory: bytes.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: no usable image; a range that is none.
    """

    def __init__(
        self,
        dataset: LocalizationDataset,
        size: int | tuple[int, int],
        *,
        area: tuple[float, float] = (0.3, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        mirror: bool = True,
        memory: int = 2**31,
        progress: bool | None = None,
    ) -> None:
        for name, (low, high), most in (("area", area, 1), ("aspect", aspect, math.inf)):
            in_order = 0 < low <= high <= most
            check(in_order, f"{name}: expected a range above 0, got ({low}, {high})")
        self.size = (size, size) if isinstance(size, int) else size
        self.area, self.aspect, self.mirror = area, aspect, mirror
        super().__init__(dataset, memory, progress)
        trouble = self._first_trouble()
        check(self.ids, f"{dataset.root}: none of {len(dataset)} images can be used{trouble}")

    def _bytes(self, sample: Sample) -> Tensor:
        side = min(self.size) * 9 // 7
        if min(sample.image.shape[1:]) > side:
            scale = side / min(sample.image.shape[1:])
            height, width = (round(s * scale) for s in sample.image.shape[1:])
            sample = resize(sample, (height, width))
        return super()._bytes(sample)

    def whole(self) -> CroppedImages:
        """The same images without a second reading, each as a whole and never mirrored."""
        other = copy.copy(self)
        other.area, other.mirror = (1.0, 1.0), False
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self._pixels_at(index)
        if self.area != (1.0, 1.0):
            pixels = self._part(pixels)
        if self.mirror and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        image = F.interpolate(
            pixels[None].float() / 255, self.size, mode="bilinear", antialias=True
        )[0]
        return image.clamp(0, 1), self.labels[index]

    def _part(self, pixels: Tensor) -> Tensor:
        """A window of a drawn area and aspect, at a drawn place; cut to what the image has."""
        height, width = pixels.shape[1:]
        share, logs = torch.rand(()), [math.log(a) for a in self.aspect]
        area = (self.area[0] + (self.area[1] - self.area[0]) * float(share)) * height * width
        ratio = math.exp(logs[0] + (logs[1] - logs[0]) * float(torch.rand(())))
        tall = max(1, min(height, round((area / ratio) ** 0.5)))
        wide = max(1, min(width, round((area * ratio) ** 0.5)))
        top = int(torch.randint(0, height - tall + 1, ()))
        left = int(torch.randint(0, width - wide + 1, ()))
        return pixels[:, top : top + tall, left : left + wide]


class Unlabelled(WrappedImages[tuple[Tensor, int]]):
    """The images of another data set, their classes unknown (-1)."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index][0], -1


def held_out_split(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on, and of those held out: ``share`` of each class.

    Raises:
        ValueError: a share outside of [0, 1), or one that leaves nothing to train on.

    >>> train, held_out = held_out_split([0, 1, 0, 1, 0, 0], 0.5, seed=0)
    >>> len(train), len(held_out), sorted(train + held_out)
    (3, 3, [0, 1, 2, 3, 4, 5])
    """
    check_number("held_out", share, 0, 1, open_high=True)
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[int]] = {}
    for i in torch.randperm(len(labels), generator=generator).tolist():
        by_class.setdefault(labels[i], []).append(i)
    held_out: list[int] = []
    for numbers in by_class.values():
        held_out += numbers[: int(share * len(numbers))]
    left = sorted(set(range(len(labels))) - set(held_out))
    return left, sorted(held_out)
