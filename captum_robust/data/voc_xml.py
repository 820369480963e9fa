"""Boxes from the XML of Pascal VOC, which ImageNet uses too."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from captum_robust._checks import check
from captum_robust.data.annotations import Box, parse_box, parse_flag, parse_side
from captum_robust.data.files import read_bytes
from captum_robust.data.sample import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


_DEEPEST = 64
"""Levels of elements, of which VOC has five."""
_ASCII = bytes(range(32, 92)) + bytes(range(93, 127)) + rb"\u0041 ~{ +AGE- .xn--mnchen-3ya"
"""Text that Python's codecs for other ends, such as "utf-7" and "idna", take for another one."""
_DECLARATION = re.compile(rb"""\s*<\?xml\s[^>]*?\bencoding\s*=\s*["']([\w.:-]+)["']""")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    **dict.fromkeys([codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE], "utf-16"),
    **{b"<\0": "utf-16-le", b"\0<": "utf-16-be"},
}
"""How a file begins whose encoding needs no declaration."""
_LARGER = {
    **{"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs"},
    **{"shift_jis": "cp932", "euc_kr": "cp949"},
}
"""What files really are in that declare an encoding, as browsers read them."""


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
            name or four numbers, or with two of one; objects elsewhere than right below the root.
            The message names file and line.
    """
    return parse_voc_xml(read_bytes(path), str(path))


def parse_voc_xml(data: bytes, name: str) -> Annotation:
    """:func:`read_voc_xml` of the content of a file."""
    root = _parsed(data, name)
    objects = root.findall("object")
    _refuse_strays(root, objects, name)
    return Annotation(
        size=(_side(root, "height", name), _side(root, "width", name)),
        objects=[_annotated(element, name) for element in objects],
    )


def _parsed(data: bytes, name: str) -> Element:
    """The root; every element has the line of its start as its only attribute."""
    parser, tree = expat.ParserCreate(), TreeBuilder()
    depth = 0

    def start(tag: str, _attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        fits = depth <= _DEEPEST
        check(fits, f"{name}:{parser.CurrentLineNumber}: more than {_DEEPEST} levels", DataError)
        tree.start(tag, {"line": str(parser.CurrentLineNumber)})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(tag)

    def entity(entity_name: str, *_: object) -> None:
        raise DataError(f"{name}:{parser.CurrentLineNumber}: declares the entity {entity_name!r}")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = tree.data
    parser.EntityDeclHandler = entity  # a few nested entities can expand to gigabytes
    try:
        parser.Parse(_decoded(data, name), True)  # of text, whatever encoding it declares
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise DataError(f"{name}:{error.lineno}: not well-formed XML: {reason}") from None
    return tree.close()


def _decoded(data: bytes, name: str) -> str:
    """The text of a file in any encoding that holds ASCII as it is, or in UTF-16."""
    encoding = next((known for mark, known in _MARKS.items() if data.startswith(mark)), "")
    if not encoding:
        declared = _DECLARATION.match(data)
        encoding = declared[1].decode().casefold() if declared else "utf-8"
        try:
            own = codecs.lookup(encoding).name
            encoding = _LARGER.get(own, own)
            holds_ascii = _ASCII.decode(encoding) == _ASCII.decode()
        except (LookupError, ValueError):
            holds_ascii = False
        check(holds_ascii, f"{name}:1: unknown encoding {encoding!r}", DataError)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"no text in {encoding} (byte {error.start})"
        raise DataError(f"{name}:{line}: not well-formed XML: {reason}") from None


def _text(element: Element, path: str, name: str) -> str:
    """All text that stands right at the path, not in elements below it."""
    found = element.findall(path)
    twice = f"expected one <{path.replace('/', '> <')}> here, got {len(found)}"
    check(len(found) <= 1, f"{name}:{element.get('line')}: {twice}", DataError)
    parts = [text for e in found for text in (e.text, *(below.tail for below in e))]
    return "".join(filter(None, parts)).strip()


def _side(root: Element, side: str, name: str) -> int:
    return parse_side(_text(root, f"size/{side}", name), f"{name}: <{side}>")


def _refuse_strays(root: Element, objects: list[Element], name: str) -> None:
    """Say that objects are not where they are read, instead of that there are none."""
    read = set(objects)
    unread = ("object",) if objects else ("object", "bndbox")
    for element in root.iter():
        is_stray = element not in read and element.tag.split(":")[-1].casefold() in unread
        expected = "expected <annotation> with <object> right below it"
        where = f"{name}:{element.get('line')}"
        check(not is_stray, f"{where}: a <{element.tag}> that is none; {expected}", DataError)


def _annotated(element: Element, name: str) -> AnnotatedObject:
    label = _text(element, "name", name)
    check(label, f"{name}:{element.get('line')}: the object has no <name>", DataError)
    corners = [f"bndbox/{corner}" for corner in _CORNERS]
    lines = [int(part.get("line", 0)) for path in corners for part in element.findall(path)]
    where = f"{name}:{min(lines, default=element.get('line'))}"
    box = parse_box([_text(element, path, name) for path in corners], where)
    mark = _text(element, "difficult", name)
    difficult = parse_flag(mark)
    check(difficult is not None, f"{where}: expected <difficult> 0 or 1, got {mark!r}", DataError)
    return AnnotatedObject(label, box, where, bool(difficult))
