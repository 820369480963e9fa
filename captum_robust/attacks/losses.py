"""What an attack raises: losses of scores n×K against classes n, none of which fades."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import check

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Scores n×K and classes n -> n losses, which an attack raises (targeted: lowers)."""


def cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """The loss of each sample: -log of the class's softmax."""
    return F.softplus(odds_against(scores, classes))


def log_cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """The logarithm of :func:`cross_entropy`, which rises where it does.

    Its gradient has the same direction, and vanishes for no classifier, however sure of the class:
    that of the cross-entropy is rounded to zero from a margin of about 100 between the scores.
    """
    z = odds_against(scores, classes)
    is_exponential = z < -10  # there the softplus of z is exp(z)
    return torch.where(is_exponential, z, F.softplus(z.masked_fill(is_exponential, 0)).log())


def odds_against(scores: Tensor, classes: Tensor) -> Tensor:
    """The n log odds against classes n, of scores n×K: no difference of nearly equal numbers."""
    return others_of(scores, classes).logsumexp(dim=1) - _own(scores, classes)


def margin(scores: Tensor, classes: Tensor) -> Tensor:
    """The highest score of another class less that of classes n (Carlini and Wagner)."""
    return others_of(scores, classes).amax(dim=1) - _own(scores, classes)


def logits_ratio(scores: Tensor, classes: Tensor) -> Tensor:
    """The difference of logits ratio (https://arxiv.org/abs/2003.01690).

    The margin over the difference of the highest and the third highest score.
    """
    count = scores.shape[1]
    check(count > 2, f"loss: 'dlr' needs scores of three classes or more, got {count}")
    highest = scores.topk(3, dim=1).values
    width = highest[:, 0] - highest[:, 2]
    return margin(scores, classes) / width.clamp(min=torch.finfo(scores.dtype).tiny)


LOSSES: dict[str, LossFunction] = {
    "log_odds": odds_against,
    "cross_entropy": log_cross_entropy,
    "margin": margin,
    "dlr": logits_ratio,
}
"""By name. ``log_odds`` is of scores in units of :func:`units_of`."""


def units_of(scores: Tensor) -> Tensor:
    """n, a tenth of the deviation of scores n×K over the classes: what they are divided by.

    So a factor of the scores changes no attack. In these units the log odds of an ImageNet network
    follow the few classes that can win: of a hundred they would follow all, of one the runner-up.
    """
    scores = scores.detach()
    least = scores.abs().amax(dim=1) * torch.finfo(scores.dtype).eps
    deviation = scores.std(dim=1, correction=0) if scores.shape[1] > 1 else least
    unit = torch.maximum(deviation, least) / 10
    return torch.where(unit > 0, unit, 1.0)


def are_probabilities(scores: Tensor) -> bool:
    """Whether each of the scores n×K of clean samples is a distribution, as softmax gives."""
    sums = scores.detach().sum(dim=1)
    return bool(((sums - 1).abs() < 1e-3).all() & (scores >= 0).all())


_COPIES = ("Clone", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias")
"""Operations that leave numbers as they are, by the names of their nodes in a graph."""


def are_of_softmax(scores: Tensor) -> bool:
    """Whether the last that was done to probabilities with a graph, but for copies, is a softmax.

    What a compiled graph ends in can't be seen: there it is taken for granted.
    """
    node = scores.grad_fn
    while node is not None and node.name().split("Backward")[0] in _COPIES:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Softmax", "CompiledFunction"))


def logarithms_of(probabilities: Tensor) -> Tensor:
    """The logarithms n×K of probabilities, which are finite and have a gradient near 1 too."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def others_of(scores: Tensor, label: Tensor) -> Tensor:
    """Scores n×K, that of the label -infinity."""
    return scores.scatter(1, label[:, None], -torch.inf)


def _own(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes[:, None])[:, 0]
