"""Concepts that units may stand for: objects of annotated samples, folders of masks, colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust._checks import check, check_type, valid_unicode
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


class Concepts(Protocol):
    """Where in images which concepts are."""

    names: Sequence[str]
    """Those that may occur, as far as is known before."""
    note: str
    """What to know of them; may be empty."""

    def read(self, sample: Sample) -> Any:
        """What is read of one image; ``DataError`` makes it unusable."""

    def masks(self, batch: Batch, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Name -> N×h×w bool, of the concepts in the batch; ``number`` is that of these reads."""

    def known(self, batch: Batch, number: int) -> Tensor:
        """N bool, the images that are annotated; of others nothing counts."""


class Colours:
    """Each pixel's colour: that of :data:`COLOURS` whose example is nearest in CIELAB."""

    names: Sequence[str] = tuple(COLOURS)
    note = "Colours: the nearest of eleven examples in CIELAB."

    def read(self, _: Sample) -> None:
        """Nothing: the pixels say it."""

    def masks(self, batch: Batch, _: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Of each colour that occurs."""
        import cv2

        pixels = F.interpolate(batch.pixels, size, mode="bilinear", antialias=True).clamp(0, 1)
        rows = pixels.permute(0, 2, 3, 1).reshape(-1, size[1], 3).contiguous()
        lab = torch.from_numpy(cv2.cvtColor(rows.numpy(), cv2.COLOR_RGB2LAB)).view(-1, 3)
        rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[None] / 255
        examples = torch.from_numpy(cv2.cvtColor(rgb.numpy(), cv2.COLOR_RGB2LAB))[0]
        nearest = torch.cdist(lab, examples).argmin(dim=1).view(-1, *size)
        occurring = torch.unique(nearest).tolist()
        return {self.names[number]: nearest == number for number in occurring}

    def known(self, batch: Batch, _: int) -> Tensor:
        """All of them."""
        return torch.ones(len(batch.pixels), dtype=torch.bool)


class _ReadMasks:
    """Concepts whose masks are read image by image."""

    def masks(self, batch: Batch, number: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """The masks that were read, at the nearest pixels."""
        read = [one[number] or {} for one in batch.read]
        names = dict.fromkeys(name for masks in read for name in masks)
        found = {name: torch.zeros(len(read), *size, dtype=torch.bool) for name in names}
        for i, masks in enumerate(read):
            for name, mask in masks.items():
                small = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")
                found[name][i] = small[0, 0] > 0
        return found

    def known(self, batch: Batch, number: int) -> Tensor:
        """Those of which something was read."""
        return torch.tensor([one[number] is not None for one in batch.read])


class Objects(_ReadMasks):
    """The object of each sample, by its class: its mask, or else its boxes.

    Args:
        class_names: of the labels; None: the numbers stand for them.
    """

    names: Sequence[str] = ()

    def __init__(self, class_names: Sequence[str] | None) -> None:
        self._class_names, self.note = class_names, ""

    def read(self, sample: Sample) -> dict[str, Tensor] | None:
        """The mask of its class; None where it has neither mask nor box."""
        mask = sample.mask
        if mask is None and len(sample.boxes):
            self.note = "Where an image has boxes only, they are its masks."
            mask = torch.zeros(sample.size, dtype=torch.bool)
            for x0, y0, x1, y1 in sample.boxes.round().int().tolist():
                mask[y0:y1, x0:x1] = True
        if mask is None:
            return None
        if sample.label is None:
            return {"object": mask}
        names = self._class_names
        return {str(sample.label) if names is None else names[sample.label]: mask}


class MaskFolders(_ReadMasks):
    """A folder of masks for each concept, one file an image, of the same name but for the suffix.

    An image that has a mask of none of them is left out; one that has some has nothing of the
    others. A mask is as large as its image.

    Args:
        folders: name of a concept -> its folder; or one folder, whose sub-folders they are.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no folders, or no masks in one.
    """

    note = ""

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
        masks = {}
        for name, path in found.items():
            mask = load_mask(path)
            sides = f"the mask has {mask.shape[1]}×{mask.shape[0]} pixels, its image "
            sides += f"{sample.original_size[1]}×{sample.original_size[0]}"
            check(tuple(mask.shape) == sample.original_size, f"{path}: {sides}", DataError)
            masks[name] = mask
        return masks or None


def concepts_of(given: Any, class_names: Sequence[str] | None) -> Concepts:
    """The concepts of a name (``"colours"``, ``"objects"``) or of folders of masks.

    Raises:
        ValueError: another name, or as :class:`MaskFolders`.
        TypeError: what is neither.
    """
    if isinstance(given, (Mapping, Path)):
        return MaskFolders(given)
    if isinstance(given, str):
        if given in ("colours", "objects"):
            return Colours() if given == "colours" else Objects(class_names)
        known = "concepts: expected one of colours, objects, or a folder of masks"
        check(Path(given).is_dir(), f"{known}, got {given!r}")
        return MaskFolders(given)
    is_one = hasattr(given, "masks") and hasattr(given, "read")
    expected = "concepts: expected 'colours', 'objects' or folders of masks"
    check(is_one, f"{expected}, got {type(given).__name__}", TypeError)
    return given  # type: ignore[no-any-return]
