"""Tiny ImageNet, from its folder or straight from its archive."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import Literal

from captum_robust._checks import check, check_choice
from captum_robust.data.annotations import once_each, parse_box
from captum_robust.data.classes import class_of, imagenet_table, numbered
from captum_robust.data.dataset import AnnotatedImages, Truth, listed_ids, place_of
from captum_robust.data.files import (
    by_name,
    decode_text,
    is_hidden,
    lines_of,
    open_tree,
    stem_of,
    words_of,
)
from captum_robust.data.image_lists import COMPANIONS

_Line = tuple[list[str], str]
"""The words wnid, x0, y0, x1, y1, and file:line."""


class TinyImageNet(AnnotatedImages):
    """Tiny ImageNet's 64×64 images with a box each, unpacked or not.

    Reads ``train/WNID/images/*`` with ``train/WNID/WNID_boxes.txt`` (name x0 y0 x1 y1), and
    ``val/images/*`` with ``val/val_annotations.txt`` (name wnid x0 y0 x1 y1). The files' boxes
    include their last row and column; a sample's don't: x1 and y1 grow by 1. The id of an image is
    its name without suffix. A training image that its boxes file doesn't mention has zero boxes
    and its folder's class; a validation image without annotation has no class either.

    Args:
        path: the folder, or a ``.tar``, ``.tar.gz`` or ``.zip`` of it, which is read in place. A
            compressed tar is held in memory; prefer the two others.
        split: ``"val"`` or ``"train"``.
        labels: ``"imagenet"``: classes are ImageNet's 1,000; ``"wnids"``: the lines of
            ``wnids.txt``, as for a classifier of these classes only.
        exif_orientation: boxes were drawn on upright images, as most viewers show them; by default
            on the pixels as they are stored. Images are upright either way.
        skip_missing: leave out annotations whose image is missing.

    Raises:
        FileNotFoundError: nothing at ``path``, or no ``wnids.txt`` or annotations in it.
        ValueError: an unknown split or meaning of labels, a damaged archive, no images, a list
            that names an image twice.
    """

    kind = "tiny-imagenet"

    def __init__(
        self,
        path: str | Path,
        split: Literal["val", "train"] = "val",
        *,
        labels: Literal["imagenet", "wnids"] = "imagenet",
        exif_orientation: bool = False,
        skip_missing: bool = False,
    ) -> None:
        check_choice("split of Tiny ImageNet", split, ["val", "train"])
        check_choice("meaning of labels", labels, ["imagenet", "wnids"])
        self.root = Path(path)
        self.exif_orientation = exif_orientation
        self.split = split
        self._tree = open_tree(self.root)
        lists = [name for name in self._tree.names if basename(name) == "wnids.txt"]
        layout = "expected Tiny ImageNet's layout"
        check(lists, f"{path}: no wnids.txt in it; {layout}", FileNotFoundError)
        listing = min(lists, key=len)
        self._top = listing.removesuffix("wnids.txt")
        wnids = words_of(self._text(listing)) if labels == "wnids" else list(imagenet_table())
        self._wnids = numbered(wnids, self._tree.where(listing))
        self.class_names = [imagenet_table().get(wnid, wnid) for wnid in wnids]

        inside = f"{self._top}{split}/"
        images: list[str] = []
        lists_of_boxes = []
        for name in self._tree.names:
            if not name.startswith(inside) or is_hidden(name.removeprefix(inside)):
                continue
            if "/images/" in name and PurePosixPath(name).suffix.lower() not in COMPANIONS:
                images.append(name)
            elif split == "train" and name.endswith("_boxes.txt"):
                lists_of_boxes.append(self._lines_in(name, wnid=name.split("/")[-2]))
        if split == "val":
            annotations = f"{inside}val_annotations.txt"
            there = annotations in self._tree.names
            check(there, f"{self._tree.where(annotations)}: no such file", FileNotFoundError)
            lists_of_boxes.append(self._lines_in(annotations))
        self._lines = once_each(chain.from_iterable(lists_of_boxes))
        where = self._tree.where(inside)
        check(images, f"{where}: no images; expected images/*.JPEG")
        self._images = by_name({name: name for name in images}, stem_of, where)
        ids = listed_ids(self._images, self._lines, skip_missing)
        self.ids = sorted(ids, key=len)  # val_9 before val_10

    def _text(self, name: str) -> str:
        return decode_text(self._tree.read(name), self._tree.where(name))

    def _lines_in(self, name: str, wnid: str | None = None) -> Iterator[tuple[str, _Line]]:
        """The stem of the image of each line, and what it says."""
        where = self._tree.where(name)
        for number, line in enumerate(lines_of(self._text(name)), start=1):
            if words := words_of(line):
                words[1:1] = [wnid] if wnid else []
                yield stem_of(words[0]), (words[1:], f"{where}:{number}")

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        name = place_of(self._images, id, self._lines[id][1] if id in self._lines else "")
        source = self._tree.where(name)
        return self._tree.read(name), source

    def _truth(self, id: str, _: tuple[int, int]) -> Truth:
        name = self._images[id]
        if id not in self._lines:
            wnid = name.split("/")[-3] if self.split == "train" else None
            return Truth(class_of(wnid, self._wnids, self._tree.where(name)))
        words, where = self._lines[id]
        x0, y0, x1, y1 = parse_box(words[1:], where)
        label = class_of(words[0], self._wnids, where)
        return Truth(label, [((x0, y0, x1 + 1, y1 + 1), where)])
