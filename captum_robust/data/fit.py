"""The one place that resizes images; boxes and masks move with their image."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust._checks import check, check_choice, checked_size
from captum_robust._resize import resize_image
from captum_robust.data.sample import DataError, Sample

FITS = ("squash", "crop")
"""Ways to bring an image to a size, see :func:`fitted`."""
MAX_PIXELS = 2**27
"""A sample that a resize would blow up beyond this (a strip one pixel high) is refused."""


def resize(sample: Sample, size: int | tuple[int, int]) -> Sample:
    """The whole image squashed to ``size`` (H, W); one number means a square.

    Bilinear with antialiasing; a mask takes the nearest pixel, so its outline stays within half a
    pixel of the exact place. Boxes are scaled exactly.

    Raises:
        ValueError: a size that isn't positive.
        DataError: the result would have more than ``MAX_PIXELS`` pixels.
    """
    height, width = checked_size("size", size)
    if (height, width) == sample.size:
        return sample
    few = height * width <= MAX_PIXELS
    check(few, f"{sample.id}: refusing to resize to {width}×{height} pixels", DataError)
    old_height, old_width = sample.size
    scale = torch.tensor([width / old_width, height / old_height] * 2, dtype=torch.float64)
    return replace(
        sample,
        image=resize_image(sample.image, (height, width)),
        boxes=(sample.boxes * scale).to(torch.float32),
        mask=None if sample.mask is None else _resize_mask(sample.mask, (height, width)),
    )


def resize_and_center_crop(
    sample: Sample, resize_to: int | tuple[int, int], crop: int | tuple[int, int]
) -> Sample:
    """Resize, then keep the middle, as torchvision's ``Resize`` and ``CenterCrop`` do.

    Boxes are clipped to the crop, and dropped when nothing of them is left in it.

    Args:
        sample: the sample.
        resize_to: one number: the length of the shorter side; (H, W): the whole image squashed.
        crop: (H, W), or one number for a square.

    Raises:
        ValueError: a crop larger than the resized image.
    """
    crop_height, crop_width = checked_size("crop", crop)
    resized = resize(sample, _resized(sample.size, resize_to))
    height, width = resized.size
    fits = crop_height <= height and crop_width <= width
    expected = f"one within the resized image {height}×{width}"
    check(fits, f"crop: expected {expected}, got {crop_height}×{crop_width}")
    top = round((height - crop_height) / 2)
    left = round((width - crop_width) / 2)
    return crop_to(resized, (left, top, left + crop_width, top + crop_height))


def fitted(sample: Sample, size: int | tuple[int, int], fit: str) -> Sample:
    """The sample at the size (H, W) that a model takes.

    Args:
        sample: of any size.
        size: (H, W), or one number for a square.
        fit: ``"squash"``: the whole image, whatever its aspect. ``"crop"``: the shorter side is
            brought to 8/7 of the longer side of ``size`` (256 for 224), and the centre is kept.
            The crop then is the image: its ``original_size`` is ``size``.

    Raises:
        ValueError: another ``fit``, or a size that isn't positive.
        DataError: the result would have more than ``MAX_PIXELS`` pixels.
    """
    check_choice("fit", fit, FITS)
    height, width = checked_size("size", size)
    if fit == "squash":
        return resize(sample, (height, width))
    shorter_side = round(max(height, width) * 8 / 7)
    cropped = resize_and_center_crop(sample, shorter_side, (height, width))
    return replace(cropped, original_size=(height, width))


def crop_to(sample: Sample, window: tuple[int, int, int, int]) -> Sample:
    """The part of the image inside ``window`` (x0, y0, x1, y1), half-open, in whole pixels.

    Raises:
        ValueError: a window without area or beyond the image.
    """
    x0, y0, x1, y1 = window
    height, width = sample.size
    inside = 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    check(inside, f"window: expected a part of the image of {width}×{height} pixels, got {window}")
    origin = torch.tensor([x0, y0, x0, y0], dtype=torch.float32)
    far = torch.tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0], dtype=torch.float32)
    boxes = torch.minimum((sample.boxes - origin).clamp(min=0), far)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return replace(
        sample,
        image=sample.image[:, y0:y1, x0:x1].contiguous(),
        boxes=boxes[has_area],
        mask=None if sample.mask is None else sample.mask[y0:y1, x0:x1].contiguous(),
    )


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    values = mask[None, None].to(torch.uint8)
    return F.interpolate(values, size, mode="nearest-exact")[0, 0].bool()


def _resized(size: tuple[int, int], resize_to: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) after a resize; a number is the shorter side, and the longer is rounded down."""
    if not isinstance(resize_to, int):
        return checked_size("resize_to", resize_to)
    short, _ = checked_size("resize_to", resize_to)
    height, width = (max(short, short * side // min(size)) for side in size)
    return height, width
