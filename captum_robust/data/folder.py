"""A folder of images, with a table of boxes, a folder of masks, both or neither."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from torch import Tensor

from captum_robust._checks import unknown_name
from captum_robust.data.boxes import checked_boxes, mask_box, parse_box
from captum_robust.data.classes import ClassIndex
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.data.files import read_text
from captum_robust.data.images import list_images, load_image, load_mask
from captum_robust.data.sample import DataError, Sample

_CORNERS = (("x0", "y0", "x1", "y1"), ("xmin", "ymin", "xmax", "ymax"))


@dataclass(frozen=True)
class _Row:
    """One row of the table: four corners as written, a label or "", and file:line."""

    corners: list[str]
    label: str
    where: str


class ImageFolder(LocalizationDataset):
    """Images under one folder, at any depth; the id of each is its path below that folder.

    Boxes come from a CSV file with a header and the columns ``file, x0, y0, x1, y1`` (or
    ``xmin, ymin, xmax, ymax``) and, if known, ``label``: one row a box, in pixels, 0-based,
    half-open, ``file`` relative to the folder of images. A row whose four numbers are empty states
    an image without a box. Masks come from a folder with a file of the same relative path and stem
    for each image, whatever the suffix; every pixel that isn't 0 is object, and without a table
    the box is drawn around the mask. An image that neither mentions has zero boxes.

    The class comes from the table's ``label`` or else from the name of the first sub-folder: a
    class index, a WordNet id or a class name.

    Args:
        root: the folder. If it has ``boxes.csv`` or ``masks/``, these are used unless told
            otherwise, and the images are those of ``root/images`` if that exists.
        boxes: path of the table of boxes.
        masks: path of the folder of masks.
        labels: what the sub-folders' names mean. ``"names"``: classes, as above; a tree in which
            none of them is a class has no labels. ``"sorted"``: the class is the sub-folder's
            position in alphabetical order, as in torchvision's ``ImageFolder``. None: nothing.
        class_names: the classifier's classes in order; ImageNet's 1,000 by default.
        exif_orientation: turn images upright as their EXIF tag says; boxes and masks must then
            have been drawn on the upright image.
        skip_missing: leave out rows and masks whose image is missing.

    Raises:
        FileNotFoundError: the folder, table or masks are missing.
        ValueError: no images, a table without the columns, or a tree in which some sub-folders are
            named after classes and others are not.
    """

    kind = "folder"

    def __init__(
        self,
        root: str | Path,
        *,
        boxes: str | Path | None = None,
        masks: str | Path | None = None,
        labels: Literal["names", "sorted"] | None = "names",
        class_names: Sequence[str] | None = None,
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        if labels not in ("names", "sorted", None):
            raise unknown_name("meaning of labels", labels, ["names", "sorted"])
        self.root = Path(root)
        self._exif_orientation = exif_orientation
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; expected a folder of images")
        table = _existing(boxes, self.root / "boxes.csv", Path.is_file, "a CSV file of boxes")
        mask_folder = _existing(masks, self.root / "masks", Path.is_dir, "a folder of masks")
        self._table, self._mask_folder = table, mask_folder
        folder = self.root
        if (table or mask_folder) and (self.root / "images").is_dir():
            folder = self.root / "images"
        self._images = list_images(folder, without=mask_folder)
        if not self._images:
            raise ValueError(f"{folder}: no images; expected files such as *.png or *.jpg")

        self._rows = _read_table(table) if table else {}
        self._masks = _by_stem(list_images(mask_folder)) if mask_folder else {}
        self._find_class = ClassIndex(class_names)
        self.class_names: Sequence[str] | None = self._find_class.names
        self._folder_class = self._read_folders(labels)
        ids = set(self._images)
        if not skip_missing:
            ids |= set(self._rows) | (set(self._masks) - set(_by_stem(self._images)))
        self.ids = sorted(ids)

    def _read_folders(self, labels: str | None) -> dict[str, int]:
        """Sub-folder → class index; empty where the folders say nothing."""
        folders = sorted({name.split("/")[0] for name in self._images if "/" in name})
        if labels is None or not folders:
            return {}
        if labels == "sorted":
            self._find_class = ClassIndex(folders)
            self.class_names = folders
            return {name: index for index, name in enumerate(folders)}
        found = {name: self._find_class(name) for name in folders}
        unknown = [name for name, index in found.items() if index is None]
        if 0 < len(unknown) < len(folders):
            raise unknown_name("class folder", unknown[0], self._find_class.names)
        return {name: index for name, index in found.items() if index is not None}

    def _load(self, index: int) -> Sample:
        id = self.ids[index]
        rows = self._rows.get(id, [])
        if id not in self._images:
            where = rows[0].where if rows else str(self._masks[id])
            raise DataError(f"{where}: annotates {id!r}, but there is no such image")
        path = self._images[id]
        image = load_image(path, exif_orientation=self._exif_orientation)
        size = (image.shape[1], image.shape[2])
        mask = self._mask(id, size)
        if rows or mask is None:
            boxed = [row for row in rows if any(row.corners)]
            boxes = checked_boxes([(parse_box(r.corners, r.where), r.where) for r in boxed], size)
        else:
            boxes = mask_box(mask)
        return Sample(
            image=image,
            label=self._label(id, rows),
            boxes=boxes,
            id=id,
            mask=mask,
            source=str(path),
        )

    def _mask(self, id: str, size: tuple[int, int]) -> Tensor | None:
        path = self._masks.get(_stem(id))
        if path is None:
            return None
        mask = load_mask(path)
        if mask.shape != size:
            raise DataError(
                f"{path}: the mask has {mask.shape[1]}×{mask.shape[0]} pixels, "
                f"its image {size[1]}×{size[0]}"
            )
        return mask

    def _label(self, id: str, rows: list[_Row]) -> int | None:
        labelled = [row for row in rows if row.label]
        if not labelled:
            return self._folder_class.get(id.split("/")[0]) if "/" in id else None
        for row in labelled:
            if row.label != labelled[0].label:
                raise DataError(
                    f"{row.where}: label {row.label!r} for {id}, "
                    f"but {labelled[0].label!r} on an earlier line"
                )
        index = self._find_class(labelled[0].label)
        if index is None:
            error = unknown_name("label", labelled[0].label, self._find_class.names)
            raise DataError(f"{labelled[0].where}: {error}")
        return index


def _existing(
    given: str | Path | None, usual: Path, exists: Callable[[Path], bool], expected: str
) -> Path | None:
    """The path that the caller gave, which must exist, or the usual one if it does."""
    if given is None:
        return usual if exists(usual) else None
    if not exists(Path(given)):
        raise FileNotFoundError(f"{given}: no such file or folder; expected {expected}")
    return Path(given)


def _read_table(path: Path) -> dict[str, list[_Row]]:
    """File → its rows; what is wrong with a row waits until its sample is loaded."""
    lines = read_text(path).splitlines()
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter))]
    corners = next((names for names in _CORNERS if set(names) <= set(columns)), None)
    if "file" not in columns or corners is None:
        raise ValueError(
            f"{path}:1: expected a header with the columns file,x0,y0,x1,y1 (or file,xmin,ymin,"
            f"xmax,ymax) and perhaps label, got {header[:80]!r}"
        )
    rows: dict[str, list[_Row]] = {}
    reader = csv.reader(lines[1:], delimiter=delimiter)
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            cell = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
            where = f"{path}:{reader.line_num + 1}"
            # A row that names no file is a sample of its own, under its place in the table.
            file = cell.get("file") or f"{path.name}:{reader.line_num + 1}"
            file = file.replace("\\", "/").removeprefix("./")
            row = _Row([cell.get(c, "") for c in corners], cell.get("label", ""), where)
            rows.setdefault(file, []).append(row)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from None
    return rows


def _stem(name: str) -> str:
    """The relative path without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _by_stem(paths: dict[str, Path]) -> dict[str, Path]:
    return {_stem(name): path for name, path in paths.items()}
