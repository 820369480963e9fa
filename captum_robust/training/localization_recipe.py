"""Training of a localization network, from a folder of images to its file."""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from captum_robust._checks import check, check_choice, check_count
from captum_robust._processes import is_first, together
from captum_robust.data.superpixels import cached_superpixels, superpixel_path
from captum_robust.models import Classifier, load_classifier, takes_size
from captum_robust.models.imported import is_imported
from captum_robust.models.zoo import published_weights
from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, save_localization_network
from captum_robust.nn.removal_loss import FORMS
from captum_robust.training.clean import clean_training
from captum_robust.training.image_sets import SegmentedImages
from captum_robust.training.localization import AreaPenalty, localization_training
from captum_robust.training.localization_evaluation import LocalizationEvaluation
from captum_robust.training.loop import TrainingResult
from captum_robust.training.recipe import LabelledRecipe
from captum_robust.training.settings import LocalizationSettings

_CLASSIFIER = "classifier"
"""The trunk that is a copy of it."""


class LocalizationRecipe(LabelledRecipe):
    """Train a network that removes objects against a classifier that learns to miss nothing.

    First the classifier alone, on clean images, then both. Boxes are used to measure only; images
    without any are trained on all the same. Its ``file`` is one that
    :func:`~captum_robust.nn.load_localization_network` takes.

    Args:
        settings: see :class:`LocalizationSettings`.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.
    """

    settings: LocalizationSettings
    network: LocalizationNetwork
    file_name = "localization.safetensors"

    def __init__(self, settings: LocalizationSettings, *, progress: bool | None = None) -> None:
        s = settings
        check_choice("form", s.form, FORMS)
        target = s.area_target or None
        self.penalty = AreaPenalty(
            s.area, s.area_start, s.area_rise, target, s.area_gain, s.area_power
        )
        check_count("pretraining_epochs", s.pretraining_epochs, 0)
        check_count("evaluation_images", s.evaluation_images, 0)
        self.trains_trunk = _trains_trunk(s)
        super().__init__(s, progress=progress)
        self.testing = self.testing[: s.evaluation_images]
        self._examples: Dataset[Any] = self.images
        if s.superpixels:
            self._examples = SegmentedImages(self.images, self._superpixels())
        boxes = [self.images.boxes[i] for i in self.testing]
        measured = Subset(self._examples, self.testing)
        self.evaluation = LocalizationEvaluation(self.network, measured, boxes, s.superpixels)

    def pretrain(self) -> TrainingResult | None:
        """Train the classifier alone, on clean images; None where that was not asked for."""
        s = self.settings
        if not s.pretraining_epochs:
            return None
        images, held_out = self._parts(self.images)
        result = clean_training(
            self.classifier,
            images,
            s.training(
                epochs=s.pretraining_epochs, learning_rate=s.pretraining_rate, evaluate_every=None
            ),
            held_out=held_out,
            out=s.out / "classifier",
            configuration=self._configuration("start_crc32"),
            progress=self.progress,
        )
        if s.trunk == _CLASSIFIER:
            self.network.corruption.trunk.load_state_dict(self.classifier.state_dict())
        return result

    def _fit(self) -> TrainingResult:
        s = self.settings
        return localization_training(
            self.network,
            self._parts(self._examples)[0],
            self.loop,
            area=self.penalty,
            **s.named("steps_of_classifier", "trainable_layers", "form", "literal", "superpixels"),
            **s.named("clean_share", "out"),
            validation=self.evaluation if self.testing else None,
            configuration={
                **self._configuration("start_crc32"),
                **s.named("width", "segments"),
                "trunk": [s.trunk, s.trunk_weights, self.trains_trunk, s.trunk_size],
                "pretraining": [s.pretraining_epochs, s.pretraining_rate],
            },
            progress=self.progress,
        )

    def _save(self, result: TrainingResult) -> None:
        s = self.settings
        trunk = None if s.trunk is None else [s.trunk, s.trunk_weights, self.trains_trunk]
        last = result.evaluations[-1] if result.evaluations else {}
        card = self._card("localization", classifier=s.model, trunk=trunk, held_out=last)
        save_localization_network(self.network, self.file, half=s.half, card=card)

    def _network(self) -> LocalizationNetwork:
        s, classifier = self.settings, self.classifier
        trunk = _trunk(s, classifier)
        if trunk is not None:
            trunk.requires_grad_(self.trains_trunk)
        corruption = CorruptionNetwork(
            trunk, width=s.width, input_size=classifier.input_size, trunk_size=s.trunk_size
        )
        segments = s.segments if s.superpixels else None
        return LocalizationNetwork(corruption, classifier, n_segments=segments)

    def _superpixels(self) -> Tensor:
        """N×H×W, by the first process; the others read its file."""
        s, file = self.settings, self.settings.superpixel_file
        if file is None:
            height, width = self.images[0][0].shape[1:]
            part = "-".join(["train", s.fit, *([f"{s.classes}classes"] if s.classes else [])])
            file = superpixel_path(s.images, s.segments, (height, width), part)
            if not file.exists() and not os.access(file.parent, os.W_OK):
                file = s.out / file.name
        with together() as wait:
            if not is_first():
                wait()
            superpixels = cached_superpixels(
                self.images, file, s.segments, progress=self.shows_bars
            )
            if is_first():
                wait()
        return superpixels


def _trains_trunk(s: LocalizationSettings) -> bool:
    """Return whether the trunk is trained, from settings that go together."""
    has_weights = published_weights(s.trunk_weights) is not None
    is_copy = s.trunk == _CLASSIFIER
    is_random = not has_weights
    if is_copy:
        is_random = published_weights(s.weights) is None and not s.pretraining_epochs
    none_is_asked_for = s.trunk is None and (has_weights or s.train_trunk is not None)
    trunk = "--trunk-weights, --train-trunk and --freeze-trunk: give --trunk too"
    check(not none_is_asked_for, trunk)
    copy_has_weights = "--trunk-weights: the trunk is a copy of the classifier; give --weights"
    check(not (is_copy and has_weights), copy_has_weights)
    frozen = "--freeze-trunk: the trunk's weights are random; give --trunk-weights"
    check(not (is_random and s.train_trunk is False), frozen)
    return is_random if s.train_trunk is None else s.train_trunk


def _trunk(s: LocalizationSettings, classifier: Classifier) -> Classifier | None:
    """A copy of the classifier, or a network for images of the trunk's side; None: no trunk."""
    if s.trunk is None:
        return None
    if s.trunk == _CLASSIFIER:
        trunk = copy.deepcopy(classifier)
    else:
        weights = published_weights(s.trunk_weights)
        # No feature depends on the classes of random weights: they are as few as there are.
        is_free = weights is None and not is_imported(s.trunk)
        names = classifier.class_names if is_free else None
        trunk = load_classifier(s.trunk, weights, class_names=names)
    height, width = classifier.input_size if s.trunk_size is None else (s.trunk_size,) * 2
    check(
        takes_size(trunk, (height, width)),
        f"--trunk {s.trunk} does not take images of {height}×{width} pixels; give another "
        f"--trunk-size, such as {trunk.input_size[0]}",
    )
    return trunk
