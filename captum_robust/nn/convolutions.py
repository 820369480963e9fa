"""Convolutions with what comes behind them, and the way up from coarse features to fine ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust._resize import resized


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the size up to its stride, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def zero_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1×1 convolution that gives 0 at the start."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class UpBlock(nn.Module):
    """Enlarged to the features of the next scale and joined with them; one residual bottleneck.

    The authors' code enlarges by pixel shuffling, which leaves a grid in the masks; here it is
    bilinear (Odena et al., https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        joined = max(4, outputs // 2)
        self.reduce = convolution(inputs, outputs, 3)
        self.skip = convolution(skip, joined, 1)
        self.join = convolution(outputs + joined, outputs, 3)
        narrow, middle = convolution(outputs, joined, 1), convolution(joined, joined, 3)
        wide = convolution(joined, outputs, 1)[:2]  # its ReLU is behind the sum
        self.bottleneck = nn.Sequential(*narrow, *middle, *wide)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """A map of the size of the finer scale's features."""
        size = (features.shape[2], features.shape[3])
        up = resized(self.reduce(x), size, antialias=False)
        x = self.join(torch.cat([up, self.skip(features)], dim=1))
        return F.relu(x + self.bottleneck(x))


class WayUp(nn.ModuleList):
    """A block for each scale but the coarsest, from coarse to fine.

    Args:
        inputs: channels of what is enlarged, at the coarsest scale.
        channels: of the features, from the finest scale to the coarsest.
        widths: channels of the blocks, from the finest scale to the coarsest but one.
    """

    def __init__(self, inputs: int, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        for skip, outputs in zip(channels[-2::-1], widths[::-1], strict=True):
            self.append(UpBlock(inputs, skip, outputs))
            inputs = outputs
        self.outputs = inputs
        """Channels at the finest scale."""

    def forward(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The map at the finest scale."""
        for block, skip in zip(self, features[-2::-1], strict=True):
            x = block(x, skip)
        return x


def in_precision_of(network: nn.Module, features: Sequence[Tensor]) -> Sequence[Tensor]:
    """Images or features, perhaps of a network in another precision, as this one takes them.

    They may be on several devices, too.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    if weight is None:
        return features
    features = [f.to(weight.device) for f in features]
    if torch.is_autocast_enabled(weight.device.type):
        return features
    return [f.to(weight.dtype) for f in features]
