"""Network dissection: which concepts the units of a layer detect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_finite, check_number, checked_size, printable
from captum_robust._contexts import evaluation
from captum_robust._plurals import amount
from captum_robust._resize import resized
from captum_robust.draw import blank_figure
from captum_robust.inspection.concepts import Concepts, nearest
from captum_robust.inspection.patches import units_of
from captum_robust.inspection.progress import Saved
from captum_robust.inspection.segmentations import concepts_of
from captum_robust.inspection.sketch import BINS, RELATIVE_ERROR, Sketch, bins_of, edges
from captum_robust.inspection.streaming import Batch, ImageStream
from captum_robust.inspection.watched import Watched, as_classifier, layers_of, watch
from captum_robust.models import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILE = 0.005
IOU = 0.04
_AT_ONCE = 1024
"""Maps that are enlarged together."""
_SAID = 20
"""Concepts that never occur, in a note."""
_Key = tuple[int, str, str]
"""The number of a source; "known" or "mask"; the category or the name."""


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
    progress: bool | None = None,
) -> Dissection:
    """Dissect a layer (Bau et al., Network Dissection, CVPR 2017, arXiv 1704.05796), in one pass.

    A unit is active where its activation is among the highest ``quantile`` of all images and
    positions. Where its map, enlarged to the size of the masks or, if larger, taken at their
    pixels, is active is compared with each concept over all images that are annotated. The quantile
    comes from a histogram of fixed size, whose bins are at most 1/32 of their lower edge wide; as
    the number of images is known, what can no longer be that high need not be counted. It takes
    about 3 kB for each unit and concept, and a threshold is from 2^-12 to 2^12.

    Args:
        model: a classifier, or any network of images.
        layer: a part of the model that gives maps, or its dotted name.
        images: as for :func:`captum_robust.inspection.maximal_patches`.
        concepts: ``"colours"`` or ``"textures"``, which need no labels; ``"objects"``, the masks
            of the samples by their classes, or their boxes where there are no masks; a folder with
            a sub-folder of masks for each concept, or a dictionary of such folders (see
            :class:`captum_robust.inspection.concepts.MaskFolders`); the JSON file of COCO's
            instances or panoptic segmentation; the folder of Pascal VOC, of ADE20K (the scene
            parsing with ``objectInfo150.txt``, or all with ``_seg.png``) or of Broden (see
            ``captum_robust.inspection.segmentations``). A mask is as large as its image is stored,
            or as it is upright, where an EXIF tag turns it on its side: its size tells which of
            the two it was drawn on. Where that does not tell, as of a square or of one upside
            down, it was drawn on the stored pixels, and a note says so.
        units: numbers of the layer's channels; None: all.
        quantile: the share of positions at which a unit is active.
        least_iou: above it a unit is a detector of its best concept.
        size: (H, W) at which maps and masks are compared, or a number for a square; None: half of
            the model's input size, as in the paper.
        batch_size: images at once; it changes nothing else.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

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
        [source],
        len(stream),
        quantile=quantile,
        size=size,
    )
    with evaluation(classifier):
        for batch in stream.batches():
            (maps,) = watch(classifier, [watched], batch.inputs)
            dissector.add(batch, maps)
    return dissector.result(stream, least_iou=least_iou)


@dataclass(frozen=True, eq=False)
class Marked:
    """Where the concepts of one source are in a batch."""

    masks: dict[str, Tensor]
    """Name -> N×h×w bool."""
    known: dict[str, Tensor]
    """Category -> N bool, the images that are annotated with it."""


def marked(sources: Sequence[Concepts], batch: Batch, size: tuple[int, int]) -> list[Marked]:
    """Where the concepts of each source are, at a size (H, W)."""
    return [
        Marked(source.masks(batch, number, size), source.known(batch, number))
        for number, source in enumerate(sources)
    ]


