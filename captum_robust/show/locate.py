"""Objects in photographs: boxes in torchvision's detection format, from a classifier alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_robust._checks import (
    check,
    check_classes,
    check_count,
    check_number,
    check_shape,
    check_type,
)
from captum_robust._contexts import evaluation
from captum_robust._processes import device_of
from captum_robust._resize import resize_image
from captum_robust._scores import probabilities_of, warn_of_probabilities
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog.methods import Explanation, Method, build_methods
from captum_robust.catalog.thresholds import Threshold
from captum_robust.data import load_image
from captum_robust.metrics.functional import crop_scores
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of

_MOST_CLASSES = 5
_MOST_PARTS = 8
_SMALLEST_PART = 0.1
"""Of the largest part of the same map: smaller ones are not looked at."""
_MARGIN = 0.1
"""Of the sides of a part: what is shown to the classifier around it."""
_SAME = 0.5
"""Boxes that share more of the smaller one than this are one object."""

USUAL = {"best": "box_vote", "fast": "box_vote_fast"}

Located = dict[str, Tensor]


def locate(
    model: Classifier,
    images: Tensor | Sequence[Tensor | str | Path],
    target: int | Sequence[int] | Tensor | None = None,
    method: Any = "best",
    *,
    threshold: float | None = None,
    confidence: float = 0.2,
    batch_size: int = 16,
) -> list[Located]:
    """Place the objects that a classifier sees in photographs of any size in boxes.

    Each class with at least ``confidence`` has its own map, and the first one in any case. The box
    around the largest part of the map stands for the class; a part beside it, of at least a tenth
    of its pixels, is one more object if the classifier gives a crop of it the class with at least
    ``confidence`` and no less than half of what it gives the whole image. Of boxes that share more
    than half of the smaller one, that with the highest score stays.

    An image costs a pass for the scores, the passes of the method for each class, and one for
    each part that is looked at.

    Args:
        model: takes images of its ``input_size``, to which photographs are squashed.
        images: N×C×H×W, or a sequence of C×H×W of any sizes, with pixels in [0, 1], or of files.
        target: the class to place, one number for all images or one each; None: those that the
            model sees.
        method: ``"best"`` or ``"fast"``, ``box_vote`` and ``box_vote_fast`` where a masking network
            comes for the model, else Grad-CAM; none has seen a box in training. ``"fast"`` takes
            three forward passes and one backward pass. Or a name of ``captum-robust methods``, a
            Captum attribution, or a function ``(images N×C×H×W, target N) -> N×H×W or N×C×H×W``.
        threshold: of the box, a share of the map's range; None: that which ships for the method.
        confidence: the least probability of a class.
        batch_size: images, and maps, at once.

    Returns:
        For each image, the most certain first: ``boxes`` M×4 float32 (x0, y0, x1, y1) in pixels of
        the image given, ``labels`` M int64, ``scores`` M float32, the class's probability in the
        image (of a part beside the largest: in its crop, if lower), and ``masks`` M×H×W Boolean.
        They are on the CPU.

    Raises:
        DataError: a file that cannot be read.
        ValueError: shapes, classes or numbers that do not fit; a model that gives no finite
            scores; a method that it cannot have.
        TypeError: other arguments than these.
    """
    kinds = (Tensor, Sequence)
    is_one = isinstance(images, str)
    check_type("images", None if is_one else images, kinds, "a tensor N×C×H×W or a sequence")
    found = Locator(model, method, threshold=threshold, confidence=confidence)
    count = len(images)
    classes = _classes_of(target, count, model)
    check_count("batch_size", batch_size, 1)
    read = (_image_of(image, number) for number, image in enumerate(images))
    results: list[Located] = []
    while batch := list(islice(read, batch_size)):
        some = None if classes is None else classes[len(results) : len(results) + len(batch)]
        results += found(batch, some)
    return results


class Locator:
    """:func:`locate` for one batch of images after another; its arguments are those."""

    def __init__(
        self,
        model: Classifier,
        method: Any = "best",
        *,
        threshold: float | None = None,
        confidence: float = 0.2,
    ) -> None:
        if threshold is not None:
            check_number("threshold", threshold, 0, 1)
        self.model = model
        self.confidence = check_number("confidence", confidence, 0, 1)
        self.method = method_for(model, method)
        own = self.method.threshold
        self.threshold = own if threshold is None else Threshold("value", threshold)

    def __call__(self, images: Sequence[Tensor], target: Tensor | None = None) -> list[Located]:
        """What is in a batch of images C×H×W, of the classes N or of those that are seen."""
        with evaluation(self.model):
            return self._found(images, target)

    def _found(self, images: Sequence[Tensor], target: Tensor | None) -> list[Located]:
        x = torch.stack([resize_image(image, self.model.input_size) for image in images])
        x = in_channels_of(self.model, x.to(device_of(self.model)))
        features: list[Tensor] | None = None
        if self.method.vote is None:
            with torch.no_grad():
                scores = self.model(x)
        else:  # the pass that its masks need anyway
            features, scores = self.method.vote.encode(x)
        warn_of_probabilities(scores, "model")
        probabilities = probabilities_of(scores)
        finite = probabilities.isfinite().all(dim=1)
        check(finite.all(), f"model: no finite scores for image(s) {_numbers(~finite)}")
        rows, classes = self._asked(probabilities, target)
        explained = [
            self._explained(x, rows[first:stop], classes[first:stop], features)
            for first in range(0, len(rows), len(images))
            for stop in [first + len(images)]
        ]
        maps = torch.cat([one.maps.detach().float().cpu() for one in explained])
        boxes = [self.method.boxes(one) for one in explained]
        own = [box for some in boxes if some is not None for box in some.tolist()]
        parts = list(self._parts(maps, own, rows, classes, probabilities))
        return self._placed(parts, self._confirmed(x, maps, parts), images, maps.shape[1:])

    def _asked(self, probabilities: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which image each map is of, and which class: P and P."""
        if target is not None:
            every = torch.arange(len(probabilities), device=probabilities.device)
            return every, target.to(probabilities.device)
        best = probabilities.topk(min(_MOST_CLASSES, probabilities.shape[1]))
        sure = best.values >= self.confidence
        sure[:, 0] = True
        rows, places = sure.nonzero(as_tuple=True)
        return rows, best.indices[rows, places]

    def _explained(
        self, x: Tensor, rows: Tensor, classes: Tensor, features: list[Tensor] | None
    ) -> Explanation:
        vote = self.method.vote
        with torch.random.fork_rng():  # the same boxes every time, also of methods that draw
            torch.manual_seed(0)
            if vote is None or features is None:
                return self.method.explain(x[rows], classes)
            maps, boxes = vote(x[rows], classes, [each[rows] for each in features])
        return Explanation(maps, boxes=boxes)

    def _parts(
        self,
        maps: Tensor,
        own: list[list[float]],
        rows: Tensor,
        classes: Tensor,
        probabilities: Tensor,
    ) -> Iterator[_Part]:
        """The separate parts of each map, largest first; its box is the ``own`` one, if any."""
        import cv2

        shares = probabilities[rows, classes].tolist()
        facts = zip(rows.tolist(), classes.tolist(), shares, strict=True)
        height, width = maps.shape[1:]
        kept = self.threshold.kept(maps).numpy()
        for place, (mask, (row, label, share)) in enumerate(zip(kept, facts, strict=True)):
            _, numbers, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            areas = stats[1:, cv2.CC_STAT_AREA]
            order = 1 + np.argsort(-areas, kind="stable")[:_MOST_PARTS]
            corners = (*stats[order, :2].T, *(stats[order, :2] + stats[order, 2:4]).T)
            boxes = [list(map(float, box)) for box in zip(*corners, strict=True)]
            if own or not len(order):  # nothing is kept: the whole image
                box = own[place] if own else [0.0, 0.0, float(width), float(height)]
                inside = _inside(box, mask.shape)
                within = mask & inside
                yield _Part(row, label, share, box, within if within.any() else inside, True)
            for rank, (number, box) in enumerate(zip(order, boxes, strict=True)):
                is_first = rank == 0 and not own
                large = areas[number - 1] >= _SMALLEST_PART * areas[order[0] - 1]
                if is_first or (rank and large and self.method.box is None):
                    yield _Part(row, label, share, box, numbers == number, is_first)

    def _confirmed(self, x: Tensor, maps: Tensor, parts: list[_Part]) -> list[float]:
        """The score of each part: of one beside the largest at most that of its crop."""
        scores = [part.share for part in parts]
        others = [number for number, part in enumerate(parts) if not part.is_largest]
        if others:
            height, width = maps.shape[1:]
            boxes = torch.tensor([_widened(parts[n].box, width, height) for n in others])
            boxes = boxes * torch.tensor([x.shape[3] / width, x.shape[2] / height] * 2)
            rows = torch.tensor([parts[n].row for n in others], device=x.device)
            labels = torch.tensor([parts[n].label for n in others], device=x.device)
            _, shares = crop_scores(self.model, x[rows], boxes[:, None].to(x.device), labels)
            for number, share in zip(others, shares[:, 0].exp().tolist(), strict=True):
                least = max(self.confidence, scores[number] / 2)
                scores[number] = min(scores[number], share) if share >= least else 0.0
        return scores

    def _placed(
        self,
        parts: list[_Part],
        scores: list[float],
        images: Sequence[Tensor],
        size: Sequence[int],
    ) -> list[Located]:
        """The parts that stay, in pixels of each image."""
        by_image: list[list[tuple[float, _Part]]] = [[] for _ in images]
        for score, part in sorted(zip(scores, parts, strict=True), key=lambda one: -one[0]):
            kept = by_image[part.row]
            is_seen = part.is_largest or score > 0
            if is_seen and all(_shared(part.box, other.box) <= _SAME for _, other in kept):
                kept.append((score, part))
        return [_located(kept, image, size) for kept, image in zip(by_image, images, strict=True)]


