"""A network that says of each pixel how likely it is to be removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_count, check_shape, check_type
from captum_robust._contexts import probing
from captum_robust._processes import device_of
from captum_robust._resize import resized
from captum_robust._scores import at_least_float
from captum_robust.nn.convolutions import WayUp, convolution, in_precision_of, zero_convolution
from captum_robust.nn.places import Layouts
from captum_robust.nn.scales import (
    channels_of,
    channels_of_maps,
    check_scales,
    features_of,
    find_scales,
    input_size_of,
)

_STRIDES = (1, 2, 4, 4)
"""Channels of the own trunk's scales, in multiples of its width."""
LARGEST_TRUNK_SIZE = 4096
"""Pixels a side that a trunk sees: a broken file could tell any number."""


class CorruptionNetwork(nn.Module):
    """Images N×C×H×W with pixels in [0, 1] -> logits N×1×H×W that a pixel is removed.

    The corruption network of Fan, Zhao and Ermon: convolutions down, up-sampling back, and skip
    connections between the two. Their sizes are not stated. The logits are made at the finest scale
    of the trunk and enlarged bilinearly.

    Args:
        trunk: any network whose modules return maps at two or more scales (a classifier of
            torchvision, timm or :func:`captum_robust.models.load_classifier`), as the way down. It
            trains with the rest, but for parameters that are frozen; those that no feature depends
            on, its head's, are frozen here. One whose parameters are all frozen stays in evaluation
            mode: its batch norm keeps its statistics. Where it is the classifier that the network
            is trained against, give a copy. None: four scales of two convolutions.
        layers: of the trunk, whose outputs are the features, from the finest scale to the coarsest;
            None: found by ``captum_robust.nn.scales.find_scales``.
        width: channels of the finest scale of the own trunk and of the way up.
        input_size: (H, W) of a probe; None: the trunk's ``input_size``, else 64.
        trunk_size: the trunk sees images whose shorter side has so many pixels, bilinearly resized;
            None: images as they are. A trunk for 224 pixels has 2×2 positions at its coarsest scale
            of an image of 64.

    Raises:
        TypeError: a trunk that is no module.
        ValueError: fewer than two scales, layers that give no maps, a width below 1, a size that is
            not 1 to 4096, layers without a trunk.
    """

    def __init__(
        self,
        trunk: nn.Module | None = None,
        *,
        layers: Sequence[nn.Module] | None = None,
        width: int = 32,
        input_size: tuple[int, int] | None = None,
        trunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.width = check_count("width", width, 1)
        self.trunk_size = check_count(
            "trunk_size", trunk_size, 1, LARGEST_TRUNK_SIZE, optional=True
        )
        check_type("trunk", trunk, nn.Module | None, "a torch.nn.Module")
        check(trunk is not None or layers is None, "layers: expected the trunk that they are of")
        self.has_own_trunk = trunk is None
        self.trunk = _own_trunk(width) if trunk is None else trunk
        size = input_size_of(trunk, input_size, 64)
        if trunk is None:
            layers = list(self.trunk.children())
        seen = self._size_seen(size)
        self._layers = tuple(find_scales(self.trunk, seen) if layers is None else layers)
        check_scales("trunk", trunk, self._layers)
        self.channels = self._probe(size)
        """Those of the features, from the finest scale to the coarsest."""
        widths = [width * min(2**number, 4) for number in range(len(self.channels) - 1)]
        device = device_of(self.trunk)
        self.blocks = WayUp(self.channels[-1], self.channels, widths).to(device)
        # All pixels alike at the start, a half each, where the gradient of the draw is largest.
        self.logits = zero_convolution(self.blocks.outputs, 1).to(device)
        self._rest_frozen_trunk()

    def train(self, mode: bool = True) -> CorruptionNetwork:
        """As :meth:`torch.nn.Module.train`; a trunk that is all frozen goes to evaluation mode."""
        super().train(mode)
        self._rest_frozen_trunk()
        return self

    def _rest_frozen_trunk(self) -> None:
        if not any(p.requires_grad for p in self.trunk.parameters()):
            self.trunk.eval()

    @property
    def layer_names(self) -> list[str] | None:
        """Dotted names, in the trunk, of the layers whose outputs are the features.

        None: one of them has no name there.
        """
        names = {module: name for name, module in self.trunk.named_modules()}
        own = [names[layer] for layer in self._layers if layer in names]
        return own if len(own) == len(self._layers) else None

    def _probe(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The features' channels; weights of the trunk that no feature depends on are frozen.

        Several processes wait for the gradient of each weight that asks for one.
        """
        asking = [p for p in self.trunk.parameters() if p.requires_grad]
        with torch.inference_mode(False), torch.enable_grad(), probing(self.trunk) as image_of:
            for p in asking:
                p.requires_grad = True
            with Layouts() as followed:
                image = image_of(channels_of(self.trunk), *size)
                followed.begin_at(image)
                maps = self._features(image)
            channels = channels_of_maps(maps, self._layers, "trunk", followed)
            sums = [m.sum() for m in maps if m.requires_grad]
            gradients = torch.autograd.grad(sums, asking, allow_unused=True) if asking else ()
        for p, gradient in zip(asking, gradients, strict=True):
            if gradient is None:
                p.requires_grad = False
        return channels

    def _size_seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of what the trunk sees of images of a size."""
        if self.trunk_size is None:
            return size
        factor = self.trunk_size / min(size)
        return round(size[0] * factor), round(size[1] * factor)

    def _features(self, x: Tensor) -> list[Tensor]:
        size = (int(x.shape[2]), int(x.shape[3]))
        x = in_precision_of(self.trunk, [resized(x, self._size_seen(size))])[0]
        return features_of(self.trunk, self._layers, x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits N×1×H×W in float32, or in the network's precision where that is higher.

        Raises:
            ValueError: ``x`` is not N×C×H×W.
        """
        check_shape("x", x, "N×C×H×W")
        features = in_precision_of(self.logits, self._features(x))
        logits = self.logits(self.blocks(features[-1], features))
        return resized(at_least_float(logits), (x.shape[2], x.shape[3]), antialias=False)


def _own_trunk(width: int) -> nn.Sequential:
    """Each stage halves the size: N×3×64×64 -> maps of 32, 16, 8 and 4 positions a side."""
    stages, inputs = [], 3
    for factor in _STRIDES:
        outputs = factor * width
        halved, again = convolution(inputs, outputs, 3, 2), convolution(outputs, outputs, 3)
        stages.append(nn.Sequential(*halved, *again))
        inputs = outputs
    return nn.Sequential(*stages)
