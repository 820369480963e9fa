"""The part of the image that a position of a layer's map depends on, found by probing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_robust._checks import check, checked_size
from captum_robust._contexts import as_written
from captum_robust._processes import device_of
from captum_robust.draw import blank_figure
from captum_robust.inspection.watched import Watched, as_classifier, layers_of, watch
from captum_robust.models import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReceptiveField:
    """Position (i, j) of a map depends on ``size`` pixels from ``start + (i, j) · stride`` on.

    All are (y, x) in pixels of the image. The outermost fields reach into the padding, so that
    ``start`` may be negative.
    """

    layer: str
    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]
    """Of position (0, 0)."""
    input_size: tuple[int, int]
    grid: tuple[int, int]
    """(h, w) of the map."""
    whole: tuple[bool, bool]
    """Whether it is all rows, and all columns, of the image, as of a layer behind a mean over the
    positions; then ``size`` is that of the image and ``stride`` is 0. Where a field is so large
    that it is cut off by the image everywhere, it counts as all of it."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole image."""
        return all(self.whole)

    @property
    def described(self) -> str:
        """Size and stride in words."""
        if self.is_whole:
            return "the whole image"
        (height, width), (down, across) = self.size, self.stride
        return f"{height}×{width} pixels, every {down}×{across}"

    def __str__(self) -> str:
        return f"{self.layer}: {self.described}"

    def plot(self) -> Figure:
        """Draw the fields of the first, the middle and the last position over the image's frame.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib.patches import Rectangle

        figure = blank_figure(figsize=(4, 4), layout="constrained")
        axes = figure.add_subplot(aspect="equal", title=str(self))
        height, width = self.input_size
        axes.add_patch(Rectangle((0, 0), width, height, facecolor="#dddddd"))
        for share, color in ((0.0, "#0072b2"), (0.5, "#d55e00"), (1.0, "#009e73")):
            at = [int(share * (count - 1)) for count in self.grid]
            y, x = (s + i * d for s, i, d in zip(self.start, at, self.stride, strict=True))
            axes.add_patch(
                Rectangle((x, y), self.size[1], self.size[0], fill=False, edgecolor=color, lw=2)
            )
        axes.autoscale_view()
        axes.invert_yaxis()
        return figure


def receptive_field(
    model: nn.Module, layer: nn.Module | str, input_size: int | tuple[int, int] | None = None
) -> ReceptiveField:
    """Find the receptive field of a layer exactly, whatever lies before it.

    Rows, then columns, of a random image are made NaN, which passes through every operation that
    depends on them, also where a weight or a gradient happens to be zero. How many rows from the
    border it takes until a position turns NaN is found by bisection: some 60 passes of one image,
    up to the layer. Where the field has gaps, as by a dilation, its outline counts.

    Args:
        model: a classifier, or any network of images.
        layer: a part of the model that gives maps, or its dotted name.
        input_size: (H, W) of the image, or a number for a square; None: the model's own.

    Raises:
        ValueError: a layer that is no part of the model or gives no maps, or whose positions are
            not evenly spaced with fields of one size, as behind an upsampling, an adaptive pooling
            or attention within windows.
    """
    size = None if input_size is None else checked_size("input_size", input_size)
    classifier = as_classifier(model, size)
    (watched,) = layers_of(classifier, [layer], size)
    field = field_of(classifier, watched, size or classifier.input_size)
    uneven = f"layer: the positions of {watched.name} have no receptive fields of one size and step"
    if field is None:
        raise ValueError(uneven)
    return field


def field_of(model: Classifier, layer: Watched, size: tuple[int, int]) -> ReceptiveField | None:
    """The receptive field of a layer; None where it is not the same at all positions."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.input_shape[0], *size, generator=generator)
    like = next(model.parameters(), image)
    image = image.to(device_of(model), like.dtype)

    def spoiled(axis: int, side: int, count: int) -> Tensor:
        """Which positions along an axis turn NaN by so many spoiled rows (columns) at a side."""
        given = image.clone()
        first = 0 if side == 0 else size[axis] - count
        given.narrow(2 + axis, first, count).fill_(torch.nan)
        (maps,) = watch(model, [layer], given)
        return maps.isnan().any(dim=1)[0].any(dim=1 - axis).cpu()

    # Winograd and FFT convolutions would spread a NaN over their tiles, and oneDNN's of half
    # precision to a neighbour.
    with (
        as_written(),
        _without_onednn(like.dtype.itemsize < 4),
        torch.backends.cudnn.flags(enabled=False),
        torch.backends.nnpack.flags(enabled=False),
    ):
        clean = not spoiled(0, 0, 0).any()
        check(clean, f"layer: {layer.name} gives NaN for a random image")
        vertical, horizontal = (_Axis(partial(spoiled, axis), size[axis]) for axis in (0, 1))
        rows = vertical.field()
        columns = horizontal.field(vertical.borders if size[0] == size[1] else (0, 0))
    if rows is None or columns is None:
        return None
    (height, down, top), (width, across, left) = rows, columns
    return ReceptiveField(
        layer=layer.name,
        size=(height, width),
        stride=(down, across),
        start=(top, left),
        input_size=size,
        grid=(layer.shape[1], layer.shape[2]),
        whole=(down == 0, across == 0),
    )


