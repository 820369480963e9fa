"""EXIF orientations: how the stored pixels of a photograph are turned to stand upright."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_TAG = 0x0112
_DAMAGED = (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error)
"""What Pillow raises on EXIF data that cannot be read; the pixels may be whole all the same."""

_MIRRORED = (2, 3, 6, 7)
"""Orientations whose pixels are mirrored left to right, after the transposition if there is one."""
_UPSIDE_DOWN = (3, 4, 7, 8)
_OPPOSITE = {6: 8, 8: 6}
"""All others undo themselves."""


def is_transposed(orientation: int) -> bool:
    """Whether height and width change places, as in a photograph that was taken upright."""
    return orientation >= 5


def turned(x: Tensor, orientation: int) -> Tensor:
    """Turn stored pixels …×H×W upright; ``orientation`` is EXIF's, from 1 (upright) to 8."""
    if is_transposed(orientation):
        x = x.transpose(-1, -2)
    flipped = [-1] * (orientation in _MIRRORED) + [-2] * (orientation in _UPSIDE_DOWN)
    return x.flip(flipped).contiguous()


def turned_back(x: Tensor, orientation: int) -> Tensor:
    """Undo :func:`turned`: the pixels …×H×W as they are stored."""
    return turned(x, _OPPOSITE.get(orientation, orientation))


def turned_boxes(boxes: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Turn half-open boxes M×4 on the stored pixels with an image that is upright (H, W)."""
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    if is_transposed(orientation):
        x0, y0, x1, y1 = y0, x0, y1, x1
    height, width = size
    if orientation in _MIRRORED:
        x0, x1 = width - x1, width - x0
    if orientation in _UPSIDE_DOWN:
        y0, y1 = height - y1, height - y0
    return torch.stack((x0, y0, x1, y1), dim=1)


def orientation_of(image: Image.Image) -> int:
    """EXIF's, from 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(_TAG, 1)
    except _DAMAGED:
        return 1
    return int(value) if value in range(1, 9) else 1
