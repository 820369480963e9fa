"""What a classifier and several methods say of a photograph, before an attack and after it."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor

from captum_robust import draw
from captum_robust._checks import check, check_choice, check_type, printable
from captum_robust._contexts import evaluation
from captum_robust._processes import device_of
from captum_robust._progress import without_bars
from captum_robust._resize import resize_image, size_within
from captum_robust._scores import probabilities_of
from captum_robust.attacks import PGD, Attack, DeepFool
from captum_robust.attr import Defended, RealTimeMasking
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog.attacks import LEVELS, check_levels
from captum_robust.catalog.methods import METHODS, Method, build_methods, named_methods
from captum_robust.catalog.thresholds import shipped_threshold
from captum_robust.catalog.words import words_of
from captum_robust.data import DataError, load_image
from captum_robust.defenses import DefendedModel, default_transforms
from captum_robust.metrics.functional import box_iou
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of
from captum_robust.show import explain
from captum_robust.show.explain import class_name
from captum_robust.show.video import MethodMasks, Painter
from captum_robust.show.video_files import ReadFrame

ATTACKS = ("none", "pgd", "deepfool", "explanation")
STEPS = 10
"""Of the attacks that take several."""
SHOWN = ("grad_cam", "robust_cam", "guided_grad_cam", "perceptual_ball_cam", "real_time_masking")
"""The methods where none are named; a model without a masking network has all but the last."""
_TOP = 5
_SIDE = 280
"""Pixels of the longer side of a picture."""
_KEPT = 256
"""Results that are not computed again; then the one that was asked for longest ago is dropped."""
_WAS_COLOR = (255, 255, 255)
_SMOOTH = 0.6
_PLACES = {
    "resize": "torchvision.transforms.functional",
    "AdversarialLocalization": "captum_robust",
    "RealTimeMasking": "captum_robust",
    "DeepFool": "captum_robust.attacks",
    "PGD": "captum_robust.attacks",
    "build_methods": "captum_robust.catalog.methods",
    "load_dataset": "captum_robust.data",
    "load_image": "captum_robust.data",
    "DefendedModel": "captum_robust.defenses",
    "default_transforms": "captum_robust.defenses",
    "load_classifier": "captum_robust.models",
    "in_channels_of": "captum_robust.models.classifier",
    "load_masking_network": "captum_robust.nn",
    "map_and_box": "captum_robust.show.explain",
    "scaled_box": "captum_robust.show.explain",
    "defended": "captum_robust.show.exploration",
    "manual_seed": "torch",
}
"""Where the names are imported from that lines of Python may use."""

T = TypeVar("T")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of a photograph."""

    target: int | None = None
    """The class to explain; None: the one that is seen."""
    attack: str = "none"
    """Of :data:`ATTACKS`. ``"explanation"`` keeps the class and moves the map of one method."""
    levels: float = 2.0
    """How strong the attack may be, in levels of an 8-bit image; DeepFool takes what it needs."""
    defended: bool = False
    """Whether scores and maps are averages over ``default_transforms``."""


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph, as it is and as the classifier takes it."""

    image: Tensor
    """3×H×W in [0, 1]."""
    x: Tensor
    """1×C×h×w in [0, 1], where the classifier runs."""
    name: str
    line: str
    """Of Python, which loads the image."""
    key: str
    """The checksum of the pixels."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is said of one image."""

    x: Tensor
    """1×C×h×w."""
    classes: list[tuple[int, str, float]]
    """The first classes: number, name, probability."""
    explained: tuple[int, str]
    """Number and name of the class that the maps are of."""
    maps: dict[str, Tensor]
    """h×w, for each method."""
    boxes: dict[str, list[float]]
    """(x0, y0, x1, y1) in pixels of the photograph, for each method."""


