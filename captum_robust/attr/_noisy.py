"""The maps that an attribution gives for many noisy copies of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._contexts import evaluation, noise_added, seeded, seeded_elsewhere
from captum_robust._resize import resized
from captum_robust._scores import arguments_of, at_least_float, model_scores, target_of
from captum_robust.attr._inputs import as_given
from captum_robust.attr._wrapped import is_of_layer, listed, passed_on, run, without_details

_BUDGET = 2**26
"""Bytes of the images of one pass; see :mod:`captum_robust.attr._masked`."""
_BUDGET_A_THREAD = 2**22
MOST_FAILURES = 0.01
"""Of the copies of an image, may have a map with NaN or infinity."""

_OTHER = 1_000_003
"""Added to the seed of the copies that choose the class: other noise than that of the test."""
_DRAWS = 2_000_003
"""Added to the seed for what an attribution draws: independent of the noise of the copies."""

Denoiser = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Copies:
    """The maps of some copies of some images."""

    rows: slice
    """Which of the images."""
    maps: list[Tensor]
    """For each input that has one, of g images and c copies c×g×h×w; zeros where it failed."""
    failed: Tensor
    """c×g, whether a map of it held NaN or infinity."""
    classes: Tensor | None
    """c×g, what the copies are recognised as, where that was asked for."""


class NoisyMaps:
    """Runs an attribution on copies of images with Gaussian noise.

    Copy i has the same noise for each image, whatever else is in the batch and in a pass.

    Args:
        attribution: whose maps they are.
        inputs: as the caller gave them; ``images`` is the tuple of them.
        extra: additional forward arguments.
        arguments: further ones of the attribution.
        sigma: the standard deviation, in the unit of the inputs.
        size: (h, w) of the maps; None: those of the images.
        seed: of the noise, and of an attribution that draws; None: drawn from torch's generator.
        denoiser: what each copy goes through.
        at_once: copies in one pass; None: as many as fit.
    """

    def __init__(
        self,
        attribution: Attribution,
        inputs: Any,
        images: tuple[Tensor, ...],
        extra: object,
        arguments: dict[str, Any],
        sigma: float,
        size: tuple[int, int] | None,
        seed: int | None,
        denoiser: Denoiser | None,
        at_once: int | None,
    ) -> None:
        self.attribution = attribution
        self.inputs, self.images, self.n_images = inputs, images, len(images[0])
        self.extra, self.arguments = extra, arguments
        self.sigma, self.size, self.denoiser = sigma, size, denoiser
        self.is_seeded = seed is not None
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed
        on_cpu = all(x.device.type == "cpu" for x in images)
        self._layout = torch.channels_last if on_cpu else torch.contiguous_format
        """Of the copies, on the CPU what convolutions are quickest on, if the model takes it."""
        if at_once is None:
            most = min(_BUDGET, _BUDGET_A_THREAD * torch.get_num_threads()) if on_cpu else _BUDGET
            at_once = max(1, most // sum(x[0].numel() * x.element_size() for x in images))
        self.at_once = at_once

    @property
    def mapped(self) -> tuple[Tensor, ...]:
        """The inputs that have a map: all, or, of a layer's map, the first."""
        return self.images[:1] if is_of_layer(self.attribution) else self.images

    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each map."""
        return [self.size or (x.shape[2], x.shape[3]) for x in self.mapped]

    @contextmanager
    def _sampling(self, seed: int) -> Iterator[None]:
        """The state of the world in which copies are drawn and explained."""
        device = self.images[0].device
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            if self.is_seeded:
                stack.enter_context(seeded(seed + _DRAWS, device))
                stack.enter_context(seeded_elsewhere(seed + _DRAWS))
            if isinstance(self.denoiser, nn.Module):
                stack.enter_context(evaluation(self.denoiser))
            token = noise_added.set(True)
            stack.callback(noise_added.reset, token)
            yield

    def top_class(self, count: int) -> Tensor | None:
        """N, the most frequent class of so many copies; None for scores without classes."""
        found: dict[int, list[Tensor]] = {}
        device: torch.device | None = None
        seed = self.seed + _OTHER
        with self._sampling(seed):
            for rows, noise in self._passes(count, seed):
                predicted = self._classes(self._noisy(rows, noise), rows, len(noise[0]))
                if predicted is None:
                    return None
                device = predicted.device
                found.setdefault(rows.start, []).append(predicted.cpu())
        tops = [torch.cat(each).mode(dim=0).values for each in found.values()]
        return torch.cat(tops).to(device)

    def __call__(
        self, count: int, target: Any, take: Callable[[Copies], object], *, with_classes: bool
    ) -> None:
        """Gives ``take`` the maps of ``count`` copies of each image, some at a time."""
        with self._sampling(self.seed):
            if not self.is_seeded:
                self._check_repeats(target)
            failures = torch.zeros(self.n_images, dtype=torch.long)
            for rows, noise in self._passes(count, self.seed):
                copies = self._explained(rows, noise, target, with_classes, count)
                failures[rows] += copies.failed.sum(dim=0).cpu()
                worst = int(failures.argmax())
                share = f"{int(failures[worst])} of {count} noisy copies of sample {worst}"
                is_rare = failures[worst] <= MOST_FAILURES * count
                what = "attribution, or the scores: NaN or infinity"
                check(is_rare, f"{what} in {share}, more than 1 %")
                take(copies)

    def _passes(self, count: int, seed: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Which images, and the noise c×C×H×W for each input, of every pass."""
        group = min(self.n_images, self.at_once)
        most = max(1, self.at_once // group)
        device = self.images[0].device
        for first in range(0, self.n_images, group):
            generator = torch.Generator(device).manual_seed(seed)
            for begin in range(0, count, most):
                each = range(begin, min(count, begin + most))
                # One copy after the other: what is drawn does not depend on how many are a pass.
                drawn = [[self._noise(x, generator) for x in self.images] for _ in each]
                noise = [torch.stack(parts) for parts in zip(*drawn, strict=True)]
                yield slice(first, min(self.n_images, first + group)), noise

    def _noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(x.shape[1:], generator=generator, device=x.device) * self.sigma

    def _noisy(self, rows: slice, noise: list[Tensor]) -> tuple[Tensor, ...]:
        """Images (cg)×C×H×W, copy after copy."""
        copies = []
        for x, each in zip(self.images, noise, strict=True):
            noisy = (x[rows] + each.unsqueeze(1)).flatten(0, 1).to(x.dtype)
            noisy = noisy.contiguous(memory_format=self._layout)
            if self.denoiser is not None:
                with torch.no_grad():
                    clean = self.denoiser(noisy)
                fits = isinstance(clean, Tensor) and clean.shape == noisy.shape
                check(
                    fits, f"denoiser: expected images {tuple(noisy.shape)}, got {listed((clean,))}"
                )
                noisy = clean.to(x.dtype)
            copies.append(noisy.detach())
        return tuple(copies)

    def _passed(self, rows: slice, count: int, **values: Any) -> dict[str, Any]:
        """The arguments of ``count`` copies of images ``rows``."""
        places = list(range(self.n_images))[rows]
        passed = {}
        for name, value in values.items():
            pick = target_of if name == "target" else arguments_of
            own = pick(value, places, self.n_images)
            passed[name] = pick(own, list(range(len(places))) * count, len(places))
        return passed

    def _classes(self, copies: tuple[Tensor, ...], rows: slice, count: int) -> Tensor | None:
        extra = self._passed(rows, count, additional_forward_args=self.extra)
        with torch.no_grad():
            scores = model_scores(self.attribution.forward_func, copies, *extra.values())
        return _best(scores, count)

    def _explained(
        self, rows: slice, noise: list[Tensor], target: Any, with_classes: bool, total: int
    ) -> Copies:
        count = len(noise[0])
        copies = self._noisy(rows, noise)
        passed = self._passed(rows, count, **passed_on(target, self.extra, self.arguments))
        heard: list[Tensor] = []
        if with_classes and getattr(self.attribution, "ranks_classes", False):
            # It shows its scores: they need no pass of their own.
            def ranking(scores: Tensor) -> Tensor:
                heard.append(scores)
                return scores

            passed.setdefault("ranking", ranking)
        try:
            parts = self._maps(copies, passed)
        except ValueError:
            parts = self._one_by_one(copies, passed, rows, MOST_FAILURES * total)
        classes: Tensor | None = None
        if with_classes:
            whole = len(heard) == 1 and len(heard[0]) == len(copies[0])
            classes = _best(heard[0], count) if whole else self._classes(copies, rows, count)
        failed = torch.zeros(len(copies[0]), dtype=torch.bool, device=copies[0].device)
        for part in parts:
            failed |= ~part.isfinite().flatten(1).all(dim=1)
        maps = []
        for part, size in zip(parts, self.sizes(), strict=True):
            part = torch.where(failed[:, None, None, None], 0, part)
            ends = [end(part, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax)]
            sized = resized(part, size).clamp(*ends)  # but for rounding, a constant map stays one
            maps.append(sized.reshape(count, -1, *size))
        return Copies(rows, maps, failed.reshape(count, -1), classes)

    def _maps(self, copies: tuple[Tensor, ...], passed: dict[str, Any]) -> list[Tensor]:
        """Maps (cg)×1×h×w: where larger is more important, none negative."""
        try:
            result = run(self.attribution, as_given(self.inputs, copies), passed)
        except RuntimeError:  # a model that calls view() on its features
            if self._layout == torch.contiguous_format:
                raise
            self._layout = torch.contiguous_format
            return self._maps(tuple(x.contiguous() for x in copies), passed)
        is_tuple = isinstance(self.inputs, tuple)
        parts, _ = without_details(result, self.attribution, is_tuple, passed)
        n, on_layer, count = len(copies[0]), is_of_layer(self.attribution), len(self.mapped)
        fit = all(isinstance(p, Tensor) and p.ndim == 4 and len(p) == n for p in parts)
        wanted = f"{n}×C×h×w for {n} images"
        check(fit, f"attribution: expected results {wanted}, got {listed(parts)}", TypeError)
        check(len(parts) == count, f"attribution: expected {count} results, got {len(parts)}")
        maps = [at_least_float(p.detach()).to(copies[0].device) for p in parts]
        return [_positive(m, on_layer) for m in maps]

    def _one_by_one(
        self, copies: tuple[Tensor, ...], passed: dict[str, Any], rows: slice, most: float
    ) -> list[Tensor]:
        """The maps of copies, at ``most`` so many of which fail and get NaN."""
        n, group = len(copies[0]), rows.stop - rows.start

        def maps_of(some: range) -> list[Tensor]:
            own = {
                k: (target_of if k == "target" else arguments_of)(v, list(some), n)
                for k, v in passed.items()
            }
            return self._maps(tuple(x[some.start : some.stop] for x in copies), own)

        found: list[list[Tensor] | None] = []
        for begin in range(0, n, group):
            try:
                each = (torch.split(p, 1) for p in maps_of(range(begin, begin + group)))
                found += map(list, zip(*each, strict=True))
                continue
            except ValueError as error:
                whole = error
            for i in range(begin, begin + group):
                try:
                    found.append(maps_of(range(i, i + 1)))
                except ValueError:
                    found.append(None)
            if found.count(None) > most:
                first = f" of the images from {rows.start} on" if rows.start else ""
                raise ValueError(f"{whole}, in a noisy copy{first}") from whole
        some = next((f for f in found if f is not None), None)
        assert some is not None  # or more than that had failed
        nothing = [torch.full_like(p, torch.nan) for p in some]
        return [torch.cat(each) for each in zip(*(f or nothing for f in found), strict=True)]

    def _check_repeats(self, target: Any) -> None:
        """``ValueError`` for an attribution that gives two maps for one image."""
        passed = self._passed(slice(0, 1), 1, **passed_on(target, self.extra, self.arguments))
        one = tuple(x[:1] for x in self.images)
        first, second = (self._maps(one, passed) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        advice = "its maps of one image differ; give a seed"
        check(same, f"seed: {type(self.attribution).__name__} is not deterministic, {advice}")


def _best(scores: Tensor, count: int) -> Tensor | None:
    """The best class c×g of scores (cg)×K; None where there are none to choose from."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        return None
    return scores.argmax(dim=1).reshape(count, -1)


def _positive(attribution: Tensor, on_layer: bool) -> Tensor:
    """N×1×h×w: of a layer the positive part of the sum over the channels; else the magnitude."""
    if on_layer:
        return attribution.sum(dim=1, keepdim=True).clamp(min=0)
    return attribution.abs().sum(dim=1, keepdim=True)
