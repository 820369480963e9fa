"""``compare``: any mix of attribution methods over a data set, one row an image, resumable."""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index as as_index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_robust._names import printable
from captum_robust.benchmark.comparison import CLEAN, GALLERY_POOL, Comparison
from captum_robust.benchmark.configuration import describe_run, device_of
from captum_robust.benchmark.measure import measure, outcomes, picture_of_change, thumbnail
from captum_robust.benchmark.methods import METHODS, Method, build_methods
from captum_robust.benchmark.passes import count_passes
from captum_robust.benchmark.store import ImageRow, ResultRow, RunStore
from captum_robust.data import DataError, Sample, resize, resize_and_center_crop
from captum_robust.models import Classifier

_PRECISIONS = ("float32", "bfloat16")
_TARGETS = ("label", "prediction")
_FITS = ("squash", "crop")


class SampleSource(Protocol):
    """What ``compare`` needs of a data set: its length and its samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def compare(
    model: Classifier,
    dataset: SampleSource,
    methods: str | Sequence[str] | Mapping[str, Any] | None = None,
    attacks: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    target: str = "label",
    fit: str = "squash",
    precision: str = "float32",
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Run the methods over the data set and keep one row for each image, method and attack.

    A run that was killed goes on where it stopped when it is started again with the same
    arguments and folder. Under ``torchrun`` the ranks share the batches and the folder. Memory
    does not grow with the number of images.

    Args:
        model: runs where its parameters are; put in evaluation mode while it lasts.
        dataset: samples with boxes or masks; see :mod:`captum_robust.data`.
        methods: names of ``captum_robust.benchmark.METHODS``, or a mapping from your own names to
            such names, Captum ``Attribution`` objects or functions ``(images, target) -> maps``.
            None: all of ``METHODS``.
        attacks: name -> an object with ``perturb(images, target)``, or such a function. Every
            method also runs on the clean images.
        out: folder of the run; None: a temporary one, which lives as long as the result.
        limit: only the first so many samples.
        batch_size: images that a method gets at once; part of what a resumed run must repeat.
        target: the class that is explained: ``"label"`` (where there is none, the prediction) or
            ``"prediction"``.
        fit: ``"squash"``: the whole image at ``model.input_size``; ``"crop"``: the shorter side
            resized to 8/7 of it, then the centre.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast.
        seed: for methods and attacks that draw; each batch gets its own generator state from it.
        progress: show a progress bar on standard error.

    Returns:
        The comparison, read from the run's folder.

    Raises:
        TypeError: ``model`` is no ``Classifier``; a method that is none of the accepted kinds.
        ValueError: an unknown name, an empty data set, a number out of range, or a folder that
            holds another run.
    """
    if not isinstance(model, Classifier):
        raise TypeError(
            f"model: expected a captum_robust.models.Classifier, got {type(model).__name__}; "
            "wrap yours with Classifier(module, mean, std, input_size)"
        )
    _check_choice("target", target, _TARGETS)
    _check_choice("fit", fit, _FITS)
    _check_choice("precision", precision, _PRECISIONS)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value is True or value < 1):
            raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise ValueError("dataset: it has no samples")
    asked = list(METHODS) if methods is None else methods
    if isinstance(asked, Iterator):
        asked = list(asked)
    built = build_methods(model, asked)
    attacked = {CLEAN: None, **{k: _perturb_of(k, v) for k, v in (attacks or {}).items()}}

    configuration = describe_run(
        model,
        dataset,
        count,
        asked,
        attacks or {},
        {
            "batch_size": batch_size,
            "target": target,
            "fit": fit,
            "precision": precision,
            "seed": seed,
        },
    )
    if out is None and _world_size() > 1:
        raise ValueError("out: the processes of a distributed run need one folder to share")
    temporary = TemporaryDirectory(prefix="captum-robust-") if out is None else None
    folder = Path(temporary.name if temporary else str(out))
    store = RunStore(folder, configuration)
    store.write_classes(model.class_names or ())
    runner = _Runner(model, dataset, built, attacked, store, target, fit, precision, seed)
    with torch.inference_mode(False), _ranks() as (rank, world):
        total = count * len(built) * len(attacked)
        with _progress_bar(total, progress and rank == 0) as advance:
            for start in range(rank * batch_size, count, world * batch_size):
                runner.run_batch(start, min(start + batch_size, count), advance)
    store.close()
    return Comparison(folder, _keep_alive=temporary)


@dataclass(frozen=True)
class _Loaded:
    """One position of a batch: a sample that fits the model, or why there is none."""

    position: int
    image: str
    sample: Sample | None
    error: str | None = None