class Dissector:
    """:func:`dissect`, given one batch after another.

    Args:
        model: a classifier.
        layer: what is dissected.
        units: the numbers of its channels.
        sources: of concepts, each for a result of its own; what they read of the images is in the
            same order.
        total: the number of images.
        quantile, size: as for :func:`dissect`.
        sketch: of all activations of the units, which another keeps; None: it keeps its own.
    """

    def __init__(
        self,
        model: Classifier,
        layer: Watched,
        units: list[int],
        sources: Sequence[Concepts],
        total: int,
        *,
        quantile: float = QUANTILE,
        size: int | tuple[int, int] | None = None,
        sketch: Sketch | None = None,
    ) -> None:
        self.quantile = check_number("quantile", quantile, 0, 1, open_low=True, open_high=True)
        half = (max(1, model.input_size[0] // 2), max(1, model.input_size[1] // 2))
        self.size = half if size is None else checked_size("size", size)
        self.layer, self.units, self.sources = layer, units, sources
        self._positions = total * layer.shape[1] * layer.shape[2]
        self._is_own = sketch is None
        self._sketch = sketch or Sketch(len(units))
        self._counts: dict[_Key, Tensor] = {}
        """Of active pixels, K·BINS int32: in all images of a category, in the masks of a name."""
        self._area: dict[str, int] = {}
        self._images = [0] * len(sources)

    def add(self, batch: Batch, maps: Tensor, found: list[Marked] | None = None) -> None:
        """Take in the maps N×C×h×w of a batch, and what is marked in it at the size of this.

        Raises:
            ValueError: NaN or infinity in them.
        """
        if self._is_own:
            check_finite(maps, f"layer: {self.layer.name}", int(batch.positions[0]))
        maps = maps[:, self.units].float()
        if self._is_own:
            self._sketch.add(maps.transpose(0, 1).flatten(1))
        found = marked(self.sources, batch, self.size) if found is None else found
        if not any(known.any() for one in found for known in one.known.values()):
            return
        keys, image, pixel = self._active(maps)
        place = image * (self.size[0] * self.size[1]) + pixel
        for number, one in enumerate(found):
            self._images[number] += int(torch.stack([*one.known.values()]).any(dim=0).sum())
            for category, known in one.known.items():
                self._count(
                    (number, "known", category), keys if known.all() else keys[known[image]]
                )
            for name, mask in one.masks.items():
                flat = mask.flatten()
                self._count((number, "mask", name), keys[flat[place]])
                area = f"{number} {name}"
                self._area[area] = self._area.get(area, 0) + int(flat.sum())

    def _active(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pixel that may be active: unit · BINS + bin, its image and its place there."""
        # What is below the quantile for good is never active. The first bin above 0 is the least.
        lowest = edges()[self._sketch.top_bins(self.quantile, self._positions)].to(maps.device)
        # Enlarging makes nothing higher than the highest.
        image, unit = (maps.amax(dim=(2, 3)) >= lowest).nonzero(as_tuple=True)
        found: list[tuple[Tensor, ...]] = [(image[:0],) * 3]
        for some, own in zip(
            torch.split(image, _AT_ONCE), torch.split(unit, _AT_ONCE), strict=True
        ):
            large = _at(maps[some, own][:, None], self.size).flatten(1)
            pair, pixel = (large >= lowest[own][:, None]).nonzero(as_tuple=True)
            found.append((own[pair] * BINS + bins_of(large[pair, pixel]), some[pair], pixel))
        keys, images, pixels = (torch.cat(one).cpu() for one in zip(*found, strict=True))
        return keys, images, pixels

    def _count(self, key: _Key, keys: Tensor) -> None:
        if key not in self._counts:
            self._counts[key] = torch.zeros(len(self.units) * BINS, dtype=torch.int32)
        if len(keys):
            self._counts[key] += torch.bincount(keys, minlength=len(self.units) * BINS).int()

    def saved(self) -> Saved:
        """All that the result is made of."""
        tensors = {str(number): counts for number, counts in enumerate(self._counts.values())}
        if self._is_own:
            tensors["sketch"] = self._sketch.counts
        facts = {"keys": list(self._counts), "area": self._area, "images": self._images}
        return tensors, facts | {"notes": [source.note for source in self.sources]}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._counts = {
            (number, kind, name): tensors[str(place)]
            for place, (number, kind, name) in enumerate(facts["keys"])
        }
        self._area, self._images = dict(facts["area"]), list(facts["images"])
        if self._is_own:
            self._sketch.counts = tensors["sketch"]
        for source, note in zip(self.sources, facts["notes"], strict=True):
            source.note = note

    def has_concepts(self, number: int) -> bool:
        """Whether any concept of a source occurred so far."""
        return any(a and key.startswith(f"{number} ") for key, a in self._area.items())

    def result(self, stream: ImageStream, number: int = 0, *, least_iou: float = IOU) -> Dissection:
        """What was found of the concepts of a source, on the images of a stream.

        Raises:
            ValueError: none of them is annotated.
        """
        check_number("least_iou", least_iou, 0, 1)
        source, images = self.sources[number], self._images[number]
        check(images, "concepts: none of the images is annotated")
        bins = self._sketch.top_bins(self.quantile)[:, None]
        tails = self._sketch.tails()
        masks = [name for i, kind, name in self._counts if i == number and kind == "mask"]
        areas = {name: self._area[f"{number} {name}"] for name in masks}
        occurring = [name for name in masks if areas[name]]
        known = list(source.names)
        names = sorted(occurring, key=known.index) if known else sorted(occurring)
        check(names, "concepts: none of them occurs on the images")
        shared = torch.cat([_tail(self._counts[number, "mask", n], bins) for n in names], dim=1)
        of = [source.categories.get(name, "") for name in names]
        tail = {c: _tail(self._counts[number, "known", c], bins) for c in set(of)}
        active = torch.cat([tail[category] for category in of], dim=1)
        area = torch.tensor([areas[name] for name in names])
        absent = sorted(set(known) - set(names), key=known.index)
        notes = [source.note] if source.note else []
        if beyond := int((bins == BINS - 1).sum()):
            least = f"{float(edges()[-1]):,.0f}"
            said = f"Of {amount(beyond, 'unit')} more than the quantile is active: activations"
            notes.append(f"{said} above {least} are not told apart.")
        if absent:
            more = ["…"] if len(absent) > _SAID else []
            said = printable(", ".join(absent[:_SAID] + more))
            notes.append(f"Concepts that never occur: {said}.")
        if left := len(stream) - len(stream.unusable) - images:
            notes.append(f"Without annotation, for the thresholds only: {amount(left, 'image')}.")
        return Dissection(
            layer=self.layer.name,
            units=self.units,
            concepts=names,
            iou=(shared / (active + area - shared)).float(),
            thresholds=edges()[bins[:, 0]],
            shares=(tails.gather(1, bins)[:, 0] / tails[:, 0]).float(),
            relative_error=RELATIVE_ERROR,
            absent=absent,
            least_iou=least_iou,
            images=images,
            notes=notes,
            unusable=dict(stream.unusable),
        )


def _at(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps M×1×h×w at a size (H, W): smaller ones enlarged, larger ones at its nearest pixels.

    Those are the pixels of the masks; a mean of several would seldom reach the threshold.
    """
    sides = zip(maps.shape[2:], size, strict=True)
    y, x = (nearest(have, min(have, want)).to(maps.device) for have, want in sides)
    return resized(maps[:, :, y[:, None], x], size)


def _tail(counts: Tensor, bins: Tensor) -> Tensor:
    """K×1 float64: how many of the counts (K·BINS) are in the bins K×1 or above."""
    rows = counts.view(-1, BINS).double()
    return (rows * (torch.arange(BINS) >= bins)).sum(dim=1, keepdim=True)
