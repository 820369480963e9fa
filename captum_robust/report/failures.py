"""Why images and maps of a run failed: reasons with their counts, and what failed everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from captum_robust._checks import printable
from captum_robust.report.results import CLEAN, Results

SHOWN_REASONS = 5


@dataclass(frozen=True)
class Reason:
    """An error that several images have, but for their names and numbers."""

    method: str
    """ "(all)": the image could not be used."""
    error: str
    """That of the first of the images."""
    count: int
    """How many there are of it."""

    def __str__(self) -> str:
        return f"{self.count}× {self.method}: {printable(self.error)}"


def reasons_of(failures: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """The reasons of rows with ``image``, ``method`` and ``error``, the most frequent first.

    >>> torn = [{"image": f"{i}.png", "method": "cam", "error": f"{i}.png: torn"} for i in (1, 2)]
    >>> [str(reason) for reason in reasons_of(torn)]
    ['2× cam: 1.png: torn']
    >>> errors = {"1": "1: got 1 to 2.5", "2": "2: got 1 to 5"}
    >>> same = [{"image": i, "method": "cam", "error": e} for i, e in errors.items()]
    >>> [str(reason) for reason in reasons_of(same)]
    ['2× cam: 1: got 1 to 2.5']
    """
    alike: dict[tuple[str, str], Reason] = {}
    for row in failures:
        # Numbers first, or an image named 1 would leave another text of "(1,)" than one named 2.
        error, image = (re.sub(r"\d+(\.\d+)?", "#", row[of]) for of in ("error", "image"))
        key = (row["method"], error.replace(image, ""))
        known = alike.get(key, Reason(row["method"], row["error"], 0))
        alike[key] = replace(known, count=known.count + 1)
    return sorted(alike.values(), key=lambda reason: -reason.count)


def shown_reasons(failures: list[dict[str, Any]]) -> tuple[list[Reason], int]:
    """The most frequent reasons, and how many others there are."""
    reasons = reasons_of(failures)
    return reasons[:SHOWN_REASONS], max(0, len(reasons) - SHOWN_REASONS)


def complete_failures(results: Results) -> list[str]:
    """A sentence with the reason for each method that failed on every image, where there is one.

    One for all methods where no image could be used, or an attack failed on all of them.
    """
    counts, failed = results.counts(), results.failed_maps()
    read, usable = counts["read"], counts["read"] - counts["broken"]
    # Of a run in which only some fail there may be too many to look at each.
    failures = results.failures() if usable in (0, *failed.values()) else []
    if failures and not usable:
        reason = reasons_of(failures)[0]
        none = "the image could not" if read == 1 else f"none of the {read} images could"
        return [f"{none} be used: {reason.error} ({reason.count}×)"]
    of_maps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in failures:
        of_maps.setdefault((row["attack"], row["method"]), []).append(row)
    alike: dict[tuple[str, str, int], list[str]] = {}
    for attack, method in product(results.attacks, results.methods):
        own = of_maps.get((attack, method), [])
        if own and len(own) == usable:
            reason = reasons_of(own)[0]
            alike.setdefault((attack, reason.error, reason.count), []).append(method)
    sentences = []
    for (attack, error, count), methods in alike.items():
        images = "the image" if usable == 1 else f"each of the {usable} images"
        under = "" if attack == CLEAN else f" under {attack}"
        sentences.append(f"{', '.join(methods)} failed on {images}{under}: {error} ({count}×)")
    return sentences