@contextmanager
def _without_onednn(is_off: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if is_off:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of another option of its, that stays as it is
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


class _Axis:
    """The rows (columns) of an image of ``length``, and which positions of a map they reach.

    Args:
        spoil: the side (0 the first rows, 1 the last) and how many rows there are spoiled -> which
            positions are then.
        length: of the image.
    """

    def __init__(self, spoil: Callable[[int, int], Tensor], length: int) -> None:
        self._spoil = spoil
        self._seen: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        self.length = length
        self.borders = (0, 0)
        """Rows that the first position does not see at the end, and the last one at the start."""

    def _reached(self, side: int, count: int) -> Tensor:
        if count not in self._seen[side]:
            self._seen[side][count] = self._spoil(side, count)
        return self._seen[side][count]

    def _unseen(self, side: int, position: int, guess: int = 0) -> int:
        """How many rows at a border the position does not depend on; a right guess is quick."""
        low, high = 0, self.length + 1  # not reached by low, reached by high
        for count in (guess, guess + 1):
            if 0 < count <= self.length:
                self._reached(side, count)
        for count, reached in self._seen[side].items():
            if reached[position]:
                high = min(high, count)
            else:
                low = max(low, count)
        while high - low > 1:
            middle = min((low + high) // 2, self.length)
            if self._reached(side, middle)[position]:
                high = middle
            else:
                low = middle
        return low

    def field(self, alike: tuple[int, int] = (0, 0)) -> tuple[int, int, int] | None:
        """Size, stride and start; stride 0: the whole image. None: uneven.

        ``alike`` are the ``borders`` of an axis that is probably like this one.
        """
        whole, length = (self.length, 0, 0), self.length
        count = len(self._reached(0, length))
        last, end = count - 1, length - self._unseen(1, 0, alike[0])
        begin = self._unseen(0, last, alike[1])
        self.borders = (length - end, begin)
        if last == 0:
            return whole if (begin, end) == (0, length) else (end - begin, length, begin)
        if begin == 0 or end == length:
            return whole
        usual = round(length / count)
        if before := self._unseen(0, last - 1, begin - usual):
            stride = begin - before
        elif behind := self._unseen(1, 1, length - end - usual):
            stride = length - behind - end
        else:
            return whole
        start = begin - stride * last
        size = end - start
        first = start + stride * (count // 2)
        for side, guess in enumerate((first, length - first - size)):
            self._unseen(side, count // 2, guess)
        return (size, stride, start) if self._is_even(size, stride, start) else None

    def _is_even(self, size: int, stride: int, start: int) -> bool:
        """Whether all that was seen follows from these; of fields that the image does not cut."""
        for side in (0, 1):
            for spoiled, reached in self._seen[side].items():
                first = start + stride * torch.arange(len(reached))
                inside = (first >= 0) & (first + size <= self.length)
                expected = first < spoiled if side == 0 else first + size > self.length - spoiled
                if (reached != expected)[inside].any():
                    return False
        return stride > 0
