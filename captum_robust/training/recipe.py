"""What a training on a folder of images needs before and after its loop."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from captum_robust._checks import check, check_choice
from captum_robust._contexts import seeded
from captum_robust._files import checksum, sole_user
from captum_robust._processes import is_first
from captum_robust.data import LocalizationDataset, load_dataset
from captum_robust.models import Classifier
from captum_robust.models.imported import source_of
from captum_robust.models.zoo import named_classifier
from captum_robust.training.acceleration import training_device
from captum_robust.training.image_sets import (
    Augmented,
    CroppedImages,
    LabelledImages,
    held_out_split,
)
from captum_robust.training.loop import TrainingResult
from captum_robust.training.settings import LocalizationSettings, RecipeSettings, RobustSettings

KINDS: dict[str, dict[str, Any]] = {
    "folder": {"labels": "sorted"},
    "tiny-imagenet": {"split": "train", "labels": "wnids"},
    "imagenet": {"split": "train"},
    "webdataset": {},
}
"""Kind of data set -> how it is opened, so that all of its images have a class."""


class Recipe(ABC):
    """A training from a folder of images to the file of a network.

    What is wrong with the settings is said before the images are read, which may take long. The
    same recipe run again goes on where it was stopped or killed, and ends with the weights that it
    would have had.

    Args:
        settings: of the training.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ValueError: settings out of range, or images that do not go with them.
        FileNotFoundError: no such images, weights or networks.
        ImportError: a package that training needs is missing; names the pip command.
    """

    file_name: str
    """The name of ``file`` in the folder of the run."""
    classifier: Classifier
    """What is trained, or what the network is trained with."""
    images: LabelledImages | CroppedImages
    """Those that can be used."""
    training: list[int]
    """Numbers of those to train on."""
    testing: list[int]
    """Numbers of those to measure with."""

    def __init__(self, settings: RecipeSettings, *, progress: bool | None = None) -> None:
        self.settings, self.progress = settings, progress
        self.shows_bars = progress and is_first()
        self.loop = settings.training()
        training_device(self.loop)  # so that a package that is missing is known at once

    def _classifier(self, **others: Any) -> Classifier:
        """Load the classifier that the settings name."""
        s: Any = self.settings
        return named_classifier(s.model, s.weights, s.size, s.mean, s.std, **others)

    def _described_classifier(self) -> dict[str, Any]:
        """What tells the classifier, beside its weights, from others."""
        named: dict[str, Any] = self.settings.named("model", "weights")
        source = source_of(named["model"])
        own = {"mean": self.settings.mean, "std": self.settings.std, "source_crc32": source}
        return named | {name: value for name, value in own.items() if value is not None}

    def train(self) -> TrainingResult:
        """Train the network, or go on; the first process writes ``file``."""
        result = self._fit()
        if is_first():
            with sole_user(self.settings.out):  # who gets the folder next removes torn files
                self._save(result)
        return result

    @abstractmethod
    def _fit(self) -> TrainingResult:
        """Train the network."""

    @abstractmethod
    def _save(self, result: TrainingResult) -> None:
        """Write the network."""

    @property
    def file(self) -> Path:
        """The file of the network."""
        return self.settings.out / self.file_name

    def _card(self, command: str, **facts: Any) -> str:
        """What is worth knowing of the network, for who gets its file."""
        from captum_robust import __version__

        return json.dumps(
            {
                "made_with": f"captum-robust {__version__} train {command}",
                "training_images": len(self.training),
                "epochs": self.settings.epochs,
                "batch_size": self.settings.batch_size,
                **facts,
            }
        )


class LabelledRecipe(Recipe):
    """A training on images of known classes, which are those of the classifier."""

    settings: RobustSettings | LocalizationSettings
    images: LabelledImages

    def __init__(
        self, settings: RobustSettings | LocalizationSettings, *, progress: bool | None = None
    ) -> None:
        super().__init__(settings, progress=progress)
        s = settings
        dataset = open_images(s.kind, s.images, s.out, **s.named("exif_orientation"))
        names = list(dataset.class_names or [])
        n = len(names)
        check(n >= 2, f"{s.images}: expected at least two classes, found {n}")
        in_range = s.classes is None or 2 <= s.classes <= n
        check(in_range, f"classes: expected a number from 2 to {n}, got {s.classes}")
        self.class_names = names[: s.classes]
        held_out_split([], s.held_out, s.seed)  # refuses a share before the images are read
        with seeded(s.seed, None):
            self.classifier = self._classifier(class_names=self.class_names)
            self.network = self._network()
        self._start = weights_crc32(self.network)
        size, classes = self.classifier.input_size, range(len(self.class_names))
        self.images = LabelledImages(
            dataset, size, fit=s.fit, classes=classes, progress=self.shows_bars
        )
        self.training, held_out = held_out_split(self.images.labels, s.held_out, s.seed)
        self.testing = shuffled(held_out, s.seed)  # the first are of all classes

    @abstractmethod
    def _network(self) -> nn.Module:
        """Return what is trained, from the classifier; what it draws is seeded."""

    def _parts(self, images: Dataset[Any]) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Return the images to train on, and those to measure with, if there are any."""
        training: Dataset[Any] = Subset(images, self.training)
        if self.settings.augment:
            training = Augmented(training)
        return training, Subset(images, self.testing) if self.testing else None

    def _configuration(self, start: str) -> dict[str, Any]:
        """Return what tells this run from others; ``start`` names the checksum of its weights."""
        return {
            **self._described_classifier(),
            **self.settings.named(
                "augment", *["exif_orientation"] * self.settings.exif_orientation
            ),
            start: self._start,
            "classes": self.class_names,
            "input_size": list(self.classifier.input_size),
        }


def open_images(kind: str, path: Path, out: Path, **options: Any) -> LocalizationDataset:
    """The data set of a kind, opened as :data:`KINDS` says but for these options.

    Raises:
        ValueError: an unknown kind; an ``out`` that is no folder outside of the images'.
    """
    check_choice("kind of data set", kind, KINDS)
    check(out.is_dir() or not out.exists(), f"--out {out} is a file; give a folder")
    inside = path.is_dir() and out.resolve().is_relative_to(path.resolve())
    check(not inside, f"--out {out} lies inside {path}, the images' folder; give another --out")
    return load_dataset(kind, path, **(KINDS[kind] | options))


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """The numbers in an order that is drawn."""
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return [numbers[i] for i in order.tolist()]


def weights_crc32(network: nn.Module) -> str:
    """The checksum of the weights: a file of the same name may have been written anew since."""
    return f"{checksum(network.state_dict().values()):08x}"
