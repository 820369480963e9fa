"""Features of a frozen network and a class -> the mask of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._resize import resized
from captum_robust.nn.convolutions import WayUp, convolution, in_precision_of, zero_convolution

_EPSILON = 1e-4
"""Is added to |a| + |b|: where both vanish, so does the mask."""
_MOST = 4.0
"""The log odds that the gate alone can give the mask: a mask of .98, which the rest can undo."""


@dataclass(frozen=True)
class DecoderShape:
    """All that the shapes of a :class:`MaskDecoder` follow from."""

    channels: tuple[int, ...]
    """Those of the features, from the finest scale that is used to the coarsest."""
    num_classes: int
    head: bool
    """Whether the classes' vectors are the weights of the classifier's own last layer."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the up-sampling blocks, from the finest scale to the coarsest but one."""
    filtered: int = 128
    """Channels of the filtered features."""


class MaskDecoder(nn.Module):
    """Features of several scales and a class -> the mask of that class.

    The coarsest features pass the feature filter of Dabkowski and Gal, X·σ(s·XᵀC_c + t), where C_c
    is the vector of class c, then up-sampling blocks, each joined with the features of its scale.
    The mask is |a| / (|a| + |b| + ε) of two channels, exponentials here. They start from the
    filter's log odds, so that an untrained network gives its gate: with the vectors of the
    classifier's last layer, a class activation map.

    Args:
        shape: of the network.
        head: K×C and K, weights and bias of the classifier's last layer, which stay as they are
            and in no state dict; None: the vectors are learned.
    """

    head_weight: Tensor | None
    head_bias: Tensor | None

    def __init__(self, shape: DecoderShape, head: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        scales = len(shape.channels)
        fits = len(shape.widths) == scales - 1
        check(shape.head == (head is not None), "head: expected exactly where the shape says so")
        check(fits, f"widths: expected {scales - 1} for {scales} scales, got {shape.widths}")
        self.shape = shape
        deepest = shape.channels[-1]
        weight, bias = (None, None) if head is None else head
        self.register_buffer("head_weight", weight, persistent=False)
        self.register_buffer("head_bias", bias, persistent=False)
        self.embedding: nn.Embedding | None = None
        if head is None:
            self.embedding = nn.Embedding(shape.num_classes, deepest)
            nn.init.normal_(self.embedding.weight, std=deepest**-0.5)
        self.scale = nn.Parameter(torch.tensor(0.5 if shape.head else 1.0))
        self.shift = nn.Parameter(torch.tensor(-2.0 if shape.head else 0.0))
        self.filter = convolution(deepest, shape.filtered, 1)
        self.blocks = WayUp(shape.filtered + 1, shape.channels, shape.widths)
        self.two_channels = zero_convolution(self.blocks.outputs, 2)

    def evidence(self, features: Tensor, classes: Tensor) -> Tensor:
        """Log odds N×h×w that the class is there, of the coarsest features N×C×h×w.

        Their mean over the positions is the e of the paper's warm-up.
        """
        if self.embedding is not None:
            vectors = self.embedding(classes)
        else:
            assert self.head_weight is not None
            vectors = self.head_weight[classes]
        similarity = torch.einsum("nchw,nc->nhw", features, vectors.to(features.dtype)).float()
        if self.head_bias is not None:
            similarity = similarity + self.head_bias[classes][:, None, None]
        odds: Tensor = self.scale * similarity + self.shift
        return odds

    def forward(
        self, features: Sequence[Tensor], classes: Tensor, confidence: float = 0.0
    ) -> Tensor:
        """Masks N×1×h×w in [0, 1], of the size of the finest features.

        Args:
            features: N×C×h×w each, from the finest scale to the coarsest.
            classes: N.
            confidence: is taken from the log odds: with 6, only what is surely of the class is
                shown; with 0, similar things too.
        """
        features = in_precision_of(self.two_channels, features)
        deepest = features[-1]
        odds = (self.evidence(deepest, classes.to(deepest.device)) - confidence)[:, None]
        gate = torch.sigmoid(odds)
        x = self.filter(deepest * gate.to(deepest.dtype))
        bounded = torch.tanh(odds / _MOST)
        x = torch.cat([x, bounded.to(x.dtype)], dim=1)
        x = self.blocks(x, features)
        start = upsampled(bounded, (x.shape[2], x.shape[3])) * (_MOST / 2)
        pair = self.two_channels(x).float() + torch.cat([start, -start], dim=1)
        # Above 0: where a channel crosses it, its magnitude leaves a dark line in the mask.
        a, b = pair.clamp(-20, 20).exp().split(1, dim=1)
        masks: Tensor = a / (a + b + _EPSILON)
        return masks


def upsampled(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks N×1×h×w at the size of the images."""
    return resized(masks, size, antialias=False)
