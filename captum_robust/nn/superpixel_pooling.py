"""Means over super-pixels, and back, for all images of a batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_floating,
    check_integers,
    check_numbers_below,
    check_shape,
    check_type,
)


def superpixel_means(values: Tensor, segments: Tensor) -> Tensor:
    """N×C×S: the mean of each channel over each super-pixel of each image, differentiable.

    S is that of the image with most super-pixels; a number that an image has no pixels of gets 0.
    On a GPU the sums are in no fixed order, unless ``torch.use_deterministic_algorithms`` says so.

    Args:
        values: N×C×H×W, floating point. Half precision is summed in float32.
        segments: N×H×W integers: the number of the super-pixel of each pixel, from 0.

    Raises:
        TypeError: values that are not floating point, segments that are no integers.
        ValueError: shapes that do not fit, an empty batch, a negative number, or one from H·W,
            which is more than an image can have.

    >>> values = torch.tensor([[[[1.0, 3.0], [5.0, 5.0]]]])
    >>> superpixel_means(values, torch.tensor([[[0, 0], [1, 1]]]))
    tensor([[[2., 5.]]])
    """
    check_floating("values", values)
    fits = values.ndim == 4 and values.numel() > 0
    check(fits, f"values: expected N×C×H×W, not empty, got {tuple(values.shape)}")
    n, channels, height, width = values.shape
    check_segments(segments, f"{n}×{height}×{width}")
    count = check_numbers_below("segments", segments, height * width) + 1
    precise = values.dtype if values.dtype == torch.float64 else torch.float32
    index = segments.reshape(n, 1, -1).long()
    flat = values.reshape(n, channels, -1).to(precise)
    sums = flat.new_zeros(n, channels, count).scatter_add(2, index.expand_as(flat), flat)
    ones = torch.ones_like(index, dtype=precise)
    pixels = flat.new_zeros(n, 1, count).scatter_add(2, index, ones)
    return (sums / pixels.clamp(min=1)).to(values.dtype)


def spread(values: Tensor, segments: Tensor) -> Tensor:
    """N×C×H×W: each pixel gets the value, of N×C×S, of its super-pixel.

    Args:
        values: N×C×S.
        segments: N×H×W integers from 0 to S - 1.

    Raises:
        TypeError: values that are no tensor, segments that are no integers.
        ValueError: shapes that do not fit, a number below 0 or from S.

    >>> spread(torch.tensor([[[2.0, 5.0]]]), torch.tensor([[[0, 0], [1, 1]]]))
    tensor([[[[2., 2.],
              [5., 5.]]]])
    """
    check_type("values", values, Tensor, "a tensor")
    fits = values.ndim == 3 and values.numel() > 0
    check(fits, f"values: expected N×C×S, not empty, got {tuple(values.shape)}")
    n, channels, count = values.shape
    check_segments(segments, f"{n}×H×W")
    check_numbers_below("segments", segments, count)
    index = segments.reshape(n, 1, -1).long().expand(n, channels, -1)
    return values.gather(2, index).reshape(n, channels, *segments.shape[1:])


def check_segments(segments: Tensor, shape: str) -> None:
    """Raise unless they are integers of that shape, such as ``"N×H×W"``."""
    check_integers("segments", segments)
    check_shape("segments", segments, shape)
