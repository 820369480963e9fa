"""Boxes from annotation files, checked against the image that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from captum_robust.data.sample import DataError

TOLERANCE = 1.0
"""Pixels that a box may reach beyond its image; it is then clipped."""

Box = tuple[float, float, float, float]


def no_boxes() -> Tensor:
    """0×4 float32."""
    return torch.zeros(0, 4)


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
    height, width = size
    rows = []
    for box, where in boxes:
        x0, y0, x1, y1 = box
        shown = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not all(map(math.isfinite, box)):
            raise DataError(f"{where}: {shown} is not finite")
        if x1 <= x0 or y1 <= y0:
            raise DataError(f"{where}: {shown} has no area; expected x0 < x1 and y0 < y1")
        clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        reach = max(abs(given - kept) for given, kept in zip(box, clipped, strict=True))
        if reach > TOLERANCE or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            raise DataError(f"{where}: {shown} lies outside the image of {width}×{height} pixels")
        rows.append(clipped)
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def check_size(annotated: tuple[int, int] | None, size: tuple[int, int], where: str) -> None:
    """Refuse boxes that were drawn on an image of another size; (H, W), zeros mean unknown."""
    if annotated is not None and all(annotated) and annotated != size:
        raise DataError(
            f"{where}: annotates an image of {annotated[1]}×{annotated[0]} pixels, "
            f"but the image has {size[1]}×{size[0]}; scale the boxes with the images"
        )


def mask_box(mask: Tensor) -> Tensor:
    """The box around the nonzero pixels of an H×W mask: 1×4, or 0×4 for an empty mask."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if len(ys) == 0:
        return no_boxes()
    corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    return torch.stack(corners).to(torch.float32)[None]
