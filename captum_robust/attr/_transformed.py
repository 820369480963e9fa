"""Batches of transformed images, and the way of their maps back to the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_finite
from captum_robust._resize import resized
from captum_robust._scores import at_least_float
from captum_robust.attr._inputs import as_tuple, divided, of_largest_one, size_of
from captum_robust.attr._wrapped import copied, listed
from captum_robust.transforms.transform import Transform, backward_differentiable

COMBINATIONS = ("mean", "normalized_mean", "median")


@dataclass(frozen=True)
class Group:
    """Transforms whose images have one size, and these, T·N×C×h×w, one transform after another."""

    numbers: tuple[int, ...]
    """The numbers of the transforms among all."""
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Result:
    """What the attribution gave for the N images of a transform."""

    parts: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    """The size of the transformed images that each part belongs to."""
    rest: tuple[Tensor, ...]
    """What came behind the attributions."""
    is_tuple: bool
    """Whether the attributions came as a tuple."""

    def resolution(self, i: int, size: tuple[int, int], is_layer: bool) -> tuple[int, int]:
        """What part i has for images of ``size``; that of a layer is in proportion."""
        values = self.parts[i]
        needs = "a transform that moves pixels needs results N×C×h×w"
        check(values.ndim == 4, f"attribution: {needs}, got {tuple(values.shape)}")
        if not is_layer:
            return size
        height, width = (
            max(1, round(own * side / transformed))
            for own, side, transformed in zip(values.shape[2:], size, self.sizes[i], strict=True)
        )
        return height, width


def groups_of(
    transforms: Sequence[Transform],
    inputs: tuple[Tensor, ...],
    arguments: dict[str, Any],
    most: int,
    graph: bool,
    clamp: float,
) -> Iterator[Group]:
    """The transformed inputs: those of one size, of up to ``most`` transforms, together.

    ``ValueError`` for arguments that do not go with them.
    """
    waiting: dict[Any, dict[int, tuple[Tensor, ...]]] = {}

    def group(same: dict[int, tuple[Tensor, ...]]) -> Group:
        return Group(tuple(same), tuple(map(torch.cat, zip(*same.values(), strict=True))))

    for i, transform in enumerate(transforms):
        images = _transformed(transform, _clamped(inputs, transform.bounds, clamp), graph)
        if transform.moves_pixels:
            for x, image in zip(inputs, images, strict=True):
                _check_places(arguments, x, transform, image)
        size = tuple(x.shape[1:] for x in images)
        same = waiting.setdefault(size, {})
        same[i] = images
        if len(same) == most:
            yield group(waiting.pop(size))
    yield from map(group, waiting.values())


def _clamped(
    inputs: tuple[Tensor, ...], bounds: tuple[float, float] | None, clamp: float
) -> tuple[Tensor, ...]:
    """Samples that leave the bounds by up to ``clamp`` of their width, clamped; others as they are.

    Those the transform refuses.
    """
    if bounds is None or clamp == 0:
        return inputs
    low, high = bounds
    reach = clamp * (high - low)

    def within(x: Tensor) -> Tensor:
        rows = x.detach().reshape(len(x), -1)
        near = (rows.amin(dim=1) >= low - reach) & (rows.amax(dim=1) <= high + reach)
        return torch.where(near.reshape(-1, *[1] * (x.ndim - 1)), x.clamp(low, high), x)

    return tuple(within(x) if x.is_floating_point() else x for x in inputs)


def _transformed(
    transform: Transform, inputs: tuple[Tensor, ...], graph: bool
) -> tuple[Tensor, ...]:
    if graph:
        images = tuple(backward_differentiable(transform, x) for x in inputs)
    else:
        # Copies: a transform of the user's may write to what it is given.
        images = tuple(transform(x) for x in copied(inputs))
    n = len(inputs[0])
    for x, image in zip(inputs, images, strict=True):
        check(len(image) == n, f"inputs: batches of {n} and {len(image)} samples")
        sizes = f"makes {tuple(image.shape)} of {tuple(x.shape)}"
        message = f"{transform!r} {sizes} and does not say how maps get back to the image"
        check(transform.moves_pixels or image.shape == x.shape, f"transforms: {message}")
        check_finite(image, f"transforms, {transform!r}")
    return images


def _check_places(arguments: dict[str, Any], x: Tensor, moving: Transform, images: Tensor) -> None:
    """``ValueError`` for a tensor of pixels that a transform would have to move too."""
    size = x.shape[2:]
    has = f"it has the size of the inputs, {tuple(size)}"
    moves = f"{moving!r} moves those of the inputs only"
    for name, value in arguments.items():
        for each in as_tuple(value):
            if not (isinstance(each, Tensor) and each.ndim == 4 and each.shape[2:] == size):
                continue
            fits = images.shape[2:] == size
            check(fits, f"{name}: {has}, and does not fit the images of {moving!r}")
            same = bool((each == each[:, :, :1, :1]).all())
            check(same, f"{name}: it differs from pixel to pixel, and {moves}")


def combined_maps(
    transforms: Sequence[Transform],
    results: Sequence[Result],
    i: int,
    x: Tensor,
    combine: str,
    is_layer: bool,
) -> Tensor:
    """Part i of the results of all transforms as one tensor, on images like ``x``."""
    size = size_of(x)
    maps = [at_least_float(result.parts[i]) for result in results]
    seen: list[Tensor | None] = [None] * len(maps)
    resolution = None
    if any(transform.moves_pixels for transform in transforms):
        # Before a transform may move it: what has no positions cannot be.
        resolution = results[0].resolution(i, size, is_layer)
        maps, seen = _aligned(transforms, maps, size, resolution)
    same = len({tuple(m.shape) for m in maps}) == 1
    check(same, f"attribution: results of different sizes, {listed(tuple(maps))}")
    if combine == "normalized_mean":
        maps = [of_largest_one(m) for m in maps]
    stack = torch.stack(maps)
    is_median = combine == "median"
    if all(s is None for s in seen):
        combined = stack.median(dim=0).values if is_median else stack.mean(dim=0)
    else:
        ones = stack.new_ones(1, 1, *size)
        weight = torch.stack([ones if s is None else s.to(stack) for s in seen])
        combined = _weighted(stack, weight, median=is_median)
    return combined if resolution is None else resized(combined, resolution)


def _aligned(
    transforms: Sequence[Transform],
    maps: list[Tensor],
    size: tuple[int, int],
    resolution: tuple[int, int],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The maps moved back to the image of ``size``, and how much of it each shows; None: all."""
    pairs = zip(transforms, maps, strict=True)
    aligned = [t.align(m, size) if t.moves_pixels else (m, None) for t, m in pairs]
    maps, seen = [m for m, _ in aligned], [s for _, s in aligned]
    if all(s is None for s in seen) and all(m.shape[2:] == resolution for m in maps):
        return maps, seen
    # Windows, and maps of several sizes, meet at the size of the image.
    for transform, (m, window) in zip(transforms, aligned, strict=True):
        fits = m.ndim == 4 and (window is None or tuple(m.shape[2:]) == size)
        shape = tuple(m.shape)
        check(fits, f"transforms: {transform!r} aligned a map to {shape}, not to {size}")
    return [resized(m, size) for m in maps], seen


def _weighted(stack: Tensor, weight: Tensor, *, median: bool) -> Tensor:
    """T×N×C×H×W maps combined over T, those positions counting that were seen (T×1×1×H×W)."""
    if not median:
        return divided(stack.sum(dim=0), weight.sum(dim=0))
    unseen = (weight <= 0.5).expand_as(stack)
    values = stack / weight.clamp(min=0.5)
    return values.masked_fill(unseen, torch.nan).nanmedian(dim=0).values.nan_to_num(0.0)
