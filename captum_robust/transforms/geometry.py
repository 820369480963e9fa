"""Input transforms that resize, crop or mirror an image, and bring its maps back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import as_number, check, check_count, check_number, checked_size
from captum_robust._resize import resize_image, resized
from captum_robust.transforms.transform import Transform


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
        is_one = (scale is None) != (size is None)
        check(is_one, f"scale and size: expected one of them, got {scale!r} and {size!r}")
        self.scale = None if scale is None else check_number("scale", scale, 0, 64, open_low=True)
        self.size = None if size is None else checked_size("size", size)
        self.restore = bool(restore)
        self.moves_pixels = not self.restore

    def _apply(self, x: Tensor) -> Tensor:
        size = self.size
        if size is None:
            assert self.scale is not None
            size = _scaled(x.shape[2:], self.scale)
        image = _resize(x, size)
        return _resize(image, (x.shape[2], x.shape[3])) if self.restore else image

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The maps at the size of the image; as they are where the image's size was restored."""
        return (resized(maps, size) if self.moves_pixels else maps), None


class HorizontalFlip(Transform):
    """Left and right exchanged."""

    moves_pixels = True

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
            check(0 < size <= 1, f"size: expected a share of at most 1, or pixels, got {size!r}")
            self.size: float | tuple[int, int] = size
        else:
            self.size = checked_size("size", size)
        if position is not None:
            is_pair = isinstance(position, (tuple, list)) and len(position) == 2
            are_shares = is_pair and all(0 <= as_number(p) <= 1 for p in position)
            check(are_shares, f"position: expected two shares in [0, 1], got {position!r}")
            position = (float(position[0]), float(position[1]))
        self.position = position
        self.draws = position is None

    def _apply(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        top, left, h, w = self._window(size)
        return _resize(x[:, :, top : top + h, left : left + w], size)

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The maps in the window, zeros around them; the pixels of the window were seen."""
        is_known = not self.draws or self.seed is not None
        check(is_known, "seed: the window was drawn anew and is not known; give a seed")
        top, left, h, w = self._window(size)
        around = (left, size[1] - left - w, top, size[0] - top - h)
        seen = maps.new_ones(1, 1, h, w)
        return F.pad(resized(maps, (h, w)), around), F.pad(seen, around)

    def _window(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width in an image of ``size``."""
        h, w = _scaled(size, self.size) if isinstance(self.size, float) else self.size
        fits = h <= size[0] and w <= size[1]
        check(fits, f"inputs: images of {size[0]}×{size[1]} are smaller than the window {h}×{w}")
        rows, columns = size[0] - h, size[1] - w
        if self.position is not None:
            return int(self.position[0] * rows), int(self.position[1] * columns), h, w
        down, right = torch.rand(2, generator=self._generator(), dtype=torch.float32).tolist()
        # Each place of the window is as likely as another.
        return int(down * (rows + 1)), int(right * (columns + 1)), h, w


def crop_ensemble(
    n: int = 30, size: float | tuple[int, int] = 90 / 224, seed: int = 0, *, sliding: bool = False
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
    # A clamp, as of what is resized, would take the gradient at 0 and 1.
    return x.clone() if tuple(x.shape[2:]) == size else resize_image(x, size)


def _scaled(size: Sequence[int], share: float) -> tuple[int, int]:
    """A share of height and width, rounded: 90/224 of 224 is a little less than 90."""
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))
