"""Input transforms that blur, quantise, add noise, resize or move the pixels of an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import as_number, check_count, check_number
from captum_robust._resize import blur_matrix, resized
from captum_robust.transforms.transform import Transform


class Identity(Transform):
    """The images as they are: the undefended member of an ensemble."""

    def __init__(self) -> None:
        super().__init__()

    def _apply(self, x: Tensor) -> Tensor:
        return x.clone()


class BitDepth(Transform):
    """Fewer grey levels: round(x · 2^bits) / 2^bits.

    As in the published code of Guo et al., "Countering Adversarial Images using Input
    Transformations" (https://arxiv.org/abs/1711.00117). The factor 2^bits leaves 2^bits + 1 levels,
    0 and 1 among them, where a display of that depth has 2^bits (a factor of 2^bits − 1). The code
    takes 8 bits unless told otherwise; 3 is what Athalye et al. (https://arxiv.org/abs/1802.00420)
    took the paper to use.

    The surrogate's value is that of the transform, its gradient that of the identity.

    Raises:
        ValueError: ``bits`` is no whole number from 1 to 16.

    >>> BitDepth(1)(torch.tensor([0.2, 0.3, 0.9]).view(1, 1, 1, 3)).flatten()
    tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        check_count("bits", bits, 1)
        if bits > 16:
            raise ValueError(f"bits: expected at most 16, got {bits}")
        self.bits = bits

    def _apply(self, x: Tensor) -> Tensor:
        levels = 1 << self.bits
        return (x * levels).round() / levels

    def _surrogate(self, x: Tensor) -> Tensor:
        return x + (self._apply(x) - x).detach()


class GaussianBlur(Transform):
    """A Gaussian of ``sigma`` pixels, cut off at 4 of them, the image mirrored at its border.

    Raises:
        ValueError: ``sigma`` is no positive number.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.sigma = check_number("sigma", sigma, 0, open_low=True)

    def _apply(self, x: Tensor) -> Tensor:
        rows, columns = (blur_matrix(n, self.sigma).to(x) for n in x.shape[2:])
        # Rounding must not lead out of what the next transform takes.
        return (rows @ x @ columns.T).clamp(0, 1)


class MedianBlur(Transform):
    """The median of the size×size pixels around each, by channel, the image mirrored at its border.

    Raises:
        ValueError: ``size`` is no odd number from 3.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        check_count("size", size, 3)
        if size % 2 == 0:
            raise ValueError(f"size: expected an odd number, got {size}")
        self.size = size

    def _apply(self, x: Tensor) -> Tensor:
        padded = x
        for dim in (2, 3):
            padded = padded.index_select(dim, _mirrored(x.shape[dim], self.size // 2).to(x.device))
        if self.size == 3:
            return _median_of_nine(padded)
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        return windows.median(dim=-1).values


class GaussianNoise(Transform):
    """Gaussian noise of standard deviation ``std``, cut to [0, 1]; the same on every image.

    Raises:
        ValueError: ``std`` is no positive number; a wrong seed.
    """

    draws = True

    def __init__(self, std: float = 0.1, seed: int | None = 0) -> None:
        super().__init__(seed=seed)
        self.std = check_number("std", std, 0, open_low=True)

    def _apply(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[1:], generator=self._generator(), dtype=torch.float32).to(x)
        return (x + self.std * noise).clamp(0, 1)


class Resize(Transform):
    """Bilinear with antialiasing, to a share of the size or to a size.

    Args:
        scale: of height and width; .5 halves them. Give this or ``size``.
        size: (H, W), or one number for a square.
        restore: enlarge (or reduce) back to the size of the image. False: the classifier is shown
            the resized image, and maps are brought to the image's size by :meth:`align`.

    Raises:
        ValueError: not one of ``scale`` and ``size``; numbers that are not positive.
    """

    def __init__(
        self,
        scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        restore: bool = True,
    ) -> None:
        super().__init__()
        if (scale is None) == (size is None):
            raise ValueError(f"scale and size: expected one of them, got {scale!r} and {size!r}")
        self.scale = None if scale is None else check_number("scale", scale, 0, open_low=True)
        self.size = None if size is None else _pair("size", size)
        self.restore = bool(restore)
        self.moves_pixels = not self.restore

    def _apply(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[2]), int(x.shape[3])
        if self.size is not None:
            size = self.size
        else:
            assert self.scale is not None
            size = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
        resized = _resize(x, size)
        return _resize(resized, (height, width)) if self.restore else resized

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The maps at the size of the image; as they are where the image's size was restored."""
        return (resized(maps, size) if self.moves_pixels else maps), None


class HorizontalFlip(Transform):
    """Left and right exchanged."""

    moves_pixels = True

    def __init__(self) -> None:
        super().__init__()

    def _apply(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The maps flipped back, of whatever resolution."""
        del size
        return maps.flip(-1), None


class CropAndRescale(Transform):
    """A window of the image, enlarged bilinearly to the size of the image.

    Args:
        size: of the window: a share of height and width below 1 (a float), or pixels (a whole
            number for a square, or (h, w)).
        position: of the window, as shares (down, right) of the room that it leaves: (0, 0) is the
            upper left corner, (.5, .5) the middle. None: drawn from ``seed``, uniformly.

    Raises:
        ValueError: numbers out of range; images smaller than the window; a position to be drawn
            anew in each call (``seed=None``), when maps shall be aligned to it.
    """

    moves_pixels = True

    def __init__(
        self,
        size: float | tuple[int, int] = 90 / 224,
        position: tuple[float, float] | None = None,
        *,
        seed: int | None = 0,
    ) -> None:
        super().__init__(seed=seed)
        if isinstance(size, float):
            if not 0 < size <= 1:
                raise ValueError(f"size: expected a share of at most 1, or pixels, got {size!r}")
            self.size: float | tuple[int, int] = size
        else:
            self.size = _pair("size", size)
        if position is not None:
            is_pair = isinstance(position, (tuple, list)) and len(position) == 2
            if not is_pair or not all(0 <= as_number(p) <= 1 for p in position):
                raise ValueError(f"position: expected two shares in [0, 1], got {position!r}")
            position = (float(position[0]), float(position[1]))
        self.position = position
        self.draws = position is None

    def _apply(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[2]), int(x.shape[3])
        top, left, h, w = self._window((height, width))
        return _resize(x[:, :, top : top + h, left : left + w], (height, width))

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The maps in the window, zeros around them; the pixels of the window were seen."""
        if self.draws and self.seed is None:
            raise ValueError("seed: the window was drawn anew and is not known; give a seed")
        top, left, h, w = self._window(size)
        around = (left, size[1] - left - w, top, size[0] - top - h)
        seen = maps.new_ones(1, 1, h, w)
        return F.pad(resized(maps, (h, w)), around), F.pad(seen, around)

    def _window(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width in an image of ``size``."""
        if isinstance(self.size, float):
            # Rounded: 90/224 of 224 is a little less than 90.
            h, w = (max(1, round(n * self.size)) for n in size)
        else:
            h, w = self.size
        if h > size[0] or w > size[1]:
            raise ValueError(
                f"inputs: images of {size[0]}×{size[1]} are smaller than the window of {h}×{w}"
            )
        down, right = (
            self.position
            or torch.rand(2, generator=self._generator(), dtype=torch.float32).tolist()
        )
        if self.position is not None:
            return int(down * (size[0] - h)), int(right * (size[1] - w)), h, w
        # Each place of the window is as likely as another.
        return int(down * (size[0] - h + 1)), int(right * (size[1] - w + 1)), h, w


def crop_ensemble(
    n: int = 30,
    size: float | tuple[int, int] = 90 / 224,
    seed: int = 0,
    *,
    sliding: bool = False,
) -> tuple[CropAndRescale, ...]:
    """``n`` windows at random places, each enlarged: the crop ensemble of Guo et al.

    (https://arxiv.org/abs/1711.00117): 30 crops of 90×90 out of 224×224.

    Args:
        n: how many; without meaning where ``sliding``.
        size: of the windows, as :class:`CropAndRescale` takes it.
        seed: of their places. Two seeds have no window in common.
        sliding: the nine windows of a 3×3 grid, from corner to corner, as the published code has
            them beside the random ones.

    Raises:
        ValueError: numbers out of range.
    """
    if sliding:
        thirds = (0.0, 0.5, 1.0)
        return tuple(CropAndRescale(size, (down, right)) for down in thirds for right in thirds)
    check_count("n", n, 1)
    check_count("seed", seed, 0)
    return tuple(CropAndRescale(size, seed=seed * n + i) for i in range(n))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x.clone()
    resized = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    # Rounding must not lead out of what the next transform takes.
    return resized.clamp(0, 1)


def _mirrored(size: int, border: int) -> Tensor:
    """Indices of a line of ``size`` pixels with ``border`` mirrored ones at each end."""
    position = torch.arange(-border, size + border) % (2 * size)
    return torch.where(position < size, position, 2 * size - 1 - position)


def _median_of_nine(padded: Tensor) -> Tensor:
    """The median of each 3×3 window of N×C×(H+2)×(W+2); many times faster than by selection."""
    low, middle, high = _sorted(padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:])
    # Of three sorted columns, all nine values have the median of these three for theirs.
    largest_low = torch.maximum(torch.maximum(low[..., :-2], low[..., 1:-1]), low[..., 2:])
    middle_middle = _sorted(middle[..., :-2], middle[..., 1:-1], middle[..., 2:])[1]
    smallest_high = torch.minimum(torch.minimum(high[..., :-2], high[..., 1:-1]), high[..., 2:])
    return _sorted(largest_low, middle_middle, smallest_high)[1]


def _sorted(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors, sorted at each place."""
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    b, c = torch.minimum(b, c), torch.maximum(b, c)
    return torch.minimum(a, b), torch.maximum(a, b), c


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{name}: expected a number of pixels or (H, W), got {value!r}")
    for number in pair:
        check_count(name, number, 1)
    return pair[0], pair[1]
