"""``compare``: any mix of attribution methods over a data set, one row an image, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from captum_robust._processes import progress_bar, ranks, world_size
from captum_robust.benchmark.adaptive_cases import Variant, adaptive_variants, describe_variants
from captum_robust.benchmark.batches import (
    Batch,
    Batches,
    BatchReader,
    Loaded,
    Perturb,
    SampleSource,
    as_jpeg,
    check_choice,
    check_classifier,
    check_settings,
    image_row,
    one_line,
    perturb_of,
)
from captum_robust.benchmark.measure import (
    crops_of_maps,
    measure,
    outcomes,
    picture_of_change,
    stabilities,
    thumbnail,
    true_crops,
)
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog.description import describe_run
from captum_robust.catalog.methods import Method, build_methods, usual_methods
from captum_robust.defenses import DefendedModel, Transform
from captum_robust.metrics.functional import SALIENCY_THRESHOLDS
from captum_robust.models import Classifier
from captum_robust.report.comparison import ATTACK_POOL, CLEAN, GALLERY_POOL, Comparison
from captum_robust.runs.store import AttackRow, ResultRow, RunStore

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
    adaptive: bool = False,
    saliency_metric: bool = False,
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
            None: all of ``METHODS`` but "iterative_mask", which takes minutes for a few images,
            "adversarial_localization", which needs a network that you trained,
            "real_time_masking" where this package has none that is trained for the model, and "lrp"
            where the model has layers without a rule.
        attacks: name -> an object with ``perturb(images, target)``, or such a function; see
            :func:`captum_robust.benchmark.build_attacks`. Names such as "pgd 2/255" say a strength:
            those that differ in it only are one curve. Every method also runs on the clean images.
        out: folder of the run; None: a temporary one, which lives as long as the result.
        limit: only the first so many samples.
        batch_size: images that a method gets at once; part of what a resumed run must repeat.
        target: the class that is explained: ``"label"`` (where there is none, the prediction) or
            ``"prediction"``, that of the classifier; a defended method explains its own.
        fit: ``"squash"``: the whole image at ``model.input_size``; ``"crop"``: the shorter side
            resized to 8/7 of it, then the centre.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast.
        seed: for methods and attacks that draw; each batch gets its own generator state from it.
        adaptive: also attack those who know the defence. For each attack "pgd 2/255" there is
            "pgd 2/255, adaptive", in which a defended method is shown images that were attacked
            through its transforms (:func:`captum_robust.defenses.adaptive_attack`); to a method
            without a defence the plain attack is adaptive already, and its row is repeated. At the
            same strengths, "explanation 2/255" keeps the class and moves the map of each method
            that has a gradient (:class:`captum_robust.attacks.ExplanationAttack`).
        saliency_metric: also measure, on the clean images, how small a crop around each map the
            class survives (:func:`captum_robust.metrics.functional.saliency_metric`): up to 18
            classifier passes an image and method, one for each box that a threshold draws.
        progress: show a progress bar on standard error.

    Returns:
        The comparison, read from the run's folder.

    Raises:
        TypeError: ``model`` is no ``Classifier``; a method that is none of the accepted kinds.
        ValueError: an unknown name, an empty data set, a number out of range, ``adaptive`` without
            an attack, or a folder that holds another run.
    """
    check_classifier(model)
    check_choice("target", target, _TARGETS)
    count = check_settings(dataset, limit, batch_size, fit, precision)
    asked = usual_methods(model) if methods is None else methods
    if isinstance(asked, Iterator):
        asked = list(asked)
    built = build_methods(model, asked)
    if CLEAN in (attacks or {}):
        raise ValueError(f"attacks: {CLEAN!r} is the name of the images without an attack")
    if adaptive and not attacks:
        raise ValueError("adaptive: there is no attack to adapt; give attacks")
    attacked = {name: perturb_of(name, attack) for name, attack in (attacks or {}).items()}

    variants = adaptive_variants(built, attacks or {}, batch_size, target) if adaptive else []

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
    # A run without them has no such entries, as those of earlier versions.
    if adaptive:
        configuration["adaptive"] = describe_variants(variants)
    if saliency_metric:
        configuration["settings"]["saliency_metric"] = SALIENCY_THRESHOLDS
    if out is None and world_size() > 1:
        raise ValueError("out: the processes of a distributed run need one folder to share")
    temporary = TemporaryDirectory(prefix="captum-robust-") if out is None else None
    folder = Path(temporary.name if temporary else str(out))
    store = RunStore(folder, configuration)
    store.write_classes(model.class_names or ())
    reader = BatchReader(model, dataset, fit, precision, seed)
    stages = _stages(built, attacked, variants)
    runner = _Runner(reader, built, stages, store, target, saliency_metric)
    with torch.inference_mode(False), ranks() as (rank, world):
        total = count * sum(len(stage.methods) for stage in runner.stages)
        with progress_bar(total, "map", progress and rank == 0) as advance:
            for start in range(rank * batch_size, count, world * batch_size):
                runner.run_batch(start, min(start + batch_size, count), advance)
    store.close()
    return Comparison(folder, _keep_alive=temporary)


