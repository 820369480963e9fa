"""What an attack raises: losses of scores n×K against classes n, none of which fades."""

from __future__ import annotations

import warnings
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
    """N×1×…, a tenth of the deviation of scores N×K×… over the classes: what they are divided by.

    So a factor of the scores changes no attack. In these units the log odds of an ImageNet network
    follow the few classes that can win: of a hundred they would follow all, of one the runner-up.
    Classes that are masked by a low constant, such as -10,000, do not count.
    """
    ordered = scores.detach().sort(dim=1, descending=True).values
    below = ordered[:, :1] - ordered
    is_gap = (below[:, :-1] > 0) & (below[:, 1:] > 20 * below[:, :-1])
    counts = F.pad(is_gap.cumsum(dim=1) == 0, [0, 0] * (below.ndim - 2) + [1, 0], value=True)
    below = below.where(counts, 0.0)
    n = counts.sum(dim=1, keepdim=True)
    mean = below.sum(dim=1, keepdim=True) / n
    deviation = ((below - mean).where(counts, 0.0).square().sum(dim=1, keepdim=True) / n).sqrt()
    least = ordered[:, :1].abs() * torch.finfo(scores.dtype).eps
    unit = torch.maximum(deviation, least) / 10
    return torch.where(unit > 0, unit, 1.0)


Ask = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
"""The scores n×K of some samples once more, with their graph, and the inputs of that."""


class Reading:
    """How the scores of a model become logits that have a gradient however sure it is.

    Those of a softmax, of a mean of some, or in per cent, become their logarithms, those of a
    sigmoid its logits. The order of the classes stays.

    Args:
        scores: N×K×… of the clean samples, at least in float32.
        ask: of a sample or more.
        resolution: of the dtype that they came in.
    """

    def __init__(self, scores: Tensor, ask: Ask, resolution: float = 0.0) -> None:
        self._to: Callable[[Tensor], Tensor] = _as_they_are
        self._back: Callable[[Tensor], Tensor] = _as_they_are
        clean = scores.detach()
        if bool((clean >= 0).all()):
            total = 100.0 if clean.numel() and bool(clean.amax() > 1 + resolution) else 1.0
            error = (clean.sum(dim=1) / total - 1).abs()
            if bool((error < max(1e-3, resolution)).all()) and _sum_is_fixed(ask):
                self._to, self._back = _logarithms_of, torch.exp
            elif bool((clean <= 1).all()) and _is_of_sigmoid(ask()[0]):
                self._to, self._back = _logits_of, torch.sigmoid
                _warn_of_rounded(clean)
        self.units = units_of(self.logits(clean))
        """N×1×…, what the loss ``log_odds`` divides logits by."""

    def logits(self, scores: Tensor) -> Tensor:
        """Of scores n×K×…."""
        return self._to(scores)

    def scores(self, logits: Tensor) -> Tensor:
        """As the model gives them, of logits n×K×…."""
        return self._back(logits)


def _as_they_are(scores: Tensor) -> Tensor:
    return scores


def _logarithms_of(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def _logits_of(probabilities: Tensor) -> Tensor:
    limits = torch.finfo(probabilities.dtype)
    return probabilities.clamp(limits.tiny, 1 - limits.eps / 2).logit()


def _sum_is_fixed(ask: Ask) -> bool:
    """Whether the sum of the scores does not depend on the inputs, as that of probabilities."""
    lengths = []
    for of_scores in (
        lambda s: s.sum(),
        lambda s: _logarithms_of(s.topk(min(2, s.shape[1]), dim=1)[0]).sum(),
    ):
        scores, inputs = ask()
        if not scores.requires_grad:
            return False
        with torch.enable_grad():
            value = of_scores(scores)
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
        # None where the graph does not reach the inputs, which is for the attack to name.
        reached = [float(g.abs().max()) for g in gradients if g is not None]
        lengths.append(max(reached, default=0.0))
    return lengths[0] <= 0.02 * lengths[1]


_COPIES = ("Clone", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias")
"""Operations that leave numbers as they are, by the names of their nodes in a graph."""


def _is_of_sigmoid(scores: Tensor) -> bool:
    """Whether the last that was done to scores with a graph, but for copies, is a sigmoid."""
    node = scores.grad_fn
    while node is not None and node.name().split("Backward")[0] in _COPIES:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def _warn_of_rounded(scores: Tensor) -> None:
    count = int(((scores == 0) | (scores == 1)).any(dim=1).sum())
    if count:
        warnings.warn(
            f"forward_func: it ends in a sigmoid, which rounds scores of {count} of {len(scores)} "
            "samples to 0 or 1, so that their gradient is lost and the model looks more robust "
            "than it is; give a function that returns the scores before the sigmoid",
            stacklevel=2,
        )


def others_of(scores: Tensor, label: Tensor) -> Tensor:
    """Scores n×K, that of the label -infinity."""
    return scores.scatter(1, label[:, None], -torch.inf)


def _own(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes[:, None])[:, 0]
