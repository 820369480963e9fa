"""The filters of the first layer, as pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._contexts import hooked, probing
from captum_robust.draw import blank_figure
from captum_robust.inspection.watched import as_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FirstLayerFilters:
    """What the first layer multiplies its input with."""

    layer: str
    weights: Tensor
    """F×C×h×w, on the CPU."""
    tiles: Tensor
    """F×h×w×3 in [0, 1], where C is 3 the filter in colours; else its C channels beside each other
    in grey, F×h×(C·w)×3. Each filter is scaled from its least to its greatest weight."""

    def plot(self, most: int = 128) -> Figure:
        """Draw the first so many tiles.

        Raises:
            ImportError: matplotlib is missing.
        """
        tiles = self.tiles[:most]
        height, width = tiles.shape[1:3]
        columns = max(1, min(len(tiles), round(16 * height / width)))
        rows = -(-len(tiles) // columns)
        figure = blank_figure(figsize=(8, 8 * rows * height / (columns * width) + 0.1))
        for number, tile in enumerate(tiles):
            axes = figure.add_subplot(rows, columns, number + 1)
            axes.imshow(tile.numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set_axis_off()
        figure.subplots_adjust(0, 0, 1, 1, wspace=0.1, hspace=0.1)
        return figure


def first_layer_filters(model: nn.Module) -> FirstLayerFilters:
    """Return the filters of the first convolution that runs, or of a first linear layer on pixels.

    Deeper ones take the maps of others, and say little as pictures.

    Raises:
        ValueError: the model has neither.
    """
    classifier = as_classifier(model)
    named = {m: n for n, m in classifier.module.named_modules()}
    layers = [m for m in named if isinstance(m, (nn.Conv2d, nn.Linear))]
    ran: list[nn.Module] = []
    shape = classifier.input_shape
    with torch.no_grad(), probing(classifier) as image_of:
        image = image_of(*shape)
        with hooked(layers, lambda module, *_: ran.append(module)):
            classifier.module(image)
    first: Any = next(iter(ran), None)
    name = "" if first is None else named[first]
    is_pixels = isinstance(first, nn.Linear) and first.in_features == torch.Size(shape).numel()
    is_known = isinstance(first, nn.Conv2d) or is_pixels
    check(is_known, "model: expected a first layer that is a 2-D convolution, or linear on pixels")
    weights = first.weight.detach().float().cpu()
    if is_pixels:
        weights = weights.view(-1, *shape)
    low, high = (getattr(weights, end)((1, 2, 3), keepdim=True) for end in ("amin", "amax"))
    scaled = torch.where(high > low, (weights - low) / (high - low), 0.5)
    if weights.shape[1] == 3:
        tiles = scaled.permute(0, 2, 3, 1)
    else:
        tiles = scaled.permute(0, 2, 1, 3).flatten(2)[..., None].expand(-1, -1, -1, 3)
    return FirstLayerFilters(name or type(first).__name__, weights, tiles.contiguous())
