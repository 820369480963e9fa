"""Images on their way to the model: read, fitted to it, batched, attacked."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_count, check_type
from captum_robust._contexts import autocast, evaluation, without_new_gradients
from captum_robust._processes import device_of
from captum_robust._scores import probabilities_of, warn_of_probabilities
from captum_robust._threads import copied, stacked
from captum_robust.attacks.attack import watched_gradients
from captum_robust.attacks.outcome import last_of, outcome
from captum_robust.benchmark.reading import Loaded, SampleReader, one_line
from captum_robust.data import FITS, Sample
from captum_robust.data.given import SampleSource, sample_source
from captum_robust.models import Classifier
from captum_robust.models.classifier import check_channels, in_channels_of
from captum_robust.runs.machine import is_of_machine, is_out_of_memory
from captum_robust.runs.rows import ImageRow

Perturb: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images n×C×H×W and their labels n -> attacked images."""


KnownScores: TypeAlias = Callable[[tuple[Loaded, ...], Tensor, Tensor], Tensor | None]
"""Positions, their images n×C×H×W and labels n -> the scores n×K, if they are known."""


@dataclass(frozen=True)
class Batch:
    """n images on the device, clean or attacked."""

    items: tuple[Loaded, ...]
    images: Tensor
    """n×C×H×W."""
    label: Tensor
    """n, the true classes; where one is not known, the prediction of the clean image."""
    before: Tensor
    """n, the classes that the model gives the clean images."""
    predicted: Tensor
    """n, those that it gives ``images``."""
    confidence: Tensor
    """n, the probabilities of ``predicted``."""
    clean: Tensor
    """n×C×H×W; of a clean batch the images themselves."""
    without_gradient: Tensor
    """n booleans: the attack had no gradient to go by."""

    @property
    def samples(self) -> list[Sample]:
        """n, fitted to the model."""
        return [item.sample for item in self.items if item.sample is not None]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Loaded]:
        return iter(self.items)

    def __getitem__(self, rows: slice | list[int]) -> Batch:
        """The batch of some of the images."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        tensors = (getattr(self, field.name)[rows] for field in fields(self)[1:])
        return Batch(tuple(self.items[i] for i in chosen), *tensors)


Columns: TypeAlias = dict[Loaded, dict[str, Any]]
"""What is in the row of each image."""
Batches: TypeAlias = tuple[list[Batch], Columns]
"""The batches, and for the images that are in none the error of each, as a column."""


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of a data set for a model.

    Batches are always the same images together, also when a run is resumed: in float32 a batch's
    size can change the last digits.

    Args:
        model: runs where its parameters are.
        dataset: the samples.
        fit: "squash" or "crop", see :func:`captum_robust.benchmark.compare`.
        precision: "float32" or "bfloat16".
        seed: of what draws.
        eight_bit: round the fitted images to the 256 levels that an image file holds.
        pictured: the first so many images are read with a picture of them.
    """

    model: Classifier
    dataset: SampleSource
    fit: str = "squash"
    precision: str = "float32"
    seed: int = 0
    eight_bit: bool = False
    pictured: int = 0

    @cached_property
    def classes(self) -> int:
        """How many classes the model scores."""
        if self.model.class_names is not None:
            return len(self.model.class_names)
        return int(self.scores(black_image(self.model)).shape[1])

    @property
    def root(self) -> Path | None:
        """Where the images lie, if the data set says so."""
        at: Any = self.dataset
        while at is not None and not isinstance(getattr(at, "root", None), (str, Path)):
            at = getattr(at, "samples", getattr(at, "dataset", None))  # what it is a view of
        return None if at is None else Path(at.root)

    @cached_property
    def _others(self) -> int:
        """How many classes the labels count, where these are others than the model's; else 0."""
        names = list(getattr(self.dataset, "class_names", None) or ())
        own = list(self.model.class_names or ())
        is_same = len(names) == self.classes or (own and names[: len(own)] == own)
        return 0 if is_same else len(names)

    @cached_property
    def samples(self) -> SampleReader:
        """What reads the samples at the model's size."""
        size, classes = self.model.input_size, self.classes
        facts = (self._others, self.fit, self.eight_bit, self.seed, self.pictured)
        return SampleReader(self.dataset, size, classes, *facts)

    def clean(self, loaded: Sequence[Loaded], scores: KnownScores | None = None) -> Batches:
        """The images that could be read as one batch, with the errors of the others.

        ``scores`` is asked for those of images whose labels are all known.
        """
        unread = {item: {"error": item.error} for item in loaded if item.error is not None}
        usable = tuple(item for item in loaded if item.sample is not None)
        return each(([usable] if usable else [], unread), partial(self._clean, scores))

    def attacked(self, clean: Batches, name: str, perturb: Perturb, start: int) -> Batches:
        """The batches under an attack; one by one where it fails on one, with its error."""

        def attack(batch: Batch) -> Batch:
            with self.undisturbed(start, name), watched_gradients() as ended:
                images = perturb(copied(batch.images), batch.label.clone()).detach()
            shape, got = tuple(batch.images.shape), tuple(images.shape)
            check(got == shape, f"attack {name!r}: expected {shape}, got {got}")
            without = last_of(ended, batch.before)
            return self.judged(batch, images.to(batch.images), without_gradient=without)

        return each(clean, attack)

    def judged(self, batch: Batch, images: Tensor, **facts: Any) -> Batch:
        """The batch with other images, and the classes that the model gives these."""
        predicted, confidence = self.classified(images)
        return replace(batch, images=images, predicted=predicted, confidence=confidence, **facts)

    def scores(self, images: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        """The scores n×K of the model, or of another around it, without gradients."""
        with torch.no_grad(), evaluation(self.model), self._precise():
            scores: Tensor = (self.model if model is None else model)(images)
        return scores

    def classified(
        self, images: Tensor, model: torch.nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """The classes that the model gives images, and their probabilities, n each."""
        return decided(self.scores(images, model))

    @contextmanager
    def undisturbed(self, start: int, name: str) -> Iterator[None]:
        """Inside, a method or an attack finds what every other finds, and leaves nothing behind.

        Draws depend on seed, batch and name only; the model is in evaluation mode, with gradients
        on; modes, the parameters' gradients, grad mode and random state are put back.
        """
        device = device_of(self.model)
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            evaluation(self.model),
            without_new_gradients(self.model),
            torch.enable_grad(),
            self._precise(),
        ):
            torch.manual_seed(zlib.crc32(f"{self.seed} {start} {name}".encode()))
            yield

    def _clean(self, scores: KnownScores | None, usable: tuple[Loaded, ...]) -> Batch:
        samples = [item.sample for item in usable if item.sample is not None]
        device = device_of(self.model)
        images = stacked([s.image for s in samples])
        if device.type == "cuda":  # so that the copy need not be waited for
            images = images.pin_memory()
        images = images.to(device, non_blocking=True)
        images = in_channels_of(self.model, images)
        known = torch.tensor([-1 if s.label is None else s.label for s in samples]).to(device)
        may_ask = scores is not None and all(s.label is not None for s in samples)
        given = scores(usable, images, known) if scores is not None and may_ask else None
        predicted, confidence = self.classified(images) if given is None else decided(given)
        label = torch.where(known < 0, predicted, known)
        none = torch.zeros_like(predicted, dtype=torch.bool)
        return Batch(usable, images, label, predicted, predicted, confidence, images, none)

    def _precise(self) -> torch.autocast:
        return autocast(device_of(self.model), self.precision)


def decided(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The classes with the largest of scores n×K, and their probabilities, n each."""
    warn_of_probabilities(scores, "model")
    return scores.argmax(dim=1), probabilities_of(scores).amax(dim=1)


_Part = TypeVar("_Part", Batch, tuple[Loaded, ...])
_Made = TypeVar("_Made")


def each(
    batches: tuple[Sequence[_Part], Columns],
    make: Callable[[_Part], _Made],
    caught: type[Exception] = Exception,
    *,
    halve: bool = True,
) -> tuple[list[_Made], Columns]:
    """What ``make`` returns of each batch or, where that fails, of each of its images alone.

    With it go the errors, also those that the batches come with, but none of the machine: where
    memory runs out, a batch is halved once.
    """
    made: list[_Made] = []
    failed = dict(batches[1])
    for batch in batches[0]:
        try:
            made.append(make(batch))
            continue
        except Exception as error:
            is_memory = is_out_of_memory(error)
            is_halved = is_memory and halve and len(batch) > 1
            if not is_halved and (is_of_machine(error) or not isinstance(error, caught)):
                raise
            if len(batch) == 1:
                failed |= {item: {"error": one_line(error)} for item in batch}
                continue
        # Behind the clause, as the error holds the tensors of the batch.
        size = -(-len(batch) // 2) if is_memory else 1
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        some, failed = each((parts, failed), make, caught, halve=False)
        made += some
    return made, failed


def columns_of(
    batches: Batches, make: Callable[[Batch], Columns], caught: type[Exception] = Exception
) -> Columns:
    """The columns that :func:`each` makes, those of the errors first."""
    made, columns = each(batches, make, caught)
    for some in made:
        columns |= some
    return columns


def outcome_columns(batch: Batch, aimed: Tensor | None = None) -> dict[str, Tensor]:
    """What became of attacked images, as columns of their rows."""
    classes = (batch.label, batch.before, batch.predicted)
    became = outcome(batch.clean, batch.images, *classes, aimed, batch.without_gradient)
    names = ("label", "before", "predicted", "confidence")
    return {name: getattr(batch, name) for name in names} | vars(became)


def rows_of(columns: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One dictionary a row, of columns of one length.

    >>> rows_of({"fooled": torch.tensor([True, False]), "label": torch.tensor([3, 4])})
    [{'fooled': True, 'label': 3}, {'fooled': False, 'label': 4}]
    """
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def image_row(item: Loaded) -> ImageRow:
    """What the run keeps of an image."""
    if item.sample is None:
        return ImageRow(item.position, item.image, error=item.error)
    sample = item.sample
    height, width = sample.size
    fractions = sample.boxes / torch.tensor([width, height, width, height])
    return ImageRow(
        item.position,
        item.image,
        sample.label,
        *sample.original_size,
        fractions.tolist(),
        item.picture,
    )


def perturb_of(name: str, attack: Any) -> Perturb:
    """The function of an attack: its ``perturb``, or itself.

    Raises:
        TypeError: it is neither.
    """
    perturb: Perturb = getattr(attack, "perturb", attack)
    expected = "an object with perturb(images, target), or a function"
    check_type(f"attack {name!r}", perturb, Callable, expected)
    return perturb


def check_settings(
    model: Any, limit: int | None, batch_size: int, fit: str, workers: int = 0
) -> None:
    """Refuse what no run can have, before an image is read.

    Raises:
        TypeError: ``model`` is no ``Classifier``.
        ValueError: a setting is out of range, or the model takes neither grey nor RGB images.
    """
    how = "a captum_robust.models.Classifier (wrap yours with Classifier(module, mean, std, size))"
    if isinstance(getattr(model, "_orig_mod", None), Classifier):
        how = "a Classifier that is not compiled itself, as Classifier(torch.compile(module), …)"
    check_type("model", model, Classifier, how)
    check_channels(model)
    check_choice("fit", fit, FITS)
    check_count("limit", limit, 1, optional=True)
    check_count("batch_size", batch_size, 1)
    check_count("workers", workers, 0)


def black_image(model: Classifier) -> Tensor:
    """A batch of one image for the model."""
    return torch.zeros(1, *model.input_shape, device=device_of(model))


def samples_of(model: Classifier, dataset: Any, limit: int | None) -> tuple[SampleSource, int]:
    """The samples of a run, and how many it has; see :func:`sample_source`.

    Raises:
        TypeError: ``dataset`` is none of the accepted kinds.
        ValueError: there are no samples, or the model has other than one name for each score.
    """
    if model.class_names is not None:
        BatchReader(model, ()).scores(black_image(model))
    source = sample_source(dataset, model.class_names, lambda: BatchReader(model, ()).classes)
    count = len(source) if limit is None else min(limit, len(source))
    check(count, "dataset: expected at least one sample, got no samples")
    return source, count