@dataclass(frozen=True, eq=False)
class Exploration:
    """The answer to a question."""

    photograph: Photograph
    question: Question
    clean: Seen
    attacked: Seen | None = None
    """None: there was no attack."""

    @property
    def strength(self) -> float:
        """The largest change of a pixel, in levels of an 8-bit image."""
        changed = self.clean if self.attacked is None else self.attacked
        return float((changed.x - self.clean.x).abs().max()) * LEVELS

    def overlaps(self) -> dict[str, float]:
        """Intersection over union of each method's boxes before and after the attack."""
        after = {} if self.attacked is None else self.attacked.boxes
        before = self.clean.boxes
        return {n: float(box_iou(*torch.tensor([[before[n]], [after[n]]]))) for n in after}

    def sentence(self) -> str:
        """What there is to see."""
        number, name, share = self.clean.classes[0]
        who = "The network"
        if self.question.defended:
            who = "On average over five blurred, noisy or compressed copies the network"
        if self.attacked is None:
            return (
                f"{who} sees {name} ({share:.0%}). Bright is where a method says that it looks; "
                "the box holds the largest bright part."
            )
        new, other, after = self.attacked.classes[0]  # two classes may have one name
        outcome = f"still sees {name}" if new == number else f"sees {other} instead of {name}"
        overlaps = self.overlaps()
        order = sorted(overlaps, key=lambda n: overlaps[n])
        ends = dict.fromkeys((order[0], order[-1]))
        spread = " to ".join(f"{overlaps[n]:.0%} ({words_of(n)})" for n in ends)
        return (
            f"No pixel changes by more than {self.strength:.0f} of 255 levels. {who} {outcome} "
            f"({share:.0%} before, {after:.0%} now). The boxes before and now overlap by {spread}."
        )

    def panels(self) -> list[tuple[str, list[tuple[draw.RGB, str]]]]:
        """Title, and pictures with captions: of the photograph, then of each method."""
        size = size_within(self.photograph.image.shape[1:], _SIDE)
        seen = [(self.clean, "as it is")]
        if self.attacked is not None:
            seen.append((self.attacked, "attacked"))
        grounds = [resize_image(one.x[0].cpu(), size) for one, _ in seen]
        first = [(draw.as_rgb(g), when) for g, (_, when) in zip(grounds, seen, strict=True)]
        if self.attacked is not None:
            change = self.attacked.x[0] - self.clean.x[0]
            picture, factor = explain.picture_of_change(grounds[0], change)
            first.append((picture, f"the change, {draw.factor_text(factor)}"))
        panels, overlaps = [("The photograph", first)], self.overlaps()
        for name in self.clean.maps:
            pictures = []
            for ground, (one, when) in zip(grounds, seen, strict=True):
                picture = draw.overlay(ground, one.maps[name])
                caption = f"{when}, of {one.explained[1]}"
                if one is self.attacked:
                    picture = self._boxed(picture, self.clean.boxes[name], _WAS_COLOR)
                    caption += f"; the boxes overlap by {overlaps[name]:.0%}"
                picture = self._boxed(picture, one.boxes[name], draw.PREDICTED_COLOR)
                pictures.append((picture, caption))
            panels.append((words_of(name), pictures))
        return panels

    def _boxed(self, picture: draw.RGB, box: list[float], color: tuple[int, int, int]) -> draw.RGB:
        scale = picture.shape[0] / self.photograph.image.shape[1]
        return draw.draw_boxes(picture, [[side * scale for side in box]], color)

    def png(self) -> bytes:
        """All pictures in one."""
        groups = [[(p, f"{title}\n{c}") for p, c in some] for title, some in self.panels()]
        columns = min(3, len(groups)) if self.attacked is None else 4
        pictures, captions = zip(*explain.in_rows(groups, columns), strict=True)
        return draw.encode_png(draw.panel(pictures, captions, columns))

    def facts(self) -> dict[str, Any]:
        """What JSON holds: the question, and classes and boxes before and after."""
        facts = {"photograph": self.photograph.name, **vars(self.question)}
        facts |= {"strength": self.strength, "overlaps": self.overlaps()}
        for when, one in (("clean", self.clean), ("attacked", self.attacked)):
            if one is not None:
                rows = [{"class": c, "name": n, "probability": p} for c, n, p in one.classes]
                facts[when] = {"explained": one.explained[0], "classes": rows, "boxes": one.boxes}
        return facts


