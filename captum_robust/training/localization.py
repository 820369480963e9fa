"""Training the adversarial localization network of Fan, Zhao and Ermon: two networks at odds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from captum_robust._checks import (
    as_number,
    check,
    check_choice,
    check_count,
    check_number,
    check_type,
)
from captum_robust._contexts import frozen, resting, seeded
from captum_robust._draws import drawn
from captum_robust._processes import is_first
from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, removal_loss
from captum_robust.nn.removal_loss import FORMS
from captum_robust.training.acceleration import training_device
from captum_robust.training.localization_evaluation import LocalizationEvaluation
from captum_robust.training.loop import TrainingResult, fit
from captum_robust.training.parts import Part, part_of
from captum_robust.training.preparation import CheckedLabels, adamw, class_scores, count_classes
from captum_robust.training.schedule import Batch, Schedule
from captum_robust.training.settings import TrainingSettings

_LOOK_EVERY = 10
"""Steps between two looks at the area of the masks, which make the device finish its work."""


@dataclass(frozen=True)
class AreaPenalty:
    """What the masks cost: λ·mean(a^power) of the share a of each image that is removed.

    λ rises linearly and then stays. With a power above 1 it costs less to remove some of each of
    two images than all of the one and nothing of the other.

    What a weight makes of the masks depends on the classifier and the number of classes. With a
    ``target`` that is what is given: λ is multiplied by a factor that grows while more than that is
    removed, and shrinks while less is.

    Args:
        weight: after the rise.
        start: at the first step; None: the same.
        rise: share of the steps that the rise takes.
        target: mean of the mask that is aimed at; None: the weight follows from the step alone.
        gain: the logarithm of the factor changes by so much a step, times the mean of the mask less
            the target.
        power: 1 is the paper's.

    Raises:
        ValueError: a number out of range.

    >>> penalty = AreaPenalty(weight=5.0, start=1.0, rise=0.5, target=None)
    >>> [penalty.at(step, steps=100) for step in (0, 25, 50, 99)]
    [1.0, 3.0, 5.0, 5.0]
    """

    weight: float = 3.0
    start: float | None = None
    rise: float = 0.3
    target: float | None = 0.5
    gain: float = 0.05
    power: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("weight", 0), ("gain", 0), ("power", 1)):
            check_number(name, getattr(self, name), least)
        check_number("start", self.weight if self.start is None else self.start, 0)
        check_number("rise", self.rise, 0, 1)
        if self.target is not None:
            check_number("target", self.target, 0, 1, open_low=True, open_high=True)

    def at(self, step: int, steps: int) -> float:
        """Return λ in a step, counted from 0, of so many."""
        rising = self.rise * steps
        if self.start is None or step >= rising:
            return self.weight
        return self.start + (self.weight - self.start) * step / rising


@dataclass(frozen=True)
class CollapseWatch:
    """When the masks count as collapsed, all on or all off, and what is done then.

    The last layer of the corruption network starts anew from noise, and the weight of the area is
    multiplied by ``factor`` where all was removed, divided by it where nothing was.

    Args:
        low, high: mean of the probabilities of removal below or above which masks are all off, or
            all on.
        steps: so many in a row.
        factor: above 1.

    Raises:
        ValueError: a number out of range.
    """

    low: float = 0.02
    high: float = 0.98
    steps: int = 100
    factor: float = 2.0

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        in_order = 0 <= as_number(low) < as_number(high) <= 1
        check(in_order, f"low and high: expected 0 <= low < high <= 1, got {low!r} and {high!r}")
        check_count("steps", self.steps, 1)
        check_number("factor", self.factor, 1, open_low=True)


@dataclass(frozen=True)
class _Rules:
    """What both networks play by; see :func:`localization_training`."""

    area: AreaPenalty
    watch: CollapseWatch
    steps_of_classifier: int = 1
    form: str = "bounded"
    literal: bool = False
    clean_share: float = 0.9

    def __post_init__(self) -> None:
        check_count("steps_of_classifier", self.steps_of_classifier, 1)
        check_choice("form", self.form, FORMS)
        check_number("clean_share", self.clean_share, 0, 1)


class _Opponents(nn.Module):
    """Both networks, the loss of each, and how far their training is.

    One module, so that a wrapper for several processes sees one forward pass. What it counts is
    part of its state dict, and so of a checkpoint.
    """

    def __init__(
        self,
        network: LocalizationNetwork,
        layers: Sequence[nn.Module],
        rules: _Rules,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.network, self.rules, self.steps, self.seed = network, rules, steps, seed
        self.layers = tuple(layers)  # a tuple: they are not registered twice
        self.step = 0
        self.area_factor = 1.0
        self.steps_in_collapse = 0
        self.restarts = 0
        self.area_sum: Tensor | None = None
        """The sum of the mean masks since the last look at them, on their device."""

    def get_extra_state(self) -> Tensor:
        """Return what was counted, for the state dict."""
        total = math.nan if self.area_sum is None else float(self.area_sum)
        counted = (self.step, self.area_factor, self.steps_in_collapse, self.restarts, total)
        return torch.tensor(counted, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what was counted up again."""
        step, factor, in_collapse, restarts, total = state.tolist()
        self.step, self.area_factor = int(step), factor
        self.steps_in_collapse, self.restarts = int(in_collapse), int(restarts)
        self.area_sum = None if math.isnan(total) else torch.tensor(total, dtype=torch.float32)

    def train(self, mode: bool = True) -> _Opponents:
        """As :meth:`torch.nn.Module.train`; layers that are not trained go to evaluation mode."""
        super().train(mode)
        trained = {m for layer in self.layers for m in layer.modules()}
        for module in self.network.classifier.modules():
            if module not in trained:
                module.training = False
        return self

    def forward(
        self, images: Tensor, labels: Tensor, segments: Tensor | None, seed: int
    ) -> dict[str, Tensor]:
        """``"loss"``, the sum of what both networks are trained for, and numbers for the log.

        No weight gets a gradient from the other network's part: for the corruption network the
        classifier stands still, and the classifier sees masks without a graph.
        """
        n = len(images)
        part, rules = part_of(seed, n), self.rules
        if self.training and part.is_first:
            self._look()
        generators = part.of_images(n)
        corrupts = not self.layers or self.step % rules.steps_of_classifier == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and corrupts):
            mask, probabilities = self.network.sample(
                images, segments, generators, literal=rules.literal
            )
        weight = self.area_factor * rules.area.at(self.step, self.steps)
        areas = mask.flatten(1).mean(dim=1)
        removed = self.network.remove(images, mask)
        loss = images.new_zeros(())
        asked: list[Tensor] = []
        if self.layers:
            is_clean = drawn(torch.rand, (n, 1, 1, 1), generators).to(images) < rules.clean_share
            mixed = torch.where(is_clean, images, removed.detach())
            asked.append(class_scores(self.network.classifier, mixed))
            loss = F.cross_entropy(asked[0], labels)
        if corrupts:
            # Behind the other pass, which moves the averages of batch norm: the backward pass of
            # this one reads them.
            with frozen(self.network.classifier):
                asked.append(class_scores(self.network.classifier, removed))
            cost = weight * areas.pow(rules.area.power).mean()
            loss = loss + removal_loss(asked[-1], labels, rules.form).mean() + cost
        area = areas.detach().mean()
        named = {
            "removal": removal_loss(asked[-1].detach(), labels, rules.form).mean(),
            "area": area,
            "cross_entropy": F.cross_entropy(asked[0].detach(), labels),
            "area_weight": area.new_tensor(weight),
            "restarts": area.new_tensor(self.restarts),
        }
        if self.training:
            self._count(probabilities, part)
        return {"loss": loss, **named}

    def _count(self, probabilities: Tensor, part: Part) -> None:
        mean = part.share * probabilities.detach().mean()
        self.area_sum = mean if self.area_sum is None else self.area_sum.to(mean) + mean
        self.step += part.is_last

    def _look(self) -> None:
        """Every so many steps, see whether the masks have collapsed; if for long, recover.

        Before the forward pass: a weight must not change between that and the backward pass.
        """
        if self.area_sum is None or self.step % _LOOK_EVERY:
            return
        from accelerate.utils import reduce

        area, watch = self.rules.area, self.rules.watch
        mean = float(reduce(self.area_sum, "mean")) / _LOOK_EVERY
        self.area_sum = None
        if area.target is not None:
            self.area_factor *= math.exp(_LOOK_EVERY * area.gain * (mean - area.target))
        is_on, is_off = mean > watch.high, mean < watch.low
        self.steps_in_collapse = self.steps_in_collapse + _LOOK_EVERY if is_on or is_off else 0
        if self.steps_in_collapse < watch.steps:
            return
        self.area_factor *= watch.factor if is_on else 1 / watch.factor
        self.steps_in_collapse = 0
        self.restarts += 1
        _start_anew(self.network.corruption, self.seed + self.restarts)
        if is_first():
            warnings.warn(
                f"step {self.step}: the masks removed {'all' if is_on else 'nothing'} (mean "
                f"{mean:.3f}) for {watch.steps} steps; the corruption network's last layer "
                f"starts anew, with the weight of the area times {self.area_factor:g}",
                RuntimeWarning,
                stacklevel=2,
            )


