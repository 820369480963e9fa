"""RISE: the mean of random masks, weighted by the score of what each of them leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._checks import check, check_count, check_number
from captum_robust._contexts import without_autocast
from captum_robust._progress import Advance, progress_bar
from captum_robust._scores import at_least_float, two_classes
from captum_robust.attr._classes import ExplainedScore, Target
from captum_robust.attr._inputs import as_given, checked_images, in_dtype_of, size_of
from captum_robust.attr._masked import MaskedImages
from captum_robust.attr._samples import Samples

Baselines: TypeAlias = float | Tensor | tuple[float | Tensor, ...] | None
_Read: TypeAlias = Callable[[Tensor, int], Tensor]
"""Scores B×… of masked copies of a sample, and its number -> B×K numbers."""
_BLOCK = 100
"""Masks between two looks at the standard error, however many run at once."""


class RISE(Attribution):
    r"""How high a score is on average where a pixel is seen, of images under random masks.

    .. math:: S = \frac{E[f(x \odot M)\, M]}{E[M]} \approx
              \bar f + \frac{1}{(N - 1)\, p} \sum_{i=1}^N (f(x \odot m_i) - \bar f)\, m_i

    Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models"
    (https://arxiv.org/abs/1806.07421), equation 6. A mask is a grid of s×s cells, each 1 with the
    probability p, enlarged bilinearly and shifted by a part of a cell; it hides pixels behind a
    baseline. The paper's :math:`\frac{1}{Np} \sum f\, m_i` has the same expected value S, but is
    too high where chance hid a pixel less often than elsewhere: the higher the mean score
    :math:`\bar f`, the more. Here the map is free of that, and unbiased too.

    The scores are those of ``forward_func``; the paper explains probabilities: give
    ``lambda x: model(x).softmax(dim=1)``.

    The grids are drawn once, for all images and classes, and enlarged as they are needed. A sample
    costs ``n_masks`` forward passes and no gradient: the model may be any function.

    Args:
        forward_func: images N×C×H×W -> scores.
        n_masks: N.
        s: cells of a mask each way, at most one a pixel.
        p: the probability that a cell is kept, and so the mean of a mask at each pixel.
        seed: of the masks, the same on all devices; None: from torch's global generator.

    Raises:
        ValueError: a number out of range.

    >>> left = RISE(lambda x: x[:, 0, :, :2].sum(dim=2).sum(dim=1), s=4, n_masks=500)
    >>> attributions = left.attribute(torch.ones(1, 1, 4, 4))[0, 0].mean(dim=0)
    >>> attributions.argsort(descending=True)[:2].sort().values
    tensor([0, 1])
    """

    explains_prediction = True

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        n_masks: int = 2000,
        s: int = 7,
        p: float = 0.5,
        seed: int | None = 0,
    ) -> None:
        super().__init__(forward_func)
        self.n_masks = check_count("n_masks", n_masks, 1)
        self.s = check_count("s", s, 1)
        self.p = check_number("p", p, 0, 1, open_low=True, open_high=True)
        self.seed = check_count("seed", seed, 0, optional=True)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        *,
        baselines: Baselines = None,
        perturbations_per_eval: int | None = None,
        tolerance: float | None = None,
        show_progress: bool | None = None,
    ) -> Any:
        """The expected score with each pixel, in the shape of the inputs: alike in all channels.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W, or a tuple of such, each of which is hidden by masks of its own.
            target: the explained class, or a function of the scores; None: the predicted class.
            additional_forward_args: passed on to ``forward_func``. Of a tensor whose first
                dimension is N, each sample keeps its row.
            baselines: what hidden pixels show, as for Captum: a number, a tensor that expands to
                the images, or a tuple of these; None: 0.
            perturbations_per_eval: masked copies of a sample in one forward pass; None: as many as
                64 MiB of images are, on the CPU 4 MiB a thread, which is quickest there.
            tolerance: a sample is done, after each 100 masks, once the standard error of its map
                (root mean square over the pixels) is at most this part of the map's range, such as
                0.05; None: all masks are used.
            show_progress: a bar on standard error, of the masks; None: only where it takes more
                than two seconds, on a terminal or in a notebook.

        Raises:
            ValueError: inputs that are no images, numbers out of range, NaN or infinity in a score
                (names the sample), or scores that are the same whatever the inputs are.
        """

        def reader(scores: Tensor) -> _Read:
            explained = ExplainedScore(scores, target)
            return lambda scores, i: explained(scores, [i] * len(scores)).unsqueeze(1)

        options = (additional_forward_args, baselines, perturbations_per_eval, tolerance)
        return self._attributed(inputs, reader, *options, show_progress, over_channels=True)

    @log_usage()
    def attribute_all_classes(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object | None = None,
        *,
        baselines: Baselines = None,
        perturbations_per_eval: int | None = None,
        tolerance: float | None = None,
        show_progress: bool | None = None,
    ) -> Any:
        """The maps N×K×H×W of all K classes, or a tuple of such, for the passes of one.

        Arguments are those of :meth:`attribute`. With ``tolerance``, a sample is done once the maps
        of all classes are so exact.

        Raises:
            ValueError: as there; scores that are not N×K, or N.
        """

        def reader(scores: Tensor) -> _Read:
            got = tuple(scores.shape)
            check(scores.ndim <= 2, f"forward_func: expected scores N×K for all classes, got {got}")
            return lambda scores, _: scores.reshape(len(scores), -1)

        options = (additional_forward_args, baselines, perturbations_per_eval, tolerance)
        return self._attributed(inputs, reader, *options, show_progress)

    def _attributed(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        reader: Callable[[Tensor], _Read],
        arguments: object,
        baselines: Baselines,
        at_once: int | None,
        tolerance: float | None,
        show_progress: bool | None,
        *,
        over_channels: bool = False,
    ) -> Any:
        """The attributions; ``reader`` is given the scores N×… of the inputs as they are."""
        images = checked_images(inputs)
        with torch.inference_mode(False), torch.no_grad():
            masked = MaskedImages(self.forward_func, images, arguments, at_once, baselines)
            scores = masked.scores()
            maps = self._maps(masked, scores, reader(scores), tolerance, show_progress)
            if over_channels:
                maps = [m.expand_as(x) for x, m in zip(images, maps, strict=True)]
            return as_given(inputs, list(map(in_dtype_of, images, maps)))

    def _maps(
        self,
        masked: MaskedImages,
        scores: Tensor,
        read: _Read,
        tolerance: float | None,
        show_progress: bool | None,
    ) -> list[Tensor]:
        """The maps N×K×H×W for each of the inputs; ``read`` gives K numbers for each score."""
        if tolerance is not None:
            check_number("tolerance", tolerance, 0)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        masks = [_Masks(x, self.n_masks, self.s, self.p, generator) for x in masked.images]
        maps: list[list[Tensor]] = []
        constant = True
        total = masked.n * self.n_masks
        with progress_bar(total, "mask", show_progress, "RISE") as advance:
            for i in range(masked.n):
                sums = self._sums(masked, i, masks, read, tolerance, advance)
                pairs = zip(sums, masks, strict=True)
                maps.append([each.map(self.p).reshape(-1, *m.size) for each, m in pairs])
                constant = constant and not any(each.moved() for each in sums)
        if constant:
            samples = Samples(self.forward_func, masked.images, None, masked.arguments, 0, masked.n)
            samples.check_not_constant(two_classes(scores, masked.n), None)
        return [torch.stack(parts) for parts in zip(*maps, strict=True)]

    def _sums(
        self,
        masked: MaskedImages,
        i: int,
        masks: Sequence[_Masks],
        read: _Read,
        tolerance: float | None,
        advance: Advance,
    ) -> list[_Sums]:
        """The sums of sample i for each of the inputs, over as many masks as it needs."""
        sums: list[_Sums] = []
        block = self.n_masks if tolerance is None else _BLOCK
        for first in range(0, self.n_masks, block):
            for part in masked.parts(first, min(self.n_masks, first + block)):
                drawn = [m(part) for m in masks]
                numbers = read(masked.masked_scores(i, drawn), i).to(drawn[0].dtype)
                sums = sums or [_Sums(numbers[0], tolerance is not None) for _ in masks]
                with without_autocast(numbers):
                    for each, m in zip(sums, drawn, strict=True):
                        each.add(numbers, m.flatten(1))
                advance(len(numbers))
            if tolerance is not None and all(s.is_exact(self.p, tolerance) for s in sums):
                advance(max(0, self.n_masks - first - block))
                break
        return sums


class _Masks:
    """The masks of one input, drawn as grids of cells and enlarged when they are asked for."""

    def __init__(
        self, x: Tensor, n: int, s: int, p: float, generator: torch.Generator | None
    ) -> None:
        self.size = size_of(x)
        dtype = at_least_float(x[:0]).dtype
        sides = [min(s, side) for side in self.size]
        self._cells = (torch.rand(n, *sides, generator=generator) < p).to(x.device, dtype)
        self._enlarge = []  # (matrices, the number of each mask's) for rows and columns
        for side, cells in zip(self.size, sides, strict=True):
            matrices = _enlargements(side, cells).to(x.device, dtype)
            shifts = torch.randint(len(matrices), (n,), generator=generator).to(x.device)
            self._enlarge.append((matrices, shifts))

    def __call__(self, part: slice) -> Tensor:
        """B×1×H×W, of mean p at each pixel."""
        rows, columns = (matrices[shifts[part]] for matrices, shifts in self._enlarge)
        with without_autocast(rows):
            return (rows @ self._cells[part] @ columns.mT).unsqueeze(1)


def _enlargements(size: int, cells: int) -> Tensor:
    """The matrices size×cells that enlarge cells linearly, one for each shift within a cell."""
    step = -(-size // cells)
    whole = F.interpolate(torch.eye(cells)[None], (cells + 1) * step, mode="linear")[0]
    return whole.unfold(1, size, 1)[:, :step].permute(1, 2, 0)


class _Sums:
    """Sums over masks and the K numbers of each; the first of them is subtracted from all."""

    def __init__(self, first: Tensor, squares: bool) -> None:
        self._first = first.unsqueeze(1)
        self._squares = squares
        self._n = 0
        self._d = self._m = self._dm = self._mm = self._dmm = self._ddmm = first.new_zeros(())

    def add(self, numbers: Tensor, m: Tensor) -> None:
        """Numbers B×K of masks B×HW."""
        d = numbers.T - self._first
        self._n += len(m)
        self._d = self._d + d.sum(dim=1, keepdim=True)
        self._m = self._m + m.sum(dim=0)
        self._dm = self._dm + d @ m
        if self._squares:
            mm = m.square()
            self._mm = self._mm + mm.sum(dim=0)
            self._dmm = self._dmm + d @ mm
            self._ddmm = self._ddmm + d.square() @ mm

    def moved(self) -> bool:
        """Whether the numbers were not the same for all masks."""
        return bool(self._dm.any())

    def map(self, p: float) -> Tensor:
        """K×HW."""
        mean = self._d / self._n
        return self._first + mean + (self._dm - mean * self._m) / (max(1, self._n - 1) * p)

    def is_exact(self, p: float, tolerance: float) -> bool:
        """Whether the standard error is at most this part of the range, of each of the K maps."""
        mean = self._d / self._n
        # The map is, but for a constant, the mean over the masks of (d - mean) m / p.
        first, second = self._dm - mean * self._m, self._ddmm - 2 * mean * self._dmm
        second = second + mean.square() * self._mm
        variance = (second - first.square() / self._n) / max(1, self._n - 1)
        error = (variance.clamp(min=0).mean(dim=1) / self._n).sqrt() / p
        low, high = self.map(p).aminmax(dim=1)
        return bool((error <= tolerance * (high - low)).all())