@dataclass(frozen=True)
class _Runner:
    model: Classifier
    dataset: SampleSource
    methods: Mapping[str, Method]
    attacks: Mapping[str, Callable[[Tensor, Tensor], Tensor] | None]
    store: RunStore
    target: str
    fit: str
    precision: str
    seed: int

    @cached_property
    def classes(self) -> int:
        """How many classes the model scores."""
        if self.model.class_names is not None:
            return len(self.model.class_names)
        black = torch.zeros(1, 3, *self.model.input_size, device=device_of(self.model))
        return int(self._scores(black).shape[1])

    def run_batch(self, start: int, stop: int, advance: Callable[[int], None]) -> None:
        """Explain one batch by all methods that have not all their rows of it yet.

        Batches are always the same images together, also when resumed: in float32 a batch's size
        can change the last digits.
        """
        have = self.store.count(start, stop)
        missing = [
            (attack, method)
            for attack in self.attacks
            for method in self.methods
            if have.get((method, attack), 0) < stop - start
        ]
        advance((stop - start) * (len(self.attacks) * len(self.methods) - len(missing)))
        if not missing:
            return
        with ThreadPoolExecutor(max_workers=2) as pool:
            loaded = list(pool.map(self._load, range(start, stop)))
        usable = [item for item in loaded if item.sample is not None]
        images = [self._image_row(item) for item in loaded]
        prepared: dict[str, tuple[list[_Batch], dict[int, str]]] = {}
        for attack, method in missing:
            if attack not in prepared:
                prepared = {attack: self._prepare(usable, attack, start)}
            batches, failed = prepared[attack]
            rows = [
                ResultRow(item.position, method, attack, item.image, error=error)
                for item in loaded
                if (error := item.error or failed.get(item.position))
            ]
            for batch in batches:
                rows += self._explain(batch, method, attack, start)
            self.store.write(rows, images)
            images = []
            advance(stop - start)

    def _load(self, position: int) -> _Loaded:
        ids = getattr(self.dataset, "ids", None)
        image = str(position) if ids is None else str(ids[position])
        try:
            sample = self.dataset[position]
            image = image if ids is not None else sample.id
            sample = self._fit(self._checked(sample))
        except Exception as error:  # whatever is wrong with one image, the run goes on
            return _Loaded(position, image, None, _one_line(error))
        return _Loaded(position, image, sample)

    def _checked(self, sample: Sample) -> Sample:
        """The sample with a plain label; ``DataError`` for what would spoil its batch."""
        image, mask = sample.image, sample.mask
        if image.dtype != torch.float32 or not (image.amin() >= 0 and image.amax() <= 1):
            raise DataError(f"{sample.id}: the image is not float32 in [0, 1]")
        if mask is not None and mask.dtype != torch.bool:
            raise DataError(f"{sample.id}: the mask is {mask.dtype}, not Boolean")
        if sample.label is None:
            return sample
        label = as_index(sample.label)
        if not 0 <= label < self.classes:
            raise DataError(
                f"{sample.id}: class index {label}, but the model has {self.classes} classes"
            )
        return replace(sample, label=label)

    def _fit(self, sample: Sample) -> Sample:
        height, width = self.model.input_size
        if self.fit == "squash":
            return resize(sample, (height, width))
        cropped = resize_and_center_crop(sample, round(max(height, width) * 8 / 7), (height, width))
        return replace(cropped, original_size=(height, width))

    def _image_row(self, item: _Loaded) -> ImageRow:
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
            _jpeg(sample.image) if item.position < GALLERY_POOL else None,
        )

    def _prepare(
        self, usable: list[_Loaded], attack: str, start: int
    ) -> tuple[list[_Batch], dict[int, str]]:
        """The images as one batch; one by one where the attack fails on one, with its error."""
        if not usable:
            return [], {}
        try:
            return [self._prepare_batch(usable, attack, start)], {}
        except Exception as error:
            if len(usable) == 1:
                return [], {usable[0].position: _one_line(error)}
        batches: list[_Batch] = []
        failed: dict[int, str] = {}
        for item in usable:
            made, error_of = self._prepare([item], attack, start)
            batches += made
            failed |= error_of
        return batches, failed

    def _prepare_batch(self, usable: list[_Loaded], attack: str, start: int) -> _Batch:
        """The images on the device, attacked, with the classes to explain."""
        samples = [item.sample for item in usable if item.sample is not None]
        device = device_of(self.model)
        images = torch.stack([s.image for s in samples]).to(device)
        scores = self._scores(images)
        predicted = scores.argmax(dim=1)
        known = torch.tensor([-1 if s.label is None else s.label for s in samples]).to(device)
        labels = torch.where(known < 0, predicted, known)
        perturb = self.attacks[attack]
        if perturb is not None:
            with self._undisturbed(start, attack):
                perturbed = perturb(images.clone(), labels.clone()).detach()
            if perturbed.shape != images.shape:
                raise ValueError(
                    f"attack {attack!r}: expected {tuple(images.shape)}, "
                    f"got {tuple(perturbed.shape)}"
                )
            images = perturbed.to(images)
            scores = self._scores(images)
            predicted = scores.argmax(dim=1)
        return _Batch(
            usable,
            samples,
            images,
            target=labels if self.target == "label" else predicted,
            predicted=predicted,
            confidence=scores.float().softmax(dim=1).amax(dim=1),
        )

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad(), _restored(self.model), self._autocast():
            scores: Tensor = self.model(images)
        return scores

    def _explain(self, batch: _Batch, method: str, attack: str, start: int) -> list[ResultRow]:
        try:
            explain = self.methods[method].explain
            images, target = batch.images.clone(), batch.target.clone()
            with self._undisturbed(start, method + attack), count_passes(self.model) as passes:
                began = _now(images.device)
                found = explain(images, target)
                seconds = _now(images.device) - began
            maps = found.maps.detach().float().cpu()
            if maps.shape != (len(batch.images), *batch.images.shape[2:]):
                raise ValueError(
                    f"expected maps {len(batch.images)}×{batch.images.shape[2]}×"
                    f"{batch.images.shape[3]}, got {tuple(maps.shape)}"
                )
            measured = measure(maps, batch.samples, self.methods[method])
            for i, item in enumerate(batch.items):
                if item.position < GALLERY_POOL:
                    measured[i]["heat"] = thumbnail(maps[i])
            if found.perturbation is not None:
                for i, columns in enumerate(outcomes(found.perturbation)):
                    measured[i] |= columns
                    if batch.items[i].position < GALLERY_POOL:
                        measured[i] |= picture_of_change(found.perturbation.change[i])
        except Exception as error:  # one image may fail where the others work
            if len(batch.images) > 1:
                singles = [batch.only(i) for i in range(len(batch.images))]
                return [r for b in singles for r in self._explain(b, method, attack, start)]
            measured, seconds, passes = [{"error": _one_line(error)}], 0.0, None
        n = len(batch.images)
        predicted, explained = batch.predicted.tolist(), batch.target.tolist()
        confidence = batch.confidence.tolist()
        return [
            ResultRow(
                item.position,
                method,
                attack,
                item.image,
                predicted=predicted[i],
                explained=explained[i],
                confidence=confidence[i],
                seconds=seconds / n if passes else None,
                forward_passes=passes.forward / n if passes else None,
                backward_passes=passes.backward / n if passes else None,
                **measured[i],
            )
            for i, item in enumerate(batch.items)
        ]

    def _autocast(self) -> torch.autocast:
        device = device_of(self.model).type
        enabled = self.precision == "bfloat16"
        return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)

    @contextmanager
    def _undisturbed(self, start: int, name: str) -> Iterator[None]:
        """Inside, a method or an attack finds what every other finds, and leaves nothing behind.

        Draws depend on seed, batch and name only; the model is in evaluation mode, with gradients
        on; modes, the parameters' gradients, grad mode and random state are put back.
        """
        device = device_of(self.model)
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            _restored(self.model),
            torch.enable_grad(),
            self._autocast(),
        ):
            torch.manual_seed(zlib.crc32(f"{self.seed} {start} {name}".encode()))
            yield


