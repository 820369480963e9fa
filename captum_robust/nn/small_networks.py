"""Classifiers for images of 64 pixels: four convolutions, and a residual network."""

from __future__ import annotations

from torch import Tensor, nn

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


class SmallResNet(nn.Sequential):
    """Two stages of two residual blocks: N×3×64×64 -> scores N×K, by a map N×2w×8×8.

    The blocks of He et al., "Deep Residual Learning for Image Recognition"
    (https://arxiv.org/abs/1512.03385), behind a 5×5 convolution of stride 4. With w = 64: 0.7
    million weights, 0.07 billion multiplications an image. Each activation is a module of its own,
    so that every attribution can hook it.

    Args:
        num_classes: K.
        width: w, channels of the first stage; the second has 2 w.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = convolution(3, width, 5, stride=4)
        self.stage1 = nn.Sequential(_Block(width, width), _Block(width, width))
        self.stage2 = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(2 * width, num_classes)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = convolution(inputs, outputs, 1, stride)[:2]

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu2(residual + self.shortcut(x))
        return result
