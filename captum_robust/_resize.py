"""The one resizer of images and maps; Gaussian blur as a product of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(x: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Images or maps N×C×h×w at another resolution N×C×H×W, bilinearly.

    With ``antialias`` what is made smaller is averaged. Half precision is computed in float32.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    full = x.float() if x.dtype.itemsize < 4 else x  # the CPU cannot smooth bfloat16
    larger = F.interpolate(full, size, mode="bilinear", align_corners=False, antialias=antialias)
    return larger.to(x.dtype)


def size_within(size: Sequence[int], side: int) -> tuple[int, int]:
    """The size (H, W) of the same shape whose longer side is ``side``.

    >>> size_within((200, 100), 50)
    (50, 25)
    """
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image C×H×W or images N×C×H×W in [0, 1] at ``size`` (H, W): bilinear, antialiased."""
    batch = image if image.ndim == 4 else image[None]
    # Rounding may leave [0, 1] by one unit in the last place.
    smaller = resized(batch, size).clamp(0, 1)
    return smaller if image.ndim == 4 else smaller[0]


def blur_matrix(size: int, sigma: float) -> Tensor:
    """size×size: a Gaussian cut off at 4 sigma, what falls over the border mirrored back."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    rows = torch.arange(size).unsqueeze(1).expand(size, len(offsets))
    columns = mirrored(rows + offsets.long(), size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.index_put_((rows, columns), weights.expand(size, -1), accumulate=True)
    return matrix


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images …×H×W under a Gaussian of ``sigma`` pixels, see :func:`blur_matrix`."""
    height, width = x.shape[-2:]
    rows = blur_matrix(height, sigma).to(x)
    columns = rows if width == height else blur_matrix(width, sigma).to(x)
    return rows @ x @ columns.T


def mirrored(positions: Tensor, size: int) -> Tensor:
    """Whole numbers beyond 0 to ``size`` - 1 mirrored back at the border, whose pixels repeat."""
    around = positions % (2 * size)
    return torch.where(around < size, around, 2 * size - 1 - around)
