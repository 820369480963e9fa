"""Boxes from annotation files, checked against the image that they belong to."""

from __future__ import annotations

import csv
import reprlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.data.sample import Box as Box
from captum_robust.data.sample import DataError, checked_box

Content = TypeVar("Content")
_FLAGS = dict.fromkeys(("", "0", "0.0", "false", "no"), False) | dict.fromkeys(
    ("1", "1.0", "true", "yes"), True
)


def parse_box(values: Sequence[str | None], where: str) -> Box:
    """Four numbers from text; ``where`` names file and line in the error."""
    try:
        x0, y0, x1, y1 = (float(value or "") for value in values)
    except ValueError:
        got = reprlib.repr(list(values))
        raise DataError(f"{where}: expected four numbers for a box, got {got}") from None
    return x0, y0, x1, y1


def table_rows(lines: Sequence[str], delimiter: str = ",") -> list[tuple[int, list[str]]]:
    """The number of the line and the cells of each row of a CSV file, from lines with their ends.

    Where a quote is never closed, each line is a row: it would take all further ones with it.
    """
    if sum(line.count('"') for line in lines) % 2 == 0:
        with suppress(csv.Error):  # a cell of more than 131,072 characters
            reader = csv.reader(lines, delimiter=delimiter)
            return [(reader.line_num, cells) for cells in reader]
    return [(n, _cells(line, delimiter)) for n, line in enumerate(lines, start=1)]


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return [reprlib.repr(line)]


def once_each(
    lines: Iterable[tuple[str, tuple[Content, str]]],
) -> dict[str, tuple[Content, str]]:
    """What the lines of a list say of each image; with it goes file:line.

    Raises:
        ValueError: two lines say of an image what differs.
    """
    told: dict[str, tuple[Content, str]] = {}
    for image, (content, where) in lines:
        first, earlier = told.setdefault(image, (content, where))
        check(first == content, f"{where}: names {image!r} again, otherwise than {earlier}")
    return told


def parse_side(value: object, where: str) -> int:
    """A number of pixels, written as a number or as text; 0 for nothing."""
    written = 0 if value is None or value == "" else value
    try:
        return int(float(written))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        got = reprlib.repr(value)
        raise DataError(f"{where}: expected a number of pixels, got {got}") from None


def parse_flag(value: object) -> bool | None:
    """Whether a mark is set, written as 0 or 1, true or false, yes or no; None: as something else.

    A mark that is missing is not set.

    >>> parse_flag("1.0"), parse_flag("False"), parse_flag(None), parse_flag(2)
    (True, False, False, None)
    """
    if value is None:
        return False
    is_plain = isinstance(value, (str, int, float))
    return _FLAGS.get(str(value).strip().casefold()) if is_plain else None


def checked_boxes(boxes: Iterable[tuple[Box, str]], size: tuple[int, int]) -> Tensor:
    """M×4 float32 from half-open boxes, each with the file and line that it came from.

    A box must be finite, have an area, and lie inside the image of ``size`` (H, W) up to
    ``TOLERANCE``; otherwise :class:`DataError`. So is one of fractions within the first pixel.
    """
    boxes = list(boxes)
    for box, where in boxes:
        is_fraction = max(box) <= 1 < max(size) and any(side % 1 for side in box)
        expected = f"{where}: box: expected pixels, got fractions of the image {box}"
        check(not is_fraction, f"{expected}; multiply them by its width and height", DataError)
    rows = [checked_box(box, size, f"{where}: box") for box, where in boxes]
    rounded = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    for box, (_, where) in zip(rounded.tolist(), boxes, strict=True):
        checked_box(box, size, f"{where}: box")  # of one thinner than float32 nothing is left
    return rounded


def check_size(annotated: tuple[int, int], size: tuple[int, int], where: str) -> None:
    """Refuse boxes that were drawn on an image of another size; (H, W), zeros mean unknown."""
    fits = annotated == size or not all(annotated)
    stated = f"annotates an image of {annotated[1]}×{annotated[0]} pixels"
    check(fits, f"{where}: {stated}, but the image has {other_size(annotated, size)}", DataError)


def other_size(annotated: tuple[int, int], size: tuple[int, int]) -> str:
    """The image's size (H, W), and what may be wrong with annotations of another."""
    is_turned = annotated == size[::-1]
    cause = "it is turned, see exif_orientation" if is_turned else "scale one to the other"
    return f"{size[1]}×{size[0]}; {cause}"


def mask_box(mask: Tensor) -> list[Box]:
    """The half-open box around the nonzero pixels of an H×W mask; none around an empty one."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if len(ys) == 0:
        return []
    return [(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))]
