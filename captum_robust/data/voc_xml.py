"""Boxes from the XML of Pascal VOC, which ImageNet uses too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from captum_robust._checks import check
from captum_robust.data.annotations import Box, parse_box
from captum_robust.data.files import read_bytes
from captum_robust.data.sample import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class AnnotatedObject:
    """One ``<object>``: its box as written, and where it was written."""

    name: str
    box: Box
    where: str
    difficult: bool = False


@dataclass(frozen=True)
class Annotation:
    """One XML file: (H, W) as it states, (0, 0) if it doesn't, and its objects."""

    size: tuple[int, int]
    objects: list[AnnotatedObject]


def read_voc_xml(path: Path) -> Annotation:
    """Read one annotation.

    Only an object's own ``bndbox`` counts, not those of its ``part``s.

    Raises:
        DataError: a file that cannot be read, XML that isn't well-formed, or an object without a
            name or four numbers; the message names file and line.
    """
    name = str(path)
    root = _parsed(read_bytes(path), name)
    return Annotation(
        size=(_side(root, "height", name), _side(root, "width", name)),
        objects=[_annotated(element, name) for element in root.findall("object")],
    )


def _parsed(data: bytes, name: str) -> Element:
    """The root; every element has the line of its start as its only attribute."""
    parser, tree = expat.ParserCreate(), TreeBuilder()

    def start(tag: str, _attributes: dict[str, str]) -> None:
        tree.start(tag, {"line": str(parser.CurrentLineNumber)})

    def entity(entity_name: str, *_: object) -> None:
        raise DataError(f"{name}:{parser.CurrentLineNumber}: declares the entity {entity_name!r}")

    parser.StartElementHandler = start
    parser.EndElementHandler = tree.end
    parser.CharacterDataHandler = tree.data
    parser.EntityDeclHandler = entity  # a few nested entities can expand to gigabytes
    try:
        parser.Parse(data, True)
    except LookupError as error:  # an encoding that Python does not know
        raise DataError(f"{name}:1: {error}") from None
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise DataError(f"{name}:{error.lineno}: not well-formed XML: {reason}") from None
    return tree.close()


def _text(element: Element, path: str) -> str:
    """All text that stands right at the path, not in elements below it."""
    parts = [t for e in element.findall(path) for t in (e.text, *(below.tail for below in e))]
    return "".join(filter(None, parts)).strip()


def _side(root: Element, side: str, name: str) -> int:
    written = _text(root, f"size/{side}") or "0"
    try:
        return int(float(written))
    except (ValueError, OverflowError):
        raise DataError(f"{name}: <{side}> must be a number of pixels, got {written!r}") from None


def _annotated(element: Element, name: str) -> AnnotatedObject:
    label = _text(element, "name")
    check(label, f"{name}:{element.get('line')}: the object has no <name>", DataError)
    corners = [f"bndbox/{corner}" for corner in _CORNERS]
    lines = [int(part.get("line", 0)) for path in corners for part in element.findall(path)]
    where = f"{name}:{min(lines, default=element.get('line'))}"
    box = parse_box([_text(element, path) for path in corners], where)
    return AnnotatedObject(label, box, where, _text(element, "difficult") == "1")
