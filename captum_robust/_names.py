"""Names in messages: what is unknown and the nearest that exist, on one printable line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    r"""The text on one line, with what is not UTF-8 or not printable in a file name written out.

    A terminal obeys some of the latter: a name could colour or hide what is around it.

    >>> printable("a\udcff.png\n is torn")
    'a\\xff.png is torn'
    >>> printable("\x1b[31mred.png")
    '\\x1b[31mred.png'
    """
    line = " ".join(text.split())
    line = line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def unknown_name(what: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error to raise when ``name`` is none of the ``valid`` names of a ``what``.

    >>> str(unknown_name("method", "robust_can", ["robust_cam", "occlusion"]))
    "unknown method 'robust_can'; did you mean 'robust_cam'? (2 known: occlusion, robust_cam)"
    >>> str(unknown_name("class", "dog", []))
    "unknown class 'dog' (there are none)"
    """
    known = sorted(valid)
    if not known:
        return ValueError(f"unknown {what} {name!r} (there are none)")
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    listing = ", ".join(known if len(known) <= 24 else [*known[:24], "…"])
    return ValueError(f"unknown {what} {name!r}{hint} ({len(known)} known: {listing})")
