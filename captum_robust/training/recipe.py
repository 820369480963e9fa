"""What a training on a folder of images needs before and after its loop."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_robust._checks import check, check_choice
from captum_robust._files import checksum
from captum_robust.data import LocalizationDataset, load_dataset
from captum_robust.training.acceleration import training_device
from captum_robust.training.image_sets import CroppedImages, LabelledImages, held_out_split
from captum_robust.training.loop import TrainingResult
from captum_robust.training.settings import LabelledSettings, RecipeSettings

KINDS: dict[str, dict[str, Any]] = {
    "folder": {"labels": "sorted"},
    "tiny-imagenet": {"split": "train", "labels": "wnids"},
    "imagenet": {"split": "train"},
}
"""Kind of data set -> how it is opened, so that all of its images have a class."""


class Recipe(ABC):
    """A training from a folder of images to the file of a network.

    What is wrong with the settings is said before the images are read, which may take long. The
    same recipe run again goes on where it was stopped or killed, and ends with the weights that it
    would have had.

    Args:
        settings: of the training.
        progress: show bars on standard error.

    Raises:
        ValueError: settings out of range, or images that do not go with them.
        FileNotFoundError: no such images, weights or networks.
        ImportError: a package that training needs is missing; names the pip command.
    """

    images: LabelledImages | CroppedImages
    """Those that can be used."""
    training: list[int]
    """Numbers of those to train on."""
    testing: list[int]
    """Numbers of those to measure with."""

    def __init__(self, settings: RecipeSettings, *, progress: bool = False) -> None:
        self.progress = progress
        self.loop = settings.training()
        training_device(self.loop)  # so that a package that is missing is known at once

    @abstractmethod
    def train(self) -> TrainingResult:
        """Train the network, or go on; the first process writes :attr:`file`."""

    @property
    @abstractmethod
    def file(self) -> Path:
        """The file of the network."""


def open_images(kind: str, path: Path, out: Path) -> LocalizationDataset:
    """The data set of a kind, all of whose images have a class."""
    check_choice("kind of data set", kind, KINDS)
    check_out(out, path)
    return load_dataset(kind, path, **KINDS[kind])


def check_out(out: Path, images: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is, or can be, a folder outside of the images'."""
    check(out.is_dir() or not out.exists(), f"--out {out} is a file; give a folder")
    inside = images.is_dir() and out.resolve().is_relative_to(images.resolve())
    check(not inside, f"--out {out} lies inside {images}, the images' folder; give another --out")


def class_names_of(dataset: LocalizationDataset, settings: LabelledSettings) -> list[str]:
    """The names of the data set's classes, or of the first so many of them.

    Raises:
        ValueError: there are fewer, or fewer than two.
    """
    names, classes = list(dataset.class_names or []), settings.classes
    n = len(names)
    check(n >= 2, f"{settings.images}: expected at least two classes, found {n}")
    in_range = classes is None or 2 <= classes <= n
    check(in_range, f"classes: expected a number from 2 to {n}, got {classes}")
    return names[:classes]


def labelled_split(images: LabelledImages, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers to train on, and those held out in a drawn order: the first are of all classes."""
    training, testing = held_out_split(images.labels, share, seed)
    return training, shuffled(testing, seed)


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """The numbers in an order that is drawn."""
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return [numbers[i] for i in order.tolist()]


def weights_crc32(network: nn.Module) -> str:
    """The checksum of the weights: a file of the same name may have been written anew since."""
    return f"{checksum(network.state_dict().values()):08x}"


def card(command: str, settings: RecipeSettings, images: int, **facts: Any) -> str:
    """What is worth knowing of a network, for who gets its file."""
    from captum_robust import __version__

    return json.dumps(
        {
            "made_with": f"captum-robust {__version__} train {command}",
            "training_images": images,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            **facts,
        }
    )
