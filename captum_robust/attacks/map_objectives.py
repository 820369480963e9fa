"""How far attribution maps have moved: the objectives of the attack on explanations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import check, check_finite, check_shape
from captum_robust._resize import resized
from captum_robust.attacks.outcome import sizes_of

OBJECTIVES = ("top_k", "mass_center", "target_map")


class Goal:
    """How far maps have moved from the clean maps N×….

    ``size`` is (H, W) of an image; ``wanted`` the region or the target, N×H×W or 1×H×W.
    """

    def __init__(
        self,
        clean: Tensor,
        objective: str,
        k: float,
        size: tuple[int, ...] | None,
        wanted: Tensor | None,
    ) -> None:
        needing = "the region" if objective == "top_k" else f"objective={objective!r}"
        check(
            clean.ndim == 3 or (objective == "top_k" and wanted is None),
            f"attribution: expected maps N×h×w, one an input, for {needing}, got "
            f"{tuple(clean.shape)}",
        )
        self.objective = objective
        self.count = max(1, round(k * clean[0].numel()))
        self.top = _top(clean, self.count)
        self.size = size
        self.center = self._center(clean) if clean.ndim == 3 else None
        name = "region" if objective == "top_k" else objective
        self.wanted = None if wanted is None else _fitted(wanted, clean, name)

    def __call__(self, maps: Tensor, rows: Tensor) -> Tensor:
        """The objective of n maps of samples ``rows``, in [0, 1]."""
        share = _shares(maps)
        if self.objective == "top_k":
            weight = self.top.to(share.dtype) if self.wanted is None else self.wanted
            return 1 - (share * weight[rows]).sum(dim=1)
        if self.objective == "target_map":
            assert self.wanted is not None
            return F.cosine_similarity(share, self.wanted[rows], dim=1, eps=1e-30)
        assert self.center is not None
        shift = self._center(maps) - self.center[rows]
        return sizes_of(shift)[1] / math.hypot(*self._extent(maps))

    def top_k_intersection(self, maps: Tensor) -> Tensor:
        """N, of all maps."""
        return (self.top & _top(maps, self.count)).sum(dim=1) / self.count

    def center_shift(self, maps: Tensor) -> Tensor:
        """N, of all maps, in pixels."""
        if self.center is None or self.size is None:
            return torch.full_like(maps.flatten(1)[:, 0], math.nan)
        return sizes_of(self._center(maps) - self.center)[1]

    def _center(self, maps: Tensor) -> Tensor:
        """n×2, the centre of mass (y, x) in pixels of the image."""
        share = _shares(maps).reshape(maps.shape)
        ends = zip(self._extent(maps), maps.shape[1:], strict=True)
        y, x = ((torch.arange(n, device=maps.device) + 0.5) * (extent / n) for extent, n in ends)
        along = (share.sum(dim=2) * y, share.sum(dim=1) * x)
        return torch.stack([a.sum(dim=1) for a in along], dim=1)

    def _extent(self, maps: Tensor) -> tuple[int, ...]:
        return tuple(maps.shape[1:]) if self.size is None else self.size


def _shares(maps: Tensor) -> Tensor:
    """Maps n×… as shares of their sum, n×P; a map of zeros is uniform."""
    flat = maps.flatten(1)
    total = flat.sum(dim=1, keepdim=True)
    has_mass = total > torch.finfo(flat.dtype).tiny
    return torch.where(has_mass, flat / torch.where(has_mass, total, 1), 1 / flat.shape[1])


def _top(maps: Tensor, count: int) -> Tensor:
    """N×P booleans: the ``count`` largest of each map."""
    flat = maps.flatten(1)
    at = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True)


def checked_map(name: str, value: Any) -> Tensor:
    """The map that a user gave for an objective, in float32."""
    check_shape(name, value, "N×H×W")
    check(value.numel() > 0, f"{name}: expected N×H×W, got {tuple(value.shape)}")
    given: Tensor = value.detach().float()
    check_finite(given, name)
    lowest, highest = float(given.amin()), float(given.amax())
    limit, expected = (1.0, "from 0 to 1") if name == "region" else (math.inf, "from 0")
    is_inside = lowest >= 0 and highest <= limit
    check(is_inside, f"{name}: expected values {expected}, got {lowest:.4g} to {highest:.4g}")
    return given


def _fitted(wanted: Tensor, like: Tensor, name: str) -> Tensor:
    """Averaged or enlarged to the size of maps N×h×w, as N×P."""
    n, got = len(like), len(wanted)
    check(got in (1, n), f"{name}: expected {n} maps, one a sample, got {got}")
    wanted = wanted.to(device=like.device, dtype=like.dtype)
    height, width = like.shape[1:]
    wanted = resized(wanted[:, None], (height, width))[:, 0].clamp(min=0)
    return wanted.expand(like.shape).flatten(1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """N, Spearman's correlation of N×… maps, equal values with the mean of their ranks."""
    centered = []
    for maps in (a, b):
        ranks = _ranks(maps.flatten(1))
        centered.append(ranks - ranks.mean(dim=1, keepdim=True))
    product = (centered[0] * centered[1]).sum(dim=1)
    lengths = centered[0].norm(dim=1) * centered[1].norm(dim=1)
    return torch.where(lengths > 0, product / lengths.clamp(min=1e-12), 0).to(a.dtype)


def _ranks(values: Tensor) -> Tensor:
    """N×P, from 1, in float64: sums of the ranks of an image's pixels exceed float32."""
    ascending = values.sort(dim=1).values
    first = torch.searchsorted(ascending, values.contiguous())
    behind = torch.searchsorted(ascending, values.contiguous(), right=True)
    return (first + behind + 1).double() / 2
