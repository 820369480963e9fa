"""Training of a localization network, from a folder of images to its file."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from captum_robust._checks import check, check_choice, check_count
from captum_robust._contexts import seeded
from captum_robust._processes import is_first
from captum_robust.data.superpixels import cached_superpixels, superpixel_path
from captum_robust.models import Classifier, load_classifier, takes_size
from captum_robust.models.zoo import published_weights
from captum_robust.nn import CorruptionNetwork, LocalizationNetwork, save_localization_network
from captum_robust.nn.removal_loss import FORMS
from captum_robust.training.clean import clean_training
from captum_robust.training.image_sets import (
    Augmented,
    LabelledImages,
    SegmentedImages,
    held_out_split,
)
from captum_robust.training.localization import AreaPenalty, localization_training
from captum_robust.training.localization_evaluation import LocalizationEvaluation
from captum_robust.training.loop import TrainingResult
from captum_robust.training.recipe import (
    Recipe,
    card,
    class_names_of,
    labelled_split,
    open_images,
    weights_crc32,
)
from captum_robust.training.settings import LocalizationSettings

_CLASSIFIER = "classifier"
"""The trunk that is a copy of it."""


class LocalizationRecipe(Recipe):
    """Train a network that removes objects against a classifier that learns to miss nothing.

    First the classifier alone, on clean images, then both. Boxes are used to measure only; images
    without any are trained on all the same.

    Args:
        settings: see :class:`LocalizationSettings`.
        progress: show bars on standard error.
    """

    images: LabelledImages

    def __init__(self, settings: LocalizationSettings, *, progress: bool = False) -> None:
        self.settings = s = settings
        check_choice("form", s.form, FORMS)
        target = s.area_target or None
        self.penalty = AreaPenalty(
            s.area, s.area_start, s.area_rise, target, s.area_gain, s.area_power
        )
        check_count("pretraining_epochs", s.pretraining_epochs, 0)
        check_count("evaluation_images", s.evaluation_images, 0)
        self.trains_trunk = _trains_trunk(s)
        super().__init__(s, progress=progress)
        dataset = open_images(s.kind, s.images, s.out)
        self.class_names = class_names_of(dataset, s)
        held_out_split([], s.held_out, s.seed)
        with seeded(s.seed, None):
            self.network = self._network()
        self._start = weights_crc32(self.network)
        size = self.classifier.input_size
        classes, show = range(len(self.class_names)), progress and is_first()
        self.images = LabelledImages(dataset, size, fit=s.fit, classes=classes, progress=show)
        self.training, self.testing = labelled_split(self.images, s.held_out, s.seed)
        self.testing = self.testing[: s.evaluation_images]
        self._examples: Dataset[Any] = self.images
        if s.superpixels:
            self._examples = SegmentedImages(self.images, self._superpixels())
        boxes = [self.images.boxes[i] for i in self.testing]
        measured = Subset(self._examples, self.testing)
        self.evaluation = LocalizationEvaluation(self.network, measured, boxes, s.superpixels)

    @property
    def classifier(self) -> Classifier:
        """The classifier that is trained along."""
        classifier = self.network.classifier
        assert isinstance(classifier, Classifier)
        return classifier

    @property
    def file(self) -> Path:
        """The file of the network, which :func:`load_localization_network` takes."""
        return self.settings.out / "localization.safetensors"

    def pretrain(self) -> TrainingResult | None:
        """Train the classifier alone, on clean images; None where that was not asked for."""
        s = self.settings
        if not s.pretraining_epochs:
            return None
        result = clean_training(
            self.classifier,
            self._augmented(Subset(self.images, self.training)),
            replace(
                self.loop,
                epochs=s.pretraining_epochs,
                learning_rate=s.pretraining_rate,
                evaluate_every=None,
            ),
            held_out=Subset(self.images, self.testing) if self.testing else None,
            out=s.out / "classifier",
            configuration=self._configuration(),
            progress=self.progress,
        )
        if s.trunk == _CLASSIFIER:
            self.network.corruption.trunk.load_state_dict(self.classifier.state_dict())
        return result

    def train(self) -> TrainingResult:
        """Train both networks after :meth:`pretrain`, or go on; the first process writes."""
        s = self.settings
        result = localization_training(
            self.network,
            self._augmented(Subset(self._examples, self.training)),
            self.loop,
            steps_of_classifier=s.steps_of_classifier,
            area=self.penalty,
            trainable_layers=s.trainable_layers,
            form=s.form,
            literal=s.literal,
            superpixels=s.superpixels,
            clean_share=s.clean_share,
            validation=self.evaluation if self.testing else None,
            out=s.out,
            configuration={
                **self._configuration(),
                "width": s.width,
                "trunk": [s.trunk, s.trunk_weights, self.trains_trunk, s.trunk_size],
                "segments": s.segments,
                "pretraining": [s.pretraining_epochs, s.pretraining_rate],
            },
            progress=self.progress,
        )
        if is_first():
            trunk = None if s.trunk is None else [s.trunk, s.trunk_weights, self.trains_trunk]
            last = result.evaluations[-1] if result.evaluations else {}
            facts = {"classifier": s.model, "trunk": trunk, "held_out": last}
            text = card("localization", s, len(self.training), **facts)
            save_localization_network(self.network, self.file, half=s.half, card=text)
        return result

    def _configuration(self) -> dict[str, Any]:
        s = self.settings
        return {
            "model": s.model,
            "weights": s.weights,
            "start_crc32": self._start,
            "classes": self.class_names,
            "input_size": list(self.classifier.input_size),
            "augment": s.augment,
        }

    def _augmented(self, images: Dataset[Any]) -> Dataset[Any]:
        return Augmented(images) if self.settings.augment else images

    def _network(self) -> LocalizationNetwork:
        s, names = self.settings, self.class_names
        weights = published_weights(s.weights)
        classifier = load_classifier(s.model, weights, class_names=names, input_size=s.size)
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
        from accelerate import PartialState

        s, file = self.settings, self.settings.superpixel_file
        if file is None:
            height, width = self.images[0][0].shape[1:]
            part = "-".join(["train", s.fit, *([f"{s.classes}classes"] if s.classes else [])])
            file = superpixel_path(s.images, s.segments, (height, width), part)
            if not file.exists() and not os.access(file.parent, os.W_OK):
                file = s.out / file.name
        with PartialState().main_process_first():
            show = self.progress and is_first()
            return cached_superpixels(self.images, file, s.segments, progress=show)


def _trains_trunk(s: LocalizationSettings) -> bool:
    """Whether the trunk is trained, of settings that go together."""
    has_weights = published_weights(s.trunk_weights) is not None
    is_copy = s.trunk == _CLASSIFIER
    check(
        s.trunk is not None or not (has_weights or s.train_trunk is not None),
        "--trunk-weights, --train-trunk and --freeze-trunk: give --trunk too",
    )
    check(
        not (is_copy and has_weights),
        "--trunk-weights: the trunk is a copy of the classifier; give --weights",
    )
    is_random = not has_weights
    if is_copy:
        is_random = published_weights(s.weights) is None and not s.pretraining_epochs
    check(
        not (is_random and s.train_trunk is False),
        "--freeze-trunk: the trunk's weights are random; give --trunk-weights",
    )
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
        names = classifier.class_names if weights is None else None
        trunk = load_classifier(s.trunk, weights, class_names=names)
    height, width = classifier.input_size if s.trunk_size is None else (s.trunk_size,) * 2
    check(
        takes_size(trunk, (height, width)),
        f"--trunk {s.trunk} does not take images of {height}×{width} pixels; give another "
        f"--trunk-size, such as {trunk.input_size[0]}",
    )
    return trunk
