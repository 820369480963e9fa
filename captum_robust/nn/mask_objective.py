"""What a mask is trained for: keep the evidence of a class, and leave none outside of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust._checks import check, check_choice, check_number

Terms = dict[str, Tensor]
"""Name -> N numbers, one a sample, each weighted; ``"total"`` is their sum."""


class _Objective:
    """A weighted sum of terms of masks and terms of scores; its fields are weights from 0."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            check_number(each.name, getattr(self, each.name), 0)

    def __call__(
        self, masks: Tensor, kept_scores: Tensor, destroyed_scores: Tensor, classes: Tensor
    ) -> Terms:
        """The terms of each sample.

        Args:
            masks: N×1×H×W in [0, 1].
            kept_scores, destroyed_scores: N×K scores of the images with the mask kept, and with it
                taken away.
            classes: N.

        Raises:
            ValueError: scores of fewer than two classes.
        """
        got = tuple(kept_scores.shape)
        fits = kept_scores.ndim == 2 and kept_scores.shape[1] > 1
        check(fits, f"kept_scores: expected N×K of at least two classes, got {got}")
        kept, destroyed = self._of_scores(kept_scores, destroyed_scores, classes)
        terms = {**self.of_mask(masks), "kept": kept, "destroyed": destroyed}
        return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}

    def of_mask(self, masks: Tensor) -> Terms:
        """The terms of N×1×H×W masks alone: all that counts for a class that is not there."""
        raise NotImplementedError

    def _of_scores(self, kept: Tensor, destroyed: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of the scores of what is kept and of what is left without it."""
        raise NotImplementedError


@dataclass(frozen=True)
class PaperObjective(_Objective):
    """λ_TV·TV(M) + λ_AV·mean(M) - log f_c(kept) + λ₃·f_c(destroyed)^λ₄.

    Equation 3 of Dabkowski and Gal (https://arxiv.org/abs/1705.07857). The paper's values, in the
    order it prints them, let the mask of the whole image win; these weights do not.

    Raises:
        ValueError: a weight that is no finite number from 0.
    """

    total_variation: float = 1e-3
    """λ_TV, of the sum of squared differences of neighbours."""
    area: float = 10.0
    """λ_AV, of the mean of the mask."""
    destroyed: float = 5.0
    """λ₃."""
    destroyed_power: float = 0.3
    """λ₄."""

    def of_mask(self, masks: Tensor) -> Terms:
        """The terms of N×1×H×W masks alone: all that counts for a class that is not there."""
        return {
            "total_variation": self.total_variation * squared_variation(masks),
            "area": self.area * masks.flatten(1).mean(dim=1),
        }

    def _of_scores(self, kept: Tensor, destroyed: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        # Clamped: the slope of the power is infinite at 0.
        left = _log_probability(destroyed, classes).exp().clamp(min=1e-6)
        return -_log_probability(kept, classes), self.destroyed * left**self.destroyed_power


@dataclass(frozen=True)
class CodeObjective(_Objective):
    """The objective of the authors' code: hinges on the margins of the scores.

    destroyer + area weight · mean((M + .0005)^power) + smoothness + preserver weight · preserver,
    where the preserver wants the class 1 above all others in the kept image, and the destroyer
    wants it 5 below another in the destroyed one.

    Raises:
        ValueError: a weight that is no finite number from 0.
    """

    area: float = 8.0
    area_power: float = 0.3
    smoothness: float = 0.005
    preserver: float = 0.3
    destroyer: float = 1.0
    preserver_margin: float = 1.0
    destroyer_margin: float = 5.0
    border: float = 0.3
    """Weighs the squared mask along the border, within the smoothness."""

    def of_mask(self, masks: Tensor) -> Terms:
        """See :meth:`PaperObjective.of_mask`."""
        edge = torch.cat(
            [masks[..., 0, :], masks[..., -1, :], masks[..., 0], masks[..., -1]], dim=-1
        )
        smooth = squared_variation(masks) + self.border * edge.square().flatten(1).sum(dim=1)
        area = (masks + 5e-4) ** self.area_power
        return {
            "smoothness": self.smoothness * smooth / 2,
            "area": self.area * area.flatten(1).mean(dim=1),
        }

    def _of_scores(self, kept: Tensor, destroyed: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        preserver = (self.preserver_margin - _margin(kept, classes)).clamp(min=0)
        destroyer = (self.destroyer_margin + _margin(destroyed, classes)).clamp(min=0)
        return self.preserver * preserver, self.destroyer * destroyer


Objective = PaperObjective | CodeObjective
OBJECTIVES: dict[str, type[Objective]] = {"paper": PaperObjective, "code": CodeObjective}


def objective_named(name: str, **weights: float) -> Objective:
    """``"paper"`` or ``"code"``, with other weights.

    Raises:
        ValueError: an unknown objective or weight, or a weight out of range.
    """
    check_choice("objective", name, OBJECTIVES)
    known = [each.name for each in fields(OBJECTIVES[name])]
    for weight in weights:
        check_choice(f"weight of the objective {name!r}", weight, known)
    return OBJECTIVES[name](**weights)


def squared_variation(masks: Tensor) -> Tensor:
    """Return Σ (M_ij - M_i,j+1)² + Σ (M_ij - M_i+1,j)² of each mask: N, of N×1×H×W.

    >>> squared_variation(torch.tensor([[[[0.0, 1.0], [0.0, 0.5]]]]))
    tensor([1.5000])
    """
    down = masks.diff(dim=-2).square().flatten(1).sum(dim=1)
    return down + masks.diff(dim=-1).square().flatten(1).sum(dim=1)


def _log_probability(scores: Tensor, classes: Tensor) -> Tensor:
    return -F.cross_entropy(scores.float(), classes, reduction="none")


def _margin(scores: Tensor, classes: Tensor) -> Tensor:
    """By how much the class stands above the best other one."""
    scores = scores.float()
    own = scores.gather(1, classes[:, None])[:, 0]
    others = scores.scatter(1, classes[:, None], -math.inf).amax(dim=1)
    return own - others