class _Maps(Attribution):  # type: ignore[misc]  # Captum's classes are untyped to mypy
    """The maps of a method, as an attribution that can be averaged over transforms."""

    def __init__(self, model: Classifier, method: Method) -> None:
        super().__init__(model)
        self.method = method

    def attribute(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
        """N×1×H×W."""
        return self.method.explain(inputs, target).maps[:, None]


def defended(model: Classifier, methods: Any) -> dict[str, Method]:
    """Each method averaged over ``default_transforms``, at the threshold that ships for it.

    Those with a defended form in the catalogue have that; baselines stay as they are.

    Args:
        model: the classifier.
        methods: as for ``build_methods``.
    """
    named, made = named_methods(methods), {}
    for name, method in build_methods(model, named).items():
        own = f"defended_{named[name]}"
        if own in METHODS:
            made[name] = build_methods(model, own)[own]
        elif method.transforms or method.box is not None:
            made[name] = method
        else:
            averaged = Defended(_Maps(model, method), default_transforms())
            built = build_methods(model, {name: averaged})[name]
            made[name] = replace(built, threshold=method.threshold)
    return made


class Explorer:
    """Answers questions on photographs, and computes nothing twice.

    Args:
        model: the classifier, which is left where it is.
        methods: as for ``build_methods``; None: :data:`SHOWN`.
        source: lines of Python that make ``model``, and ``methods`` where those are no names, for
            :meth:`python`.
    """

    def __init__(
        self,
        model: Classifier,
        methods: str | Iterable[str] | Mapping[str, Any] | None = None,
        source: Sequence[str] = ("# model and methods are those of the explorer",),
    ) -> None:
        check_type("model", model, Classifier, "a captum_robust.models.Classifier")
        if methods is None:
            methods = SHOWN if model.name in pretrained() else SHOWN[:-1]
        self.model, self.source = model, list(source)
        self.named = named_methods(methods)
        self.methods = build_methods(model, self.named)
        self.moved = next((n for n, m in self.methods.items() if m.attack_map is not None), "")
        """The method whose map an explanation attack moves; "": none has a gradient at hand."""
        self._kept: OrderedDict[Key, Any] = OrderedDict()
        self._lock = threading.RLock()

    def photograph(self, source: bytes | Tensor, name: str, line: str = "") -> Photograph:
        """The photograph of a file's bytes, or of an image 3×H×W that ``line`` of Python loads.

        Raises:
            DataError: it cannot be decoded, or has too many pixels.
        """
        name = printable(PurePath(name).name)
        image = load_image(source, name=name) if isinstance(source, bytes) else source
        x = resize_image(image, self.model.input_size)[None].to(device_of(self.model))
        key = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        line = line or f"load_image({name!r})"
        return Photograph(image, in_channels_of(self.model, x), name, line, key)

    def explore(self, photograph: Photograph, question: Question) -> Exploration:
        """The answer to a question.

        The attack moves away from the class that the model sees, or, where it moves a map, keeps
        that; it does not know of the defence.

        Raises:
            ValueError: an unknown attack, one on a map that has no gradient, a strength outside of
                0 to 255, or a class that the model does not have.
            DataError: the model gives no finite scores.
        """
        check_choice("attack", question.attack, ATTACKS)
        check_levels(question.levels)
        key: Key = (photograph.key,)
        with self._lock, evaluation(self.model), without_bars():  # the page has one of its own
            clean = self._seen(key, photograph, photograph.x, question)
            if question.attack == "none":
                return Exploration(photograph, question, clean)
            predicted = self._scores(key, photograph.x, False).argmax(dim=1)
            attack = self._attack(question)
            key += (question.attack, attack.epsilon)
            x = self._once(("x", *key), lambda: attack.perturb(photograph.x, predicted))
            attacked = self._seen(key, photograph, x, question)
        return Exploration(photograph, question, clean, attacked)

    def _attack(self, question: Question) -> Attack:
        if question.attack == "pgd":
            return PGD(self.model, question.levels / LEVELS, STEPS, early_stop=False)
        if question.attack == "deepfool":
            return DeepFool(self.model, quantize=True)
        make = self.methods[self.moved].attack_map if self.moved else None
        if make is None:
            raise ValueError("attack: none of the methods has a map that can be attacked")
        return make(question.levels / LEVELS, STEPS)

    def _once(self, key: Key, make: Callable[[], T]) -> T:
        """What was made under this key, now or before."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        result: T = self._kept[key]
        return result

    def _scores(self, key: Key, x: Tensor, averaged: bool) -> Tensor:
        def make() -> Tensor:
            model = DefendedModel(self.model, default_transforms()) if averaged else self.model
            with torch.no_grad():
                scores: Tensor = model(x)
            check(scores.isfinite().all(), "model: it gives no finite scores", DataError)
            return scores

        return self._once(("scores", averaged, *key), make)

    @cached_property
    def _defended(self) -> dict[str, Method]:
        return defended(self.model, self.named)

    def _seen(self, key: Key, photograph: Photograph, x: Tensor, question: Question) -> Seen:
        (shares,) = probabilities_of(self._scores(key, x, question.defended))
        best = shares.topk(min(_TOP, len(shares)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        classes = [(i, class_name(self.model, i), share) for i, share in rows]
        number = classes[0][0] if question.target is None else question.target
        check(0 <= number < len(shares), f"target: the model has no class {number}")
        maps, boxes = {}, {}
        for name, method in (self._defended if question.defended else self.methods).items():
            make = partial(explain.map_and_box, method, x, number)
            _, heat, box = self._once(("map", name, question.defended, number, *key), make)
            maps[name] = heat[0]
            boxes[name] = explain.scaled_box(box, heat, photograph.image)[0].tolist()
        return Seen(x, classes, (number, class_name(self.model, number)), maps, boxes)

    def python(self, photograph: Photograph, question: Question) -> str:
        """Lines of Python that make the ``boxes`` shown last, in a folder with the photograph."""
        strength = f"{question.levels:g} / {LEVELS}"
        attacks = {
            "pgd": f"PGD(model, {strength}, {STEPS}, early_stop=False)",
            "deepfool": "DeepFool(model, quantize=True)",
            "explanation": f"plain[{self.moved!r}].attack_map({strength}, {STEPS})",
        }
        attack = attacks.get(question.attack)
        scores = "DefendedModel(model, default_transforms())" if question.defended else "model"
        target = f"int({scores}(x).argmax())" if question.target is None else question.target
        names = None if any(n != v for n, v in self.named.items()) else list(self.named)
        own = "defended(model, methods)" if question.defended else "plain"
        lines = [
            *self.source,
            *(() if names is None else (f"methods = {names}",)),
            "plain = build_methods(model.eval(), methods)",
            f"image = {photograph.line}",
            "x = resize(image, model.input_size)[None].clamp(0, 1)",
            f"x = in_channels_of(model, x).to({str(device_of(self.model))!r})",
            *(() if attack is None else (f"x = {attack}.perturb(x, model(x).argmax(dim=1))",)),
            f"target = {target}",
            "boxes = {}  # (x0, y0, x1, y1) in pixels of the photograph",
            f"for name, method in {own}.items():",
            "    _, heat, box = map_and_box(method, x, target)",
            "    boxes[name] = scaled_box(box, heat, image)[0].tolist()",
            "print(boxes)",
        ]
        body = "\n".join(lines)
        used = [f"from {m} import {n}" for n, m in _PLACES.items() if re.search(rf"\b{n}\b", body)]
        return "\n".join([*used, "", body, ""])

    @cached_property
    def _painter(self) -> Painter:
        own = next((v for v in self.named.values() if isinstance(v, RealTimeMasking)), None)
        if own is None and self.model.name in pretrained():
            own = RealTimeMasking.from_pretrained(self.model.name, model=self.model)
        if own is None:
            masks = MethodMasks(self.model, next(iter(self.named.values())))
            return Painter(masks, self.model.class_names, None, masks.threshold, _SMOOTH, "float32")
        network, threshold = own.network, shipped_threshold("real_time_masking")
        return Painter(network, self.model.class_names, None, threshold, _SMOOTH, "float32")

    def frame(self, picture: draw.RGB) -> draw.RGB:
        """A frame of a camera with the mask, the box and the name of the class over it."""
        image = resize_image(torch.tensor(picture).permute(2, 0, 1) / 255, self.model.input_size)
        seen = draw.as_rgb(image)
        frame = ReadFrame(np.ascontiguousarray(picture[:, :, ::-1]), seen, 0.0)
        with self._lock, evaluation(self.model):
            (painted,) = self._painter.painted([frame])
        return np.ascontiguousarray(painted[:, :, ::-1])
