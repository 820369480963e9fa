"""Tiny ImageNet, from its folder or straight from its archive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from captum_robust._checks import unknown_name
from captum_robust.data.boxes import checked_boxes, parse_box
from captum_robust.data.classes import imagenet_names, imagenet_wnids
from captum_robust.data.dataset import LocalizationDataset
from captum_robust.data.files import decode_text, open_tree
from captum_robust.data.images import EXTENSIONS, load_image
from captum_robust.data.sample import DataError, Sample

_Line = tuple[str, list[str], str]
"""wnid, the box's words, file:line."""


class TinyImageNet(LocalizationDataset):
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
        skip_missing: leave out annotations whose image is missing.

    Raises:
        FileNotFoundError: nothing at ``path``, or no ``wnids.txt`` or annotations in it.
        ValueError: an unknown split or meaning of labels, a damaged archive, no images.
    """

    kind = "tiny-imagenet"

    def __init__(
        self,
        path: str | Path,
        split: Literal["val", "train"] = "val",
        *,
        labels: Literal["imagenet", "wnids"] = "imagenet",
        skip_missing: bool = False,
    ) -> None:
        if split not in ("val", "train"):
            raise unknown_name("split of Tiny ImageNet", split, ["val", "train"])
        if labels not in ("imagenet", "wnids"):
            raise unknown_name("meaning of labels", labels, ["imagenet", "wnids"])
        self.root = Path(path)
        self.split = split
        self._tree = open_tree(self.root)
        files = set(self._tree.names)
        tops = [name.removesuffix("wnids.txt") for name in files if _last(name) == "wnids.txt"]
        if not tops:
            raise FileNotFoundError(f"{path}: no wnids.txt in it; expected Tiny ImageNet's layout")
        self._top = min(tops, key=len)
        self._read_classes(labels)

        inside = f"{self._top}{split}/"
        self._images: dict[str, str] = {}
        self._lines: dict[str, _Line] = {}
        for name in self._tree.names:
            if not name.startswith(inside) or _last(name).startswith("."):
                continue
            if "/images/" in name and name[name.rfind(".") :].lower() in EXTENSIONS:
                self._images[_stem(name)] = name
            elif split == "train" and name.endswith("_boxes.txt"):
                self._read_lines(name, wnid=name.split("/")[-2])
        if split == "val":
            annotations = f"{inside}val_annotations.txt"
            if annotations not in files:
                raise FileNotFoundError(f"{self._tree.where(annotations)}: no such file")
            self._read_lines(annotations)
        if not self._images:
            raise ValueError(f"{self._tree.where(inside)}: no images; expected images/*.JPEG")
        ids = set(self._images) if skip_missing else set(self._images) | set(self._lines)
        self.ids = sorted(ids, key=lambda id: (len(id), id))  # val_9 before val_10

    def _read_classes(self, labels: str) -> None:
        self.class_names: Sequence[str] = imagenet_names()
        self._classes = imagenet_wnids()
        if labels == "wnids":
            wnids = self._text(f"{self._top}wnids.txt").split()
            names = {wnid: imagenet_names()[index] for wnid, index in self._classes.items()}
            self._classes = {wnid: index for index, wnid in enumerate(wnids)}
            self.class_names = [names.get(wnid, wnid) for wnid in wnids]

    def _text(self, name: str) -> str:
        return decode_text(self._tree.read(name), self._tree.where(name))

    def _read_lines(self, name: str, wnid: str | None = None) -> None:
        where = self._tree.where(name)
        for number, line in enumerate(self._text(name).splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            label = wnid if wnid is not None else "".join(words[1:2])
            box = words[1 if wnid is not None else 2 :]
            self._lines[_stem(words[0])] = (label, box, f"{where}:{number}")

    def _load(self, index: int) -> Sample:
        id = self.ids[index]
        wnid, words, where = self._lines.get(id, (None, [], ""))
        if id not in self._images:
            raise DataError(f"{where}: annotates {id}, but no such image is in {self.split}")
        name = self._images[id]
        source = self._tree.where(name)
        image = load_image(self._tree.read(name), name=source)
        boxes = []
        if where:
            if len(words) != 4:
                raise DataError(f"{where}: expected four numbers for the box of {id}, got {words}")
            x0, y0, x1, y1 = parse_box(words, where)
            boxes.append(((x0, y0, x1 + 1, y1 + 1), where))
        elif self.split == "train":
            wnid = name.split("/")[-3]
        return Sample(
            image=image,
            label=None if wnid is None else self._label(wnid, where or source),
            boxes=checked_boxes(boxes, (image.shape[1], image.shape[2])),
            id=id,
            source=source,
        )

    def _label(self, wnid: str, where: str) -> int:
        if wnid not in self._classes:
            raise DataError(f"{where}: {wnid!r} is none of the {len(self._classes)} classes")
        return self._classes[wnid]


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    return _last(name).rsplit(".", 1)[0]
