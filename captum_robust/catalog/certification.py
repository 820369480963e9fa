"""What noisy copies prove of the maps and the boxes of any method of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor

from captum_robust._checks import check, check_count, check_number, check_type
from captum_robust._progress import progress_bar
from captum_robust._resize import resized
from captum_robust.attr._certificate import CertifiedDetails, Counts, Rules
from captum_robust.attr._noisy import Copies, NoisyMaps
from captum_robust.catalog.methods import Method
from captum_robust.metrics.functional import boxes_to_mask, least_samples
from captum_robust.metrics.functional.certificates import probability_at
from captum_robust.models import Classifier
from captum_robust.nn.denoiser import load_denoiser

CERTIFIED_RADII = (0.1, 0.25, 0.5)
"""In L2 over the image, with pixels in [0, 1]."""
CERTIFY_SAMPLES = 100
_CELLS = 28
"""A side of the grid on which pixels are tested, which is as fine as most maps are."""


@dataclass(frozen=True)
class Certification:
    """How the maps and boxes of methods are certified, see :class:`captum_robust.attr.Certified`.

    The noise is added to the pixels, each copy is cut off at 0 and 1, as an image is, and explained
    as any image. Of its map the largest pixels count as shown, on a grid of 28×28 cells; its box is
    the one that the method draws, of the threshold that ships for it, and certified by the rule
    ``"median"``. Of a method that places boxes itself the pixels in the box are those that count.

    Args:
        sigma: standard deviation of the noise, with pixels in [0, 1].
        samples: copies of each image.
        radii: of the balls, in L2 over the image.
        share: of the cells, how many of the largest a copy shows.
        confidence: that nothing of what is certified of an image's pixels, and nothing of its box,
            is wrong, at each radius.
        seed: of the noise.
        denoiser: each copy goes through that of the package
            (:func:`captum_robust.nn.load_denoiser`), which leaves pixels in [0, 1], in the stead of
            being cut off.

    Raises:
        ValueError: a number out of range; fewer samples than it takes to prove anything at the
            least of the radii (says how many).
    """

    sigma: float
    samples: int = CERTIFY_SAMPLES
    radii: tuple[float, ...] = CERTIFIED_RADII
    share: float = 0.3
    confidence: float = 0.999
    seed: int = 0
    denoiser: bool = False

    def __post_init__(self) -> None:
        check_number("certify", self.sigma, 0, open_low=True)
        check_count("certify_samples", self.samples, 1)
        check_type("certify_radii", self.radii, Sequence, "a list of numbers")
        radii = [check_number("certify_radii", r, 0, open_low=True) for r in self.radii]
        check(radii, "certify_radii: expected at least one, got none")
        object.__setattr__(self, "radii", tuple(sorted(set(radii))))
        check_number("share", self.share, 0, 1, open_low=True, open_high=True)
        check_number("confidence", self.confidence, 0, 1, open_low=True, open_high=True)
        check_count("seed", self.seed, 0)
        check_type("certify_denoiser", self.denoiser, bool, "True or False")
        far = f"certify_radii: {self.radii[-1]:g} is too far for noise of {self.sigma:g}"
        check(self._tau(self.radii[-1]) < 1 - 1e-9, far)
        near = f"certify_radii: {self.radii[0]:g} is too near for noise of {self.sigma:g}"
        check(self._tau(self.radii[0]) > 0.5, near)
        least = self.least(self.radii[0])
        where = f"noise of {self.sigma:g} and a radius of {self.radii[0]:g}"
        fits = self.samples >= least
        check(fits, f"certify_samples: expected at least {least} for {where}, got {self.samples}")

    def least(self, radius: float) -> int:
        """The fewest copies that can prove anything of pixels within a radius."""
        return least_samples(_CELLS**2, self._tau(radius), self.confidence)

    def unproven(self) -> dict[float, int]:
        """The radii for which there are too few copies -> how many it takes at least."""
        each = {radius: self.least(radius) for radius in self.radii}
        return {radius: least for radius, least in each.items() if least > self.samples}

    def _tau(self, radius: float) -> float:
        return probability_at(radius / self.sigma)

    def facts(self) -> dict[str, Any]:
        """All that certificates depend on, beside images and methods."""
        facts = {**vars(self), "radii": list(self.radii), "cells": _CELLS}
        if not self.denoiser:  # so that runs of before there was one go on
            del facts["denoiser"]
        return facts

    def of(
        self,
        model: Classifier,
        method: Method,
        images: Tensor,
        target: Tensor | None,
        *,
        show_progress: bool = False,
    ) -> Certificates:
        """Certify the map and the box of each image by the copies that ``samples`` says.

        Args:
            model: the classifier of the method.
            method: of the catalogue.
            images: N×C×H×W in [0, 1].
            target: N classes; None: those that a defended method takes each copy for.
            show_progress: a bar on standard error, of the copies.

        Raises:
            ValueError: NaN in the maps of more than 1 % of the copies of an image.
        """
        height, width = images.shape[2:]
        if method.box is not None:
            return self._fixed(method.box((height, width)), images)
        noisy = NoisyMaps(
            *(_Maps(model, method), images, (images,), None, {}),
            sigma=self.sigma,
            size=None,
            seed=self.seed,
            denoiser=load_denoiser().to(images.device) if self.denoiser else _as_pixels,
            at_once=None,
        )
        cells = (min(_CELLS, height, width),) * 2
        chosen = method.threshold
        pixels = self._counts(images, cells, share=self.share, box="pixels")
        boxes = self._counts(
            images, (height, width), threshold=(chosen.strategy, chosen.alpha), box="median"
        )
        with progress_bar(self.samples * len(images), "copy", show_progress, "certify") as advance:

            def take(copies: Copies) -> None:
                (every,) = copies.maps
                c, g = every.shape[:2]
                coarse = resized(every.flatten(0, 1).unsqueeze(1), cells)
                pixels.add(copies, coarse.reshape(c, g, *cells))
                boxes.add(copies, every)
                advance(c * g)

            noisy(self.samples, target, take, with_classes=False)
        each = [(pixels.certified(tau), boxes.certified(tau)) for tau in map(self._tau, self.radii)]
        proven = [
            Proven(radius, _cells_of(of_pixels, cells), of_box.inner_box, of_box.outer_box)
            for radius, (of_pixels, of_box) in zip(self.radii, each, strict=True)
        ]
        return Certificates(each[0][1].box, proven)

    def _counts(self, images: Tensor, size: tuple[int, int], **how: Any) -> Counts:
        rules = Rules(
            **{"share": None, "threshold": None, **how},
            sigma=self.sigma,
            n=self.samples,
            confidence=self.confidence,
            tau=self._tau(self.radii[0]),
            correction="holm",
        )
        return Counts(rules, 1 - self.confidence, images, size, None)

    def _fixed(self, box: Tensor, images: Tensor) -> Certificates:
        """Of a box that is the same for all images: nothing can move it."""
        n, (height, width) = len(images), images.shape[2:]
        size = (min(_CELLS, height, width),) * 2
        scale = box.new_tensor([size[1] / width, size[0] / height] * 2)
        cells = boxes_to_mask((box * scale)[None], size).expand(n, *size)
        boxes = box.float().expand(n, 4)
        states = torch.where(cells, IN, OUT).to(torch.uint8)
        return Certificates(boxes, [Proven(r, states, boxes, boxes) for r in self.radii])


OUT, ABSTAIN, IN = 0, 1, 2
"""What is proven of a cell."""


@dataclass(frozen=True)
class Proven:
    """What is proven of N images within a radius."""

    radius: float
    cells: Tensor
    """N×h×w uint8: :data:`OUT`, :data:`ABSTAIN` or :data:`IN`."""
    inner: Tensor
    """N×4 in pixels, within the box of every image in the ball; NaN where nothing is proven."""
    outer: Tensor
    """N×4, around it; likewise."""

    @property
    def share(self) -> Tensor:
        """N, the share of the image that is certified, in or out."""
        return (self.cells != ABSTAIN).flatten(1).double().mean(dim=1).float()


@dataclass(frozen=True)
class Certificates:
    """What is proven of N images."""

    box: Tensor
    """N×4 in pixels, each side the median of that of the copies' boxes."""
    at: list[Proven]
    """For each radius, the least first."""