def _start_anew(corruption: CorruptionNetwork, seed: int) -> None:
    """Noise for the last layer: probabilities close to a half, where gradients pass best."""
    last = corruption.logits
    drawn = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        last.weight.copy_(0.01 * drawn)
        if last.bias is not None:
            last.bias.zero_()


def localization_training(
    network: LocalizationNetwork,
    dataset: Dataset[Any],
    settings: TrainingSettings | None = None,
    *,
    steps_of_classifier: int = 1,
    area: AreaPenalty | None = None,
    watch: CollapseWatch | None = None,
    trainable_layers: int | None = None,
    form: str = "bounded",
    literal: bool = False,
    superpixels: bool = True,
    clean_share: float = 0.9,
    validation: LocalizationEvaluation | None = None,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a corruption network and a classifier against each other, in place.

    Fan, Zhao and Ermon, "Adversarial Localization Network". The corruption network learns to
    remove what the classifier knows a class by, and as little as it can; the classifier learns to
    know what is left. Everything of :func:`captum_robust.training.fit` holds: several processes, a
    killed run goes on. The optimiser is Adam with weight decay (AdamW). In a step both networks
    see the same images, each while the other stands still.

    Where the masks are all on or all off for many steps, a warning says so, and the corruption
    network starts anew with another weight of the area (:class:`CollapseWatch`).

    Args:
        network: both networks; the classifier may have been trained before, on clean images.
        dataset: items (image with pixels in [0, 1], segments H×W, class), or without segments.
        settings: 10 epochs of batches of 64 with a learning rate of .001 by default.
        steps_of_classifier: for each of the corruption network, which rests in the others.
        area: the weight of what is removed; :class:`AreaPenalty` by default.
        watch: :class:`CollapseWatch` by default.
        trainable_layers: so many of the classifier's ``layers``, counted from its scores, are
            trained, and all that is behind them; 0: it stays as it is; None: all of it, whatever
            its layers.
        form: which loss of the scores: ``"bounded"``, ``"squared"`` or ``"literal"``; see
            :func:`captum_robust.nn.removal_loss`.
        literal: draw the masks as the paper's formula has it; see
            :func:`captum_robust.nn.straight_through`.
        superpixels: remove whole segments; False: pixels.
        clean_share: share of the images that the classifier sees as they are. The fewer, the
            more it learns from backgrounds, which are then removed as well, and the less it knows
            of whole images.
        validation: what is measured before, during and after.
        out, configuration, progress: see :func:`captum_robust.training.fit`.

    Raises:
        TypeError: a network or a data set that is none, a classifier that gives no scores N×K.
        ValueError: a number out of range, an unknown form, layers that the classifier does not
            have, super-pixels without segments, a label that is none of the classes;
            see also :func:`captum_robust.training.fit`.
        ImportError: accelerate is missing; names the pip command.
    """
    settings = settings or TrainingSettings(epochs=10, learning_rate=1e-3, weight_decay=1e-4)
    check_type("network", network, LocalizationNetwork, "a LocalizationNetwork")
    area, watch = area or AreaPenalty(), watch or CollapseWatch()
    rules = _Rules(area, watch, steps_of_classifier, form, literal, clean_share)
    layers = _layers_of(network.classifier, trainable_layers)
    schedule = Schedule(dataset, settings)
    network.to(training_device(settings))
    _check_segments(dataset, superpixels, settings.seed)
    classes = count_classes("classifier", network.classifier, dataset, settings.seed)
    described = {
        **vars(rules),
        "area": repr(area),
        "watch": repr(watch),
        "trainable_layers": trainable_layers,
        "superpixels": superpixels,
        "validation": None if validation is None else len(validation.images),  # type: ignore[arg-type]
    }
    trained = {p for layer in layers for p in layer.parameters()}
    with resting(p for p in network.classifier.parameters() if p not in trained):
        asking = [p for p in network.parameters() if p.requires_grad]
        return fit(
            _Opponents(network, layers, rules, schedule.steps, settings.seed),
            CheckedLabels(dataset, classes, maps=superpixels),
            _loss,
            settings,
            # Where the features are 0 the mask follows from the last layer's bias alone, and Adam
            # moves a number by no more than its rate in a step.
            optimizer=adamw(asking, settings, fast=network.corruption.logits.parameters()),
            evaluate=validation,
            partial=steps_of_classifier > 1,
            out=out,
            configuration={**described, **(configuration or {})},
            progress=progress,
        )


def _loss(opponents: nn.Module, batch: Batch, seed: int) -> Mapping[str, Tensor]:
    images, *maps, labels = batch
    terms: Mapping[str, Tensor] = opponents(images, labels, maps[0] if maps else None, seed)
    return terms


def _layers_of(classifier: nn.Module, count: int | None) -> list[nn.Module]:
    """What of the classifier is trained: its last layers with all behind them."""
    if count is None:
        return [classifier]
    check_count("trainable_layers", count, 0)
    if count == 0:
        return []
    candidates: list[Any] = [getattr(m, "layers", None) for m in classifier.modules()]
    layers: list[nn.Module] = next((each for each in candidates if isinstance(each, list)), [])
    has = f"has {len(layers)} layers" if layers else "does not name its layers"
    trouble = f"trainable_layers: the classifier {has}, got {count}; None trains all of it"
    check(count <= len(layers), trouble)
    in_order = list(classifier.modules())
    last = max(in_order.index(m) for m in layers[-1].modules())
    return [*layers[len(layers) - count :], *in_order[last + 1 :]]


def _check_segments(dataset: Dataset[Any], superpixels: bool, seed: int) -> None:
    """Refuse what is no data set for the training, by its first item."""
    with seeded(seed, None):
        item = dataset[0]
    is_item = isinstance(item, (tuple, list)) and len(item) in (2, 3)
    expected = "expected items (image, class) or (image, segments, class)"
    check(is_item, f"dataset: {expected}, got {type(item).__name__}", TypeError)
    check(
        not superpixels or len(item) == 3,
        "superpixels: the data set has no segments; give some (captum_robust.data.superpixels), or "
        "superpixels=False",
    )
