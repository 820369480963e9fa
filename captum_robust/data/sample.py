"""What every data set gives: one image with its class, its boxes and, where known, a mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_robust._checks import check_shape


class DataError(ValueError):
    """One sample cannot be used; the message is one line that names the file (and line).

    A runner can note it as that sample's error and go on with the next.
    """


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
    """M×4 float32 (x0, y0, x1, y1) in pixels of ``image``, half-open: the width is x1 − x0."""
    id: str
    """Unique within the data set and the same in every run."""
    mask: Tensor | None = None
    """H×W bool, the object's pixels."""
    original_size: tuple[int, int] = (0, 0)
    """(H, W) before any resize; taken from ``image`` when not given."""
    source: str = ""
    """Where the image came from, for messages."""

    def __post_init__(self) -> None:
        check_shape("image", self.image, "3×H×W")
        check_shape("boxes", self.boxes, "M×4")
        if self.mask is not None:
            check_shape("mask", self.mask, "×".join(map(str, self.size)))
        if self.original_size == (0, 0):
            object.__setattr__(self, "original_size", self.size)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of ``image``."""
        height, width = self.image.shape[1:]
        return height, width
