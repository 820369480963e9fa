"""What a file says of its tensors, held to a form before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from captum_robust._checks import check, printable

LARGEST_SIDE = 2048
"""Of the images that a file says its network takes: one of more pixels a side takes gigabytes."""
_NEEDED = object()


@dataclass(frozen=True)
class Fact:
    """What one field may hold."""

    expected: str
    """For the message, as in "expected a whole number"."""
    fits: Callable[[Any], bool]
    """Of what JSON holds."""
    otherwise: Any = _NEEDED
    """What a file means that does not have the field; a field without it must be there."""


Form = Mapping[str, Fact]
"""Name of a field -> what it may hold; a file with other fields is of a later version."""


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> Fact:
    """A finite number from ``low``, which may be excluded, to ``high``."""

    def fits(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Whole numbers may be too long for a float.
        is_finite = is_number and abs(value) <= 1e300
        return is_finite and low <= value <= high and not (open_low and value == low)

    limits = "" if high == math.inf else f" to {high:g}"
    lowest = "" if low == -math.inf else f" {'above' if open_low else 'from'} {low:g}"
    return Fact(f"a finite number{lowest}{limits}", fits)


def whole(low: int, high: int = 2**31 - 1) -> Fact:
    """A whole number from ``low`` to ``high``."""
    return Fact(
        f"a whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def text() -> Fact:
    """A string."""
    return Fact("a text", lambda value: isinstance(value, str))


def choice(*values: Any) -> Fact:
    """One of these, of the same type."""
    known = [(type(value), value) for value in values]
    expected = f"one of {', '.join(map(str, values))}"
    return Fact(expected, lambda value: (type(value), value) in known)


def listed(each: Fact, least: int = 0, most: int = 10**6) -> Fact:
    """A list of ``least`` to ``most`` entries, each of which fits."""
    count = f"{least}" if least == most else f"{least} to {most}"
    return Fact(
        f"a list of {count}, each {each.expected}",
        lambda value: (
            isinstance(value, list) and least <= len(value) <= most and all(map(each.fits, value))
        ),
    )


def parts(form: Form, *, others: bool = False) -> Fact:
    """Fields in a field; with ``others`` there may be more of them."""

    def fits(value: Any) -> bool:
        is_known = isinstance(value, dict) and (others or value.keys() <= form.keys())
        return is_known and all(
            fact.fits(value[name]) if name in value else fact.otherwise is not _NEEDED
            for name, fact in form.items()
        )

    each = "; ".join(f"{name}: {fact.expected}" for name, fact in form.items())
    return Fact(f"fields ({each})", fits)


def named(each: Fact) -> Fact:
    """Fields of any names, each of which fits."""
    return Fact(
        f"fields, each {each.expected}",
        lambda value: isinstance(value, dict) and all(map(each.fits, value.values())),
    )


def or_none(fact: Fact) -> Fact:
    """The same, or null."""
    return Fact(f"{fact.expected}, or none", lambda value: value is None or fact.fits(value))


def optional(fact: Fact, otherwise: Any = None) -> Fact:
    """The same, but files may not have the field, as those of an earlier version."""
    return replace(fact, otherwise=otherwise)


def checked_facts(where: str, what: str, facts: object, form: Form) -> dict[str, Any]:
    """The facts of a file, each held to its form, with those that need not be there.

    Args:
        where: the file, for messages.
        what: what the file should hold, for messages: "localization network".
        facts: what its JSON says.
        form: what they may be.

    Raises:
        ValueError: the file "holds no ``what``", with the first field that is wrong.
    """
    refused = f"{printable(where)} holds no {what}"
    if not isinstance(facts, dict):
        raise ValueError(refused)
    checked = {}
    for name, fact in form.items():
        value = facts.get(name, fact.otherwise)
        check(value is not _NEEDED, f"{refused} that can be used (there is no {name!r})")
        fits = name not in facts or fact.fits(value)
        got = f"expected {fact.expected}, got {printable(repr(value)[:100])}"
        check(fits, f"{refused} that can be used ({name}: {got})")
        checked[name] = value
    others = [name for name in facts if name not in form]
    later = f"{printable(repr(others[:1])[1:-1])}: expected no such field"
    check(not others, f"{refused} that can be used ({later}; a later version may know it)")
    return checked
