"""The parts of images that each unit of a layer answers to most, over a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust._checks import check, check_count, check_finite, whole_numbers
from captum_robust._contexts import evaluation
from captum_robust._files import sole_user
from captum_robust._plurals import amount
from captum_robust._resize import resize_image, size_within
from captum_robust.draw import RGB, as_rgb, blank_figure, overlay
from captum_robust.inspection.progress import Progress, Saved, resumed
from captum_robust.inspection.receptive_field import ReceptiveField, field_of
from captum_robust.inspection.sketch import BINS, Sketch, edges
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import Watched, as_classifier, layers_of, watch
from captum_robust.models import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 64
"""Pixels of the longer side of a patch that is kept; larger ones are reduced."""
_OUTSIDE = 128
"""Grey, of what a patch holds beyond the image."""
_NONE = torch.finfo(torch.float32).min
"""The value in a place for which there was no image yet."""


@dataclass(frozen=True, eq=False)
class MaximalPatches:
    """For each of K units the N images with its highest activations, at most one patch of each."""

    layer: str
    units: list[int]
    """The numbers of the units, K of them."""
    values: Tensor
    """K×N, the highest first; NaN where there are fewer images."""
    positions: Tensor
    """K×N×2, (y, x) in the layer's map."""
    images: list[list[str]]
    """K lists of the ids of the images, one each for the values that are there."""
    patches: Tensor
    """K×N×3×h×w uint8: what the position's receptive field holds, at most 64 pixels on a side. What
    lies beyond the image is grey."""
    heats: Tensor
    """K×N×h×w uint8: the unit's map on the patch, from 0 to its value in 255."""
    histograms: Tensor
    """K×769 int64: how many activations, of all images and positions, lie in each of the bins."""
    edges: Tensor
    """769, the lower edges of the bins; the first holds all below 2^-12, also negative ones."""
    field: ReceptiveField | None
    """None: it differs between positions, so that the patch is the whole image."""
    dead: list[int]
    """Units that were never above 0 on any image, or always the same."""
    notes: list[str]
    """What to know of the result."""
    unusable: dict[str, str]
    """Id of an image that could not be used -> why."""

    def strip(self, row: int) -> RGB:
        """The patches of the unit in this row side by side, and below them with its heat."""
        there = len(self.images[row])
        plain = [as_rgb(patch.float() / 255) for patch in self.patches[row, :there]]
        pairs = zip(plain, self.heats[row, :there], strict=True)
        return np.vstack(
            [np.hstack(plain), np.hstack([_heated(patch, heat) for patch, heat in pairs])]
        )

    @property
    def shown(self) -> list[int]:
        """The first 12 units that live, or else the first."""
        return [unit for unit in self.units if unit not in self.dead][:12] or self.units[:1]

    def plot(self, units: Sequence[int] | None = None) -> Figure:
        """Draw patches, heat and histogram of some units, by default of those in ``shown``.

        Raises:
            ValueError: a unit that is not among ``self.units``.
            ImportError: matplotlib is missing.
        """
        units = self.shown if units is None else units
        unknown = [unit for unit in units if unit not in self.units]
        check(not unknown, f"units: expected some of the {len(self.units)} looked at, got {units}")
        figure = blank_figure(figsize=(9, 0.3 + 1.65 * len(units)), layout="constrained")
        figure.suptitle(f"{self.layer}: highest activations")
        grid = figure.add_gridspec(len(units), 2, width_ratios=(4, 1))
        for number, unit in enumerate(units):
            row = self.units.index(unit)
            axes = figure.add_subplot(grid[number, 0])
            axes.imshow(self.strip(row))
            axes.set(xticks=[], yticks=[], ylabel=f"unit {unit}")
            self._plot_histogram(figure.add_subplot(grid[number, 1]), row)
        return figure

    def _plot_histogram(self, axes: Any, row: int) -> None:
        """Shares of activations above 0, by powers of two; the share at 0 is said."""
        counts = self.histograms[row].double()
        octaves = counts[1:].view(-1, 32).sum(1) / counts.sum().clamp(min=1)
        axes.bar(self.edges[1::32].log2().numpy(), octaves.numpy(), width=1, align="edge")
        zero = float(counts[0] / counts.sum().clamp(min=1))
        axes.set_title(f"{zero:.0%} not above 0", fontsize="small")
        axes.set(yticks=[], xticks=[-10, 0, 10], xticklabels=["2⁻¹⁰", "1", "2¹⁰"])


