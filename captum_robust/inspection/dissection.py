"""Network dissection: which concepts the units of a layer detect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_finite, check_number, checked_size
from captum_robust._contexts import evaluation
from captum_robust._resize import resized
from captum_robust.draw import blank_figure
from captum_robust.inspection.concepts import Concepts, concepts_of
from captum_robust.inspection.patches import units_of
from captum_robust.inspection.sketch import BINS, RELATIVE_ERROR, Sketch, bins_of, edges
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import Watched, as_classifier, layers_of, watch
from captum_robust.models import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILE = 0.005
IOU = 0.04


@dataclass(frozen=True, eq=False)
class Detector:
    """A unit that stands for a concept."""

    unit: int
    concept: str
    iou: float


@dataclass(frozen=True, eq=False)
class Dissection:
    """How well each of K units of a layer marks each of C concepts."""

    layer: str
    units: list[int]
    """The numbers of the units, K of them."""
    concepts: list[str]
    """C names, of those that occur."""
    iou: Tensor
    """K×C in [0, 1]: of all annotated images together, the pixels that unit and concept share,
    divided by those that either has."""
    thresholds: Tensor
    """K: a unit is active where its activation is at least this."""
    shares: Tensor
    """K: of all positions of its maps, the share that is active. It is less than the quantile where
    a unit is seldom above 0."""
    relative_error: float
    """The exact quantile is at most so much above the threshold, in parts of it; the overlaps are
    exact for the threshold as it is."""
    absent: list[str]
    """Concepts that never occur."""
    least_iou: float
    """Above which a unit is a detector."""
    images: int
    """That are annotated."""
    notes: list[str]
    """What to know of the result."""
    unusable: dict[str, str]
    """Id of an image that could not be used -> why."""

    @property
    def detectors(self) -> list[Detector]:
        """The units whose best concept is marked well enough, the best first."""
        best, which = self.iou.max(dim=1)
        rows = zip(self.units, which.tolist(), best.tolist(), strict=True)
        found = [Detector(u, self.concepts[c], iou) for u, c, iou in rows if iou > self.least_iou]
        return sorted(found, key=lambda one: -one.iou)

    def histogram(self) -> dict[str, int]:
        """Concept -> how many units detect it, the most frequent first."""
        names = [one.concept for one in self.detectors]
        return dict(sorted(((n, names.count(n)) for n in set(names)), key=lambda p: (-p[1], p[0])))

    def plot(self, most: int = 30) -> Figure:
        """Draw how many units detect each concept, of the most frequent concepts.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib.ticker import MaxNLocator

        counts = dict(list(self.histogram().items())[:most])
        figure = blank_figure(figsize=(6, 1.2 + 0.25 * max(1, len(counts))), layout="constrained")
        said = f"{len(self.detectors)} of {len(self.units)} units detect {len(counts)} concepts"
        axes = figure.add_subplot(title=f"{self.layer}: {said}", xlabel="units")
        names = [name.replace("$", r"\$") for name in counts]  # no formula
        axes.barh(names, list(counts.values()), color="#0072b2")
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def dissect(
    model: nn.Module,
    layer: nn.Module | str,
    images: Any,
    concepts: Any = "colours",
    units: Sequence[int] | None = None,
    *,
    quantile: float = QUANTILE,
    least_iou: float = IOU,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Dissection:
    """Dissect a layer (Bau et al., Network Dissection, CVPR 2017, arXiv 1704.05796), in one pass.

    A unit is active where its activation is among the highest ``quantile`` of all images and
    positions. Where its map, enlarged to the size of the masks, is active is compared with each
    concept over all images that are annotated. The quantile comes from a histogram of fixed size,
    whose bins are at most 1/32 of their lower edge wide; as the number of images is known, what
    can no longer be that high need not be counted. It takes about 3 kB for each unit and concept,
    and a threshold is never below 2^-12.

    Args:
        model: a classifier, or any network of images.
        layer: a part of the model that gives maps, or its dotted name.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        concepts: ``"colours"``, which need no labels; ``"objects"``, the masks of the samples by
            their classes, or their boxes where there are no masks; a folder with a sub-folder of
            masks for each concept, or a dictionary of such folders (see
            :class:`captum_robust.inspection.concepts.MaskFolders`).
        units: numbers of the layer's channels; None: all.
        quantile: the share of positions at which a unit is active.
        least_iou: above it a unit is a detector of its best concept.
        size: (H, W) at which maps and masks are compared, or a number for a square; None: half of
            the model's input size, as in the paper.
        batch_size: images at once; it changes nothing else.
        progress: whether a bar on standard error shows how far it is.

    Raises:
        ValueError: a layer without maps, units that it does not have, no image that could be used
            or none that is annotated.
        FileNotFoundError: a folder of masks is missing.
    """
    classifier = as_classifier(model)
    (watched,) = layers_of(classifier, [layer])
    source = concepts_of(concepts, classifier.class_names)
    stream = ImageStream(
        classifier, images, batch_size=batch_size, progress=progress, reads=(source.read,)
    )
    dissector = Dissector(
        classifier,
        watched,
        units_of(watched, units),
        source,
        len(stream),
        quantile=quantile,
        size=size,
    )
    with evaluation(classifier):
        for batch in stream.batches():
            (maps,) = watch(classifier, [watched], batch.inputs)
            dissector.add(batch, maps)
    return dissector.result(stream, least_iou)


class Dissector:
    """:func:`dissect`, given one batch after another; ``total`` is the number of images."""

    def __init__(
        self,
        model: Classifier,
        layer: Watched,
        units: list[int],
        concepts: Concepts,
        total: int,
        *,
        quantile: float = QUANTILE,
        size: int | tuple[int, int] | None = None,
        number: int = 0,
    ) -> None:
        self.quantile = check_number("quantile", quantile, 0, 1, open_low=True, open_high=True)
        half = (max(1, model.input_size[0] // 2), max(1, model.input_size[1] // 2))
        self.size = half if size is None else checked_size("size", size)
        self.layer, self.units, self.concepts = layer, units, concepts
        self._number = number
        self._positions = total * layer.shape[1] * layer.shape[2]
        self._sketch = Sketch(len(units))
        self._active = self._none()
        self._shared: dict[str, Tensor] = {}
        self._area: dict[str, int] = {}
        self._images = 0

    def _none(self) -> Tensor:
        return torch.zeros(len(self.units) * BINS, dtype=torch.int32)

    def add(self, batch: Batch, maps: Tensor) -> None:
        """Take in the maps N×C×h×w of a batch.

        Raises:
            ValueError: NaN or infinity in them.
        """
        check_finite(maps, f"layer: {self.layer.name}", int(batch.positions[0]))
        maps = maps[:, self.units].float()
        self._sketch.add(maps.transpose(0, 1).flatten(1))
        known = self.concepts.known(batch, self._number)
        if not known.any():
            return
        self._images += int(known.sum())
        masks = self.concepts.masks(batch, self._number, self.size)
        # What is below the quantile for good is never active. The first bin above 0 is the least.
        floor = self._sketch.top_bins(self.quantile, self._positions).to(maps.device)
        large = resized(maps[known.to(maps.device)], self.size).transpose(0, 1).flatten(1)  # K×P
        unit, pixel = (large >= edges().to(maps.device)[floor][:, None]).nonzero(as_tuple=True)
        keys = (unit * BINS + bins_of(large[unit, pixel])).cpu()
        pixel = pixel.cpu()
        self._active += torch.bincount(keys, minlength=len(self._active)).int()
        for name, mask in masks.items():
            flat = mask[known].flatten()
            inside = torch.bincount(keys[flat[pixel]], minlength=len(self._active)).int()
            self._shared[name] = self._shared.get(name, 0) + inside
            self._area[name] = self._area.get(name, 0) + int(flat.sum())

    @property
    def has_concepts(self) -> bool:
        """Whether any concept occurred so far."""
        return any(self._area.values())

    def result(self, stream: ImageStream, least_iou: float = IOU) -> Dissection:
        """What was found, of the images of a stream.

        Raises:
            ValueError: none of them is annotated.
        """
        check(self._images, "concepts: none of the images is annotated")
        bins = self._sketch.top_bins(self.quantile)[:, None]
        tails = self._sketch.tails()
        occurring = [name for name, area in self._area.items() if area]
        known = list(self.concepts.names)
        names = sorted(occurring, key=known.index) if known else sorted(occurring)
        check(self.has_concepts, "concepts: none of them occurs on the images")
        active = _tail(self._active, bins)
        shared = torch.cat([_tail(self._shared[name], bins) for name in names], dim=1)
        area = torch.tensor([self._area[name] for name in names])
        absent = [name for name in known if name not in names]
        note = self.concepts.note
        notes = [note] if note else []
        if absent:
            notes.append(f"Concepts that never occur: {', '.join(absent)}.")
        if left := len(stream) - len(stream.unusable) - self._images:
            notes.append(f"{left} images without annotation count for the thresholds only.")
        return Dissection(
            layer=self.layer.name,
            units=self.units,
            concepts=names,
            iou=(shared / (active + area - shared)).float(),
            thresholds=edges()[bins[:, 0]],
            shares=(tails.gather(1, bins)[:, 0] / tails[:, 0]).float(),
            relative_error=RELATIVE_ERROR,
            absent=absent,
            least_iou=check_number("least_iou", least_iou, 0, 1),
            images=self._images,
            notes=notes,
            unusable=dict(stream.unusable),
        )


def _tail(counts: Tensor, bins: Tensor) -> Tensor:
    """K×1 float64: how many of the counts (K·BINS) are in the bins K×1 or above."""
    rows = counts.view(-1, BINS).double()
    return (rows * (torch.arange(BINS) >= bins)).sum(dim=1, keepdim=True)
