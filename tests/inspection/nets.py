"""Networks whose units are known by hand, and images of coloured blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_robust.models import Classifier


class Head(nn.Module):
    """Maps N×C×h×w -> scores N×C, their means, by a linear layer that changes nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


def colour_net(size: int = 16) -> Classifier:
    """Units of layer ``units``: 0 is 1 on pure red pixels, 1 on pure blue; 2 is never above 0."""
    conv = nn.Conv2d(3, 3, 1)
    weights = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, -1, -1]])
    conv.weight = nn.Parameter(weights[:, :, None, None])
    conv.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1.0]))
    net = nn.Sequential()
    net.add_module("conv", conv)
    net.add_module("units", nn.ReLU(inplace=True))
    net.add_module("head", Head(3))
    return Classifier(net, input_size=size, class_names=["red", "blue", "none"])


def block(
    color: tuple[float, float, float], y: int, x: int, height: int, width: int, size: int = 16
) -> Tensor:
    """A rectangle of one colour on black, 3×size×size."""
    image = torch.zeros(3, size, size)
    image[:, y : y + height, x : x + width] = torch.tensor(color)[:, None, None]
    return image


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
