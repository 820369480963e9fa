"""COCO instances: one sample for each category that an image shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_robust._checks import check, check_choice
from captum_robust.data.annotations import Box, check_size
from captum_robust.data.classes import category_labels
from captum_robust.data.coco_mask import union_mask
from captum_robust.data.dataset import AnnotatedImages, Truth, entry_id
from captum_robust.data.files import existing, read_text
from captum_robust.data.sample import DataError


@dataclass(frozen=True)
class _Entry:
    """One sample before its image is decoded: an image of the file and its objects there."""

    image: dict[str, Any]
    category: str
    objects: list[dict[str, Any]]


class Coco(AnnotatedImages):
    """``annotations/instances_<split>.json`` and its images.

    One sample for each pair of an image and a category in it, with that category's boxes
    (x, y, width, height become corners) and the union of its masks; its id is
    ``file_name#category``. Crowds are left out. An image without annotations is one sample with
    zero boxes and no class. Polygons are filled by pycocotools if installed, else by scikit-image,
    which differ along the outline.

    Args:
        root: the folder that holds ``annotations``, or the JSON file itself.
        split: names the JSON file and the images' folder below ``root``.
        images: the images' folder; by default the first that exists of ``<split>``,
            ``images/<split>``, ``images`` and the root itself (for a JSON file: beside it).
        categories: take only these categories, and only images that show one of them.
        category_to_class: COCO's category name → the classifier's index.
        class_names: the classifier's classes, in order; a category of the same name gets the
            index. Where neither names it, the label is None.
        exif_orientation: boxes and masks were drawn on upright images, as most viewers show them;
            by default on the pixels as they are stored. Images are upright either way.
        skip_missing: leave out images that are not in the folder.

    Raises:
        FileNotFoundError: the JSON file or the images' folder is missing.
        ValueError: a file that isn't JSON or lacks ``images``, ``annotations`` or ``categories``;
            no images, or one listed twice; an unknown name in ``categories``.
    """

    kind = "coco"

    def __init__(
        self,
        root: str | Path,
        split: str = "val2017",
        *,
        images: str | Path | None = None,
        categories: Sequence[str] | None = None,
        category_to_class: Mapping[str, int] | None = None,
        class_names: Sequence[str] | None = None,
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        self.root = Path(root)
        self.exif_orientation = exif_orientation
        self.class_names = class_names
        if self.root.suffix.lower() == ".json":
            self._path, beside = self.root, self.root.parent
        else:
            self._path, beside = self.root / "annotations" / f"instances_{split}.json", self.root
        existing(self._path, "file", "COCO's instances")
        self._folder = _image_folder(images, beside, split)
        self._entries: dict[str, _Entry] = {}
        for entry in self._read(categories):
            name = entry.image.get("file_name", f"image_id={entry.image['id']}")
            id = entry_id(str(name), entry.category)
            if not skip_missing or self._file(entry).is_file():
                is_new = id not in self._entries
                check(is_new, f"{self._path}: lists the image of {id!r} more than once")
                self._entries[id] = entry
        check(self._entries, f"{self._path}: no images with annotations to take")
        self.ids = list(self._entries)
        names = {entry.category for entry in self._entries.values()}
        self._labels = category_labels(names, category_to_class, class_names)

    def _read(self, categories: Sequence[str] | None) -> list[_Entry]:
        content = _read_json(self._path)
        names = {each["id"]: str(each["name"]) for each in content["categories"]}
        for category in categories or ():
            check_choice("category of COCO", category, names.values())
        images = {each["id"]: each for each in content["images"]}
        objects: dict[Any, dict[str, list[dict[str, Any]]]] = {}
        for each in content["annotations"]:
            id, category_id = each.get("image_id"), each.get("category_id")
            name = names.get(category_id, f"category {category_id}")
            images.setdefault(id, {"id": id})  # one that is not listed, an error of its sample
            by_name = objects.setdefault(id, {})
            if not each.get("iscrowd") and (categories is None or name in categories):
                by_name.setdefault(name, []).append(each)
        bare: dict[str, list[dict[str, Any]]] = {"": []} if categories is None else {}
        return [
            _Entry(image, name, own)
            for id, image in images.items()
            for name, own in sorted(objects.get(id, bare).items())
        ]

    def _file(self, entry: _Entry) -> Path:
        return self._folder / str(entry.image.get("file_name", ""))

    def _wheres(self, entry: _Entry) -> list[str]:
        return [f"{self._path}: annotation {each.get('id')}" for each in entry.objects]

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        entry = self._entries[id]
        at = next(iter(self._wheres(entry)), self._path)
        named = "file_name" in entry.image
        check(named, f"{at}: no image with id {entry.image['id']} and a file_name", DataError)
        path = self._file(entry)
        return path, str(path)

    def _truth(self, id: str, size: tuple[int, int]) -> Truth:
        entry = self._entries[id]
        stated = (entry.image.get("height", 0), entry.image.get("width", 0))
        check_size(stated, size, f"{self._path}: image {entry.image['id']}")
        pairs = zip(entry.objects, self._wheres(entry), strict=True)
        boxes = [(_corners(each, where), where) for each, where in pairs]
        return Truth(self._labels.get(entry.category), boxes, self._mask(entry, size))

    def _mask(self, entry: _Entry, size: tuple[int, int]) -> Tensor | None:
        """The union of the objects' masks; None unless all of them have one."""
        parts = [each.get("segmentation") for each in entry.objects]
        if not parts or not all(parts):
            return None
        try:
            return union_mask(parts, size)
        # The file may hold anything at this place, and pycocotools' C code raises what it likes.
        except Exception as error:
            ids = ", ".join(str(each.get("id")) for each in entry.objects)
            reason = " ".join(str(error).split())
            raise DataError(f"{self._path}: segmentation of annotation {ids}: {reason}") from None


def _image_folder(given: str | Path | None, beside: Path, split: str) -> Path:
    if given is not None:
        return existing(given, "folder", "COCO's images")
    usual = [beside / split, beside / "images" / split, beside / "images", beside]
    return next((folder for folder in usual if folder.is_dir()), beside)


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of an instances file, each made of objects with what an index needs."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    needed = {"images": ("id",), "annotations": (), "categories": ("id", "name")}
    for key, fields in needed.items():
        items: Any = content.get(key) if isinstance(content, dict) else None
        is_list = isinstance(items, list)
        check(is_list, f"{path}: no list {key!r}; expected COCO's instances format")
        whole = all(isinstance(each, dict) and set(fields) <= each.keys() for each in items)
        check(whole, f"{path}: expected every item of {key!r} to be an object with {fields}")
    return content  # type: ignore[no-any-return]


def _corners(annotation: dict[str, Any], where: str) -> Box:
    try:
        x, y, width, height = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        got = annotation.get("bbox")
        raise DataError(f"{where}: expected bbox [x, y, width, height], got {got!r}") from None
    return x, y, x + width, y + height
