"""Objects in photographs: boxes in torchvision's detection format, from a classifier alone."""

from __future__ import annotations

import warnings
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
    check_numbers_below,
    check_shape,
    check_type,
    known_name,
    printable,
)
from captum_robust._contexts import evaluation
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust._resize import resize_image
from captum_robust._scores import probabilities_of, warn_of_probabilities
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog.methods import METHODS, Explanation, Method, build_methods
from captum_robust.catalog.thresholds import Threshold
from captum_robust.data import load_image
from captum_robust.data.given import unit_pixels
from captum_robust.metrics.functional import crop_scores
from captum_robust.models import Classifier, takes_size
from captum_robust.models.classifier import in_channels_of

_MOST_CLASSES = 5
_MOST_PARTS = 8
_SMALLEST_PART = 0.1
"""Of the largest part of the same map: smaller ones are not looked at."""
_MARGIN = 0.1
"""Of the sides of a part: what is shown to the classifier around it."""
ROUNDS = 4
_SQUASHED = 1.5
"""Images that are no longer than so many times their shorter side are squashed to the model's size,
as those were on which thresholds were chosen."""
_LONGEST = 4.0
"""Longer ones are squashed to this shape."""
_STEP = 32
"""Pixels of which the longer side of such images is a multiple."""
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
    rounds: int | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> list[Located]:
    """Place the objects that a classifier sees in photographs of any size in boxes.

    Each class with at least ``confidence`` has its own map, and the first one in any case. The box
    around the largest part of the map stands for the class. A part beside it, of at least a tenth
    of its pixels, is one more object if the classifier gives a crop of it the class with at least
    ``confidence`` and no less than half of what it gives the whole image. Then what was found is
    painted over and the rest is looked at again, where each box has to be confirmed so, until
    nothing new is found or after so many ``rounds``. Of boxes that share more than half of the
    smaller one, the first stays.

    An image costs, each round, a pass for the scores, the passes of the method for each class, and
    one for each part that has to be confirmed.

    Args:
        model: takes images of its ``input_size``, to which photographs are squashed. One whose
            longer side is more than 1.5 times the shorter keeps about its shape, with the shorter
            side as long as the model's, if the model takes such images.
        images: N×C×H×W, or a sequence of C×H×W of any sizes, with pixels in [0, 1], or of files.
        target: the class to place, one number for all images or one each; None: those that the
            model sees.
        method: ``"best"`` or ``"fast"``, ``box_vote`` and ``box_vote_fast`` where a masking network
            comes for the model, else Grad-CAM; none has seen a box in training. ``"fast"`` takes
            three forward passes and one backward pass. Or a name of ``captum-robust methods``, a
            Captum attribution, or a function ``(images N×C×H×W, target N) -> N×H×W or N×C×H×W``.
        threshold: of the box, a share of the map's range; None: that which ships for the method.
        confidence: the least probability of a class.
        rounds: None: four, but one with ``"fast"``.
        batch_size: images, and maps, at once.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Returns:
        For each image, the most certain first: ``boxes`` M×4 float32 (x0, y0, x1, y1) in pixels of
        the image given, ``labels`` M int64, ``scores`` M float32, the class's probability in the
        image, or in its rest (of a box that had to be confirmed: in its crop, if lower), and
        ``masks`` M×H×W Boolean. They are on the CPU.

    Raises:
        DataError: a file that cannot be read.
        ValueError: shapes, classes or numbers that do not fit; a model that gives no finite
            scores; a method that it cannot have.
        TypeError: other arguments than these.
    """
    expected = "a tensor N×C×H×W or a sequence"
    check_type("images", images, (Tensor, Sequence), expected)
    check(not isinstance(images, str), f"images: expected {expected}, got one str", TypeError)
    found = Locator(model, method, threshold=threshold, confidence=confidence, rounds=rounds)
    count = len(images)
    classes = _classes_of(target, count, model)
    check_count("batch_size", batch_size, 1)
    numbers = counted(range(count), "image", progress, "locate")
    read = (_image_of(images[number], number) for number in numbers)
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
        rounds: int | None = None,
    ) -> None:
        check_type("model", model, Classifier, "a captum_robust.models.Classifier")
        if threshold is not None:
            check_number("threshold", threshold, 0, 1)
        self.model = model
        self.confidence = check_number("confidence", confidence, 0, 1)
        usual = 1 if isinstance(method, str) and method == "fast" else ROUNDS
        self.rounds = usual if rounds is None else check_count("rounds", rounds, 1)
        self.method = method_for(model, method)
        own = self.method.threshold
        self.threshold = own if threshold is None else Threshold("value", threshold)
        self._takes: dict[tuple[int, int], bool] = {}

    def __call__(self, images: Sequence[Tensor], target: Tensor | None = None) -> list[Located]:
        """What is in a batch of images C×H×W, of the classes N or of those that are seen."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(self._size_for(image), []).append(number)
        found: dict[int, Located] = {}
        with evaluation(self.model):
            for size, numbers in groups.items():
                asked = None if target is None else target[numbers]
                some = self._found([images[number] for number in numbers], size, asked)
                found |= dict(zip(numbers, some, strict=True))
        return [found[number] for number in range(len(images))]

    def _size_for(self, image: Tensor) -> tuple[int, int]:
        """The size (H, W) at which the model sees an image.

        Its own; of a longer image the shorter side as long as that, if the model takes that.
        """
        own = self.model.input_size
        shape = image.shape[1] / image.shape[2]
        if max(shape, 1 / shape) <= _SQUASHED or own[0] != own[1]:
            return own
        longer = round(own[0] * min(max(shape, 1 / shape), _LONGEST) / _STEP) * _STEP
        size = (longer, own[1]) if shape > 1 else (own[0], longer)
        if size not in self._takes:
            self._takes[size] = takes_size(self.model, size)
        return size if self._takes[size] else own

    def _found(
        self, images: Sequence[Tensor], size: tuple[int, int], target: Tensor | None
    ) -> list[Located]:
        x = torch.stack([resize_image(image, size) for image in images])
        x = in_channels_of(self.model, x.to(device_of(self.model)))
        found: list[list[tuple[float, _Part]]] = [[] for _ in images]
        left = list(range(len(images)))
        for number in range(self.rounds):
            taken = [[part.box for _, part in found[i]] for i in left]
            rest = _without(x[left], taken) if number else x
            asked = None if target is None else target[left]
            parts = self._round(rest, x[left], asked, is_first=number == 0)
            left = sorted({left[row] for row in self._keep(parts, found, left)})
            if not left:
                break
        pairs = zip(found, images, strict=True)
        return [_located(some, image, size) for some, image in pairs]

    def _round(
        self, rest: Tensor, x: Tensor, target: Tensor | None, *, is_first: bool
    ) -> list[tuple[float, _Part]]:
        """The parts that are seen in the rest of images ``x``, with their scores."""
        features: list[Tensor] | None = None
        if self.method.vote is None:
            with torch.no_grad():
                scores = self.model(rest)
        else:  # the pass that its masks need anyway
            features, scores = self.method.vote.encode(rest)
        warn_of_probabilities(scores, "model")
        probabilities = probabilities_of(scores)
        finite = probabilities.isfinite().all(dim=1)
        check(finite.all(), f"model: no finite scores for image(s) {_numbers(~finite)}")
        rows, classes = self._asked(probabilities, target, is_first)
        if not len(rows):
            return []
        step = max(1, len(x))
        explained = [
            self._explained(rest, rows[first:stop], classes[first:stop], features)
            for first in range(0, len(rows), step)
            for stop in [first + step]
        ]
        maps = torch.cat([one.maps.detach().float().cpu() for one in explained])
        boxes = [self.method.boxes(one) for one in explained]
        own = [box for some in boxes if some is not None for box in some.tolist()]
        parts = list(self._parts(maps, own, rows, classes, probabilities))
        sure = [is_first and part.is_largest for part in parts]
        return list(zip(self._confirmed(x, parts, sure), parts, strict=True))

    def _asked(
        self, probabilities: Tensor, target: Tensor | None, is_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Which image each map is of, and which class: P and P."""
        if target is not None:
            check_numbers_below("classes", target, probabilities.shape[1])
            target = target.to(probabilities.device)
            own = probabilities.gather(1, target[:, None])[:, 0] >= self.confidence
            rows = (own | is_first).nonzero()[:, 0]
            return rows, target[rows]
        best = probabilities.topk(min(_MOST_CLASSES, probabilities.shape[1]))
        sure = best.values >= self.confidence
        sure[:, 0] |= is_first
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

    def _confirmed(self, x: Tensor, parts: list[_Part], sure: list[bool]) -> list[float]:
        """The score of each part: of those that are not ``sure`` at most that of their crop."""
        scores = [part.share for part in parts]
        others = [number for number, is_sure in enumerate(sure) if not is_sure]
        if others:
            boxes = torch.tensor([_widened(parts[n].box, x.shape[3], x.shape[2]) for n in others])
            rows = torch.tensor([parts[n].row for n in others], device=x.device)
            labels = torch.tensor([parts[n].label for n in others], device=x.device)
            _, shares = crop_scores(self.model, x[rows], boxes[:, None].to(x.device), labels)
            for number, share in zip(others, shares[:, 0].exp().tolist(), strict=True):
                least = max(self.confidence, scores[number] / 2)
                scores[number] = min(scores[number], share) if share >= least else -1.0
        return scores

    def _keep(
        self,
        parts: list[tuple[float, _Part]],
        found: list[list[tuple[float, _Part]]],
        left: list[int],
    ) -> list[int]:
        """Add the parts that are another object to what was found; the rows of those."""
        rows = []
        for score, part in sorted(parts, key=lambda one: -one[0]):
            kept = found[left[part.row]]
            if score >= 0 and all(_shared(part.box, other.box) <= _SAME for _, other in kept):
                kept.append((score, part))
                rows.append(part.row)
        return rows


