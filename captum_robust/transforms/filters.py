"""Input transforms that leave each pixel in its place: grey levels, blur and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import check, check_count, check_number
from captum_robust._resize import blurred, mirrored
from captum_robust.transforms.transform import Transform


class Identity(Transform):
    """The images as they are: the undefended member of an ensemble."""

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
        self.bits = check_count("bits", bits, 1, 16)

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
        self.sigma = check_number("sigma", sigma, 0, 1000, open_low=True)

    def _apply(self, x: Tensor) -> Tensor:
        # Rounding must not lead out of what the next transform takes.
        return blurred(x, self.sigma).clamp(0, 1)


class MedianBlur(Transform):
    """The median of the size×size pixels around each, by channel, the image mirrored at its border.

    Raises:
        ValueError: ``size`` is no odd number from 3.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = check_count("size", size, 3, 1001)
        check(size % 2 == 1, f"size: expected an odd number, got {size}")

    def _apply(self, x: Tensor) -> Tensor:
        padded, border = x, self.size // 2
        for dim in (2, 3):
            positions = torch.arange(-border, x.shape[dim] + border, device=x.device)
            padded = padded.index_select(dim, mirrored(positions, x.shape[dim]))
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
