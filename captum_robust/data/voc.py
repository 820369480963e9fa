"""Pascal VOC: one sample for each class that an image shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from captum_robust._checks import check, valid_unicode
from captum_robust.data.annotations import Box, check_size
from captum_robust.data.classes import category_labels
from captum_robust.data.dataset import AnnotatedImages, Truth, entry_id
from captum_robust.data.files import (
    by_name,
    existing,
    is_hidden,
    lines_of,
    read_text,
    stem_of,
    words_of,
)
from captum_robust.data.image_lists import some_images
from captum_robust.data.sample import DataError
from captum_robust.data.voc_xml import read_voc_xml


@dataclass(frozen=True)
class _Entry:
    """One sample before its image is decoded; ``error`` where its annotation cannot be read."""

    stem: str
    category: str = ""
    boxes: Sequence[tuple[Box, str]] = ()
    size: tuple[int, int] = (0, 0)
    error: str = ""


class PascalVOC(AnnotatedImages):
    """``JPEGImages``, ``Annotations`` and ``ImageSets/Main/<split>.txt``: VOC 2007 to 2012.

    One sample for each pair of an image and a class in it, with the boxes of that class; its id is
    ``stem#class``. VOC counts pixels from 1 and includes the last: x0 and y0 shrink by 1, x1 and y1
    stay. An image without annotation or objects is one sample with zero boxes and no class.

    Args:
        root: the folder that holds ``JPEGImages`` (``VOCdevkit/VOC2007``).
        split: name of the list in ``ImageSets/Main``; None takes every image.
        difficult: count objects marked as difficult. Without them, a class of which an image
            shows only difficult objects is skipped there.
        category_to_class: VOC's class name → the classifier's index.
        class_names: the classifier's classes, in order; a VOC class of the same name gets the
            index. Where neither names it, the label is None.
        exif_orientation: boxes were drawn on upright images, as most viewers show them; by default
            on the pixels as they are stored. Images are upright either way.
        skip_missing: leave out images of the split that are missing.

    Raises:
        FileNotFoundError: ``JPEGImages``, ``Annotations`` or the split's list is missing.
        ValueError: no images.
    """

    kind = "voc"

    def __init__(
        self,
        root: str | Path,
        split: str | None = "val",
        *,
        difficult: bool = False,
        category_to_class: Mapping[str, int] | None = None,
        class_names: Sequence[str] | None = None,
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        self.root = Path(root)
        self.exif_orientation = exif_orientation
        self.split = split
        self.class_names = class_names
        layout = "Pascal VOC's layout"
        folder = existing(self.root / "JPEGImages", "folder", layout)
        existing(self.root / "Annotations", "folder", layout)
        self._images = by_name(some_images(folder, "*.jpg"), stem_of, folder)
        xml = (self.root / "Annotations").glob("*.xml")
        self._xml = {valid_unicode(path.stem): path for path in xml if not is_hidden(path.name)}
        stems = self._stems()
        if skip_missing:
            stems = [stem for stem in stems if stem in self._images]
        entries = [entry for stem in stems for entry in self._read(stem, difficult)]
        self._entries = {entry_id(entry.stem, entry.category): entry for entry in entries}
        self.ids = list(self._entries)
        categories = {entry.category for entry in entries}
        self._labels = category_labels(categories, category_to_class, class_names)

    def _stems(self) -> list[str]:
        if self.split is None:
            return sorted(self._xml.keys() | self._images)
        listing = self.root / "ImageSets" / "Main" / f"{self.split}.txt"
        existing(listing, "file", "the split's image names")
        words = map(words_of, lines_of(read_text(listing)))
        stems = list(dict.fromkeys(word[0] for word in words if word))
        check(stems, f"{listing}: no images; expected one name a line")
        return stems

    def _read(self, stem: str, difficult: bool) -> list[_Entry]:
        try:
            annotation = read_voc_xml(self._xml[stem]) if stem in self._xml else None
        except DataError as error:
            return [_Entry(stem, error=str(error))]
        if annotation is None or not annotation.objects:
            return [_Entry(stem)]
        boxes: dict[str, list[tuple[Box, str]]] = {}
        for each in annotation.objects:
            if difficult or not each.difficult:
                x0, y0, x1, y1 = each.box
                boxes.setdefault(each.name, []).append(((x0 - 1, y0 - 1, x1, y1), each.where))
        return [_Entry(stem, name, own, annotation.size) for name, own in sorted(boxes.items())]

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        entry = self._entries[id]
        there = entry.stem in self._images
        check(there, f"{self.root / 'JPEGImages' / entry.stem}.jpg: no such image", DataError)
        check(not entry.error, entry.error, DataError)
        path = self._images[entry.stem]
        return path, str(path)

    def _truth(self, id: str, size: tuple[int, int]) -> Truth:
        entry = self._entries[id]
        if entry.boxes:
            check_size(entry.size, size, str(self._xml[entry.stem]))
        return Truth(self._labels.get(entry.category), entry.boxes)
