"""What the units of each layer make of one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from captum_robust._checks import check_choice, check_shape
from captum_robust._contexts import evaluation
from captum_robust._processes import device_of
from captum_robust._resize import resize_image
from captum_robust.data import Sample, load_image
from captum_robust.data.given import unit_pixels
from captum_robust.draw import as_rgb, blank_figure, heat_rgb
from captum_robust.inspection.watched import as_classifier, layers_of, watch
from captum_robust.models.classifier import in_channels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Activations:
    """The maps of some layers for one image."""

    image: Tensor
    """3×H×W in [0, 1], at the model's input size."""
    maps: dict[str, Tensor]
    """Name of a layer -> its maps C×h×w, on the CPU."""

    def strongest(self, layer: str, count: int = 8) -> list[int]:
        """The units of a layer with the highest single activations, the highest first."""
        peaks = self.maps[layer].amax(dim=(1, 2))
        return [int(unit) for unit in peaks.topk(min(count, len(peaks))).indices.tolist()]

    def plot(self, layers: Sequence[str] | None = None, units: int = 8) -> Figure:
        """Draw the image, and for some layers the mean map and those of the strongest units.

        Raises:
            ValueError: a layer that is not among the maps.
            ImportError: matplotlib is missing.
        """
        shown = list(self.maps) if layers is None else list(layers)
        for name in shown:
            check_choice("layers", name, self.maps)
        rows = len(shown)
        figure = blank_figure(figsize=(1.2 * (units + 2), 1.4 * rows), layout="constrained")
        axes = figure.subplots(rows, units + 2, squeeze=False)
        for each in axes.flat:
            each.set_axis_off()
        for name, row in zip(shown, axes, strict=True):
            maps = self.maps[name]
            row[0].imshow(as_rgb(self.image))
            row[0].set_title(f"{name}\n{maps.shape[1]}×{maps.shape[2]}", fontsize="small")
            strongest = self.strongest(name, units)
            pictures = [("mean", maps.mean(0)), *((f"{unit}", maps[unit]) for unit in strongest)]
            for (title, heat), each in zip(pictures, row[1:], strict=False):
                each.imshow(np.asarray(heat_rgb(heat)), interpolation="nearest")
                each.set_title(title, fontsize="small")
        return figure


def activations(
    model: nn.Module,
    image: Tensor | Sample | str | Path,
    layers: Sequence[nn.Module | str] | None = None,
) -> Activations:
    """Return the maps of layers for one image, in one pass.

    Args:
        model: a classifier, or any network of images.
        image: 1×H×W or 3×H×W of any size, in [0, 1] or uint8; a sample, or the path of a file.
        layers: parts of the model that give maps, or their dotted names; None: the last one of
            each scale.

    Raises:
        ValueError: a layer that gives no maps.
        DataError: an image out of [0, 1], or a file that cannot be read.
    """
    classifier = as_classifier(model)
    if isinstance(image, Sample):
        image = image.image
    if isinstance(image, Tensor):
        check_shape("image", image, "C×H×W")
        pixels = unit_pixels(image, "image")
    else:
        pixels = load_image(image)
    watched = layers_of(classifier, layers, argument="layers")
    pixels = resize_image(pixels, classifier.input_size)
    x = in_channels_of(classifier, pixels[None].to(device_of(classifier)))
    with torch.no_grad(), evaluation(classifier):
        maps = watch(classifier, watched, classifier.normalised(x))
    return Activations(
        pixels, {w.name: m[0].float().cpu() for w, m in zip(watched, maps, strict=True)}
    )
