"""What every data set gives: one image with its class, its boxes and, where known, a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check, check_shape, refusal


class DataError(ValueError):
    """One sample cannot be used; the message is one line that names the file (and line).

    A runner can note it as that sample's error and go on with the next. The message is a
    ``captum_robust._checks.refusal``.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(refusal(message))


TOLERANCE = 1.0
"""Pixels that a box may reach beyond its image; it is then clipped."""

Box = tuple[float, float, float, float]


def checked_box(box: Sequence[float], size: tuple[int, int], name: str) -> Box:
    """The box, clipped to its image of ``size`` (H, W).

    Raises:
        DataError: it is not finite, has no area, or reaches beyond the image by more than
            ``TOLERANCE``.
    """
    x0, y0, x1, y1 = box
    height, width = size
    name = f"{name} ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    check(all(map(math.isfinite, box)), f"{name} is not finite", DataError)
    has_area = x0 < x1 and y0 < y1
    check(has_area, f"{name} has no area; expected x0 < x1 and y0 < y1", DataError)
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    reach = max(abs(given - kept) for given, kept in zip(box, clipped, strict=True))
    overlaps = clipped[2] > clipped[0] and clipped[3] > clipped[1]
    where = "partly lies outside" if overlaps else "lies outside"
    inside = overlaps and reach <= TOLERANCE
    check(inside, f"{name} {where} the image of {width}×{height} pixels", DataError)
    return clipped


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and what is known of its object.

    A sample without boxes (M = 0) is valid: the image has no annotation, or its boxes were cropped
    away. It can be classified and attacked, not scored for localization.
    """

    image: Tensor
    """3×H×W float32, RGB in [0, 1]."""
    label: int | None
    """Index among the classifier's classes; None where the data set doesn't know it."""
    boxes: Tensor
    """M×4 float32 (x0, y0, x1, y1) in pixels of ``image``, half-open: the width is x1 − x0.

    One that reaches beyond the image by at most ``TOLERANCE`` is clipped; another is refused.
    """
    id: str
    """Unique within the data set and the same in every run."""
    mask: Tensor | None = None
    """H×W bool, the object's pixels."""
    original_size: tuple[int, int] = (0, 0)
    """(H, W) before any resize; taken from ``image`` when not given."""
    source: str = ""
    """Where the image came from, for messages."""
    orientation: int = 1
    """EXIF's, from 1 to 8, of the file that the image was turned upright from; 1: it was so."""

    def __post_init__(self) -> None:
        check_shape("image", self.image, "3×H×W")
        check_shape("boxes", self.boxes, "M×4")
        if self.mask is not None:
            check_shape("mask", self.mask, "×".join(map(str, self.size)))
        rows = self.boxes.tolist()
        inside = [checked_box(box, self.size, f"{self.id}: box {i}") for i, box in enumerate(rows)]
        if [list(box) for box in inside] != rows:
            object.__setattr__(self, "boxes", torch.tensor(inside, dtype=torch.float32))
        if self.original_size == (0, 0):
            object.__setattr__(self, "original_size", self.size)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of ``image``."""
        height, width = self.image.shape[1:]
        return height, width
