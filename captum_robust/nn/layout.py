"""Where the channels and the positions of a layer's output are, known from how it was computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._contexts import hooked
from captum_robust.nn.places import LOST, LOST_ROWS, NOWHERE, PLAIN, Layouts, Places, compressed

ONE_POSITION = "layer: its output has one position, so that its map says nothing of where"
_WARNED: WeakSet[nn.Module] = WeakSet()
_STEP = 1e-4
"""Coordinates that differ by less are one; in parts of the image."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where in a tensor the samples and the places of the image are; the rest are channels.

    It is also the function that turns such a tensor into N×C×….
    """

    batch: int
    positions: tuple[int, ...]
    """The dimensions along which the places differ."""
    order: Tensor | None
    """The numbers of the positions, row by row of the image, without class tokens; None: all."""
    grid: tuple[int, ...]
    """(h, w) of an image, (T,) of a series."""

    def __call__(self, x: Tensor) -> Tensor:
        """h×w×N×C, tokens N×T×C and the like as N×C×h×w."""
        channels = [d for d in range(x.ndim) if d != self.batch and d not in self.positions]
        rows = x.permute(self.batch, *channels, *self.positions)
        n, count = x.shape[self.batch], math.prod(x.shape[d] for d in channels)
        flat = rows.reshape(n, count, -1)
        if self.order is not None:
            flat = flat[:, :, self.order.to(x.device)]
        return flat.reshape(n, count, *self.grid)


def recognised(
    layer: nn.Module, places: Places | None, output: Tensor, image: Tensor
) -> Layout | None:
    """What :func:`fitting` gives; a layer whose output has one position only is warned of once."""
    layout = fitting(places, output, image)
    maps = output if layout is None else layout(output)
    is_one = maps.ndim == image.ndim > 2 and maps[0, 0].numel() == 1 < image[0, 0].numel()
    if is_one and layer not in _WARNED:
        _WARNED.add(layer)
        warnings.warn(f"{ONE_POSITION}; take one before the pooling", stacklevel=2)
    return layout


def fitting(places: Places | None, output: Tensor, image: Tensor) -> Layout | None:
    """What turns a layer's output into N×C×h×w, or N×C×T of a series; None: it is that.

    ``image`` is the model's input, N×C×H×W, a series N×T×F or N×C×T, or numbers N×T.

    Raises:
        ValueError: the places are not known, or not those of a grid.
    """
    if places is PLAIN or output.ndim < 3:
        return None
    if places is None or places is LOST:
        # A map N×C×h×w, as far as anyone knows.
        if output.ndim == 3 and (places is LOST or image.ndim > 3):
            raise _refusal(output)
        return None
    if places is LOST_ROWS:
        raise _refusal(output)
    with torch.no_grad():
        return _layout(places.parts, output, image)


def _refusal(output: Tensor) -> ValueError:
    expected = "expected N×C×h×w, or tokens whose places in the image are known"
    advice = "give a reshape_transform that makes it N×C×h×w"
    return ValueError(f"layer: {expected}, got {tuple(output.shape)}; {advice}")


def _layout(parts: Sequence[Tensor], output: Tensor, image: Tensor) -> Layout | None:
    """The layout of a tensor that has these parts; None where it is N×C×h×w."""
    sample, axes = parts[0], parts[1:]
    batch = _batch_dimension(sample, output.shape, len(image))
    spatial = image.ndim - 2 if image.ndim > 3 else 1
    # Of a series, the time may be either of its dimensions.
    without_tokens = [compressed(axis, ignore_nowhere=True) for axis in axes]
    varying = [a for a, short in zip(axes, without_tokens, strict=True) if short.numel() > 1]
    own = axes[-spatial:] if image.ndim > 3 else varying
    if len(own) == 2 and spatial == 1 and batch == 0:
        return None  # it is the series itself
    positions = tuple(d for d in range(output.ndim) if any(a.shape[d] > 1 for a in own))
    others = without_tokens[:-spatial] if image.ndim > 3 else []
    is_mixed = any(a.shape[d] > 1 for a in others for d in positions)
    if batch is None or any(a.shape[batch] > 1 for a in axes) or is_mixed or len(own) > spatial:
        raise _refusal(output)
    if not positions:
        if sum(length > 1 for d, length in enumerate(output.shape) if d != batch) > 1:
            raise _refusal(output)
        return Layout(batch, (), None, (1,) * spatial)
    shape = [s if d in positions else 1 for d, s in enumerate(output.shape)]
    points = torch.stack([axis.expand(shape).flatten() for axis in own])
    inside = (points != NOWHERE).all(dim=0).nonzero().squeeze(1)
    points = points[:, inside]
    if not len(inside):
        raise _refusal(output)
    ranked = list(map(_ranks, points))
    code, grid = torch.zeros_like(inside), tuple(count for _, count in ranked)
    for rank, count in ranked:
        code = code * count + rank
    order = code.argsort()
    if not torch.equal(code[order], torch.arange(math.prod(grid), device=code.device)):
        raise _refusal(output)  # not one at each place
    in_order = torch.equal(inside[order], torch.arange(math.prod(shape), device=code.device))
    if in_order and batch == 0 and min(positions) > 1 and output.shape[2:] == grid:
        return None
    if not all(_fills(p, *ranks) for p, ranks in zip(points, ranked, strict=True)):  # a part
        raise _refusal(output)
    return Layout(batch, positions, None if in_order else inside[order], grid)


def _batch_dimension(sample: Tensor, shape: Sequence[int], n: int) -> int | None:
    """The dimension of the samples; None where they are spread over several."""
    varying = [d for d, length in enumerate(sample.shape) if length > 1]
    if n == 1 and not varying:
        return next((d for d, length in enumerate(shape) if length == 1), 0)
    return varying[0] if len(varying) == 1 else None


def _ranks(points: Tensor) -> tuple[Tensor, int]:
    """The number of each coordinate among those that differ, and how many these are."""
    ordered, order = points.sort()
    number = (ordered.diff(prepend=ordered[:1]) > _STEP).cumsum(0)
    return torch.empty_like(number).scatter(0, order, number), int(number[-1]) + 1


def _fills(points: Tensor, rank: Tensor, count: int) -> bool:
    """Whether each of the coordinates is within its own part of ``count`` equal ones."""
    return bool(((points - (rank + 0.5) / count).abs() <= 0.5 / count + _STEP).all())


@contextmanager
def followed_outputs(
    layer: nn.Module, at_input: bool, images: Sequence[Any]
) -> Iterator[list[tuple[Tensor, Places | None]]]:
    """It is given a list, which gets the tensors of the layer's last call with their places.

    ``images`` are what the network is given.
    """
    outputs: list[tuple[Tensor, Places | None]] = []

    def record(_: nn.Module, given: Any, output: Any) -> None:
        value = given if at_input else output
        parts = value if isinstance(value, tuple) else (value,)
        other = next((type(x).__name__ for x in parts if not isinstance(x, Tensor)), None)
        got = f"got {other}; take RobustCAM, which takes those of others"
        is_taken = at_input or other is None
        check(is_taken, f"layer: expected a tensor or a tuple of tensors, {got}", TypeError)
        outputs[:] = [(x.detach(), followed.of(x)) for x in parts if isinstance(x, Tensor)]

    with Layouts(*images) as followed, hooked([layer], record):
        yield outputs


def placed(
    result: Any, outputs: list[tuple[Tensor, Places | None]], reshapes: Sequence[Any]
) -> Any:
    """A result in the shape of a layer's outputs, its dimensions put in their places by these."""
    parts = result if isinstance(result, tuple) else (result,)
    if [getattr(part, "shape", None) for part in parts] != [x.shape for x, _ in outputs]:
        return result
    each = zip(reshapes, parts, strict=True)
    moved = tuple(part if reshape is None else reshape(part) for reshape, part in each)
    return moved if isinstance(result, tuple) else moved[0]
