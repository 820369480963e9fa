"""Boxes from annotation files, checked against the image that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.data.sample import Box as Box
from captum_robust.data.sample import DataError, checked_box


def parse_box(values: Sequence[str | None], where: str) -> Box:
    """Four numbers from text; ``where`` names file and line in the error."""
    try:
        x0, y0, x1, y1 = (float(value or "") for value in values)
    except ValueError:
        raise DataError(f"{where}: expected four numbers for a box, got {list(values)}") from None
    return x0, y0, x1, y1


def checked_boxes(boxes: Iterable[tuple[Box, str]], size: tuple[int, int]) -> Tensor:
    """M×4 float32 from half-open boxes, each with the file and line that it came from.

    A box must be finite, have an area, and lie inside the image of ``size`` (H, W) up to
    ``TOLERANCE``; otherwise :class:`DataError`.
    """
    rows = [checked_box(box, size, f"{where}: box") for box, where in boxes]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def check_size(annotated: tuple[int, int], size: tuple[int, int], where: str) -> None:
    """Refuse boxes that were drawn on an image of another size; (H, W), zeros mean unknown."""
    fits = annotated == size or not all(annotated)
    stated = f"annotates an image of {annotated[1]}×{annotated[0]} pixels"
    advice = f"the image has {size[1]}×{size[0]}; scale the boxes with the images"
    check(fits, f"{where}: {stated}, but {advice}", DataError)


def mask_box(mask: Tensor) -> list[Box]:
    """The half-open box around the nonzero pixels of an H×W mask; none around an empty one."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if len(ys) == 0:
        return []
    return [(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))]
