"""Networks and images that tests of several files share; what one test needs lives there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_robust.models import Classifier
from captum_robust.nn import SimpleConvNet

NAMES = ["ant", "bee", "cat"]
"""The classes of :func:`classifier_of`."""


class Net(nn.Module):
    """A small classifier N×C×H×W -> N×K with in-place ReLUs, one of them used twice."""

    def __init__(self, channels: int = 3, classes: int = 6, pooled: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1 if pooled else 2)
        self.head = nn.Linear(8 if pooled else 32, classes)
        self.body = nn.Sequential()  # only there to be a layer that never runs

    def forward(self, x: Tensor, other: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if other is not None:
            x = x + scale * other
        x = self.relu(self.conv1(self.normalized(x)))
        x = self.relu(self.conv2(x))
        return self.head(self.pool(x).flatten(1))

    def normalized(self, x: Tensor) -> Tensor:
        """What the first layer sees."""
        return x


class PixelNet(Net):
    """The same for images in [0, 1], which are brought to [-2, 2]."""

    def normalized(self, x: Tensor) -> Tensor:
        return 4 * x - 2


class InPlaceNet(Net):
    """As :class:`PixelNet`, but it writes into the caller's images."""

    def normalized(self, x: Tensor) -> Tensor:
        return x.mul_(4).sub_(2)


class CheckpointedNet(PixelNet):
    """As :class:`PixelNet`, with its convolutions in a segment that is computed twice."""

    use_reentrant: bool | None = None
    """None: not so."""

    def segment(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(self.normalized(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            x = self.segment(x)
        else:
            x = checkpoint(self.segment, x, use_reentrant=self.use_reentrant)
        return self.head(self.pool(x).flatten(1))


class ChannelsLastNet(PixelNet):
    """As :class:`PixelNet`, with a layer ``norm`` N×h×w×C and the same as ``first``, N×C×h×w."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(self.normalized(x)))
        x = self.norm(self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.pool(self.relu(self.first(x).clone())).flatten(1))


class Grid(nn.Module):
    """The 24 scores of a network as N×4×2×3, for targets that are tuples."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).reshape(-1, 4, 2, 3)


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Counted(Called):
    """A function or network that notes how many images each of its calls sees."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.calls: list[int] = []

    def forward(self, *arguments: Any) -> Any:
        self.calls.append(len(arguments[0]))
        return super().forward(*arguments)


class ChannelMeans(nn.Module):
    """Scores N×C of images of any size: the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Rounding(nn.Module):
    """A layer that cuts the graph, as an operation without a derivative does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().round()


def quantised(layer: nn.Module) -> nn.Module:
    """A linear layer in dynamic int8, whose output has a graph but no gradient."""
    whole = nn.Sequential(layer)
    changed: nn.Module = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, torch.qint8)
    return changed[0]


def randomize(network: nn.Module) -> None:
    """Weights and statistics that are none of the initial ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for name, b in network.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))


def classifier_of(width: int = 4) -> Classifier:
    """A classifier of 64×64 pixels and three classes, with maps at four scales."""
    torch.manual_seed(0)
    net = SimpleConvNet(3, width)
    return Classifier(
        net, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3, input_size=64, class_names=NAMES, name="simple"
    ).eval()


def trunk_of() -> nn.Module:
    """Another network with maps at four scales."""
    torch.manual_seed(1)
    return SimpleConvNet(2, 3).eval()


def drawn(n: int = 3, channels: int = 3, height: int = 22, width: int = 17) -> Tensor:
    """Smooth images N×C×H×W in [0, 1] with some noise on them."""
    generator = torch.Generator().manual_seed(height * width + channels)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noise = torch.randn(n, channels, height, width, generator=generator)
    return (smooth + 0.03 * noise).clamp(0, 1)
