"""Adversarial training of a classifier, from a folder of images to its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Subset

from captum_robust._checks import check_choice, check_number
from captum_robust._contexts import seeded
from captum_robust._processes import is_first
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.models.zoo import published_weights
from captum_robust.training.adversarial import METHODS, InnerAttack, adversarial_training
from captum_robust.training.image_sets import Augmented, LabelledImages
from captum_robust.training.loop import TrainingResult
from captum_robust.training.recipe import (
    Recipe,
    class_names_of,
    labelled_split,
    open_images,
    weights_crc32,
)
from captum_robust.training.settings import RobustSettings


class RobustRecipe(Recipe):
    """Train a classifier that withstands attacks.

    Args:
        settings: see :class:`RobustSettings`.
        progress: show bars on standard error.
    """

    images: LabelledImages

    def __init__(self, settings: RobustSettings, *, progress: bool = False) -> None:
        self.settings = s = settings
        check_number("epsilon", s.epsilon, 0, 255, open_low=True)
        InnerAttack(s.epsilon / 255, s.steps)
        check_choice("method", s.method, METHODS)
        super().__init__(s, progress=progress)
        dataset = open_images(s.kind, s.images, s.out)
        self.class_names = class_names_of(dataset, s)
        with seeded(s.seed, None):
            self.network = load_classifier(
                s.model,
                published_weights(s.weights),
                class_names=self.class_names,
                input_size=s.size,
            )
        self.static_models = [_static(text, self.class_names) for text in s.static or ()]
        size, classes = self.network.input_size, range(len(self.class_names))
        show = progress and is_first()
        self.images = LabelledImages(dataset, size, fit=s.fit, classes=classes, progress=show)
        self.training, self.testing = labelled_split(self.images, s.held_out, s.seed)

    @property
    def file(self) -> Path:
        """The file of the classifier, which :func:`load_classifier` takes."""
        return self.settings.out / "model.safetensors"

    def train(self) -> TrainingResult:
        """Train the classifier, or go on; the first process writes :attr:`file`."""
        s = self.settings
        images = Subset(self.images, self.training)
        result = adversarial_training(
            self.network,
            Augmented(images) if s.augment else images,
            self.loop,
            method=s.method,
            epsilon=s.epsilon / 255,
            steps=s.steps,
            static_models=self.static_models,
            held_out=Subset(self.images, self.testing) if self.testing else None,
            evaluation_images=s.evaluation_images,
            out=s.out,
            configuration={
                "model": s.model,
                "weights": s.weights,
                "weights_crc32": weights_crc32(self.network),
                "classes": self.class_names,
                "input_size": list(self.network.input_size),
                "augment": s.augment,
            },
            progress=self.progress,
        )
        if is_first():
            save_classifier(self.network, self.file)
        return result


def _static(text: str, names: Sequence[str]) -> Classifier:
    """A model from ``NAME=FILE`` or ``NAME``."""
    name, _, file = text.partition("=")
    return load_classifier(name, file) if file else load_classifier(name, class_names=names)