def _heated(patch: RGB, heat: Tensor) -> RGB:
    """The patch with the heat over it; a heat without differences is left out."""
    return overlay(patch, heat, 0.55) if heat.any() else patch


def maximal_patches(
    model: nn.Module,
    layer: nn.Module | str,
    images: Any,
    units: Sequence[int] | None = None,
    top: int = 9,
    *,
    batch_size: int = 16,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> MaximalPatches:
    """Find the patches of images that activate each unit of a layer most, in one pass.

    Of an image only the position with a unit's highest activation counts. The memory does not grow
    with the number of images: values, positions and patches of the best so far are kept.

    Args:
        model: a classifier, or any network of images.
        layer: a part of the model that gives maps, or its dotted name.
        images: as for :class:`captum_robust.inspection.streaming.ImageStream`.
        units: numbers of the layer's channels; None: all.
        top: how many patches of each unit.
        batch_size: images at once; it changes nothing else.
        folder: where the state is written now and then, so that the same call goes on after a stop.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: a layer without maps, units that it does not have, no image that could be used,
            or a ``folder`` that holds the state of another call.
    """
    classifier = as_classifier(model)
    (watched,) = layers_of(classifier, [layer])
    chosen = units_of(watched, units)
    stream = ImageStream(classifier, images, batch_size=batch_size, progress=progress)
    collector = PatchCollector(classifier, watched, chosen, top)
    path = None if folder is None else Path(folder)
    run = {"layer": watched.name, "units": chosen, "top": top}
    with evaluation(classifier), sole_user(path):
        state = None
        if path is not None:
            file = path / "patches.safetensors"
            state = Progress(file, classifier, stream, {"patches": collector}, run)
        for batch in resumed(stream, state):
            (maps,) = watch(classifier, [watched], batch.inputs)
            collector.add(batch, maps)
    return collector.result(stream)


def units_of(layer: Watched, units: Sequence[int] | None) -> list[int]:
    """The numbers of units; ``ValueError`` unless they are different ones of the layer."""
    count = layer.shape[0]
    if units is None:
        return list(range(count))
    chosen = whole_numbers(units) or []
    inside = chosen and len(set(chosen)) == len(chosen)
    inside = inside and min(chosen) >= 0 and max(chosen) < count
    expected = f"units: expected different numbers from 0 to {count - 1}, of {layer.name}"
    check(inside, f"{expected}, got {units!r}")
    return chosen


class PatchCollector:
    """:func:`maximal_patches`, given one batch after another; its arguments are those."""

    def __init__(self, model: Classifier, layer: Watched, units: list[int], top: int) -> None:
        check_count("top", top, 1)
        self.layer, self.units = layer, units
        self.field = field_of(model, layer, model.input_size)
        grid = zip(layer.shape[1:], model.input_size, strict=True)
        self._lines = [_line(self.field, a, *sizes) for a, sizes in enumerate(grid)]
        size = (self._lines[0].size, self._lines[1].size)
        self.patch_size = size if max(size) <= SIDE else size_within(size, SIDE)
        count, shape = len(units), (len(units), top)
        self._state = {
            "values": torch.full(shape, _NONE),
            "images": torch.full(shape, -1),
            "places": torch.zeros(shape, dtype=torch.int64),
            "patches": torch.zeros(*shape, 3, *self.patch_size, dtype=torch.uint8),
            "heats": torch.zeros(*shape, *self.patch_size, dtype=torch.uint8),
            "slots": torch.arange(top).repeat(count, 1),
            "counts": torch.zeros(count, BINS, dtype=torch.int64),
            "least": torch.full((count,), torch.finfo(torch.float32).max),
        }

    def add(self, batch: Batch, maps: Tensor) -> None:
        """Take in the maps N×C×h×w of a batch.

        Raises:
            ValueError: NaN or infinity in them.
        """
        check_finite(maps, f"layer: {self.layer.name}", int(batch.positions[0]))
        maps = maps[:, self.units].float()
        self.sketch.add(maps.transpose(0, 1).flatten(1))
        maps, s = maps.cpu(), self._state
        best, places = maps.flatten(2).max(dim=2)
        torch.minimum(s["least"], maps.amin((0, 2, 3)), out=s["least"])
        top = s["values"].shape[1]
        values, order = torch.cat([s["values"], best.T], 1).sort(
            stable=True, dim=1, descending=True
        )
        order = order[:, :top]
        s["values"] = values[:, :top].contiguous()
        for name, new in (("images", batch.positions.expand_as(best.T)), ("places", places.T)):
            s[name] = torch.cat([s[name], new], dim=1).gather(1, order)
        is_new = order >= top
        # Pictures stay where they are; a new one takes the slot of one that is no longer needed.
        slots = s["slots"].gather(1, order.clamp(max=top - 1))
        is_kept = torch.zeros_like(s["slots"]).scatter_add(1, slots, (~is_new).long())
        free = is_kept.argsort(dim=1, stable=True)
        s["slots"] = torch.where(is_new, free.gather(1, (is_new.cumsum(1) - 1).clamp(min=0)), slots)
        row, column = is_new.nonzero(as_tuple=True)
        if len(row):
            image, place = order[row, column] - top, s["places"][row, column]
            slot = s["slots"][row, column]
            s["patches"][row, slot] = self._cut(batch.pixels, image, place)
            s["heats"][row, slot] = self._heat(maps[image, row], place, s["values"][row, column])

    def _cut(self, pixels: Tensor, image: Tensor, place: Tensor) -> Tensor:
        """M×3×h×w uint8: what the receptive fields of places in the images N×3×H×W hold.

        Where patches are reduced, whole images are, and a patch begins at the nearest pixel then.
        """
        used, which = torch.unique(image, return_inverse=True)
        rows, columns = self._lines
        height, width = self.patch_size
        size = rows.reduced(height), columns.reduced(width)
        small = resize_image(pixels[used], size).mul(255).round().to(torch.uint8)
        small = F.pad(small, (width, width, height, height), value=_OUTSIDE)
        y = (
            rows.first(place // columns.count, height)[:, None, None]
            + torch.arange(height)[:, None]
        )
        x = columns.first(place % columns.count, width)[:, None, None] + torch.arange(width)
        return small[which[:, None, None], :, y, x].permute(0, 3, 1, 2)

    def _heat(self, maps: Tensor, place: Tensor, values: Tensor) -> Tensor:
        """M×h×w uint8: the maps M×h×w over the patches, relative to the values M at the places."""
        rows, columns = self._lines
        y = rows.on_map(place // columns.count, self.patch_size[0])
        x = columns.on_map(place % columns.count, self.patch_size[1])
        grid = torch.stack(
            [x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], 3
        )
        options = {"padding_mode": "border", "align_corners": True}
        heats = F.grid_sample(maps[:, None], grid.to(maps), **options)[:, 0]  # type: ignore[arg-type]
        scale = torch.where(values > 0, 255 / values, 0)[:, None, None]
        inside = (
            rows.within(place // columns.count, self.patch_size[0])[:, :, None]
            & columns.within(place % columns.count, self.patch_size[1])[:, None]
        )
        return (heats * scale * inside).clamp(0, 255).round().to(torch.uint8)

    def result(self, stream: ImageStream) -> MaximalPatches:
        """What was found, of images whose ids the stream knows."""
        s = self._state
        there = s["images"] >= 0
        peak = s["values"][:, 0]
        is_dead = (peak <= 0) | (peak == s["least"])
        rows = zip(s["images"].tolist(), there.tolist(), strict=True)
        names = [[stream.name_of(i) for i, t in zip(*row, strict=True) if t] for row in rows]
        width = self.layer.shape[2]
        field, dead = (
            self.field,
            [u for u, d in zip(self.units, is_dead.tolist(), strict=True) if d],
        )
        notes = []
        if field is None or field.is_whole:
            why = "differs between positions" if field is None else "is the whole image"
            notes.append(f"The receptive field {why}, so each patch is the whole image.")
        elif max(field.size) > SIDE:
            notes.append(f"Patches of {field.size[0]}×{field.size[1]} pixels are shown smaller.")
        if dead:
            units = amount(len(self.units), "unit")
            notes.append(f"Dead: {len(dead)} of {units}, never above 0, or constant.")
        return MaximalPatches(
            layer=self.layer.name,
            units=self.units,
            values=torch.where(there, s["values"], torch.nan),
            positions=torch.stack([s["places"] // width, s["places"] % width], dim=2),
            images=names,
            patches=s["patches"][torch.arange(len(self.units))[:, None], s["slots"]],
            heats=s["heats"][torch.arange(len(self.units))[:, None], s["slots"]],
            histograms=s["counts"],
            edges=edges(),
            field=field,
            dead=dead,
            notes=notes,
            unusable=dict(stream.unusable),
        )

    def saved(self) -> Saved:
        """All tensors that the result is made of."""
        return self._state, {}

    def restore(self, tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> None:
        """Take up what was saved, in the same memory."""
        for name, tensor in tensors.items():
            self._state[name].copy_(tensor)

    @property
    def sketch(self) -> Sketch:
        """Of all activations so far, also of those that are still to come."""
        return Sketch(len(self.units), self._state["counts"])


@dataclass(frozen=True)
class _Line:
    """Along one axis: receptive fields, positions of the map and pixels of the image."""

    size: int
    stride: int
    start: int
    count: int
    """Of positions."""
    pixels: int
    is_part: bool
    """Whether a field is not the whole axis."""

    def reduced(self, length: int) -> int:
        """The pixels of the image where a field has ``length``."""
        return max(1, round(self.pixels * length / self.size))

    def first(self, position: Tensor, length: int) -> Tensor:
        """The first of them of the fields of positions, where ``length`` more lie around them."""
        if not self.is_part:
            return torch.full_like(position, length)
        at = (self.start + self.stride * position) * length / self.size
        return (at.round().long() + length).clamp(0, length + self.reduced(length))

    def on_map(self, position: Tensor, length: int) -> Tensor:
        """M×length: the places of a patch's pixels on the map, from -1 at its first to 1."""
        pixel = self._pixels_of(length)
        if self.is_part:
            place = position[:, None] + (pixel - self.size / 2) / self.stride
        else:
            place = (pixel / self.size * self.count - 0.5).expand(len(position), -1)
        return 2 * place / max(1, self.count - 1) - 1

    def within(self, position: Tensor, length: int) -> Tensor:
        """M×length bool: which of a patch's pixels are in the image."""
        place = self.start + self.stride * position[:, None] + self._pixels_of(length)
        return (place > 0) & (place < self.pixels)

    def _pixels_of(self, length: int) -> Tensor:
        """The middles of a patch's pixels in those of the image, from its first edge on."""
        return (torch.arange(length) + 0.5) / length * self.size


def _line(field: ReceptiveField | None, axis: int, count: int, pixels: int) -> _Line:
    """Along an axis the fields of a layer, or the whole image where they are that or uneven."""
    if field is None or field.whole[axis]:
        return _Line(pixels, 0, 0, count, pixels, is_part=False)
    size, stride, start = field.size[axis], field.stride[axis], field.start[axis]
    return _Line(size, stride, start, count, pixels, is_part=True)
