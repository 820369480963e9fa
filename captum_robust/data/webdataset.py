"""WebDataset: tar archives in which files of one name, but for the suffix, are one sample."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import basename

from captum_robust._checks import check, printable
from captum_robust.data.dataset import AnnotatedImages, Truth
from captum_robust.data.files import (
    FileTree,
    decode_text,
    existing,
    is_hidden,
    lines_of,
    open_tree,
    read_text,
)
from captum_robust.data.image_lists import EXTENSIONS
from captum_robust.data.sample import DataError

_LARGEST_CLASS = 10**6


class WebDataset(AnnotatedImages):
    """Images ``KEY.jpg`` (or another suffix of images) and their classes ``KEY.cls`` in tars.

    The layout of https://github.com/webdataset/webdataset: the key of a file is its path up to the
    first dot of its name, and ``.cls`` holds the number of the class as text. Other members are
    left alone; none is ever unpickled. A tar is read where it lies, by the place of each image in
    it, so that images come in any order; a compressed one is held in memory.

    The names of the classes are the lines of ``classnames.txt`` beside the tars; without that file
    they are the numbers up to the largest. A sample without ``.cls`` has no class. The id of a
    sample is its tar and its key.

    Args:
        path: a tar, or a folder of them, which are taken in order of their names, or a pattern of
            tars of one folder, such as ``train-*.tar`` or ``train-{000000..000146}.tar``.
        exif_orientation: has no effect, as there are no boxes; images are upright.

    Raises:
        FileNotFoundError: nothing at ``path``, or a tar that the pattern counts is missing.
        ValueError: no tars or no images in them, a damaged tar, two images of one key.
    """

    kind = "webdataset"

    def __init__(self, path: str | Path, *, exif_orientation: bool = False) -> None:
        self.exif_orientation = exif_orientation
        tars = _tars_at(Path(path))
        folder = tars[0].parent
        self.root = Path(path) if Path(path).exists() else folder
        self._trees: dict[str, FileTree] = {tar.name: open_tree(tar) for tar in tars}
        self._samples: dict[str, tuple[str, str, str | None]] = {}
        """Id -> the tar, the members of image and class."""
        for name, tree in self._trees.items():
            self._samples |= _samples_of(name, tree)
        check(self._samples, f"{path}: no images; expected members such as 000000.jpg")
        self.ids = [*self._samples]
        self._classes, self._broken = self._read_classes()
        listing = folder / "classnames.txt"
        if listing.is_file():
            self.class_names = [n.strip() for n in lines_of(read_text(listing)) if n.strip()]
        else:
            self.class_names = [str(i) for i in range(1 + max(self._classes.values(), default=-1))]

    def _read_classes(self) -> tuple[dict[str, int], dict[str, str]]:
        """The class of each id that has one; why that of others can't be read."""
        classes: dict[str, int] = {}
        broken: dict[str, str] = {}
        for id, (tar, _, member) in self._samples.items():
            if member is None:
                continue
            tree = self._trees[tar]
            try:
                text = decode_text(tree.read(member)[:100], tree.where(member)).strip()
                is_class = re.fullmatch("[0-9]{1,7}", text) and int(text) < _LARGEST_CLASS
                got = f"expected the number of a class, got {printable(text)!r}"
                check(is_class, f"{tree.where(member)}: {got}", DataError)
                classes[id] = int(text)
            except ValueError as error:
                broken[id] = str(error)
        return classes, broken

    def _image_file(self, id: str) -> tuple[Path | bytes, str]:
        tar, image, _ = self._samples[id]
        tree = self._trees[tar]
        return tree.read(image), tree.where(image)

    def _truth(self, id: str, _: tuple[int, int]) -> Truth:
        check(id not in self._broken, self._broken.get(id, ""), DataError)
        label = self._classes.get(id)
        count = len(self.class_names or [])
        names = f"{id}: class {label}, but classnames.txt has {count}"
        check(label is None or label < count, names, DataError)
        return Truth(label)


def _tars_at(path: Path) -> list[Path]:
    """The tars of a folder, those of a pattern in the last part of a path, or the one at it."""
    counted = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name)
    folder, names = path.parent, iter([path.name])
    if path.is_dir():
        folder, found = path, sorted(file.name for file in path.iterdir() if file.is_file())
        kept = [n for n in found if re.search(r"\.(tar|tgz|tar\.\w+)$", n.lower())]
        names = iter([name for name in kept if not is_hidden(name)])
    elif counted and not path.exists():
        start, first, last, end = counted.groups()
        numbers = range(int(first), int(last) + 1)
        names = (f"{start}{number:0{len(first)}}{end}" for number in numbers)
    elif not path.exists() and folder.is_dir():
        found = sorted(file.name for file in folder.iterdir())
        names = iter([n for n in found if fnmatchcase(n, path.name)] or [path.name])
    expected = "a tar, a folder of tars or a pattern of them"
    tars = [existing(folder / name, "file", expected) for name in names]
    check(tars, f"{path}: no tars; expected files such as train-000000.tar")
    return tars


def _samples_of(name: str, tree: FileTree) -> Mapping[str, tuple[str, str, str | None]]:
    """The samples of a tar by their ids."""
    images: dict[str, str] = {}
    classes: dict[str, str] = {}
    for member in tree.names:
        if is_hidden(member):
            continue
        file, _, suffix = basename(member).partition(".")
        key = member[: len(member) - len(basename(member))] + file
        if f".{suffix.lower()}" in EXTENSIONS:
            other = images.setdefault(key, member)
            two = f"expected one image of a key, got {other} and {member}"
            check(other == member, f"{tree.path}: {two}")
        elif suffix.lower() == "cls":
            classes[key] = member
    return {f"{name}/{key}": (name, file, classes.get(key)) for key, file in images.items()}
