"""Where the classes of clean and attacked images stand in each other's ranking."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_robust._captum import format_tensor_into_tuples
from captum_robust._checks import check, check_batch, check_choice, check_count
from captum_robust._progress import counted
from captum_robust.attacks.image_batches import class_scores
from captum_robust.attacks.norms import Tensors
from captum_robust.draw import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("adversarial_in_clean", "clean_in_adversarial")


@dataclass(frozen=True)
class Share:
    """A share of n samples and Wilson's 95 % interval around it; NaN where n is 0.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927). Unlike
    the usual interval it also holds for shares near 0 and 1.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, count: int, n: int) -> Share:
        """``count`` of ``n``.

        >>> share = Share.of(5, 10)
        >>> share.value, round(share.low, 4), round(share.high, 4)
        (0.5, 0.2366, 0.7634)
        """
        if n == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        z = 1.959964  # 95 %
        p = count / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        # Exactly 0 and 1 at the ends, but for rounding.
        low = 0.0 if count == 0 else middle - half
        high = 1.0 if count == n else middle + half
        return cls(p, low, high, n)


@dataclass(frozen=True)
class RankAnalysis:
    """Ranks of the classes that an attack changed. Rank 0 is the class with the highest score."""

    n: int
    """All samples, changed or not."""
    adversarial_in_clean: Tensor
    """The rank of each changed sample's adversarial class in the clean scores: from 1."""
    clean_in_adversarial: Tensor
    """The rank of each changed sample's clean class in the adversarial scores: from 1."""
    top: int
    """How many of the highest ranks the histogram tells apart."""

    @property
    def changed(self) -> int:
        """How many samples have another class than before."""
        return len(self.adversarial_in_clean)

    def share(self, direction: str, k: int) -> Share:
        """The share of the changed samples whose rank is within the top ``k``.

        No changed sample has rank 0, so ``k=2`` gives the share that comes second.

        Args:
            direction: ``"adversarial_in_clean"`` or ``"clean_in_adversarial"``.
            k: from 2.
        """
        check_count("k", k, 2)
        return Share.of(int((self._ranks(direction) < k).sum()), self.changed)

    def histogram(self, direction: str) -> Tensor:
        """``top`` counts: of the ranks 1 to ``top`` - 1, and of all that are further down."""
        ranks = self._ranks(direction).clamp(max=self.top)
        return torch.bincount(ranks, minlength=self.top + 1)[1:]

    def plot(self) -> Figure:
        """Both histograms, as shares of the changed samples.

        Raises:
            ImportError: matplotlib is missing.
        """
        figure = blank_figure(figsize=(9, 3.6), layout="constrained")
        names = [*(str(rank) for rank in range(2, self.top + 1)), f"after {self.top}"]
        titles = (
            "adversarial class in the clean ranking",
            "clean class in the adversarial ranking",
        )
        left_and_right: Any = figure.subplots(1, 2, sharey=True)
        for axes, direction, title in zip(left_and_right, DIRECTIONS, titles, strict=True):
            bars = axes.bar(
                names, self.histogram(direction) / max(1, self.changed), color="#0072b2"
            )
            axes.bar_label(bars, fmt="{:.2f}", padding=2)
            axes.set(title=title, xlabel="place (1: the predicted class)", ylim=(0, 1.05))
            axes.spines[["top", "right"]].set_visible(False)
        left_and_right[0].set_ylabel("share of the changed samples")
        figure.suptitle(f"{self.changed} of {self.n} samples changed their class")
        return figure

    def _ranks(self, direction: str) -> Tensor:
        check_choice("direction", direction, DIRECTIONS)
        ranks: Tensor = getattr(self, direction)
        return ranks


def rank_analysis(
    forward_func: Callable[..., Tensor],
    clean: Tensor | Tensors,
    adversarial: Tensor | Tensors,
    *,
    top: int = 5,
    batch_size: int | None = None,
) -> RankAnalysis:
    """Where an attack's class stood before it, and where the former class stands after it.

    Figure 1 of Prakash et al., "Robust Discriminative Localization Maps" (2018). There 38 % of the
    changed samples took the class that was second, and 64 % one of the clean top 5: the reason for
    :class:`captum_robust.attr.RobustCAM` to average the maps of the top classes.

    Args:
        forward_func: inputs -> scores N×K; run once on each, without gradients.
        clean: N×…, or a tuple of such tensors.
        adversarial: the same samples attacked.
        top: how many of the highest ranks the histogram tells apart.
        batch_size: samples a forward pass; None: all at once.

    Raises:
        ValueError: clean and adversarial inputs of different shapes; an empty batch; NaN or
            infinity in inputs or scores; scores that are not N×K.

    >>> model = torch.nn.Identity()
    >>> clean = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.9, 0.0]])
    >>> adversarial = torch.tensor([[0.5, 0.9, 0.6], [0.2, 0.8, 0.0]])
    >>> ranks = rank_analysis(model, clean, adversarial)
    >>> ranks.changed, ranks.adversarial_in_clean, ranks.clean_in_adversarial
    (1, tensor([1]), tensor([2]))
    """
    check_count("top", top, 2)
    check_count("batch_size", batch_size, 1, optional=True)
    before: Tensors = format_tensor_into_tuples(clean)
    after: Tensors = format_tensor_into_tuples(adversarial)
    n = check_batch(before)
    check_batch(after)
    shapes = [tuple(x.shape) for x in before], [tuple(x.shape) for x in after]
    expected = f"the shapes {shapes[0]} of clean"
    check(shapes[0] == shapes[1], f"adversarial: expected {expected}, got {shapes[1]}")
    parts = []
    for start in counted(range(0, n, batch_size or n), "batch", None, "ranks"):
        rows = slice(start, start + (batch_size or n))
        orders = [
            _order(forward_func, tuple(x[rows] for x in inputs), start)
            for inputs in (before, after)
        ]
        changed = orders[0][:, 0] != orders[1][:, 0]
        ranked = [order[changed] for order in orders]
        ranks = [_rank(ranked[0], ranked[1][:, 0]), _rank(ranked[1], ranked[0][:, 0])]
        parts.append(torch.stack(ranks).cpu())
    ranks_of_all = torch.cat(parts, dim=1)
    return RankAnalysis(n, ranks_of_all[0], ranks_of_all[1], top)


@torch.no_grad()
def _order(forward_func: Callable[..., Tensor], inputs: Tensors, first_sample: int) -> Tensor:
    """n×K, the classes by descending score; of equals the first."""
    scores = class_scores(forward_func, inputs, first_sample=first_sample)
    return scores.sort(dim=1, descending=True, stable=True).indices


def _rank(order: Tensor, classes: Tensor) -> Tensor:
    """n, the place of each class in its row of the order."""
    return (order == classes[:, None]).int().argmax(dim=1)
