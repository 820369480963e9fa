"""COCO instances: one sample for each category that an image shows."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from torch import Tensor

from captum_robust._checks import check, check_choice, refusal, valid_unicode
from captum_robust._progress import stage
from captum_robust.data.annotations import Box, check_size, parse_flag, parse_side
from captum_robust.data.classes import category_labels
from captum_robust.data.coco_mask import union_mask
from captum_robust.data.dataset import AnnotatedImages, Truth, entry_id
from captum_robust.data.files import existing, read_text
from captum_robust.data.sample import DataError

_DEEPEST = 64
"""Levels of JSON, of which COCO has five."""
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{}]', re.DOTALL)


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
    zero boxes and no class. Masks are those that pycocotools makes. An image without ``file_name``
    has the last part of its ``coco_url``. A ``file_name`` that is absolute, or leads out of the
    folder of images by its ``..``, is an error of its sample.

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
            no images, or one listed twice; one id of two images or of two categories, or one
            name of two categories; an unknown name in ``categories``, or one of several classes.
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
            name = file_name_of(entry.image) or f"image_id={_key(entry.image['id'])}"
            id = entry_id(name, entry.category)
            is_kept = not skip_missing or leads_out(file_name_of(entry.image))
            if is_kept or os.path.isfile(self._file(entry)):
                is_new = id not in self._entries
                check(is_new, f"{self._path}: lists the image of {id!r} more than once")
                self._entries[id] = entry
        check(self._entries, f"{self._path}: no images with annotations to take")
        self.ids = list(self._entries)
        names = {entry.category for entry in self._entries.values()}
        self._labels = category_labels(names, category_to_class, class_names)

    def _read(self, categories: Sequence[str] | None) -> list[_Entry]:
        content = read_coco(self._path)
        listed = by_id(content, "categories", self._path)
        names = {id: valid_unicode(str(_key(each["name"]))) for id, each in listed.items()}
        ids: dict[str, Any] = {}
        for id, name in names.items():
            two = f"{ids.setdefault(name, id)} and {id}"
            check(ids[name] == id, f"{self._path}: its categories {two} are both called {name!r}")
        self._categories = names.keys()
        for category in categories or ():
            check_choice("category of COCO", category, names.values())
        images = by_id(content, "images", self._path)
        objects: dict[Any, dict[str, list[dict[str, Any]]]] = {}
        for each in content["annotations"]:
            id, category_id = coco_id(each.get("image_id")), coco_id(each.get("category_id"))
            name = names.get(category_id, f"category {category_id}")
            images.setdefault(id, {"id": id})  # one that is not listed, an error of its sample
            by_name = objects.setdefault(id, {})
            is_crowd = parse_flag(each.get("iscrowd")) is True  # None: an error of its sample
            if not is_crowd and (categories is None or name in categories):
                by_name.setdefault(name, []).append(each)
        bare: dict[str, list[dict[str, Any]]] = {"": []} if categories is None else {}
        return [
            _Entry(image, name, own)
            for id, image in images.items()
            for name, own in sorted(objects.get(id, bare).items())
        ]

    def _file(self, entry: _Entry) -> Path:
        return self._folder / file_name_of(entry.image)

    def _wheres(self, entry: _Entry) -> list[str]:
        return [f"{self._path}: annotation {_key(each.get('id'))}" for each in entry.objects]

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        entry = self._entries[id]
        at = next(iter(self._wheres(entry)), self._path)
        missing = f"{at}: no image with id {_key(entry.image['id'])} and a file_name"
        file_name = file_name_of(entry.image)
        check(file_name, missing, DataError)
        outside = f"expected a file_name in the folder of images, got {file_name!r}"
        check(not leads_out(file_name), f"{at}: {outside}", DataError)
        path = self._file(entry)
        return path, str(path)

    def _truth(self, id: str, size: tuple[int, int]) -> Truth:
        entry = self._entries[id]
        at = f"{self._path}: image {_key(entry.image['id'])}"
        height, width = (parse_side(entry.image.get(side), at) for side in ("height", "width"))
        check_size((height, width), size, at)
        pairs = list(zip(entry.objects, self._wheres(entry), strict=True))
        for each, where in pairs:
            is_flag = parse_flag(each.get("iscrowd")) is not None
            got = reprlib.repr(each.get("iscrowd"))
            check(is_flag, f"{where}: expected iscrowd 0 or 1, got {got}", DataError)
            category = coco_id(each.get("category_id"))
            is_known = category in self._categories
            unknown = f"category_id {category!r} is none of the file's categories"
            check(is_known, f"{where}: {unknown}", DataError)
        boxes = [(corners(each, where), where) for each, where in pairs]
        return Truth(self._labels.get(entry.category), boxes, self._mask(entry, size))

    def _mask(self, entry: _Entry, size: tuple[int, int]) -> Tensor | None:
        """The union of the objects' masks; None unless all of them have one."""
        parts = [outlines(each.get("segmentation")) for each in entry.objects]
        if not parts or not all(parts):
            return None
        try:
            return union_mask(parts, size)
        except ValueError as error:
            ids = ", ".join(str(_key(each.get("id"))) for each in entry.objects)
            raise DataError(f"{self._path}: segmentation of annotation {ids}: {error}") from None


