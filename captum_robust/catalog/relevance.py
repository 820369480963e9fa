"""Layer-wise relevance propagation by Captum, for networks that are a chain of its layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from captum.attr import LRP
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_robust._captum import EpsilonRule, GammaRule
from captum_robust._checks import check
from captum_robust._contexts import probing
from captum_robust._scores import two_classes
from captum_robust.models import Classifier

_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_WITH_RULE = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, *_POOLING)
_ACTIVATIONS = (nn.ReLU, nn.Tanh)
"""Relevance passes them as it is."""
_PASSED_OVER = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity)
"""They do nothing in evaluation mode, or nothing but what ``_Chain`` does."""


class RelevancePropagation:
    """The relevance N×3×H×W of each pixel for a class, by Captum's ``LRP``.

    Bach et al., https://doi.org/10.1371/journal.pone.0130140. Batch normalizations are merged with
    the convolutions before them. Convolutions have the rule γ = 1/4 of Montavon et al.
    (https://doi.org/10.1007/978-3-030-28954-6_10), but the first, whose input has both signs; it
    and all others have the rule ε. Captum's own choice, ε for all, is gradient times input for a
    network of ReLUs (Ancona et al., https://arxiv.org/abs/1711.06104).

    It works on a copy of the layers as they are now, whose input is the normalised image: in the
    classifier itself, relevance would pass the normalisation as a gradient does, and leave some
    channels larger.

    Args:
        model: a chain of convolutions, linear layers, batch normalizations, poolings, ReLUs and
            dropouts, as VGG and ``simple_convnet`` are.

    Raises:
        ValueError: a layer that Captum's LRP has no rule for, or a network that is not the chain
            of its layers, such as one with residual sums.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.chain = _chain_of(model)

    def __call__(self, images: Tensor, target: Any) -> Tensor:
        """The relevance of pixels in [0, 1] for the target; the predicted class where it is None.

        It sums to the score of the class, but for what the layers' biases keep.
        """
        x = self.model.normalised(images.detach())
        if target is None:
            with torch.no_grad():
                target = self.chain(x).argmax(dim=1)
        convolutions = [m for m in self.chain if isinstance(m, nn.Conv2d)]
        for layer in self.chain:  # Captum takes the rules away after each call
            if isinstance(layer, _WITH_RULE):
                is_inner = layer in convolutions[1:]
                layer.rule = GammaRule(0.25) if is_inner else EpsilonRule()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the gradients that it sets
            relevance: Tensor = LRP(self.chain).attribute(x.clone(), target=target)
        return relevance.detach()


class _Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
        return x


def _chain_of(model: Classifier) -> _Chain:
    """A copy of the layers in the order in which they run, which gives the same scores.

    Those of one logit are the two of the classifier.
    """
    ran: list[nn.Module] = []

    def record(module: nn.Module, *_: Any) -> None:
        if not any(module.children()):
            ran.append(module)

    with torch.no_grad(), probing(model, record) as image_of:
        like = image_of(*model.input_shape)
        noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
        logits = model.module(noise)
        expected = two_classes(logits, 1)
    _check_rules(model, ran)
    layers: list[nn.Module] = []
    for module in ran:
        if type(module) in _PASSED_OVER:
            continue
        own = copy.deepcopy(module).eval().requires_grad_(False)
        if isinstance(own, nn.ReLU):
            own.inplace = False
        last = layers[-1] if layers else None
        is_norm = isinstance(own, nn.BatchNorm2d) and own.running_mean is not None
        if is_norm and isinstance(last, nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(last, own)  # type: ignore[arg-type]
        else:
            layers.append(own)
    if expected.shape != logits.shape:
        both = nn.Linear(1, 2, bias=False).requires_grad_(False)
        both.weight.copy_(two_classes(torch.ones(1, 1), 1).T)
        layers.append(both.to(logits))
    chain = _Chain(*layers).eval()
    needed = "a chain of layers, each of which takes what the one before gives"
    reason = f"{model.name} has branches, or computes outside of its layers"
    is_chain = _gives(chain, noise, expected)
    check(is_chain, f"layer-wise relevance propagation needs {needed}; {reason}")
    return chain


def _check_rules(model: Classifier, ran: Collection[nn.Module]) -> None:
    with_rule = (*_WITH_RULE, *_ACTIVATIONS, *_PASSED_OVER)
    without = sorted(
        f"{name} ({type(module).__name__})"
        for name, module in model.module.named_modules()
        if module in ran and type(module) not in with_rule
    )
    names = ", ".join([*without[:3], "…"] if len(without) > 3 else without)
    check(not without, f"Captum's layer-wise relevance propagation has no rule for {names}")


def _gives(chain: _Chain, images: Tensor, expected: Tensor) -> bool:
    try:
        with torch.no_grad():
            scores = chain(images)
    except RuntimeError:  # the maps of a branch do not fit the next layer
        return False
    # Half precision rounds in each layer.
    share = 5e-2 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
    most = share * float(expected.abs().max())
    return scores.shape == expected.shape and torch.allclose(scores, expected, rtol=0, atol=most)
