"""Numbers of things, in words."""

from __future__ import annotations

import re


def amount(count: int, noun: str) -> str:
    """A number with its noun, in the singular of one alone.

    >>> amount(1, "image"), amount(0, "image"), amount(2, "box"), amount(100, "copy")
    ('1 image', '0 images', '2 boxes', '100 copies')
    """
    if count == 1:
        return f"{count} {noun}"
    if re.search(r"[^aeiou]y$", noun):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
