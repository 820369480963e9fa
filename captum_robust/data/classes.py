"""Class indices from what users write: a number, a WordNet id, or a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files

from captum_robust._checks import check
from captum_robust.data.sample import DataError

_WNID = re.compile(r"n\d{8}")


@cache
def imagenet_table() -> Mapping[str, str]:
    """WordNet id → name of the 1,000 ImageNet classes, in order."""
    text = (files("captum_robust") / "imagenet_classes.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in text.splitlines() if line)


def imagenet_wnids() -> dict[str, int]:
    """WordNet id → index of the 1,000 ImageNet classes.

    >>> imagenet_wnids()["n01440764"]
    0
    """
    return {wnid: index for index, wnid in enumerate(imagenet_table())}


@cache
def imagenet_names() -> tuple[str, ...]:
    """The names of the 1,000 ImageNet classes, in order.

    >>> imagenet_names()[0]
    'tench'
    """
    return tuple(imagenet_table().values())


class ClassIndex:
    """Finds the index of a class among ``names`` (the 1,000 of ImageNet by default).

    >>> find = ClassIndex()
    >>> find("n01440764"), find("Great White Shark"), find("17"), find("my cat")
    (0, 2, 17, None)
    >>> ClassIndex(["cat", "dog"])("dog")
    1
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = tuple(names) if names is not None else imagenet_names()
        self._exact = {name: index for index, name in enumerate(self.names)}
        plain = [_plain(name) for name in self.names]
        times = Counter(plain)
        # ImageNet's "Cardigan" is a dog and its "cardigan" a garment: a name that fits two
        # classes only counts in its exact spelling.
        self._plain = {name: i for i, name in enumerate(plain) if times[name] == 1}
        self._wnids = imagenet_wnids() if self.names == imagenet_names() else {}

    def __call__(self, text: str) -> int | None:
        """The index, or None when ``text`` is no class."""
        text = text.strip()
        if text in self._exact:
            return self._exact[text]
        if _WNID.fullmatch(text):
            return self._wnids.get(text)
        if text.isascii() and text.isdigit():
            return int(text) if int(text) < len(self.names) else None
        return self._plain.get(_plain(text))


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def category_labels(
    categories: Iterable[str],
    category_to_class: Mapping[str, int] | None,
    class_names: Sequence[str] | None,
) -> dict[str, int | None]:
    """The class index of each category: from the mapping, else by its name, else None."""
    find = ClassIndex(class_names or ())
    return {name: find(name) for name in categories} | dict(category_to_class or {})


def class_of(wnid: str | None, classes: Mapping[str, int], where: str) -> int | None:
    """The index of a WordNet id, which must be among the classes; None without one."""
    known = wnid is None or wnid in classes
    check(known, f"{where}: {wnid!r} is none of the {len(classes)} classes", DataError)
    return None if wnid is None else classes[wnid]