@dataclass(frozen=True, eq=False)
class _Part:
    """A connected part of the map of a class in an image."""

    row: int
    label: int
    share: float
    """The class's probability in the image, or in what is left of it."""
    box: list[float]
    """In pixels of the map."""
    mask: np.ndarray[Any, Any]
    is_largest: bool
    """Of its map."""


def method_for(model: Classifier, method: Any) -> Method:
    """The method of :func:`locate`: ``"best"``, ``"fast"``, or what ``build_methods`` takes."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        method = known_name("method", method, [*USUAL, *METHODS])
    if isinstance(method, str) and method in USUAL:
        is_known = model.name in pretrained()
        if not is_known:
            warnings.warn(
                f"no masking network comes for {printable(model.name)}: {method} is grad_cam; "
                "captum-robust train masking trains one",
                stacklevel=3,
            )
        method = USUAL[method] if is_known else "grad_cam"
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
    return unit_pixels(pixels, name)


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


def _without(x: Tensor, taken: list[list[list[float]]]) -> Tensor:
    """Images N×C×H×W with their mean colour in the boxes."""
    rest = x.clone()
    for image, boxes in zip(rest, taken, strict=True):
        colour = image.mean(dim=(1, 2))[:, None, None]
        for x0, y0, x1, y1 in boxes:
            image[:, int(y0) : round(y1), int(x0) : round(x1)] = colour
    return rest


def _located(kept: list[tuple[float, _Part]], image: Tensor, size: Sequence[int]) -> Located:
    kept = sorted(kept, key=lambda one: -one[0])
    height, width = image.shape[1:]
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    boxes = torch.tensor([part.box for _, part in kept], dtype=torch.float32) * scale
    maps = torch.stack([torch.from_numpy(part.mask) for _, part in kept])
    masks = F.interpolate(maps[None].float(), (height, width), mode="nearest")[0].bool()
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        if not mask.any():  # a part that lies between the pixels of an image smaller than the map
            mask |= torch.from_numpy(_inside(box, (height, width)))
    return {
        "boxes": boxes,
        "labels": torch.tensor([part.label for _, part in kept]),
        "scores": torch.tensor([score for score, _ in kept], dtype=torch.float32),
        "masks": masks,
    }
