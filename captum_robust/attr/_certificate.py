"""What the counts of noisy copies prove; see :class:`captum_robust.attr.Certified`."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from captum_robust._checks import check, check_number
from captum_robust.attr._noisy import Copies
from captum_robust.metrics.functional import (
    certify_counts,
    largest_component,
    mask_to_box,
    probability_above,
    threshold,
)
from captum_robust.metrics.functional.certificates import order_for, probability_at

BOX_RULES = ("pixels", "component", "median")
_SIDES = 8
"""Bounds of a box: below and above, of four sides."""
_SAME = 2e-6
"""Pixels that differ by less than this share are equal: resizing rounds those of a plateau."""


@dataclass(frozen=True)
class Rules:
    """What is certified, and how surely; the arguments of :class:`Certified`."""

    sigma: float
    n: int
    confidence: float
    tau: float
    share: float | None
    threshold: tuple[str, float] | None
    box: str
    correction: str

    def shown(self, maps: Tensor) -> Tensor:
        """The pixels of maps N×h×w, none negative, that count as shown: N×h×w truth values."""
        if self.threshold is not None:
            return threshold(maps, *self.threshold)
        assert self.share is not None
        flat = maps.flatten(1)
        cut = flat.topk(max(1, round(self.share * flat.shape[1])), dim=1).values[:, -1:]
        least = flat.amin(dim=1, keepdim=True)
        shown = (flat >= cut * (1 - _SAME)) & (flat > least * (1 + _SAME))
        return shown.reshape(maps.shape)


@dataclass(frozen=True)
class CertifiedDetails:
    """What is proven of each of N images within its radius, with the confidence that was asked."""

    inside: Tensor
    """N×1×H×W booleans: certified in."""
    outside: Tensor
    """N×1×H×W booleans: certified out."""
    frequency: Tensor
    """N×1×H×W, the share of the copies that show the pixel."""
    radius: Tensor
    """N, in L2; 0 where the class is not proven, and so nothing is."""
    classes: Tensor | None
    """N, the explained classes where they were found; None where they were given."""
    class_radius: Tensor
    """N, how far the class is proven to stay; infinity where it was given."""
    box: Tensor
    """N×4 (x0, y0, x1, y1), half-open, in pixels of the input: the box of the smoothed map as far
    as the copies show it; NaN where there is none."""
    inner_box: Tensor
    """N×4, within the box of every image that differs by at most the radius; NaN where nothing is
    proven."""
    outer_box: Tensor
    """N×4, around the box of each of them; likewise."""
    samples: Tensor
    """N, the copies that have a map."""
    _counts: Counts = field(repr=False)

    @property
    def abstain(self) -> Tensor:
        """N×1×H×W booleans: neither is proven."""
        return ~(self.inside | self.outside)

    @property
    def map(self) -> Tensor:
        """N×1×H×W: 1 in, 0 out, .5 where it abstains."""
        return (1 + self.inside.float() - self.outside.float()) / 2

    @property
    def certified_share(self) -> Tensor:
        """N, the share of the pixels that do not abstain."""
        return 1 - self.abstain.double().mean(dim=(1, 2, 3)).float()

    def at(self, radius: float) -> CertifiedDetails:
        """What the same copies prove at another radius, with the confidence for that one alone.

        Raises:
            ValueError: a radius that is not positive, or too far or too near for any copies.
        """
        check_number("radius", radius, 0, open_low=True)
        sigma = self._counts.rules.sigma
        tau = probability_at(radius / sigma)
        check(0.5 < tau < 1, f"radius: {radius} is too far, or too near, for sigma={sigma}")
        return self._counts.certified(tau)


class Counts:
    """How many copies show each cell of the maps of N images, and where their boxes end.

    Args:
        rules: see :class:`Rules`.
        error: the probability that something is wrong, of what is certified of an image's pixels,
            of its box, and of its class.
        x: the images N×C×H×W.
        size: (h, w) of the maps.
        classes: N that were found, which the copies have to prove.
    """

    def __init__(
        self,
        rules: Rules,
        error: float,
        x: Tensor,
        size: tuple[int, int],
        classes: Tensor | None,
    ) -> None:
        self.rules, self.error, self.classes = rules, error, classes
        self.image_size = x.shape[2], x.shape[3]
        n = len(x)
        self.shown = torch.zeros(n, *size, dtype=torch.int32, device=x.device)
        self.failed = torch.zeros(n, dtype=torch.long, device=x.device)
        self.hits = torch.zeros_like(self.failed)
        """Copies of the found class."""
        ends = max(size) + 1 if rules.box == "median" else 0
        self.sides = torch.zeros(n, 4, ends, dtype=torch.int32, device=x.device)
        """How many copies have a box with this side there."""

    def add(self, copies: Copies, maps: Tensor) -> None:
        """Count copies; ``maps`` are c×g×h×w."""
        c, g = maps.shape[:2]
        valid = ~copies.failed
        shown = self.rules.shown(maps.flatten(0, 1)).reshape(maps.shape) & valid[..., None, None]
        self.shown[copies.rows] += shown.sum(dim=0, dtype=torch.int32)
        self.failed[copies.rows] += copies.failed.sum(dim=0)
        if self.classes is not None and copies.classes is not None:
            own = self.classes[copies.rows].to(copies.classes.device)
            self.hits[copies.rows] += (copies.classes == own).sum(dim=0).to(self.hits.device)
        if self.rules.box == "median":
            boxes = mask_to_box(largest_component(shown.flatten(0, 1)))
            ends = boxes.long().reshape(c, g, 4).permute(1, 2, 0)
            ones = valid.int().T.unsqueeze(1).expand_as(ends)
            self.sides[copies.rows] = self.sides[copies.rows].scatter_add(2, ends, ones)

    def certified(self, tau: float) -> CertifiedDetails:
        """What is proven where a probability above τ is needed."""
        rules, n = self.rules, self.rules.n
        radius = rules.sigma * distance(tau)
        hidden = n - self.failed[:, None, None] - self.shown
        given = (n, tau, 1 - self.error, rules.correction)
        inside, outside = certify_counts(self.shown, hidden, *given)
        class_radius = torch.full(self.failed.shape, torch.inf, device=inside.device)
        if self.classes is not None:
            above = probability_above(self.hits, n, 1 - self.error).tolist()
            reach = [rules.sigma * distance(p) if p > 0.5 else 0.0 for p in above]
            class_radius = torch.tensor(reach, device=inside.device)
        proven = class_radius >= radius
        inside, outside = (m & proven[:, None, None] for m in (inside, outside))
        box, inner, outer = self._boxes(inside, outside, tau)
        inner, outer = (b.masked_fill(~proven[:, None], torch.nan) for b in (inner, outer))
        samples = n - self.failed
        frequency = self.shown / samples.clamp(min=1)[:, None, None]
        return CertifiedDetails(
            inside=self._pixels(inside).unsqueeze(1),
            outside=self._pixels(outside).unsqueeze(1),
            frequency=self._pixels(frequency).unsqueeze(1),
            radius=torch.where(proven, radius, 0.0),
            classes=self.classes,
            class_radius=class_radius,
            box=box,
            inner_box=inner,
            outer_box=outer,
            samples=samples,
            _counts=self,
        )

    def _pixels(self, cells: Tensor) -> Tensor:
        """Each pixel N×H×W as its cell."""
        for dim, side in enumerate(self.image_size, 1):
            if (cell := cells.shape[dim]) != side:
                of_pixel = torch.arange(side, device=cells.device) * cell // side
                cells = cells.index_select(dim, of_pixel)
        return cells

    def _boxes(self, inside: Tensor, outside: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """The box, the inner and the outer one, N×4; ``inside`` and ``outside`` are N×h×w."""
        if self.rules.box == "median":
            return self._median_boxes(tau)
        # A copy without a map shows no pixel.
        map_, possible = 2 * self.shown > self.rules.n, ~outside
        if self.rules.box == "component":
            map_ = largest_component(map_)
            inside, possible = _around(inside, possible)
        boxes = [self._box(each) for each in (map_, inside, possible)]
        return boxes[0], boxes[1], boxes[2]

    def _box(self, cells: Tensor) -> Tensor:
        """In pixels; NaN where there are none."""
        none = ~cells.flatten(1).any(dim=1)
        return mask_to_box(self._pixels(cells)).masked_fill(none[:, None], torch.nan)

    def _median_boxes(self, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """The medians, and what bounds them, of each side."""
        n = self.rules.n
        middle = self._edges(self._ends((n + 1) // 2)[1])
        k = order_for(n, tau, self.error / _SIDES)
        if k is None:
            nothing = torch.full_like(middle, torch.nan)
            return middle, nothing, nothing
        below, above = self._ends(k)
        # The upper bounds of x0 and y0 and the lower ones of x1 and y1 are the inner box.
        inner = torch.cat([above[:, :2], below[:, 2:]], dim=1)
        outer = torch.cat([below[:, :2], above[:, 2:]], dim=1)
        empty = (inner[:, :2] >= inner[:, 2:]).any(dim=1)
        inner = inner.masked_fill(empty[:, None], torch.nan)
        return middle, self._edges(inner), self._edges(outer)

    def _ends(self, k: int) -> tuple[Tensor, Tensor]:
        """N×4 in cells: the largest v that k copies reach, and the least that k do not exceed."""
        last = self.sides.shape[2] - 1
        up_to, from_on = self.sides.cumsum(dim=2), self.sides.flip(2).cumsum(dim=2)
        lower = last - (from_on >= k).int().argmax(dim=2)
        upper = (up_to >= k).int().argmax(dim=2)
        # Where copies failed, there may be fewer than k: nothing is known but the size.
        few = up_to[..., -1] < k
        h, w = self.shown.shape[1:]
        sizes = upper.new_tensor([w, h, w, h]).expand_as(upper)
        return lower.masked_fill(few, 0).double(), torch.where(few, sizes, upper).double()

    def _edges(self, cells: Tensor) -> Tensor:
        """Sides N×4 in pixels, of sides in cells."""
        h, w = self.shown.shape[1:]
        height, width = self.image_size
        # Multiplied first: what divides exactly is not to be rounded up.
        return (
            (cells * cells.new_tensor([width, height] * 2) / cells.new_tensor([w, h] * 2))
            .ceil()
            .float()
        )


def distance(probability: float) -> float:
    """Φ⁻¹: below how many standard deviations a normal variable is with the probability."""
    return NormalDist().inv_cdf(probability)


def _around(inside: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """The largest component of the first, and what of the second the largest may lie in.

    Nothing, and all that is possible, where another one may be the largest. N×h×w.
    """
    from torch.nn.functional import max_pool2d

    core = largest_component(inside)
    near = max_pool2d(core.float(), 3, stride=1, padding=1).bool()
    rival = largest_component(possible & ~near).flatten(1).sum(dim=1)
    sure = core.flatten(1).sum(dim=1) > rival
    around = _component_of(possible, core)
    core = core & sure[:, None, None]
    return core, torch.where(sure[:, None, None], around, possible)


def _component_of(mask: Tensor, core: Tensor) -> Tensor:
    """The component of each mask N×h×w that a connected core, within it, belongs to."""
    import cv2

    found = torch.zeros_like(mask, device="cpu")
    for i, (sample, start) in enumerate(zip(mask.cpu(), core.cpu(), strict=True)):
        if start.any():
            _, labels = cv2.connectedComponents(sample.to(torch.uint8).numpy(), connectivity=8)
            of = torch.from_numpy(labels)
            found[i] = of == of[start][0]
    return found.to(mask.device)
