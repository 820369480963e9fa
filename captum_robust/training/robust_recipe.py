"""Adversarial training of a classifier, from a folder of images to its file."""

from __future__ import annotations

from captum_robust._checks import check_choice, check_number
from captum_robust.models import Classifier, load_classifier, save_classifier
from captum_robust.training.adversarial import METHODS, InnerAttack, adversarial_training
from captum_robust.training.loop import TrainingResult
from captum_robust.training.recipe import LabelledRecipe
from captum_robust.training.settings import RobustSettings


class RobustRecipe(LabelledRecipe):
    """Train a classifier that withstands attacks.

    Its ``file`` is one that :func:`~captum_robust.models.load_classifier` takes.

    Args:
        settings: see :class:`RobustSettings`.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.
    """

    settings: RobustSettings
    network: Classifier
    file_name = "model.safetensors"

    def __init__(self, settings: RobustSettings, *, progress: bool | None = None) -> None:
        check_number("epsilon", settings.epsilon, 0, 255, open_low=True)
        InnerAttack(settings.epsilon / 255, settings.steps)
        check_choice("method", settings.method, METHODS)
        super().__init__(settings, progress=progress)

    def _network(self) -> Classifier:
        self.static_models = [self._static(text) for text in self.settings.static or ()]
        return self.classifier

    def _static(self, text: str) -> Classifier:
        """Return a model from ``NAME=FILE`` or ``NAME``."""
        name, _, file = text.partition("=")
        if file:
            return load_classifier(name, file)
        return load_classifier(name, class_names=self.class_names)

    def _fit(self) -> TrainingResult:
        images, held_out = self._parts(self.images)
        return adversarial_training(
            self.network,
            images,
            self.loop,
            epsilon=self.settings.epsilon / 255,
            **self.settings.named("method", "steps", "evaluation_images", "out"),
            static_models=self.static_models,
            held_out=held_out,
            configuration=self._configuration("weights_crc32"),
            progress=self.progress,
        )

    def _save(self, _: TrainingResult) -> None:
        save_classifier(self.network, self.file)
