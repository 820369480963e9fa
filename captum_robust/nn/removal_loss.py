"""How much of a class is left in the scores of images that it shall be removed from."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_classes, check_floating

FORMS = ("bounded", "squared", "literal")


def removal_loss(scores: Tensor, classes: Tensor, form: str = "bounded") -> Tensor:
    """N numbers: by how much the score of the class exceeds the mean score of the others.

    L = l_c - 1/(K-1) Σ_{j≠c} l_j, which the corruption network of Fan, Zhao and Ermon minimises. As
    printed it has no lower bound: it rewards scores of the class *below* those of the others,
    where the paper says that all shall be the same.

    Args:
        scores: l, N×K.
        classes: c, N integers.
        form: ``"bounded"``: max(0, L); ``"squared"``: L²; ``"literal"``: L.

    Raises:
        TypeError: scores that are not floating point, classes that are no integers.
        ValueError: an unknown form, scores that are not N×K, fewer than two classes, or class
            numbers that are none of the K.

    >>> removal_loss(torch.tensor([[5.0, 1.0, 2.0], [0.0, 4.0, 2.0]]), torch.tensor([0, 0]))
    tensor([3.5000, 0.0000])
    """
    check_choice("form", form, FORMS)
    check_floating("scores", scores)
    fits = scores.ndim == 2 and scores.shape[1] > 1
    check(fits, f"scores: expected N×K of at least two classes, got {tuple(scores.shape)}")
    n, count = scores.shape
    check_classes(classes, n, count)
    of_class = scores.gather(1, classes.long()[:, None])[:, 0]
    excess = of_class - (scores.sum(dim=1) - of_class) / (count - 1)
    if form == "bounded":
        return torch.relu(excess)
    return excess.square() if form == "squared" else excess
