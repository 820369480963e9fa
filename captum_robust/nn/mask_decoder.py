"""Features of a frozen network and a class -> the mask of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPSILON = 1e-4
"""Of |a| + |b|: where both vanish, so does the mask."""
_MOST = 4.0
"""The log odds that the gate alone can give the mask: a mask of .98, which the rest can undo."""


@dataclass(frozen=True)
class DecoderShape:
    """All that the shapes of a :class:`MaskDecoder` follow from."""

    channels: tuple[int, ...]
    """Of the features, from the finest scale that is used to the coarsest."""
    num_classes: int
    head: bool
    """Whether the classes' vectors are the weights of the classifier's own last layer."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the up-sampling blocks, from the finest scale to the coarsest but one."""
    filtered: int = 128
    """Channels of the filtered features."""


class UpBlock(nn.Module):
    """Enlarged to the features of the next scale and joined with them; one residual bottleneck.

    The authors' code enlarges by pixel shuffling, which leaves a grid in the masks; here it is
    bilinear (Odena et al., https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        joined = max(4, outputs // 2)
        self.reduce = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.skip = nn.Sequential(
            nn.Conv2d(skip, joined, 1, bias=False), nn.BatchNorm2d(joined), nn.ReLU()
        )
        self.join = nn.Sequential(
            nn.Conv2d(outputs + joined, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(outputs, joined, 1, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(),
            nn.Conv2d(joined, joined, 3, padding=1, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(),
            nn.Conv2d(joined, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """A map of the size of the finer scale's features."""
        size = (features.shape[2], features.shape[3])
        up = upsampled(self.reduce(x), size)
        x = self.join(torch.cat([up, self.skip(features)], dim=1))
        return F.relu(x + self.bottleneck(x))


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
        if shape.head != (head is not None):
            raise ValueError("head: expected exactly where the shape says so")
        if len(shape.widths) != len(shape.channels) - 1:
            raise ValueError(
                f"widths: expected {len(shape.channels) - 1} for {len(shape.channels)} scales, got "
                f"{shape.widths}"
            )
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
        self.filter = nn.Sequential(
            nn.Conv2d(deepest, shape.filtered, 1, bias=False),
            nn.BatchNorm2d(shape.filtered),
            nn.ReLU(),
        )
        blocks = []
        inputs = shape.filtered + 1
        for skip, outputs in zip(shape.channels[-2::-1], shape.widths[::-1], strict=True):
            blocks.append(UpBlock(inputs, skip, outputs))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.two_channels = nn.Conv2d(inputs, 2, 1)
        nn.init.zeros_(self.two_channels.weight)
        nn.init.zeros_(self.two_channels.bias)  # type: ignore[arg-type]

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
        if not torch.is_autocast_enabled(features[-1].device.type):
            # Those of an encoder in half precision.
            features = [f.to(self.two_channels.weight.dtype) for f in features]
        deepest = features[-1]
        odds = (self.evidence(deepest, classes) - confidence)[:, None]
        gate = torch.sigmoid(odds)
        x = self.filter(deepest * gate.to(deepest.dtype))
        bounded = torch.tanh(odds / _MOST)
        x = torch.cat([x, bounded.to(x.dtype)], dim=1)
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            x = block(x, skip)
        start = upsampled(bounded, (x.shape[2], x.shape[3]))
        start = start * (_MOST / 2)
        pair = self.two_channels(x).float() + torch.cat([start, -start], dim=1)
        # Above 0: where a channel crosses it, its magnitude leaves a dark line in the mask.
        a, b = pair.clamp(-20, 20).exp().split(1, dim=1)
        masks: Tensor = a / (a + b + _EPSILON)
        return masks


def upsampled(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks N×1×h×w at the size of the images."""
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)
