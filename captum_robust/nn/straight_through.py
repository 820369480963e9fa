"""Zeros and ones drawn with given probabilities, through which a gradient passes."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import check, check_floating
from captum_robust._draws import Generators, drawn


def straight_through(
    probabilities: Tensor, generator: Generators = None, *, literal: bool = False
) -> Tensor:
    """b of 0 and 1, in the shape of p, with P(b = 1) = p and a gradient ∂b/∂p of 1.

    Fan, Zhao and Ermon draw with Gumbel noise z = -ln(-ln u) and pass the gradient straight through
    (Bengio et al., https://arxiv.org/abs/1308.3432). b = 1 where ln p + z1 > ln(1-p) + z2: the
    difference of two Gumbel variables is logistic, so that this is u < p of one uniform u, which
    needs no logarithm and is finite for p of 0 and 1 too.

    Args:
        probabilities: p in [0, 1], of any shape.
        generator: what is drawn comes from it, on its device, or from one for each p[i]; None: from
            torch's global one.
        literal: what the paper prints, I(p + z1 > 1 - p + z2), without its -ln(-ln(-u)), which is
            NaN for every u. It draws a 1 with the probability σ(2p - 1), from .27 to .73.

    Raises:
        TypeError: probabilities that are not floating point.
        ValueError: NaN, or a number outside of [0, 1], as logits are.

    >>> straight_through(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    p = probabilities
    check_floating("probabilities", p)
    known = p.detach()
    # NaN fails each comparison. One wait for a GPU.
    inside = ((known >= 0) & (known <= 1)).all()
    others = "got NaN or others; of logits take torch.sigmoid"
    check(inside, f"probabilities: expected numbers in [0, 1], {others}")
    chance = known if known.dtype == torch.float64 else known.float()
    if literal:
        chance = torch.sigmoid(2 * chance - 1)
    u = drawn(torch.rand, p.shape, generator, p.device, chance.dtype).to(p.device)
    # p - p is exactly 0, which b + p - p is not after rounding: the result stays 0 or 1.
    return (u < chance).to(p.dtype) + (p - known)
