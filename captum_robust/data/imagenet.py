"""ImageNet's classification and localization set in the layout of its Kaggle archive."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from captum_robust._checks import unknown_name
from captum_robust.data.boxes import Box, check_size, checked_boxes, no_boxes, parse_box
from captum_robust.data.classes import imagenet_names, imagenet_wnids
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.data.files import read_bytes, read_text
from captum_robust.data.images import list_images, load_image
from captum_robust.data.sample import DataError, Sample
from captum_robust.data.voc_xml import read_voc_xml

__all__ = ["ImageNet", "imagenet_names", "imagenet_wnids"]


class ImageNet(LocalizationDataset):
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
        skip_missing: leave out annotations whose image is missing, to read a part of the set with
            the annotations of the whole.

    Raises:
        FileNotFoundError: the images' folder, or both kinds of annotation, are missing.
        ValueError: no images, an unknown split, or a CSV or mapping that cannot be read.
    """

    kind = "imagenet"

    def __init__(self, root: str | Path, split: str = "val", *, skip_missing: bool = False) -> None:
        if split not in ("val", "train"):
            raise unknown_name("split of ImageNet", split, ["val", "train"])
        self.root = Path(root)
        self.split = split
        folder = self.root / "ILSVRC" / "Data" / "CLS-LOC" / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; expected the images of ILSVRC's Kaggle archive there"
            )
        images = list_images(folder)
        if not images:
            raise ValueError(f"{folder}: no images; expected *.JPEG")
        self._images = {_stem(name): path for name, path in images.items()}
        self._folder_class = {_stem(n): n.split("/")[0] for n in images if "/" in n}

        annotations = self.root / "ILSVRC" / "Annotations" / "CLS-LOC" / split
        self._csv_path = self.root / f"LOC_{split}_solution.csv"
        if not annotations.is_dir() and not self._csv_path.is_file():
            raise FileNotFoundError(
                f"{annotations}: no such folder, nor {self._csv_path.name} in {self.root}; "
                "expected one of them for the boxes"
            )
        self._xml = {path.stem: path for path in sorted(annotations.rglob("*.xml"))}
        self._csv = _read_solution(self._csv_path) if self._csv_path.is_file() else {}
        self._read_classes()
        ids = set(self._images)
        if not skip_missing:
            ids |= set(self._xml) | set(self._csv)
        self.ids = sorted(ids)

    def _read_classes(self) -> None:
        mapping = self.root / "LOC_synset_mapping.txt"
        self._wnids = imagenet_wnids()
        self.class_names: Sequence[str] = imagenet_names()
        if not mapping.is_file():
            return
        lines = [line.split(maxsplit=1) for line in read_text(mapping).splitlines()]
        names = {line[0]: line[-1].split(",")[0] for line in lines if line}
        if not names:
            raise ValueError(f"{mapping}: no classes; expected lines of 'wnid name, …'")
        if list(names) != list(self._wnids):
            self._wnids = {wnid: index for index, wnid in enumerate(names)}
            self.class_names = tuple(names.values())

    def _load(self, index: int) -> Sample:
        id = self.ids[index]
        if id not in self._images:
            annotation = self._xml.get(id, self._csv_path)
            raise DataError(f"{annotation}: annotates {id}, but no such image is in {self.split}")
        path = self._images[id]
        image = load_image(path)
        size = (image.shape[1], image.shape[2])
        wnid, boxes = self._annotation(id, size)
        return Sample(
            image=image,
            label=None if wnid is None else self._label(wnid, id),
            boxes=checked_boxes(boxes, size) if boxes else no_boxes(),
            id=id,
            source=str(path),
        )

    def _annotation(
        self, id: str, size: tuple[int, int]
    ) -> tuple[str | None, list[tuple[Box, str]]]:
        """The image's own class and the boxes of that class, each with its file and line."""
        line, text = self._csv.get(id, (0, ""))
        objects: list[tuple[str, Box, str]] = []
        solution = _parse_solution(text, f"{self._csv_path}:{line}") if line else []
        if id in self._xml:
            path = self._xml[id]
            annotation = read_voc_xml(read_bytes(path), str(path))
            check_size(annotation.size, size, str(path))
            objects = [(each.name, each.box, each.where) for each in annotation.objects]
        else:
            objects = solution
        first = [name for name, _, _ in solution + objects][:1]
        wnid = self._folder_class.get(id, first[0] if first else None)
        return wnid, [(box, where) for name, box, where in objects if name == wnid]

    def _label(self, wnid: str, id: str) -> int:
        if wnid not in self._wnids:
            raise DataError(f"{id}: its class {wnid!r} is none of the {len(self._wnids)} classes")
        return self._wnids[wnid]


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _read_solution(path: Path) -> dict[str, tuple[int, str]]:
    """Image → (line, "wnid x0 y0 x1 y1 wnid …"); the boxes are parsed when they are asked for."""
    reader = csv.reader(read_text(path).splitlines())
    if next(reader, [])[:2] != ["ImageId", "PredictionString"]:
        raise ValueError(f"{path}:1: expected the header ImageId,PredictionString")
    try:
        return {row[0]: (reader.line_num, row[1] if len(row) > 1 else "") for row in reader if row}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _parse_solution(text: str, where: str) -> list[tuple[str, Box, str]]:
    words = text.split()
    if len(words) % 5:
        raise DataError(f"{where}: expected groups of 'wnid x0 y0 x1 y1', got {len(words)} words")
    groups = [words[i : i + 5] for i in range(0, len(words), 5)]
    return [(wnid, parse_box(corners, where), where) for wnid, *corners in groups]
