"""``compare``: any mix of attribution methods over a data set, one row an image, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from captum_robust.benchmark.batches import (
    Batch,
    Batches,
    BatchReader,
    Loaded,
    Perturb,
    SampleSource,
    as_jpeg,
    image_row,
    one_line,
    perturb_of,
)
from captum_robust.benchmark.comparison import ATTACK_POOL, CLEAN, GALLERY_POOL, Comparison
from captum_robust.benchmark.configuration import describe_run
from captum_robust.benchmark.measure import measure, outcomes, picture_of_change, thumbnail
from captum_robust.benchmark.methods import METHODS, Method, build_methods
from captum_robust.benchmark.passes import count_passes
from captum_robust.benchmark.running import (
    check_choice,
    check_classifier,
    check_settings,
    progress_bar,
    ranks,
    world_size,
)
from captum_robust.benchmark.store import AttackRow, ResultRow, RunStore
from captum_robust.models import Classifier

_TARGETS = ("label", "prediction")


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
        attacks: name -> an object with ``perturb(images, target)``, or such a function; see
            :func:`captum_robust.benchmark.build_attacks`. Names such as "pgd 2/255" say a strength:
            those that differ in it only are one curve. Every method also runs on the clean images.
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
    check_classifier(model)
    check_choice("target", target, _TARGETS)
    count = check_settings(dataset, limit, batch_size, fit, precision)
    asked = list(METHODS) if methods is None else methods
    if isinstance(asked, Iterator):
        asked = list(asked)
    built = build_methods(model, asked)
    if CLEAN in (attacks or {}):
        raise ValueError(f"attacks: {CLEAN!r} is the name of the images without an attack")
    attacked = {name: perturb_of(name, attack) for name, attack in (attacks or {}).items()}

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
    if out is None and world_size() > 1:
        raise ValueError("out: the processes of a distributed run need one folder to share")
    temporary = TemporaryDirectory(prefix="captum-robust-") if out is None else None
    folder = Path(temporary.name if temporary else str(out))
    store = RunStore(folder, configuration)
    store.write_classes(model.class_names or ())
    reader = BatchReader(model, dataset, fit, precision, seed)
    runner = _Runner(reader, built, attacked, store, target)
    with torch.inference_mode(False), ranks() as (rank, world):
        total = count * len(built) * (1 + len(attacked))
        with progress_bar(total, "map", progress and rank == 0) as advance:
            for start in range(rank * batch_size, count, world * batch_size):
                runner.run_batch(start, min(start + batch_size, count), advance)
    store.close()
    return Comparison(folder, _keep_alive=temporary)


@dataclass(frozen=True)
class _Runner:
    reader: BatchReader
    methods: Mapping[str, Method]
    attacks: Mapping[str, Perturb]
    store: RunStore
    target: str

    def run_batch(self, start: int, stop: int, advance: Callable[[int], None]) -> None:
        """Explain one batch by all methods that have not all their rows of it yet.

        The images are read once, and attacked once by each attack, whatever the methods.
        """
        have = self.store.count(start, stop)
        missing = {
            attack: [m for m in self.methods if have.get((m, attack), 0) < stop - start]
            for attack in (CLEAN, *self.attacks)
        }
        left = sum(map(len, missing.values()))
        advance((stop - start) * ((1 + len(self.attacks)) * len(self.methods) - left))
        if not left:
            return
        loaded = self.reader.load(start, stop)
        images = [image_row(item, picture=item.position < GALLERY_POOL) for item in loaded]
        clean = self.reader.clean(loaded)
        for attack, methods in missing.items():
            if not methods:
                continue
            prepared = clean
            attacked: list[AttackRow] = []
            if attack != CLEAN:
                prepared = self.reader.attacked(clean, attack, self.attacks[attack], start)
                attacked = _attack_rows(prepared, attack, loaded)
            for method in methods:
                rows = self._results(prepared, loaded, method, attack, start)
                self.store.write(rows, images, attacked)
                images, attacked = [], []
                advance(stop - start)

    def _results(
        self, prepared: Batches, loaded: list[Loaded], method: str, attack: str, start: int
    ) -> list[ResultRow]:
        batches, failed = prepared
        rows = [
            ResultRow(item.position, method, attack, item.image, error=failed[item.position])
            for item in loaded
            if item.position in failed
        ]
        for batch in batches:
            rows += self._explain(batch, method, attack, start)
        return rows

    def _explain(self, batch: Batch, method: str, attack: str, start: int) -> list[ResultRow]:
        model = self.reader.model
        explained = batch.label if self.target == "label" else batch.predicted
        try:
            explain = self.methods[method].explain
            images, target = batch.images.clone(), explained.clone()
            with self.reader.undisturbed(start, method + attack), count_passes(model) as passes:
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
            measured, seconds, passes = [{"error": one_line(error)}], 0.0, None
        n = len(batch.images)
        predicted, confidence = batch.predicted.tolist(), batch.confidence.tolist()
        classes = explained.tolist()
        return [
            ResultRow(
                item.position,
                method,
                attack,
                item.image,
                predicted=predicted[i],
                explained=classes[i],
                confidence=confidence[i],
                seconds=seconds / n if passes else None,
                forward_passes=passes.forward / n if passes else None,
                backward_passes=passes.backward / n if passes else None,
                **measured[i],
            )
            for i, item in enumerate(batch.items)
        ]


def _attack_rows(attacked: Batches, attack: str, loaded: list[Loaded]) -> list[AttackRow]:
    """What became of the images that could be read, whatever the methods."""
    batches, failed = attacked
    rows = [
        AttackRow(item.position, attack, item.image, error=failed[item.position])
        for item in loaded
        if item.sample is not None and item.position in failed
    ]
    for batch in batches:
        for item, columns in zip(batch.items, measure_attack(batch), strict=True):
            rows.append(AttackRow(item.position, attack, item.image, **columns))
    return rows


def measure_attack(batch: Batch) -> list[dict[str, Any]]:
    """Of each attacked image the columns of its row."""
    change = batch.images - batch.clean
    flat = change.flatten(1).float()
    already = batch.before != batch.label
    columns = {
        "label": batch.label,
        "before": batch.before,
        "predicted": batch.predicted,
        "confidence": batch.confidence,
        "already": already,
        "fooled": ~already & (batch.predicted != batch.label),
        "linf": flat.abs().amax(dim=1),
        "l2": flat.norm(dim=1),
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    rows = [{name: lists[name][i] for name in lists} for i in range(len(batch.items))]
    for i, item in enumerate(batch.items):
        if item.position < ATTACK_POOL:
            shown = picture_of_change(change[i])
            rows[i]["change"] = shown["perturbation"]
            rows[i]["amplification"] = shown["amplification"]
            rows[i]["picture"] = as_jpeg(batch.images[i].clamp(0, 1))
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
