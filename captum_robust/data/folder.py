"""A folder of images, with a table of boxes, a folder of masks, both or neither."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from captum_robust._checks import (
    check,
    check_choice,
    printable,
    refusal,
    unknown_name,
    valid_unicode,
)
from captum_robust.data.annotations import mask_box, other_size, parse_box, table_rows
from captum_robust.data.classes import ClassIndex
from captum_robust.data.dataset import AnnotatedImages, Truth, listed_ids, place_of
from captum_robust.data.files import BLANKS, by_name, existing, is_hidden, lines_of, read_text
from captum_robust.data.image_lists import list_images, some_images, without_suffix
from captum_robust.data.images import load_mask
from captum_robust.data.sample import DataError

_WHOLE = re.compile(r"[0-9]+\.0+")
_CORNERS = (("x0", "y0", "x1", "y1"), ("xmin", "ymin", "xmax", "ymax"))


@dataclass(frozen=True)
class _Row:
    """One row of the table: its image, four corners as written, a label or "", and file:line."""

    file: str
    corners: list[str]
    label: str
    where: str


class ImageFolder(AnnotatedImages):
    """Images under one folder, at any depth; the id of each is its path below that folder.

    Boxes come from a CSV file with a header and the columns ``file, x0, y0, x1, y1`` (or
    ``xmin, ymin, xmax, ymax``) and, if known, ``label``: one row a box, in pixels, 0-based,
    half-open, ``file`` relative to the folder of images. A row whose four numbers are empty states
    an image without a box. Masks come from a folder with a file of the same relative path and stem
    for each image, whatever the suffix; every pixel that isn't 0 is object (in a JPEG, every one
    above half of the lightest), and without a table the box is drawn around the mask. An image that
    neither mentions has zero boxes.

    The class comes from the table's ``label`` or else from the name of the first sub-folder: a
    class index, a WordNet id or a class name.

    Args:
        root: the folder. If it has ``boxes.csv`` or ``masks/``, these are used unless told
            otherwise, and the images are those of ``root/images`` if that exists.
        boxes: path of the table of boxes.
        masks: path of the folder of masks.
        void: value of mask pixels that are neither object nor background, and don't count as
            object; 255 in masks with the palette of Pascal VOC, else none.
        labels: what the sub-folders' names mean. ``"names"``: classes, as above; a tree in which
            none of them is a class has no labels. ``"sorted"``: the class is the sub-folder's
            position in alphabetical order, as in torchvision's ``ImageFolder``, also where one
            has no images. None: nothing.
        class_names: the classifier's classes in order; ImageNet's 1,000 by default.
        exif_orientation: boxes and masks were drawn on upright images, as most viewers show them;
            by default on the pixels as they are stored. Images are upright either way.
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
        void: int | None = None,
        labels: Literal["names", "sorted"] | None = "names",
        class_names: Sequence[str] | None = None,
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        check_choice("meaning of labels", labels, ["names", "sorted", None])
        self.root = Path(root)
        self.exif_orientation = exif_orientation
        self._void = void
        existing(self.root, "folder", "a folder of images")
        table = self.root / "boxes.csv"
        if boxes is not None:
            table = existing(boxes, "file", "a CSV file of boxes")
        mask_folder = self.root / "masks"
        if masks is not None:
            mask_folder = existing(masks, "folder", "a folder of masks")
        # A run is another one where the content of these is.
        self._table = table if table.is_file() else None
        self._mask_folder = mask_folder if mask_folder.is_dir() else None
        self._images = some_images(
            self._folder, "files such as *.png or *.jpg", without=mask_folder
        )
        rows = _read_table(self._table) if self._table else []
        images_of = _spelled_as(self._images, [row.file for row in rows])
        self._rows: dict[str, list[_Row]] = {}
        for row in rows:
            self._rows.setdefault(images_of[row.file], []).append(row)
        mask_files, stems = list_images(mask_folder), map(without_suffix, self._images)
        stems_of = _spelled_as(stems, map(without_suffix, mask_files))
        self._masks = by_name(mask_files, lambda n: stems_of[without_suffix(n)], mask_folder)
        self._find_class = ClassIndex(class_names)
        self.class_names: Sequence[str] | None = self._find_class.names
        self.folders = sorted({name.split("/")[0] for name in self._images if "/" in name})
        """The first sub-folders that have images."""
        self._folder_class: dict[str, int] = {}
        self.read_labels(labels)
        lone = self._masks.keys() - {without_suffix(name) for name in self._images}
        self.ids = listed_ids(self._images, [*self._rows, *lone], skip_missing)

    def read_labels(self, labels: str | None) -> None:
        """Take the classes from the sub-folders' names, as the argument of that name says."""
        names = self.folders
        if labels == "sorted" and names:
            names = self.class_names = self.folders_in_order
            self._find_class = ClassIndex(names)
            self._folder_class = {name: index for index, name in enumerate(names)}
        elif labels == "names":
            indices = {name: self._find_class(name) for name in names}
            unknown = [name for name, index in indices.items() if index is None]
            if 0 < len(unknown) < len(names):
                raise unknown_name("class folder", unknown[0], self._find_class.names)
            self._folder_class = {n: index for n, index in indices.items() if index is not None}

    @cached_property
    def folders_in_order(self) -> list[str]:
        """The sub-folders in alphabetical order; those without an image too, with a warning."""
        empty = sorted(set(_folders_in(self._folder, self._mask_folder)) - set(self.folders))
        if empty:
            which = printable(", ".join(empty[:5]))
            warnings.warn(f"{self._folder}: classes without an image: {which}", stacklevel=4)
        return sorted([*self.folders, *empty])

    @property
    def _folder(self) -> Path:
        """The folder of the images."""
        inner = self.root / "images"
        return inner if inner.is_dir() and (self._table or self._mask_folder) else self.root

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        rows = self._rows.get(id)
        path = place_of(self._images, id, rows[0].where if rows else self._masks.get(id))
        return path, str(path)

    def _truth(self, id: str, size: tuple[int, int]) -> Truth:
        rows, mask = self._rows.get(id, []), None
        boxes = [(parse_box(r.corners, r.where), r.where) for r in rows if any(r.corners)]
        if path := self._masks.get(without_suffix(id)):
            mask = load_mask(path, exif_orientation=self.exif_orientation, void=self._void)
            height, width = mask.shape
            other = other_size((height, width), size)
            sides = f"the mask has {width}×{height} pixels, its image {other}"
            check(mask.shape == size, f"{path}: {sides}", DataError)
            if not rows:
                boxes = [(box, str(path)) for box in mask_box(mask)]
        return Truth(self._label(id, rows), boxes, mask)

    def _label(self, id: str, rows: list[_Row]) -> int | None:
        labelled = [row for row in rows if row.label]
        if not labelled:
            return self._folder_class.get(id.split("/")[0]) if "/" in id else None
        label = labelled[0].label
        for row in labelled:
            two = f"label {row.label!r} for {id}, but {label!r} on an earlier line"
            check(row.label == label, f"{row.where}: {two}", DataError)
        # As pandas writes a column of numbers in which one is missing.
        is_whole = label not in self._find_class.names and _WHOLE.fullmatch(label)
        try:
            index = self._find_class(label.partition(".")[0] if is_whole else label)
        except ValueError as error:
            raise DataError(f"{labelled[0].where}: label: {error}") from None
        if index is None:
            unknown = unknown_name("label", label, self._find_class.names)
            raise DataError(f"{labelled[0].where}: {unknown}")
        return index


