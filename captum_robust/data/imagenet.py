"""ImageNet's classification and localization set in the layout of its Kaggle archive."""

from __future__ import annotations

from pathlib import Path

from captum_robust._checks import check, check_choice
from captum_robust.data.annotations import check_size, once_each, parse_box, table_rows
from captum_robust.data.classes import (
    class_of,
    imagenet_names,
    imagenet_table,
    imagenet_wnids,
    numbered,
)
from captum_robust.data.dataset import AnnotatedImages, Truth, listed_ids, place_of
from captum_robust.data.files import (
    by_name,
    existing,
    files_below,
    lines_of,
    read_text,
    stem_of,
    words_of,
)
from captum_robust.data.image_lists import some_images
from captum_robust.data.sample import DataError
from captum_robust.data.voc_xml import AnnotatedObject, read_voc_xml

__all__ = ["ImageNet", "imagenet_names", "imagenet_wnids"]


class ImageNet(AnnotatedImages):
    """ILSVRC CLS-LOC: ``ILSVRC/Data/CLS-LOC/val/*.JPEG`` and their boxes.

    The boxes come from ``ILSVRC/Annotations/CLS-LOC/val/*.xml``, or from ``LOC_val_solution.csv``
    where an image has no XML file; one of the two must exist. Coordinates are taken as they are:
    0-based corners, half-open. Only boxes of the image's own class count, which is the first that
    the CSV names, or the first in the XML. Classes are counted in the order of
    ``LOC_synset_mapping.txt``, or of ImageNet's 1,000 when that file is missing.

    The id of an image is its name without suffix. An image without annotation has zero boxes, and
    in ``train`` still its folder's class.

    Args:
        root: the folder that holds ``ILSVRC``.
        split: ``"val"`` or ``"train"``.
        exif_orientation: boxes were drawn on upright images, as most viewers show them; by default
            on the pixels as they are stored. Images are upright either way.
        skip_missing: leave out annotations whose image is missing, to read a part of the set with
            the annotations of the whole.

    Raises:
        FileNotFoundError: the images' folder, or both kinds of annotation, are missing.
        ValueError: no images, an unknown split, or a CSV or mapping that cannot be read, or that
            names an image or a class twice; two XML files of one image.
    """

    kind = "imagenet"

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        check_choice("split of ImageNet", split, ["val", "train"])
        self.root = Path(root)
        self.exif_orientation = exif_orientation
        self.split = split
        folder = self.root / "ILSVRC" / "Data" / "CLS-LOC" / split
        existing(folder, "folder", "the images of ILSVRC's Kaggle archive there")
        images = some_images(folder, "*.JPEG")
        self._images = by_name(images, stem_of, folder)
        self._folder_class = {stem_of(n): n.split("/")[0] for n in images if "/" in n}

        annotations = self.root / "ILSVRC" / "Annotations" / "CLS-LOC" / split
        self._csv_path = self.root / f"LOC_{split}_solution.csv"
        has_boxes = annotations.is_dir() or self._csv_path.is_file()
        other = f"nor {self._csv_path.name} in {self.root}; expected one of them for the boxes"
        check(has_boxes, f"{annotations}: no such folder, {other}", FileNotFoundError)
        files = {str(path): path for path in files_below(annotations)}
        xml = {name: path for name, path in files.items() if path.suffix.lower() == ".xml"}
        self._xml = by_name(xml, stem_of, annotations)
        self._csv = _read_solution(self._csv_path) if self._csv_path.is_file() else {}
        self._read_classes()
        self.ids = listed_ids(self._images, [*self._xml, *self._csv], skip_missing)

    def _read_classes(self) -> None:
        mapping = self.root / "LOC_synset_mapping.txt"
        names = imagenet_table()
        if mapping.is_file():
            lines = [words_of(line, most=1) for line in lines_of(read_text(mapping))]
            numbered([line[0] for line in lines if line], str(mapping))
            own = {line[0]: line[-1].split(",")[0] for line in lines if line}
            check(own, f"{mapping}: no classes; expected lines of 'wnid name, …'")
            names = own if list(own) != list(names) else names
        self._wnids = {wnid: index for index, wnid in enumerate(names)}
        self.class_names = tuple(names.values())

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        path = place_of(self._images, id, self._xml.get(id, self._csv_path))
        return path, str(path)

    def _truth(self, id: str, size: tuple[int, int]) -> Truth:
        solution = _parse_solution(*self._csv.get(id, ("", "")))
        objects = solution
        if id in self._xml:
            annotation = read_voc_xml(self._xml[id])
            check_size(annotation.size, size, str(self._xml[id]))
            objects = annotation.objects
        first = next((each.name for each in solution + objects), None)
        wnid = self._folder_class.get(id, first)
        # Only boxes of the image's own class count.
        boxes = [(each.box, each.where) for each in objects if each.name == wnid]
        return Truth(class_of(wnid, self._wnids, f"{id}: its class"), boxes)


def _read_solution(path: Path) -> dict[str, tuple[str, str]]:
    """Image → "wnid x0 y0 x1 y1 wnid …" and file:line; boxes are parsed when they are asked for."""
    (_, header), *rows = table_rows(lines_of(read_text(path), with_ends=True) or [""])
    header = header[:2]
    fits = header == ["ImageId", "PredictionString"]
    check(fits, f"{path}:1: expected the header ImageId,PredictionString, got {header}")
    filled = ((number, [*row, ""]) for number, row in rows if row)
    return once_each((row[0], (row[1].strip(), f"{path}:{number}")) for number, row in filled)


def _parse_solution(text: str, where: str) -> list[AnnotatedObject]:
    words = text.split()
    expected = f"expected groups of 'wnid x0 y0 x1 y1', got {len(words)} words"
    check(len(words) % 5 == 0, f"{where}: {expected}", DataError)
    groups = [words[i : i + 5] for i in range(0, len(words), 5)]
    return [AnnotatedObject(wnid, parse_box(box, where), where) for wnid, *box in groups]
