"""Training of a masking network, from a folder of images to its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from captum_robust._checks import check, check_choice, check_count, check_number
from captum_robust._contexts import seeded
from captum_robust.data import LocalizationDataset
from captum_robust.data.classes import imagenet_names
from captum_robust.nn import (
    EvidenceRemoval,
    MaskingNetwork,
    load_masking_network,
    save_masking_network,
)
from captum_robust.nn.mask_objective import objective_named
from captum_robust.training.image_sets import (
    CroppedImages,
    SomeSamples,
    Unlabelled,
    held_out_split,
)
from captum_robust.training.loop import TrainingResult
from captum_robust.training.masking import masking_training
from captum_robust.training.recipe import Recipe, open_images, shuffled, weights_crc32
from captum_robust.training.settings import MaskingSettings


class MaskingRecipe(Recipe):
    """Train a network that shows in one pass where the evidence of a class is.

    Its ``file`` is one that :func:`~captum_robust.nn.load_masking_network` takes.

    Args:
        settings: see :class:`MaskingSettings`.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.
    """

    settings: MaskingSettings
    images: CroppedImages
    file_name = "masking.safetensors"

    def __init__(self, settings: MaskingSettings, *, progress: bool | None = None) -> None:
        s = settings
        check_choice("labels", s.labels, ["folder", "model"])
        self.objective = objective_named(s.objective, **_weights_of(s.weight or ()))
        self.removal = EvidenceRemoval(s.removal)
        super().__init__(s, progress=progress)
        check_count("evaluation_images", s.evaluation_images, 0)
        check_count("limit", s.limit, 1, optional=True)
        check_number("crop", s.crop, 0)
        with seeded(s.seed, None):  # of random weights the same when the run goes on
            self.classifier = self._classifier()
        self.classifier.to(memory_format=torch.channels_last)
        names = list(self.classifier.class_names or [])
        upright = s.named("exif_orientation")
        dataset = open_for_masking(s.kind, s.images, s.out, names, s.labels, **upright)
        if s.limit is not None and s.limit < len(dataset):
            drawn = sorted(shuffled(range(len(dataset)), s.seed)[: s.limit])
            dataset = SomeSamples(dataset, drawn)
        if s.start is not None:
            self.network = load_masking_network(s.start, self.classifier)
        else:
            with seeded(s.seed, None):
                self.network = MaskingNetwork(self.classifier, learned_classes=s.learned_classes)
        self.network.to(memory_format=torch.channels_last)
        held_out_split([], s.held_out, s.seed)  # refuses a share before the images are read
        size = self.classifier.input_size
        others = None
        if s.validation is not None:
            others = open_for_masking("folder", s.validation, s.out, names, "model", **upright)
        self.images = CroppedImages(dataset, size, progress=self.shows_bars)
        if others is not None:
            self.looked_at = CroppedImages(others, size, area=(1.0, 1.0), mirror=False)
            self.training, self.testing = (
                list(range(len(images))) for images in (self.images, self.looked_at)
            )
        else:
            self.looked_at = self.images.whole()
            one_class = [0] * len(self.images)  # a class may have one image only
            self.training, self.testing = held_out_split(one_class, s.held_out, s.seed)
        self.testing = shuffled(self.testing, s.seed)
        check(
            s.patience is None or self.testing[: s.evaluation_images],
            "--patience: there are no images to look at; give --validation, or a larger --held-out",
        )

    def _fit(self) -> TrainingResult:
        s = self.settings
        testing = self.testing[: s.evaluation_images]
        images = Subset(self.images, self.training)
        return masking_training(
            self.network,
            Unlabelled(images) if s.labels == "model" else images,
            self.loop,
            objective=self.objective,
            removal=self.removal,
            warm_up_steps=0 if s.start is not None else s.warm_up_steps,
            validation=Subset(self.looked_at, testing) if testing else None,
            **s.named("fake_probability", "fakes", "crop", "patience", "out", "tensorboard"),
            configuration={
                **self._described_classifier(),
                **s.named("labels", *["limit"] * (s.limit is not None)),
                **({} if s.size is None else s.named("size")),
                "weights_crc32": weights_crc32(self.classifier),
                "start": None if s.start is None else str(s.start),
                "start_crc32": weights_crc32(self.network.decoder),
            },
            progress=self.progress,
        )

    def _save(self, result: TrainingResult) -> None:
        s = self.settings
        card = self._card("masking", classifier=s.model, validation=best_look(result))
        save_masking_network(self.network, self.file, half=s.half, card=card)


def best_look(result: TrainingResult) -> dict[str, float]:
    """The measurement with the lowest saliency metric; empty without any."""
    return min(result.evaluations, key=lambda row: row["saliency_metric"], default={})


def open_for_masking(
    kind: str, path: Path, out: Path, names: Sequence[str], labels: str, **options: Any
) -> LocalizationDataset:
    """Images whose labels count the classifier's classes, where they have some."""
    names = list(names)
    if kind == "folder":
        options |= {"labels": "names", "class_names": names or None}
    elif kind == "tiny-imagenet" and names == list(imagenet_names()):
        options |= {"labels": "imagenet"}
    dataset = open_images(kind, path, out, **options)
    check(
        kind == "folder" or labels == "model" or names == list(dataset.class_names or []),
        f"--kind {kind}: its classes are not those of the classifier; with --labels model "
        "the classifier says them",
    )
    return dataset


def _weights_of(texts: Sequence[str]) -> dict[str, float]:
    """The weights of an objective from ``NAME=NUMBER``."""
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"--weight: expected NAME=NUMBER, got {text!r}") from None
    return weights
