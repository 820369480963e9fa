"""Batches of transformed images, and the way of their maps back to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import check_finite
from captum_robust._resize import resized
from captum_robust.transforms.transform import Transform, backward_differentiable


@dataclass(frozen=True)
class Group:
    """Transforms whose images have one size, and these, T·N×C×h×w, one transform after another."""

    numbers: tuple[int, ...]
    """Of the transforms, among all."""
    transforms: tuple[Transform, ...]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """The attribution of the N images of a transform."""

    values: Tensor
    shown: tuple[int, int]
    """The size of the transformed images."""
    is_layer: bool

    def resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """What the map has for images of ``size``: in proportion."""
        if self.values.ndim != 4:
            raise ValueError(
                "attribution: a transform that moves pixels needs results N×C×h×w, got "
                f"{tuple(self.values.shape)}"
            )
        if not self.is_layer:
            return size
        height, width = (
            max(1, round(own * side / shown))
            for own, side, shown in zip(self.values.shape[2:], size, self.shown, strict=True)
        )
        return height, width


@dataclass(frozen=True)
class Result:
    parts: tuple[Part, ...]
    rest: list[Tensor]
    is_tuple: bool


def transformed(
    transform: Transform, inputs: tuple[Tensor, ...], graph: bool
) -> tuple[Tensor, ...]:
    if graph:
        images = tuple(backward_differentiable(transform, x) for x in inputs)
    else:
        # Copies: a transform of the user's may write to what it is given.
        images = tuple(transform(x.detach().clone()) for x in inputs)
    for x, image in zip(inputs, images, strict=True):
        if len(image) != len(inputs[0]):
            raise ValueError(f"inputs: batches of {len(inputs[0])} and {len(image)} samples")
        if not transform.moves_pixels and image.shape != x.shape:
            raise ValueError(
                f"transforms: {transform!r} makes {tuple(image.shape)} of {tuple(x.shape)} and "
                "does not say how maps get back to the image"
            )
        check_finite(image, f"transforms, {transform!r}")
    return images


def repeated(value: Any, times: int, n: int) -> Any:
    """Tensors of N rows, also within a tuple, that often one after another; all else as it is."""
    if isinstance(value, tuple):
        return tuple(repeated(v, times, n) for v in value)
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n and times > 1:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def repeated_target(target: TargetType, times: int) -> Any:
    """Targets, one a sample, that often one after another; what holds for all as it is."""
    if isinstance(target, list):
        return target * times
    if isinstance(target, Tensor) and target.ndim == 1 and len(target) > 1:
        return target.repeat(times)
    return target


def size_like(inputs: tuple[Tensor, ...], i: int) -> Tensor:
    """The input that part i of a result belongs to: its own, or the first where there is none."""
    return inputs[i] if i < len(inputs) else inputs[0]


def rows_of_each(values: Tensor, count: int, n: int) -> list[Tensor]:
    """Values of T·N·m rows by transform."""
    rows = len(values) // (count * n)
    return list(torch.split(values, n * rows))


def check_places(
    arguments: dict[str, Any], x: Tensor, transforms: tuple[Transform, ...], shown: Tensor
) -> None:
    """``ValueError`` for a tensor of pixels that the transforms of a group would have to move."""
    moving = next((t for t in transforms if t.moves_pixels), None)
    if moving is None:
        return
    for name, value in arguments.items():
        for each in value if isinstance(value, tuple) else (value,):
            if not isinstance(each, Tensor) or each.ndim != 4 or each.shape[2:] != x.shape[2:]:
                continue
            if shown.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"{name}: it has the size of the inputs, {tuple(x.shape[2:])}, and does not "
                    f"fit the images of {moving!r}"
                )
            if bool((each != each[:, :, :1, :1]).any()):
                raise ValueError(
                    f"{name}: it differs from pixel to pixel, and {moving!r} moves those of the "
                    "inputs only"
                )


def at_size(
    maps: Tensor, seen: Tensor | None, size: tuple[int, int], transform: Transform
) -> Tensor:
    """An aligned map on images of ``size``."""
    if maps.ndim != 4 or (seen is not None and tuple(maps.shape[2:]) != size):
        raise ValueError(
            f"transforms: {transform!r} aligned a map to {tuple(maps.shape)}, not to {size}"
        )
    return resized(maps, size)


def weighted(stack: Tensor, weight: Tensor, *, median: bool) -> Tensor:
    """T×N×C×H×W maps combined over T, those positions counting that were seen (T×1×1×H×W)."""
    total = weight.sum(dim=0)
    safe = torch.where(total > 0, total, torch.ones_like(total))
    if not median:
        return stack.sum(dim=0) / safe
    unseen = (weight <= 0.5).expand_as(stack)
    values = stack / weight.clamp(min=0.5)
    found = values.masked_fill(unseen, torch.nan).nanmedian(dim=0).values
    return found.nan_to_num(0.0)
