"""What the model says of many masked copies of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust._captum import format_baseline
from captum_robust._checks import check, check_count, check_finite, shape_or_type
from captum_robust._scores import FastScores, arguments_of, finite_scores, one_row_a_sample

_BUDGET = 2**26
"""Bytes of the masked images of one pass, the most: 111 of 3×224×224 in single precision."""
_BUDGET_A_THREAD = 2**22
"""Of each thread on the CPU, whose caches hold no more: 6 images. 64 at once take twice as long."""


class MaskedImages:
    """Images N×C×H×W, of which one at a time is given to the model under many masks.

    Args:
        forward_func: the model.
        images: all inputs.
        arguments: additional ones, of which each sample keeps its row.
        at_once: masks in one pass; None: as many as fit into 64 MiB, on the CPU 4 MiB a thread.
        baselines: what hidden pixels show, see :func:`_checked_baselines`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        images: tuple[Tensor, ...],
        arguments: object,
        at_once: int | None,
        baselines: Any = None,
    ) -> None:
        check_count("perturbations_per_eval", at_once, 1, optional=True)
        # On the CPU, convolutions run some 20 % faster on channels_last.
        on_cpu = all(x.device.type == "cpu" for x in images)
        self._model = FastScores(forward_func, channels_last=on_cpu)
        if at_once is None:
            most = min(_BUDGET, _BUDGET_A_THREAD * torch.get_num_threads()) if on_cpu else _BUDGET
            at_once = max(1, most // sum(x[0].numel() * x.element_size() for x in images))
        self.at_once = at_once
        self.images = images
        self.n = len(images[0])
        self.device = images[0].device
        self._baselines = _checked_baselines(images, baselines)
        self.arguments = arguments

    def scores(self) -> Tensor:
        """The scores N×… of the images as they are, finite."""
        scores = self._model(self.images, self.arguments)
        return finite_scores(scores, self.n).to(self.device)

    def masked_scores(self, i: int, masks: Sequence[Tensor]) -> Tensor:
        """The scores B×… of image i under B masks B×1×H×W for each input, finite."""
        count = len(masks[0])
        each = zip(self.images, self._baselines, masks, strict=True)
        copies = [torch.addcmul(b[i], m.to(x.dtype), x[i] - b[i]) for x, b, m in each]
        scores = self._model(copies, arguments_of(self.arguments, [i] * count, self.n))
        scores = one_row_a_sample(scores, count)
        finite_scores(scores.reshape(1, -1), 1, first_sample=i)
        return scores.to(self.device)

    def parts(self, first: int, last: int) -> Iterator[slice]:
        """The masks from ``first`` up to ``last`` in passes."""
        for begin in range(first, last, self.at_once):
            yield slice(begin, min(last, begin + self.at_once))


def _checked_baselines(images: tuple[Tensor, ...], baselines: Any) -> list[Tensor]:
    """A baseline in the shape of each of the images, from what Captum takes: numbers, or tensors
    of one sample or of all; None: 0."""
    given = format_baseline(baselines, images)
    check(len(given) == len(images), f"baselines: expected {len(images)}, got {len(given)}")
    each = []
    for x, baseline in zip(images, given, strict=True):
        own = torch.as_tensor(baseline).to(x)
        expected = f"a number or a tensor that expands to {tuple(x.shape)}"
        fits = own.ndim <= x.ndim and all(
            a in (1, b) for a, b in zip(own.shape[::-1], x.shape[::-1], strict=False)
        )
        check(fits, f"baselines: expected {expected}, got {shape_or_type(baseline)}")
        check_finite(own.reshape(-1), "baselines")
        each.append(own.expand_as(x))
    return each