class _Maps(Attribution):  # type: ignore[misc]  # Captum's classes are untyped to mypy
    """The maps of a method as an attribution; those of boxes of its own are the boxes, filled."""

    def __init__(self, model: Classifier, method: Method) -> None:
        super().__init__(model)
        self.method = method

    def attribute(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
        """N×1×H×W."""
        explanation = self.method.explain(inputs, target)
        maps, boxes = explanation.maps.detach(), self.method.boxes(explanation)
        if boxes is not None:
            size = maps.shape[1], maps.shape[2]
            maps = torch.stack([boxes_to_mask(box[None], size) for box in boxes.float()]).float()
        return maps.unsqueeze(1)


def _as_pixels(copies: Tensor) -> Tensor:
    """Noisy copies as an image holds them: several methods take no other pixels."""
    return copies.clamp(0, 1)


def _cells_of(details: CertifiedDetails, size: tuple[int, int]) -> Tensor:
    """N×h×w uint8, what is proven of each cell, of the first pixel of which it is read."""
    height, width = details.inside.shape[2:]
    rows = torch.tensor([-(-i * height // size[0]) for i in range(size[0])])
    columns = torch.tensor([-(-i * width // size[1]) for i in range(size[1])])
    states = ABSTAIN + details.inside.to(torch.uint8) - details.outside.to(torch.uint8)
    return states[:, 0].cpu()[:, rows][:, :, columns]
