"""A classifier of four convolutions for images of 64 pixels."""

from __future__ import annotations

from torch import nn

from captum_robust.nn.convolutions import convolution


class SimpleConvNet(nn.Sequential):
    """Four convolutions, the mean of their map, one linear layer: N×3×H×W -> scores N×K.

    The "simple four-layer" classifier of Fan, Zhao and Ermon, whose widths are not stated. With a
    linear layer behind global average pooling it has class activation maps (Zhou et al.,
    https://arxiv.org/abs/1512.04150), of 8×8 positions for 64 pixels. With w = 64: 1 million
    weights, 0.08 billion multiplications an image. It is a chain of modules, each activation its
    own, so that layer-wise relevance propagation has a rule for each.

    Args:
        num_classes: K.
        width: w, channels of the first convolution; the others have 2 w, 4 w and 4 w.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.block1 = convolution(3, width, 5, stride=2)
        self.block2 = convolution(width, 2 * width, 3, stride=2)
        self.block3 = convolution(2 * width, 4 * width, 3, stride=2)
        self.block4 = convolution(4 * width, 4 * width, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(4 * width, num_classes)

    @property
    def layers(self) -> list[nn.Sequential]:
        """The four blocks, from the image to the pooling."""
        return [self.block1, self.block2, self.block3, self.block4]