def _folders_in(root: Path, without: Path | None) -> list[str]:
    """The sub-folders, but for hidden ones, ``without``, and links that lead up again."""
    above = os.path.realpath(root)
    masks = None if without is None else os.path.realpath(without)
    paths = [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
    reals = {valid_unicode(path.name): os.path.realpath(path) for path in paths}
    return [
        n for n, real in reals.items() if real != masks and not Path(above).is_relative_to(real)
    ]


def _spelled_as(files: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Each name as that file is spelled which it means.

    Letters with accents are one character in most tables, and two in names that macOS gave.
    """
    there = set(files)
    spelled = {normalize("NFC", file): file for file in there}
    return {n: n if n in there else spelled.get(normalize("NFC", n), n) for n in names}


def _read_table(path: Path) -> list[_Row]:
    """The rows; what is wrong with one waits until its sample is loaded."""
    lines = lines_of(read_text(path), with_ends=True) or [""]
    (_, names), *table = table_rows(lines, max(",;\t", key=lines[0].count))
    columns = [name.strip().casefold() for name in names]
    corners = next((names for names in _CORNERS if set(names) <= set(columns)), None)
    if "file" not in columns or corners is None:
        expected = "the columns file,x0,y0,x1,y1 (or file,xmin,ymin,xmax,ymax) and perhaps label"
        got = repr(lines[0].strip()[:80])
        raise ValueError(refusal(f"{path}:1: expected a header with {expected}, got {got}"))
    rows = []
    for number, cells in table:
        if not any(cell.strip() for cell in cells):
            continue
        cell = dict(zip(columns, (cell.strip(BLANKS) for cell in cells), strict=False))
        # A row that names no file is a sample of its own, under its place in the table.
        file = cell.get("file") or f"{path.name}:{number}"
        file = file.replace("\\", "/").removeprefix("./")
        numbers = [cell.get(corner, "") for corner in corners]
        rows.append(_Row(file, numbers, cell.get("label", ""), f"{path}:{number}"))
    return rows