@dataclass(frozen=True)
class _Stage:
    """One set of attacked images, or the clean ones, and the methods that are shown them."""

    attack: str
    """As in the tables."""
    name: str
    """Of this set."""
    methods: tuple[str, ...]
    perturb: Perturb | None
    transforms: tuple[Transform, ...] = ()
    """Those whose averaged scores are attacked; none: the classifier's own."""


def _stages(
    methods: Mapping[str, Method], attacks: Mapping[str, Perturb], variants: Sequence[Variant]
) -> tuple[_Stage, ...]:
    every = tuple(methods)
    return (
        _Stage(CLEAN, CLEAN, every, None),
        *(_Stage(name, name, every, perturb) for name, perturb in attacks.items()),
        *(_Stage(v.attack, v.name, v.methods, v.perturb, v.transforms) for v in variants),
    )


class _OfBatch:
    """What several methods need of one batch of positions, found once."""

    def __init__(self) -> None:
        self.clean_maps: dict[str, dict[int, Tensor]] = {}
        """Of each method, by position, H×W."""
        self.decisions: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = {}
        """By images and transforms, and by position: class and probability."""


@dataclass(frozen=True)
class _Runner:
    reader: BatchReader
    methods: Mapping[str, Method]
    stages: tuple[_Stage, ...]
    store: RunStore
    target: str
    saliency_metric: bool

    def run_batch(self, start: int, stop: int, advance: Callable[[int], None]) -> None:
        """Explain one batch by all methods that have not all their rows of it yet.

        The images are read once, and attacked once by each attack, whatever the methods.
        """
        have = self.store.count(start, stop)
        missing = [
            [m for m in stage.methods if have.get((m, stage.attack), 0) < stop - start]
            for stage in self.stages
        ]
        left = sum(map(len, missing))
        advance((stop - start) * (sum(len(stage.methods) for stage in self.stages) - left))
        if not left:
            return
        loaded = self.reader.load(start, stop)
        images = [image_row(item, picture=item.position < GALLERY_POOL) for item in loaded]
        clean = self.reader.clean(loaded)
        if self.saliency_metric:
            crops = self._true_crops(clean[0])
            for row in images:
                row.true_crop = crops.get(row.position)
        found = _OfBatch()
        for stage, methods in zip(self.stages, missing, strict=True):
            if not methods:
                continue
            prepared = clean
            attacked: list[AttackRow] = []
            if stage.perturb is not None:
                prepared = self.reader.attacked(clean, stage.name, stage.perturb, start)
                attacked = self._attack_rows(prepared, stage, loaded, found)
            for method in methods:
                if stage.perturb is not None and method not in found.clean_maps:
                    # A run that goes on behind the method's clean rows.
                    self._results(clean, loaded, method, self.stages[0], start, found)
                rows = self._results(prepared, loaded, method, stage, start, found)
                self.store.write(rows, images, attacked)
                images, attacked = [], []
                advance(stop - start)

    def _results(
        self,
        prepared: Batches,
        loaded: list[Loaded],
        method: str,
        stage: _Stage,
        start: int,
        found: _OfBatch,
    ) -> list[ResultRow]:
        batches, failed = prepared
        rows = [
            ResultRow(item.position, method, stage.attack, item.image, error=failed[item.position])
            for item in loaded
            if item.position in failed
        ]
        if stage.perturb is None:
            found.clean_maps[method] = {}
        for batch in batches:
            rows += self._explain(batch, method, stage, start, found)
        return rows

    def _explain(
        self, batch: Batch, method: str, stage: _Stage, start: int, found: _OfBatch
    ) -> list[ResultRow]:
        model, asked = self.reader.model, self.methods[method]
        explained = batch.label if self.target == "label" else batch.predicted
        decided: list[int] | None = None
        try:
            images = batch.images.clone()
            target: Tensor | None = explained.clone()
            if asked.transforms:
                classes, _ = self._decided(batch, asked.transforms, stage.name, found)
                decided = classes.tolist()
                if self.target == "prediction":
                    explained, target = classes, None
            with (
                self.reader.undisturbed(start, method + stage.attack),
                count_passes(model) as passes,
            ):
                began = _now(images.device)
                explanation = asked.explain(images, target)
                seconds = _now(images.device) - began
            maps = explanation.maps.detach().float().cpu()
            if maps.shape != (len(batch.images), *batch.images.shape[2:]):
                raise ValueError(
                    f"expected maps {len(batch.images)}×{batch.images.shape[2]}×"
                    f"{batch.images.shape[3]}, got {tuple(maps.shape)}"
                )
            measured = measure(maps, batch.samples, asked)
            for i, item in enumerate(batch.items):
                if item.position < GALLERY_POOL:
                    measured[i]["heat"] = thumbnail(maps[i])
            if explanation.perturbation is not None:
                for i, columns in enumerate(outcomes(explanation.perturbation)):
                    measured[i] |= columns
                    if batch.items[i].position < GALLERY_POOL:
                        measured[i] |= picture_of_change(explanation.perturbation.change[i])
            if self.saliency_metric and stage.perturb is None:
                crops = crops_of_maps(self.reader.scores, batch.images, maps, explained, asked)
                for columns, packed in zip(measured, crops, strict=True):
                    columns["crops"] = packed
            positions = [item.position for item in batch.items]
            clean_maps = found.clean_maps[method]
            if stage.perturb is None:
                clean_maps.update(zip(positions, maps, strict=True))
            elif asked.box is None:  # a fixed box is drawn whatever the image
                for columns, more in zip(
                    measured, stabilities(positions, clean_maps, maps), strict=True
                ):
                    columns |= more
        except Exception as error:  # one image may fail where the others work
            if len(batch.images) > 1:
                singles = [batch.only(i) for i in range(len(batch.images))]
                return [r for b in singles for r in self._explain(b, method, stage, start, found)]
            measured, seconds, passes = [{"error": one_line(error)}], 0.0, None
        n = len(batch.images)
        predicted, confidence = batch.predicted.tolist(), batch.confidence.tolist()
        classes_explained = explained.tolist()
        return [
            ResultRow(
                item.position,
                method,
                stage.attack,
                item.image,
                predicted=predicted[i],
                explained=classes_explained[i],
                confidence=confidence[i],
                decided=None if decided is None else decided[i],
                source=None if stage.name == stage.attack else stage.name,
                seconds=seconds / n if passes else None,
                forward_passes=passes.forward / n if passes else None,
                backward_passes=passes.backward / n if passes else None,
                **measured[i],
            )
            for i, item in enumerate(batch.items)
        ]

    def _true_crops(self, batches: list[Batch]) -> dict[int, bytes | None]:
        """By position; without the images whose boxes cannot be cut out."""
        crops: dict[int, bytes | None] = {}
        for batch in batches:
            classes = batch.label if self.target == "label" else batch.predicted
            try:
                found = true_crops(self.reader.scores, batch.images, batch.samples, classes)
            except ValueError:
                if len(batch.items) > 1:
                    crops |= self._true_crops([batch.only(i) for i in range(len(batch.items))])
                continue
            crops |= zip((item.position for item in batch.items), found, strict=True)
        return crops

    def _decided(
        self, batch: Batch, transforms: tuple[Transform, ...], name: str, found: _OfBatch
    ) -> tuple[Tensor, Tensor]:
        """The classes of the scores averaged over the transforms, and their probabilities."""
        known = found.decisions.setdefault((name, repr(transforms)), {})
        positions = [item.position for item in batch.items]
        if any(p not in known for p in positions):
            # Not in the method's own time: there it finds the class by itself.
            defended = DefendedModel(self.reader.model, transforms, transforms_per_eval=1)
            both = self.reader.classified(batch.images, defended)
            known.update(zip(positions, zip(*both, strict=True), strict=True))
        classes, confidence = zip(*(known[p] for p in positions), strict=True)
        return torch.stack(classes), torch.stack(confidence)

    def _attack_rows(
        self, attacked: Batches, stage: _Stage, loaded: list[Loaded], found: _OfBatch
    ) -> list[AttackRow]:
        """What became of the images that could be read, whatever the methods."""
        batches, failed = attacked
        rows = [
            AttackRow(item.position, stage.name, item.image, error=failed[item.position])
            for item in loaded
            if item.sample is not None and item.position in failed
        ]
        for batch in batches:
            judged = batch
            if stage.transforms:
                clean = replace(batch, images=batch.clean)
                try:
                    before, _ = self._decided(clean, stage.transforms, CLEAN, found)
                    after, confidence = self._decided(batch, stage.transforms, stage.name, found)
                except Exception as error:
                    rows += [
                        AttackRow(item.position, stage.name, item.image, error=one_line(error))
                        for item in batch.items
                    ]
                    continue
                judged = replace(batch, before=before, predicted=after, confidence=confidence)
            for item, columns in zip(batch.items, measure_attack(judged), strict=True):
                rows.append(AttackRow(item.position, stage.name, item.image, **columns))
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