@dataclass(frozen=True)
class _Batch:
    items: list[_Loaded]
    samples: list[Sample]
    images: Tensor
    target: Tensor
    predicted: Tensor
    confidence: Tensor

    def only(self, i: int) -> _Batch:
        one = slice(i, i + 1)
        return _Batch(
            self.items[one],
            self.samples[one],
            self.images[one],
            self.target[one],
            self.predicted[one],
            self.confidence[one],
        )


def _jpeg(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _one_line(error: Exception) -> str:
    text = printable(str(error))
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"[:500]


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name}: expected one of {tuple(valid)}, got {value!r}")


def _perturb_of(name: str, attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if name == CLEAN:
        raise ValueError(f"attacks: {CLEAN!r} is the name of the images without an attack")
    perturb = getattr(attack, "perturb", attack)
    if not callable(perturb):
        raise TypeError(
            f"attack {name!r}: expected an object with perturb(images, target) or a function, "
            f"got {type(attack).__name__}"
        )
    made: Callable[[Tensor, Tensor], Tensor] = perturb
    return made


@contextmanager
def _restored(model: Classifier) -> Iterator[None]:
    """In evaluation mode; then modes are as before, and gradients that came are gone."""
    modes = [(m, m.training) for m in model.modules()]
    bare = [p for p in model.parameters() if p.grad is None]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in bare:
            parameter.grad = None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """Rank and number of processes under ``torchrun``; leaves together, when all have finished."""
    if _world_size() == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")  # only a barrier: no tensor is exchanged
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="map", disable=not show, smoothing=0.05) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance
