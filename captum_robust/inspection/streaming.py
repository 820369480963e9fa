"""One pass over images of any number: batches for the network, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_count
from captum_robust._contexts import probing
from captum_robust._processes import device_of
from captum_robust._progress import progress_bar
from captum_robust.data import DataError, Sample, fitted
from captum_robust.data.contents import checksums_of
from captum_robust.data.given import sample_source
from captum_robust.data.renumbered import Renumbered
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of

Read = Callable[[Sample], Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some of the images, at the size of the network."""

    pixels: Tensor
    """N×3×H×W in [0, 1], RGB, on the CPU."""
    inputs: Tensor
    """N×C×H×W, normalised, on the network's device."""
    samples: list[Sample]
    """As the pixels, with masks and boxes of the same size."""
    positions: Tensor
    """N, the number of each image in the data set, on the CPU."""
    read: list[list[Any]]
    """What else was read for each image, by each of the functions given."""


class ImageStream:
    """Images, or samples, of a data set in batches; those that cannot be used are noted.

    Args:
        model: whose input size they are squashed to.
        images: all that :func:`captum_robust.benchmark.compare` takes for a data set: a folder, a
            data set, tensors 3×H×W, pictures, pairs with labels.
        batch_size: images that the network gets at once.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.
        reads: functions of a sample whose results are wanted too; a ``DataError`` of one makes its
            image unusable.

    Raises:
        ValueError: there are no images.
        TypeError: ``images`` is something else.
    """

    def __init__(
        self,
        model: Classifier,
        images: Any,
        *,
        batch_size: int = 16,
        progress: bool | None = None,
        reads: tuple[Read, ...] = (),
    ) -> None:
        self.batch_size = check_count("batch_size", batch_size, 1)
        self._source = sample_source(images, model.class_names, lambda: _count_classes(model))
        check(len(self._source), "images: expected at least one, got none")
        self._model, self._progress, self._reads = model, progress, reads
        self.unusable: dict[str, str] = {}
        """Id of an image -> why it could not be used."""

    def __len__(self) -> int:
        return len(self._source)

    def checksums(self) -> dict[str, int | None]:
        """What tells these images from others of the same names; None: a file is not there now."""
        source = self._source
        return checksums_of(source.samples if isinstance(source, Renumbered) else source, len(self))

    def name_of(self, position: int) -> str:
        """The id of an image."""
        ids = getattr(self._source, "ids", None)
        return str(position) if ids is None else str(ids[position])

    def sample(self, position: int) -> Sample:
        """An image at the size of the network."""
        return fitted(self._source[position], self._model.input_size, "squash")

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The images in order, from number ``first`` on.

        Raises:
            ValueError: none of all could be used; the reason of the first is said.
        """
        with progress_bar(len(self), "image", self._progress, "looking") as advance:
            advance(first)
            for start in range(first, len(self), self.batch_size):
                numbers = range(start, min(start + self.batch_size, len(self)))
                if batch := self._batch(numbers):
                    yield batch
                advance(len(numbers))
        if len(self.unusable) == len(self):
            why = next(iter(self.unusable.values()))
            raise ValueError(f"images: none of {len(self)} could be used: {why}")

    def _batch(self, numbers: range) -> Batch | None:
        samples, positions, read = [], [], []
        for number in numbers:
            try:
                sample = self.sample(number)
                read.append([function(sample) for function in self._reads])
            except DataError as error:
                self.unusable[self.name_of(number)] = str(error)
                continue
            samples.append(sample)
            positions.append(number)
        if not samples:
            return None
        pixels = torch.stack([sample.image for sample in samples])
        x = in_channels_of(self._model, pixels.to(device_of(self._model)))
        inputs = self._model.normalised(x)
        return Batch(pixels, inputs, samples, torch.tensor(positions), read)


def _count_classes(model: Classifier) -> int:
    with torch.no_grad(), probing(model) as image_of:
        return int(model.module(image_of(*model.input_shape)).shape[1])
