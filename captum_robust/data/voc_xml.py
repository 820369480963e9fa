"""Boxes from the XML of Pascal VOC, which ImageNet uses too."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

from captum_robust._checks import check
from captum_robust.data.annotations import Box, parse_box
from captum_robust.data.sample import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class AnnotatedObject:
    """One ``<object>``: its box as written, and where it was written."""

    name: str
    box: Box
    difficult: bool
    where: str


@dataclass(frozen=True)
class Annotation:
    """One XML file: (H, W) as it states, (0, 0) if it doesn't, and its objects."""

    size: tuple[int, int]
    objects: list[AnnotatedObject]


@dataclass
class _Fields:
    """The texts and lines of one ``<object>``, by path below it."""

    line: int
    texts: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_voc_xml(data: bytes, name: str) -> Annotation:
    """Read one annotation; ``name`` is the file's, for errors.

    Only an object's own ``bndbox`` counts, not those of its ``part``s.

    Raises:
        DataError: XML that isn't well-formed, or an object without a name or four numbers; the
            message names file and line.
    """
    parser = expat.ParserCreate()
    path: list[str] = []
    size: dict[str, str] = {}
    objects: list[_Fields] = []

    def start(tag: str, _attributes: dict[str, str]) -> None:
        path.append(tag)
        if path[1:] == ["object"]:
            objects.append(_Fields(parser.CurrentLineNumber))

    def text(content: str) -> None:
        if path[1:2] == ["size"] and len(path) == 3:
            size[path[2]] = size.get(path[2], "") + content
        elif path[1:2] == ["object"] and len(path) > 2:
            below = "/".join(path[2:])
            objects[-1].texts[below] = objects[-1].texts.get(below, "") + content
            objects[-1].lines.setdefault(below, parser.CurrentLineNumber)

    def end(_tag: str) -> None:
        path.pop()

    def entity(entity_name: str, *_: object) -> None:
        raise DataError(f"{name}:{parser.CurrentLineNumber}: declares the entity {entity_name!r}")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = entity  # a few nested entities can expand to gigabytes
    try:
        parser.Parse(data, True)
    except LookupError as error:  # an encoding that Python does not know
        raise DataError(f"{name}:1: {error}") from None
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise DataError(f"{name}:{error.lineno}: not well-formed XML: {reason}") from None

    return Annotation(
        size=(_side(size, "height", name), _side(size, "width", name)),
        objects=[_annotated(fields, name) for fields in objects],
    )


def _side(size: dict[str, str], side: str, name: str) -> int:
    written = size.get(side, "").strip() or "0"
    try:
        return int(float(written))
    except (ValueError, OverflowError):
        raise DataError(f"{name}: <{side}> must be a number of pixels, got {written!r}") from None


def _annotated(fields: _Fields, name: str) -> AnnotatedObject:
    corners = [f"bndbox/{corner}" for corner in _CORNERS]
    line = min((fields.lines[c] for c in corners if c in fields.lines), default=fields.line)
    where = f"{name}:{line}"
    label = fields.texts.get("name", "").strip()
    check(label, f"{name}:{fields.line}: the object has no <name>", DataError)
    return AnnotatedObject(
        name=label,
        box=parse_box([fields.texts.get(corner) for corner in corners], where),
        difficult=fields.texts.get("difficult", "0").strip() == "1",
        where=where,
    )