def _image_folder(given: str | Path | None, beside: Path, split: str) -> Path:
    if given is not None:
        return existing(given, "folder", "COCO's images")
    usual = [beside / split, beside / "images" / split, beside / "images", beside]
    return next((folder for folder in usual if folder.is_dir()), beside)


def read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of an instances file, each made of objects with what an index needs."""
    # Bytes that aren't UTF-8 stay in the names, which are those of the files.
    text = read_text(path, "surrogateescape")
    try:
        with stage(f"reading {path.name}"):
            try:
                content = json.loads(text)
            except RecursionError:
                content = json.loads(_shallow(text))
    except json.JSONDecodeError as error:
        raise ValueError(refusal(f"{path}:{error.lineno}: not JSON: {error.msg}")) from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(refusal(f"{path}: cannot be read as JSON: {error}")) from None
    needed = {"images": ("id",), "annotations": (), "categories": ("id", "name")}
    for key, fields in needed.items():
        items: Any = content.get(key) if isinstance(content, dict) else None
        is_list = isinstance(items, list)
        check(is_list, f"{path}: no list {key!r}; expected COCO's instances format")
        whole = all(isinstance(each, dict) and set(fields) <= each.keys() for each in items)
        check(whole, f"{path}: expected every item of {key!r} to be an object with {fields}")
    return content  # type: ignore[no-any-return]


def by_id(
    content: Mapping[str, list[dict[str, Any]]], kind: str, path: Path
) -> dict[Any, dict[str, Any]]:
    """The items of a list of :func:`read_coco` by their ids; ``ValueError`` if two share one."""
    items: dict[Any, dict[str, Any]] = {}
    for each in content[kind]:
        id = coco_id(each["id"])
        is_one = items.setdefault(id, each) == each
        check(is_one, f"{path}: gives the id {id!r} to two of its {kind}")
    return items


def _shallow(text: str) -> str:
    """JSON with a word for what is nested deeper than Python can read: one odd item's error."""
    depth = start = 0
    kept = []
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == _DEEPEST:
                kept.append(text[start : token.start()] + '"nested too deep"')
                start = len(text)
        elif token[0] in ("]", "}"):
            if depth == _DEEPEST:
                start = token.end()
            depth -= 1
    return "".join([*kept, text[start:]])


def _key(value: Any) -> Any:
    """An id or a name as one that can be looked up and shown, whatever the file holds there."""
    return value if isinstance(value, (str, int, float)) else reprlib.repr(value)


def coco_id(value: Any) -> Any:
    """An id, which is a number also where it is written as text.

    >>> coco_id("12"), coco_id(12), coco_id("012")
    (12, 12, '012')
    """
    is_number = isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,17}", value)
    return int(value) if is_number else _key(value)


def outlines(segmentation: Any) -> Any:
    """A segmentation without polygons of no point, which tools write of objects without one."""
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if polygon != []]
    return segmentation


def file_name_of(image: Mapping[str, Any]) -> str:
    """The image's file, as its URL names it where that is all there is; "" without both."""
    given = image.get("file_name") or image.get("coco_url")
    name = given if isinstance(given, str) else ""
    return name if image.get("file_name") else PurePosixPath(unquote(name.partition("?")[0])).name


def leads_out(name: str) -> bool:
    """Whether the path of a file leads out of the folder that it is given in.

    >>> leads_out("/etc/x.png"), leads_out("a/../../x.png"), leads_out("a/../..x.png")
    (True, True, False)
    """
    return bool(Path(name).anchor) or ".." in Path(os.path.normpath(name)).parts


def corners(annotation: dict[str, Any], where: str) -> Box:
    """The corners of an annotation's box."""
    try:
        x, y, width, height = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        got = reprlib.repr(annotation.get("bbox"))
        raise DataError(f"{where}: expected bbox [x, y, width, height], got {got}") from None
    return x, y, x + width, y + height
