"""Training of a denoiser, from a folder of images to its file."""

from __future__ import annotations

import torch
from torch.utils.data import Subset

from captum_robust._checks import check_count, check_number
from captum_robust._contexts import seeded
from captum_robust.nn.denoiser import Denoiser, load_denoiser, save_denoiser
from captum_robust.training.denoiser_training import DenoisingLoss, denoising_training
from captum_robust.training.image_sets import CroppedImages, Unlabelled, held_out_split
from captum_robust.training.loop import TrainingResult
from captum_robust.training.recipe import Recipe, open_images, shuffled, weights_crc32
from captum_robust.training.settings import DenoisingSettings


class DenoisingRecipe(Recipe):
    """Train a network that takes noise out of images for a classifier.

    Its ``file`` is one that :func:`~captum_robust.nn.load_denoiser` takes.

    Args:
        settings: see :class:`DenoisingSettings`.
        progress: show bars on standard error; None: after two seconds, on a terminal.
    """

    settings: DenoisingSettings
    images: CroppedImages
    file_name = "denoiser.safetensors"

    def __init__(self, settings: DenoisingSettings, *, progress: bool | None = None) -> None:
        super().__init__(settings, progress=progress)
        s = settings
        check_number("sigma_low", s.sigma_low, 0, open_low=True)
        check_number("sigma_high", s.sigma_high, s.sigma_low)
        check_count("part", s.part, 1, optional=True)
        check_count("evaluation_images", s.evaluation_images, 0)
        self.sigma = (s.sigma_low, s.sigma_high)
        with seeded(s.seed, None):
            self.classifier = self._classifier()
            self.denoiser = Denoiser(s.width) if s.start is None else load_denoiser(s.start)
        DenoisingLoss(self.classifier, self.classifier.cam_layer, self.sigma, s.features)
        self.classifier.to(memory_format=torch.channels_last)
        dataset = open_images(s.kind, s.images, s.out, **s.named("exif_orientation"))
        held_out_split([], s.held_out, s.seed)  # refuses a share before the images are read
        size = self.classifier.input_size
        self.images = CroppedImages(dataset, s.part or size, progress=self.shows_bars)
        self.training, testing = held_out_split([0] * len(self.images), s.held_out, s.seed)
        self.testing = shuffled(testing, s.seed)[: s.evaluation_images]
        self._start = weights_crc32(self.denoiser)

    def _fit(self) -> TrainingResult:
        s = self.settings
        validation = Subset(self.images.whole(), self.testing) if self.testing else None
        return denoising_training(
            self.denoiser,
            Unlabelled(Subset(self.images, self.training)),
            self.classifier,
            self.classifier.cam_layer,
            self.loop,
            sigma=self.sigma,
            validation=validation,
            **s.named("features", "out"),
            configuration={
                **self._described_classifier(),
                **s.named("part"),
                "weights_crc32": weights_crc32(self.classifier),
                "start_crc32": self._start,
            },
            progress=self.progress,
        )

    def _save(self, result: TrainingResult) -> None:
        last = result.evaluations[-1] if result.evaluations else {}
        card = self._card("denoiser", classifier=self.settings.model, validation=last)
        save_denoiser(self.denoiser, self.file, half=True, card=card)
