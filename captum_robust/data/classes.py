"""Class indices from what users write: a number, a WordNet id, or a name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from unicodedata import normalize

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
        self._exact = _places(self.names, str.strip)
        self._plain = _places(self.names, _plain)
        self._wnids = imagenet_wnids() if self.names == imagenet_names() else {}

    def __call__(self, text: str, what: str = "class") -> int | None:
        """The index, or None when ``text`` is no class; ``what`` is its name in the error.

        Raises:
            ValueError: ``text`` is the name of several classes. Its exact spelling comes first:
                ImageNet's "Cardigan" is a dog, "cardigan" a garment, and "CARDIGAN" an error.
        """
        text = text.strip()
        # A number of few digits: Python refuses to read one of thousands.
        if text not in self._exact and text.isascii() and text.isdigit() and len(text) < 10:
            return int(text) if int(text) < len(self.names) else None
        return self.named(text, what)

    def named(self, text: str, what: str = "class") -> int | None:
        """The same of a name or a WordNet id; a number is one only where a class is called so."""
        text, fitting = text.strip(), self.fitting(text)
        several = f"the name of several ({', '.join(map(str, fitting))}); give the number"
        check(len(fitting) <= 1, f"{what}: expected the name of one, got {text!r}, {several}")
        return fitting[0] if fitting else None

    def fitting(self, name: str) -> list[int]:
        """The indices of all classes that a name or a WordNet id may mean."""
        name = name.strip()
        if name not in self._exact and _WNID.fullmatch(name):
            return [self._wnids[name]] if name in self._wnids else []
        return self._exact.get(name) or self._plain.get(_plain(name), [])


def _places(names: Iterable[str], spelled: Callable[[str], str]) -> dict[str, list[int]]:
    """The indices of each name."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        places[spelled(name)].append(index)
    return dict(places)


def _plain(name: str) -> str:
    # Letters with accents are one character here and two there, such as in names of files.
    return " ".join(normalize("NFC", name).replace("_", " ").casefold().split())


def is_numbered(names: Sequence[str]) -> bool:
    """Whether the names of classes are but their numbers."""
    return list(names) == [str(i) for i in range(len(names))]


def category_labels(
    categories: Iterable[str],
    category_to_class: Mapping[str, int] | None,
    class_names: Sequence[str] | None,
) -> dict[str, int | None]:
    """The class index of each category: from the mapping, else by its name, else None.

    A category that is called "2" is not the class of that number.

    Raises:
        ValueError: a category that the mapping lacks has the name of several classes.
    """
    find, given = ClassIndex(class_names or ()), dict(category_to_class or {})
    return {name: find.named(name) for name in categories if name not in given} | given


def numbered(wnids: Sequence[str], where: str) -> dict[str, int]:
    """The index of each WordNet id; ``ValueError`` where one comes twice and shifts the others."""
    twice = next((wnid for wnid, n in Counter(wnids).items() if n > 1), None)
    check(twice is None, f"{where}: names {twice!r} more than once")
    return {wnid: index for index, wnid in enumerate(wnids)}


def class_of(wnid: str | None, classes: Mapping[str, int], where: str) -> int | None:
    """The index of a WordNet id, which must be among the classes; None without one."""
    known = wnid is None or wnid in classes
    check(known, f"{where}: {wnid!r} is none of the {len(classes)} classes", DataError)
    return None if wnid is None else classes[wnid]
