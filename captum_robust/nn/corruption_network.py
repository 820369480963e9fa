"""A network that says of each pixel how likely it is to be removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captum_robust._checks import check_count
from captum_robust._contexts import probing
from captum_robust._resize import resized
from captum_robust._scores import at_least_float
from captum_robust.nn.mask_decoder import UpBlock
from captum_robust.nn.scales import channels_of, channels_of_maps, features_of, find_scales

_STRIDES = (1, 2, 4, 4)
"""Channels of the own trunk's scales, in multiples of its width."""
_LARGEST = 4096
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
            None: found by :func:`captum_robust.nn.scales.find_scales`.
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
        check_count("width", width, 1)
        if trunk_size is not None:
            check_count("trunk_size", trunk_size, 1)
            if trunk_size > _LARGEST:
                raise ValueError(
                    f"trunk_size: expected at most {_LARGEST} pixels, got {trunk_size}"
                )
        if trunk is not None and not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a torch.nn.Module, got {type(trunk).__name__}")
        if trunk is None and layers is not None:
            raise ValueError("layers: give the trunk that they are of")
        self.width = width
        self.trunk_size = trunk_size
        self.has_own_trunk = trunk is None
        self.trunk = _own_trunk(width) if trunk is None else trunk
        size = getattr(trunk, "input_size", (64, 64)) if input_size is None else input_size
        size = (int(size[0]), int(size[1]))
        if trunk is None:
            layers = list(self.trunk.children())
        seen = self._size_seen(size)
        self._layers = tuple(find_scales(self.trunk, seen) if layers is None else layers)
        if len(self._layers) < 2:
            raise ValueError(
                f"trunk: expected maps at two or more scales, found {len(self._layers)} in "
                f"{type(trunk).__name__}; give the layers yourself"
            )
        self.channels = self._probe(size)
        """Of the features, from the finest scale to the coarsest."""
        inputs, blocks = self.channels[-1], []
        for number in reversed(range(len(self.channels) - 1)):
            outputs = width * min(2**number, 4)
            blocks.append(UpBlock(inputs, self.channels[number], outputs))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.logits = nn.Conv2d(inputs, 1, 1)
        # All pixels alike at the start, a half each, where the gradient of the draw is largest.
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)  # type: ignore[arg-type]
        like = next(self.trunk.parameters(), torch.empty(0))
        self.blocks.to(like.device)
        self.logits.to(like.device)
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
        found = [names.get(layer) for layer in self._layers]
        return None if None in found else found  # type: ignore[return-value]

    def _probe(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The features' channels; weights of the trunk that no feature depends on are frozen.

        Several processes wait for the gradient of each weight that asks for one.
        """
        asking = [p for p in self.trunk.parameters() if p.requires_grad]
        with torch.inference_mode(False), torch.enable_grad(), probing(self.trunk) as image_of:
            for p in asking:
                p.requires_grad = True
            maps = self._features(image_of(channels_of(self.trunk), *size))
            channels = channels_of_maps(maps, self._layers, "trunk")
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
        return features_of(self.trunk, self._layers, resized(x, self._size_seen(size)))[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits N×1×H×W in float32, or in the network's precision where that is higher.

        Raises:
            ValueError: ``x`` is not N×C×H×W.
        """
        if x.ndim != 4:
            raise ValueError(f"x: expected images N×C×H×W, got {tuple(x.shape)}")
        features = self._features(x)
        if not torch.is_autocast_enabled(x.device.type):
            # Those of a trunk in half precision.
            features = [f.to(self.logits.weight.dtype) for f in features]
        up = features[-1]
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            up = block(up, skip)
        logits = self.logits(up)
        return resized(at_least_float(logits), (x.shape[2], x.shape[3]), antialias=False)


def _own_trunk(width: int) -> nn.Sequential:
    """Each stage halves the size: N×3×64×64 -> maps of 32, 16, 8 and 4 positions a side."""
    stages, inputs = [], 3
    for factor in _STRIDES:
        outputs = factor * width
        halved = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        again = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        parts = (halved, nn.BatchNorm2d(outputs), nn.ReLU())
        stages.append(nn.Sequential(*parts, again, nn.BatchNorm2d(outputs), nn.ReLU()))
        inputs = outputs
    return nn.Sequential(*stages)