@dataclass(frozen=True, eq=False)
class _Part:
    """A connected part of the map of a class in an image."""

    row: int
    label: int
    share: float
    """The class's probability in the whole image."""
    box: list[float]
    """In pixels of the map."""
    mask: np.ndarray[Any, Any]
    is_largest: bool


def method_for(model: Classifier, method: Any) -> Method:
    """The method of :func:`locate`: ``"best"``, ``"fast"``, or what ``build_methods`` takes."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in USUAL:
        method = USUAL[method] if model.name in pretrained() else "grad_cam"
    name = method if isinstance(method, str) else "method"
    return build_methods(model, {name: method})[name]


def _image_of(image: Any, number: int) -> Tensor:
    if isinstance(image, (str, Path)):
        return load_image(image)
    check_shape(f"images[{number}]", image, "C×H×W")
    name, pixels = f"images[{number}]", image.detach().cpu()
    channels = len(pixels)
    check(channels in (1, 3), f"{name}: expected 3 channels, or 1, got {channels}")
    check(pixels.is_floating_point(), f"{name}: expected pixels in [0, 1], got {pixels.dtype}")
    check(pixels.isfinite().all(), f"{name}: expected finite pixels")
    grey: Tensor = pixels.float().expand(3, -1, -1)
    return grey


def _classes_of(target: Any, count: int, model: Classifier) -> Tensor | None:
    if target is None:
        return None
    try:
        classes = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        expected = "expected a class, or one for each image, as integers"
        raise TypeError(f"target: {expected}, got {target!r:.80}") from None
    classes = classes.expand(count) if classes.ndim == 0 else classes
    check_classes(classes, count, len(model.class_names or ()) or 2**31)
    return classes.long()


def _numbers(where: Tensor) -> list[int]:
    return where.nonzero().flatten().tolist()


def _inside(box: Sequence[float], size: tuple[int, ...]) -> Any:
    """Boolean H×W: the pixels of a box, at least one."""
    inside = np.zeros(size, bool)
    x0, y0 = (int(min(round(b), s - 1)) for b, s in zip(box[:2], size[::-1], strict=True))
    inside[y0 : max(round(box[3]), y0 + 1), x0 : max(round(box[2]), x0 + 1)] = True
    return inside


def _widened(box: Iterable[float], width: int, height: int) -> list[float]:
    """A box with a margin, within the map."""
    x0, y0, x1, y1 = box
    across, down = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    return [max(0, x0 - across), max(0, y0 - down), min(width, x1 + across), min(height, y1 + down)]


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of the smaller of two boxes that both cover."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, across) * max(0, down) / smaller


def _located(kept: list[tuple[float, _Part]], image: Tensor, size: Sequence[int]) -> Located:
    height, width = image.shape[1:]
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    masks = torch.stack([torch.from_numpy(part.mask) for _, part in kept])
    return {
        "boxes": torch.tensor([part.box for _, part in kept], dtype=torch.float32) * scale,
        "labels": torch.tensor([part.label for _, part in kept]),
        "scores": torch.tensor([score for score, _ in kept], dtype=torch.float32),
        "masks": F.interpolate(masks[None].float(), (height, width), mode="nearest")[0].bool(),
    }
