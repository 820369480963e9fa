"""MultiScale: an attribution averaged over sizes of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._checks import as_number, check
from captum_robust._progress import counted
from captum_robust._resize import resized
from captum_robust._scores import at_least_float
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import (
    as_given,
    as_tuple,
    checked,
    in_dtype_of,
    input_of,
    of_largest_one,
    size_of,
)
from captum_robust.attr._wrapped import Wrapper, copied, listed, run, takes_target


class MultiScale(Wrapper):
    r"""The average of an attribution over several sizes of the image.

    A network with global pooling takes larger images too, and its last map is then finer: the 7×7
    positions of a class activation map at 224 px are 12×12 at 384 px. The result of each size is
    brought back to the size of the inputs and divided by its largest magnitude.

    Args:
        attribution: any, of N×C×H×W inputs, whose result has their shape or is a map N×1×h×w.
        scales: factors of the height and width, 1 for the image as it is. Each costs about its
            square in classifier passes.

    Raises:
        TypeError: ``attribution`` is no attribution.
        ValueError: no scale, or one that is not positive.

    >>> from captum.attr import InputXGradient
    >>> brightness = InputXGradient(lambda x: x.sum(dim=(1, 2, 3)))
    >>> MultiScale(brightness, (1, 2)).attribute(torch.ones(1, 1, 2, 2))
    tensor([[[[1., 1.],
              [1., 1.]]]])
    """

    explains_prediction = False
    """The sizes could disagree, so the class is predicted for the inputs as they are given."""

    def __init__(self, attribution: Attribution, scales: Sequence[float] = (1, 12 / 7)) -> None:
        super().__init__(attribution)
        is_several = isinstance(scales, Sequence) and len(scales) > 0
        are_positive = is_several and all(0 < as_number(s) < math.inf for s in scales)
        check(are_positive, f"scales: expected positive numbers, at least one, got {scales!r}")
        self.scales = tuple(scales)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        **arguments: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The average, signed, in [-1, 1]: N×1×H×W for maps, else in the shape of the inputs.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×C×H×W, or a tuple of such, which are resized alike.
            target: None: the class that is predicted for the inputs as they are, found by one more
                forward pass.
            additional_forward_args: passed on as they are.
            arguments: those of the attribution's ``attribute``.

        Raises:
            ValueError: inputs or results that are not images; NaN or infinity in either.
        """
        tensors = checked(inputs)
        n = len(tensors[0])
        are_images = all(x.ndim == 4 for x in tensors)
        check(are_images, f"inputs: expected N×C×H×W, got {listed(tensors)}")
        with torch.inference_mode(False), torch.enable_grad():
            if target is None and takes_target(self.attribution):
                target = self._predicted(tensors, additional_forward_args)
            sums: list[Tensor] = []
            for scale in counted(self.scales, "scale", None, "attribution"):
                sized = tuple(_resized(x, _size(x, scale)) for x in copied(tensors))
                images = as_given(inputs, sized)
                result = run(self.attribution, images, arguments, target, additional_forward_args)
                parts = as_tuple(result)
                are_maps = all(isinstance(p, Tensor) and p.ndim == 4 and len(p) == n for p in parts)
                check(are_maps, f"attribution: expected results N×C×H×W, got {listed(parts)}")
                self._check_finite(sized, additional_forward_args, attribution=parts)
                maps = [
                    _resized(at_least_float(part.detach()), size_of(input_of(tensors, i)))
                    for i, part in enumerate(parts)
                ]
                maps = [of_largest_one(m) for m in maps]
                sums = [a + b for a, b in zip(sums, maps, strict=True)] if sums else maps
        averages = (in_dtype_of(tensors[0], s / len(self.scales)) for s in sums)
        output: Tensor | tuple[Tensor, ...] = as_given(result, averages)
        return output


def _size(x: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(scale * x.shape[2])), max(1, round(scale * x.shape[3]))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear; smoothed before it is made smaller."""
    if tuple(x.shape[2:]) == size:
        return x
    x = x if x.is_floating_point() else x.float()
    # Rounding would take white pixels past 1, out of an attribution's bounds.
    dims = (1, 2, 3)
    return resized(x, size).clamp(x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True))
