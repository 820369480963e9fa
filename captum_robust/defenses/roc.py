"""The receiver operating characteristic: how well scores tell attacked images from clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import check, check_count, check_number, check_type
from captum_robust._progress import counted
from captum_robust.metrics.functional.bootstrap import percentiles

_CHUNK = 1 << 22
"""Numbers held at a time while resampling."""


@dataclass(frozen=True)
class ROC:
    """How well scores tell M attacked images from N clean ones, at every threshold.

    A threshold says "attacked" of the scores that reach it.

    Attributes:
        false_positive_rate: T, the share of clean images that each threshold rejects.
        true_positive_rate: T, the share of attacked images that it rejects.
        thresholds: T, falling, from infinity; one for each score that occurs.
        area: under the curve, the chance that an attacked image has a higher score than a clean
            one (equal scores count half).
        interval: (low, high), the bootstrap interval around the area; NaN of one score each.
        resampled_areas: one of each resampling, from which the interval is taken.
    """

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    thresholds: Tensor
    area: float
    interval: tuple[float, float]
    resampled_areas: Tensor

    @classmethod
    def of(
        cls,
        clean_scores: Tensor,
        attacked_scores: Tensor,
        *,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> ROC:
        """The curve of N and M scores, of any detector.

        Args:
            clean_scores: N; higher is more suspicious.
            attacked_scores: M.
            level: confidence of the interval, in (0, 1).
            resamples: how often N clean and M attacked scores are drawn with replacement,
                independently; where both are of the same images that makes the interval wider
                than need be.
            seed: the same seed gives the same interval on every device.

        Raises:
            ValueError: no scores of one kind, NaN, a level or number of resamples out of range.
            TypeError: no tensors.

        >>> roc = ROC.of(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]))
        >>> roc.area, roc.thresholds.tolist()[0]
        (0.75, inf)
        """
        for name, scores in (("clean_scores", clean_scores), ("attacked_scores", attacked_scores)):
            check_type(name, scores, Tensor, "a tensor")
            is_list = scores.ndim == 1 and len(scores) > 0
            check(is_list, f"{name}: expected one a sample, got {tuple(scores.shape)}")
            missing = scores.isnan().nonzero().flatten().tolist()
            check(not missing, f"{name}: expected numbers, got NaN for samples {missing[:3]}")
        check_number("level", level, 0, 1, open_low=True, open_high=True)
        check_count("resamples", resamples, 1)
        check_count("seed", seed)
        clean, attacked = clean_scores.detach().cpu(), attacked_scores.detach().cpu()
        precise = torch.promote_types(clean.dtype, attacked.dtype)
        both = torch.cat([clean.to(precise), attacked.to(precise)])
        values, places = torch.unique(both, return_inverse=True)
        kinds = places.split([len(clean), len(attacked)])
        counts = [_counts(p[None], len(values)) for p in kinds]
        # The shares of scores that reach a value, from the highest down.
        false, true = (F.pad(c[0].flip(0).cumsum(0) / c.sum(), (1, 0)) for c in counts)
        thresholds = F.pad(values.flip(0).double(), (1, 0), value=torch.inf)
        areas = _resampled_areas(kinds, len(values), resamples, seed)
        interval = percentiles(areas, level, max(len(clean), len(attacked)))
        return cls(false, true, thresholds, _areas(*counts).item(), interval, areas)


def _counts(places: Tensor, values: int) -> Tensor:
    """How many of each row of B×N places there are of each value: B×values."""
    counts = torch.zeros(len(places), values, dtype=torch.double)
    return counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.double))


def _areas(clean: Tensor, attacked: Tensor) -> Tensor:
    """B areas of B×values counts of clean and of attacked scores."""
    below = clean.cumsum(1) - clean / 2
    return (below * attacked).sum(1) / (clean[0].sum() * attacked[0].sum())


def _resampled_areas(kinds: Sequence[Tensor], values: int, resamples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _CHUNK // (values + sum(map(len, kinds))))
    areas = []
    for done in counted(range(0, resamples, chunk), "part", None, "bootstrap"):
        size = min(chunk, resamples - done)
        drawn = (p[torch.randint(len(p), (size, len(p)), generator=generator)] for p in kinds)
        areas.append(_areas(*(_counts(p, values) for p in drawn)))
    return torch.cat(areas)
