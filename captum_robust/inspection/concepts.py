"""Concepts that units may stand for: colours, textures, objects of samples, folders of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust._checks import check, check_type, valid_unicode
from captum_robust._orientation import is_transposed, turned
from captum_robust._resize import blurred, resize_image
from captum_robust.data import DataError, Sample
from captum_robust.data.files import by_name, existing, is_hidden
from captum_robust.data.image_lists import list_images, without_suffix
from captum_robust.data.images import load_mask
from captum_robust.inspection.streaming import Batch

COLOURS = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "red": (200, 25, 30),
    "orange": (245, 130, 25),
    "yellow": (250, 220, 40),
    "green": (50, 150, 60),
    "blue": (40, 90, 190),
    "purple": (120, 50, 140),
    "pink": (240, 150, 180),
    "brown": (110, 70, 40),
}
"""The eleven basic colour terms of Berlin and Kay (1969), each with an example in sRGB."""


BOXES_AS_MASKS = "Where an object has a box only, it is its mask."
_AS_STORED = (
    "Photographs have EXIF orientations that the size of a mask does not tell: these masks are "
    "taken as drawn on the pixels as they are stored."
)


class Concepts(Protocol):
    """Where in images which concepts are."""

    names: Sequence[str]
    """Those that may occur, as far as is known before."""
    note: str
    """What to know of them; may be empty."""
    categories: Mapping[str, str]
    """The category of names that are not in the one without a name."""

    def read(self, sample: Sample) -> Any:
        """What is read of one image; ``DataError`` makes it unusable."""

    def masks(self, batch: Batch, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Name -> N×h×w bool, of the concepts in the batch; ``number`` is that of these reads."""

    def known(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Category -> N bool, the images annotated with it; others do not count for its names."""


class _OfPixels:
    """Concepts of each pixel that need no labels, so that all images have them."""

    categories: Mapping[str, str] = {}

    def read(self, _: Sample) -> None:
        """Nothing: the pixels say it."""

    def known(self, batch: Batch, _: int) -> dict[str, Tensor]:
        """All of them."""
        return {"": torch.ones(len(batch.pixels), dtype=torch.bool)}


class Colours(_OfPixels):
    """Each pixel's colour: that of :data:`COLOURS` whose example is nearest in CIELAB."""

    names: Sequence[str] = tuple(COLOURS)
    note = "Colours: the nearest of eleven examples in CIELAB."

    def masks(self, batch: Batch, _: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Of each colour that occurs."""
        import cv2

        pixels = resize_image(batch.pixels, size)
        rows = pixels.permute(0, 2, 3, 1).reshape(-1, size[1], 3).contiguous()
        lab = torch.from_numpy(cv2.cvtColor(rows.numpy(), cv2.COLOR_RGB2LAB)).view(-1, 3)
        rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[None] / 255
        examples = torch.from_numpy(cv2.cvtColor(rgb.numpy(), cv2.COLOR_RGB2LAB))[0]
        nearest = torch.cdist(lab, examples).argmin(dim=1).view(-1, *size)
        return _by_number(nearest, self.names)


class Textures(_OfPixels):
    """What is around each pixel, by the gradients of the light there: flat, lines, or irregular.

    Their products are averaged over a sixteenth of the image (the structure tensor of Bigün and
    Granlund 1987). It is flat where the root of the mean squared gradient is below 4 levels of 255
    a pixel, in images of 112 pixels. Lines are there where one direction has at least three times
    the energy of the one across it.
    """

    names: Sequence[str] = (
        *("flat", "horizontal lines", "rising lines", "vertical lines", "falling lines"),
        "irregular",
    )
    note = "Textures: by the strength and the direction of the gradients around each pixel."

    def masks(self, batch: Batch, _: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Of each texture that occurs."""
        light = resize_image(batch.pixels, size).mean(dim=1, keepdim=True)
        padded = F.pad(light, (1, 1, 1, 1), mode="replicate")
        down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
        right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
        products = torch.cat([right * right, down * down, right * down], dim=1)
        across, along, both = blurred(products, min(size) / 32).unbind(1)
        energy, difference = across + along, torch.hypot(across - along, 2 * both)
        # The gradient points across the lines. In four parts, of which the first is around 0.
        angle = torch.atan2(2 * both, across - along) / 2 / torch.pi * 4
        quarter = angle.round().long() % 4  # to the right, down right, down, down left
        number = torch.tensor([3, 2, 1, 4])[quarter]
        number[2 * difference < energy] = 5
        number[energy.clamp(min=0).sqrt() < 4 / 255 * 112 / min(size)] = 0
        return _by_number(number, self.names)


def _by_number(numbers: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The masks of those names whose numbers occur."""
    return {names[number]: numbers == number for number in torch.unique(numbers).tolist()}


class ReadMasks:
    """Concepts whose masks are read image by image."""

    names: Sequence[str] = ()
    note = ""
    categories: Mapping[str, str] = {}

    def say(self, note: str) -> None:
        """Add what to know of them, once."""
        if note not in self.note:
            self.note = f"{self.note} {note}".strip()

    def say_of_turned(self, sample: Sample) -> None:
        """Say which way masks of an image are, if it is one whose size does not tell."""
        height, width = sample.original_size
        if sample.orientation != 1 and (not is_transposed(sample.orientation) or height == width):
            self.say(_AS_STORED)

    def masks(self, batch: Batch, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """The masks that were read, at the nearest pixels."""
        read = [one[number] or {} for one in batch.read]
        names = dict.fromkeys(name for masks in read for name in masks)
        found = {name: torch.zeros(len(read), *size, dtype=torch.bool) for name in names}
        for i, masks in enumerate(read):
            for name, mask in masks.items():
                y, x = (nearest(*sides) for sides in zip(mask.shape, size, strict=True))
                found[name][i] = mask[y[:, None], x]
        return found

    def known(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Those of which something was read, of a category with a name one of its concepts."""
        read = [one[number] for one in batch.read]
        if not self.categories:
            return {"": torch.tensor([masks is not None for masks in read])}
        there = [{self.categories[name] for name in masks or ()} for masks in read]
        every = dict.fromkeys(self.categories.values())
        return {name: torch.tensor([name in some for some in there]) for name in every}


def nearest(length: int, count: int) -> Tensor:
    """The nearest of so many pixels for each of ``count`` that are evenly spread over them."""
    return ((torch.arange(count) + 0.5) * (length / count)).long()


def stored_size(sample: Sample) -> tuple[int, int]:
    """(H, W) of the pixels of the image's file."""
    upright = sample.original_size
    return upright[::-1] if is_transposed(sample.orientation) else upright


def turn_of(
    size: tuple[int, int], sample: Sample, where: object, what: str = "the mask has"
) -> int:
    """The EXIF orientation by which masks (H, W) come upright, as their image is.

    They are turned as the image was, unless only the upright image is as large as they are.
    ``DataError`` where the stored pixels are not as large either.
    """
    upright, stored = sample.original_size, stored_size(sample)
    sides = f"{what} {size[1]}×{size[0]} pixels, its image {upright[1]}×{upright[0]}"
    check(size in (stored, upright), f"{where}: {sides}", DataError)
    return sample.orientation if size == stored else 1


def upright(mask: Tensor, sample: Sample, where: object) -> Tensor:
    """The mask or numbers H×W, upright as the image is; see :func:`turn_of`."""
    height, width = mask.shape
    return turned(mask, turn_of((height, width), sample, where))


class Objects(ReadMasks):
    """The object of each sample, by its class: its mask, or else its boxes.

    Args:
        class_names: of the labels; None: the numbers stand for them.
    """

    def __init__(self, class_names: Sequence[str] | None) -> None:
        self._class_names = class_names

    def read(self, sample: Sample) -> dict[str, Tensor] | None:
        """The mask of its class; None where it has neither mask nor box."""
        mask = sample.mask
        if mask is None and len(sample.boxes):
            self.say(BOXES_AS_MASKS)
            mask = filled(sample.boxes.tolist(), sample.size)
        if mask is None:
            return None
        if sample.label is None:
            return {"object": mask}
        names, label = self._class_names, sample.label
        if names is None:
            return {str(label): mask}
        got = f"{sample.id}: expected a label from 0 to {len(names) - 1}, got {label}"
        check(0 <= label < len(names), got, DataError)
        return {names[label]: mask}


def filled(boxes: Iterable[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """H×W bool: the pixels in any of the boxes (x0, y0, x1, y1)."""
    mask = torch.zeros(size, dtype=torch.bool)
    for box in boxes:
        x0, y0, x1, y1 = (max(0, round(side)) for side in box)
        mask[y0:y1, x0:x1] = True
    return mask


class MaskFolders(ReadMasks):
    """A folder of masks for each concept, one file an image, of the same name but for the suffix.

    An image that has a mask of none of them is left out; one that has some has nothing of the
    others. A mask is as large as its image is stored or, where the EXIF tag of that turns it on its
    side, as it is upright.

    Args:
        folders: name of a concept -> its folder; or one folder, whose sub-folders they are.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no folders, or no masks in one.
    """

    def __init__(self, folders: str | Path | Mapping[str, str | Path]) -> None:
        if isinstance(folders, (str, Path)):
            root = existing(folders, "folder", "a folder with a sub-folder of masks a concept")
            inner = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
            folders = {valid_unicode(path.name): path for path in inner}
            check(folders, f"concepts: {root} has no sub-folders, one for each concept")
        check_type("concepts", folders, Mapping, "names and folders of masks")
        check(folders, "concepts: expected at least one folder of masks, got none")
        self._files: dict[str, dict[str, Path]] = {}
        for name, folder in folders.items():
            root = existing(folder, "folder", f"a folder of the masks of {name}")
            masks = list_images(root)
            check(masks, f"concepts: {root} has no masks of {name}")
            self._files[name] = by_name(masks, without_suffix, root)
        self.names: Sequence[str] = tuple(self._files)

    def read(self, sample: Sample) -> dict[str, Tensor] | None:
        """Those masks that there are; None without any."""
        stem = without_suffix(sample.id)
        found = {name: files[stem] for name, files in self._files.items() if stem in files}
        if found:
            self.say_of_turned(sample)
        masks = {name: load_mask(path, exif_orientation=False) for name, path in found.items()}
        return {name: upright(mask, sample, found[name]) for name, mask in masks.items()} or None
