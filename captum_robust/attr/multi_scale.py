"""MultiScale: an attribution averaged over sizes of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import (
    TargetType,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
)
from captum_robust._checks import as_number, check_batch, check_finite
from captum_robust.attr._wrapped import (
    Wrapper,
    as_tuple,
    copied,
    listed,
    of_largest_one,
    predicted_by,
    run,
    scores_of,
    takes_target,
)


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

    def __init__(self, attribution: Attribution, scales: Sequence[float] = (1, 12 / 7)) -> None:
        super().__init__(attribution)
        is_several = isinstance(scales, Sequence) and len(scales) > 0
        if not is_several or not all(0 < as_number(s) < math.inf for s in scales):
            raise ValueError(f"scales: expected positive numbers, at least one, got {scales!r}")
        self.scales = tuple(scales)

    @property
    def explains_prediction(self) -> bool:
        """Never: the sizes could disagree on the class, so it is found on the inputs as given."""
        return False

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
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
        is_inputs_tuple = is_tuple(inputs)
        inputs_tuple: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
        n = check_batch(inputs_tuple)
        if any(x.ndim != 4 for x in inputs_tuple):
            raise ValueError(f"inputs: expected N×C×H×W, got {listed(inputs_tuple)}")
        with torch.inference_mode(False), torch.enable_grad():
            if target is None and takes_target(self.attribution):
                target = predicted_by(self.forward_func, inputs_tuple, additional_forward_args)
            shared = {"target": target, "additional_forward_args": additional_forward_args}
            shared = {name: value for name, value in shared.items() if value is not None}
            sums: list[Tensor] = []
            for scale in self.scales:
                sized = tuple(_resized(x, _size(x, scale)) for x in copied(inputs_tuple))
                result = run(
                    self.attribution, format_output(is_inputs_tuple, sized), shared | arguments
                )
                parts = as_tuple(result)
                for i, part in enumerate(parts):
                    if not isinstance(part, Tensor) or part.ndim != 4 or len(part) != n:
                        raise ValueError(
                            f"attribution: expected results N×C×H×W, got {listed(parts)}"
                        )
                    try:
                        check_finite(part, "attribution")
                    except ValueError:
                        scores_of(self.forward_func, sized, additional_forward_args)  # is it they?
                        raise
                    like = inputs_tuple[min(i, len(inputs_tuple) - 1)]
                    part = of_largest_one(_resized(part.detach(), tuple(like.shape[2:])))
                    if len(sums) <= i:
                        sums.append(part)
                    else:
                        sums[i] = sums[i] + part
        dtype = inputs_tuple[0].dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        averages = tuple((s / len(self.scales)).to(dtype).contiguous() for s in sums)
        output: Tensor | tuple[Tensor, ...] = format_output(isinstance(result, tuple), averages)
        return output


def _size(x: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(scale * x.shape[2])), max(1, round(scale * x.shape[3]))


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear; smoothed before it is made smaller."""
    if tuple(x.shape[2:]) == size:
        return x
    x = x.float() if not x.is_floating_point() or x.dtype.itemsize < 4 else x
    resized = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    # Rounding would take white pixels past 1, out of an attribution's bounds.
    dims = (1, 2, 3)
    return resized.clamp(x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True))
