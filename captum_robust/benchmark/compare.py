"""``compare``: any mix of attribution methods over a data set, one row an image, resumable."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_type
from captum_robust._contexts import PRECISIONS
from captum_robust._processes import is_first, world_size
from captum_robust.benchmark import measure
from captum_robust.benchmark.adaptive_cases import Stage, adaptive_stages, describe_stages
from captum_robust.benchmark.batches import (
    Batch,
    Batches,
    BatchReader,
    Columns,
    Loaded,
    check_settings,
    columns_of,
    image_row,
    one_line,
    perturb_of,
    rows_of,
    samples_of,
)
from captum_robust.benchmark.passes import count_passes
from captum_robust.benchmark.runner import Rows, Runner
from captum_robust.catalog.certification import Certification
from captum_robust.catalog.description import describe_run
from captum_robust.catalog.methods import Method, build_methods, named_methods, usual_methods
from captum_robust.catalog.words import words_of
from captum_robust.defenses import DefendedModel, Transform
from captum_robust.metrics import functional as metrics
from captum_robust.metrics.functional import (
    REMOVAL_STEPS,
    SALIENCY_THRESHOLDS,
    layers_with_weights,
)
from captum_robust.metrics.functional.stability import SSIM_WINDOW
from captum_robust.models import Classifier
from captum_robust.report.comparison import Comparison
from captum_robust.report.results import CLEAN, GALLERY_POOL
from captum_robust.runs.machine import is_of_machine
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore

_TARGETS = ("label", "prediction")
_REMOVAL = {"steps": REMOVAL_STEPS, "deletion_fill": "mean", "insertion_fill": "blur"}
_SQUARES = {"squares": metrics.INFIDELITY_SQUARES, "fill": "mean", "seed": 0}
_ROAD: dict[str, Any] = {"shares": [0.1, 0.3, 0.5, 0.7, 0.9], "noise": 0.01, "seed": 0}
_STAGES: dict[str, Any] = {"stages": 3, "seed": 0}
_NOISE: dict[str, Any] = {
    "radius": metrics.SENSITIVITY_RADIUS,
    "samples": metrics.SENSITIVITY_SAMPLES,
    "seed": 0,
}


class RunWarning(UserWarning):
    """A method failed on every image of a run, or nothing was scored."""


def compare(
    model: Classifier,
    dataset: Any,
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
    faithfulness: bool = False,
    sensitivity: bool = False,
    randomization: bool = False,
    certify: float | Certification | None = None,
    retry: bool = True,
    progress: bool = True,
) -> Comparison:
    """Run the methods over the data set and keep one row for each image, method and attack.

    A run that was killed goes on where it stopped when it is started again with the same
    arguments and folder, also under another number of ranks: under ``torchrun`` these share the
    batches and the folder, in which each has a file of rows. Memory does not grow with the number
    of images.

    Args:
        model: runs where its parameters are; put in evaluation mode while it lasts.
        dataset: samples with boxes or masks, see :mod:`captum_robust.data`; or the path of a folder
            of images. Or images of PIL or tensors, pairs (image, class index), triples with boxes
            M×4, batches of these, a ``DataLoader``, torchvision's data sets, or a data frame of
            pandas with the columns path, label and boxes (or x0, y0, x1, y1), as
            ``captum_robust.data.given.sample_source`` says. Without boxes images are not scored
            for localization.
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
            class survives (:func:`captum_robust.metrics.functional.saliency_metric`): up to 22
            classifier passes an image and method, one for each box that a threshold draws.
        faithfulness: also measure, on the clean images, how the class goes with the largest pixels
            of each map, and comes with them
            (:func:`captum_robust.metrics.functional.removal_curves`): 65 classifier passes an
            image and method; what it keeps without the pixels that matter most, and least, where
            their neighbours fill them (:func:`captum_robust.metrics.functional.road`): 10; and how
            badly the map foretells what squares are worth
            (:func:`captum_robust.metrics.functional.infidelity`): 33 an image for all methods.
        sensitivity: also measure, on the clean images, how far noise moves each map
            (:func:`captum_robust.metrics.functional.sensitivity`): ten times the method's own
            passes.
        randomization: also measure, on the clean images, how far each map stays the same while the
            classifier loses its weights, in three stages from the last layer to the first
            (:func:`captum_robust.metrics.functional.model_randomization`): three times the method's
            own passes. A method that does not look at the classifier keeps its map.
        certify: standard deviation of noise, with pixels in [0, 1], or a
            :class:`~captum_robust.benchmark.Certification`: also measure, on the clean images, what
            of each map and box no attacker can move who changes an image by at most a radius in L2
            (:class:`captum_robust.attr.Certified`): as many times the method's own passes as there
            are samples, 100 by default. A box that is the same for all images costs nothing.
        retry: when a run goes on, make the rows with errors again. Without it they are kept, and a
            run also goes on where nearly all images can't be opened.
        progress: show a progress bar on standard error.

    Returns:
        The comparison, read from the run's folder.

    Warns:
        RunWarning: a method failed on every image, with the most frequent reason; or no image has a
            box, so that nothing was scored.

    Raises:
        TypeError: ``model`` is no ``Classifier``; a data set or a method that is none of the
            accepted kinds.
        ValueError: an unknown name, an empty data set, a number out of range, ``adaptive`` without
            an attack, ``randomization`` of a classifier of fewer than three layers or of inputs
            below 11×11 pixels, or a folder that holds another run.
        OSError: memory or the disk's room ran out (a batch is halved once first), or nearly all
            images can't be opened, as when their folder is away; no row is made of that.
    """
    check_settings(model, limit, batch_size, fit)
    check_choice("precision", precision, PRECISIONS)
    check_choice("target", target, _TARGETS)
    attacks = attacks or {}
    named = named_methods(usual_methods(model) if methods is None else methods)
    built = build_methods(model, named)
    check(CLEAN not in attacks, f"attacks: {CLEAN!r} is the name of the images without an attack")
    if randomization:
        fits = min(model.input_size) >= SSIM_WINDOW and len(layers_with_weights(model)) >= 3
        least = f"{SSIM_WINDOW}×{SSIM_WINDOW} pixels and three layers with parameters"
        check(fits, f"randomization: expected a classifier with an input of at least {least}")
    check(attacks or not adaptive, "adaptive: there is no attack to adapt; give attacks")
    every = tuple(built)
    stages = [Stage(CLEAN, CLEAN, every, None)]
    stages += [Stage(name, name, every, perturb_of(name, a)) for name, a in attacks.items()]
    cases = adaptive_stages(built, attacks, batch_size, target) if adaptive else []
    settings = {
        "batch_size": batch_size,
        "target": target,
        "fit": fit,
        "precision": precision,
        "seed": seed,
    }
    source, count = samples_of(model, dataset, limit)
    configuration = describe_run(model, source, count, named, attacks, settings)
    # A run without them has no such entries, as those of earlier versions.
    if adaptive:
        configuration["adaptive"] = describe_stages(cases)
    if saliency_metric:
        configuration["settings"]["saliency_metric"] = SALIENCY_THRESHOLDS
    if faithfulness:
        configuration["settings"]["faithfulness"] = {
            **_REMOVAL,
            "road": _ROAD,
            "infidelity": _SQUARES,
        }
    if sensitivity:
        configuration["settings"]["sensitivity"] = _NOISE
    if randomization:
        configuration["settings"]["randomization"] = _STAGES
    certify = _certification(certify)
    if certify is not None:
        configuration["settings"]["certificates"] = certify.facts()
    alone = out is not None or world_size() == 1
    check(alone, "out: the processes of a distributed run need one folder to share")
    temporary = TemporaryDirectory(prefix="captum-robust-") if out is None else None
    folder = Path(temporary.name if temporary else str(out))
    reader = BatchReader(model, source, fit, precision, seed)
    store = RunStore(folder, configuration)
    # The methods that are shown the same images follow each other.
    tasks = [(stage, method) for stage in [*stages, *cases] for method in stage.methods]
    also = (saliency_metric, faithfulness, sensitivity, randomization, certify)
    runner = _Comparing(reader, store, tasks, built, target, *also)
    runner.run(count, batch_size, "map", progress, retry)
    # What the ranks wrote is read together by who asks for it, which may be the first alone.
    result = Comparison(folder, _keep_alive=temporary, _lazy=not is_first())
    if is_first():
        for sentence in [*result.complete_failures(), *result.left_unscored()]:
            warnings.warn(sentence, RunWarning, stacklevel=2)
    return result


def _certification(certify: float | Certification | None) -> Certification | None:
    if isinstance(certify, float | int):
        certify = Certification(certify)
    check_type("certify", certify, Certification | None, "a number or a Certification")
    return certify


_Task: TypeAlias = tuple[Stage, str]
"""Images, and a method that is shown them."""


@dataclass(frozen=True)
class _Work:
    """What several methods need of one batch of positions, computed once."""

    start: int
    clean: Batches
    clean_maps: dict[str, dict[Loaded, Tensor]] = field(default_factory=dict)
    """By method and by image, H×W."""
    decisions: dict[tuple[str, str], dict[Loaded, tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )
    """By attack and transforms, and by image: class and probability."""
    drops: dict[tuple[Loaded, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By image and explained class: the removed squares, and what each of them takes."""


@dataclass(frozen=True)
class _Comparing(Runner[_Task]):
    """Explains each batch by all methods; it is attacked once by each attack."""

    methods: Mapping[str, Method]
    target: str
    saliency_metric: bool
    faithfulness: bool
    sensitivity: bool
    randomization: bool
    certify: Certification | None

    def missing(self, start: int, stop: int, kept: Collection[int]) -> list[_Task]:
        have = self.store.count(start, stop, kept)
        failed = self.store.failed_attacks(start, stop, kept)
        return [
            (stage, method)
            for stage, method in self.tasks
            if have.get((method, stage.attack), 0) < stop - start
            or (stage.name in failed and method == stage.methods[0])  # its rows bring the attack's
        ]

    def name_of(self, task: _Task) -> str:
        stage, method = task
        words = words_of(method)
        return words if stage.perturb is None else f"{words} under {stage.name}"

    def image_rows(self, loaded: Sequence[Loaded], clean: Batches) -> list[ImageRow]:
        rows = [image_row(item, picture=item.position < GALLERY_POOL) for item in loaded]
        # Without the images whose boxes cannot be cut out.
        crops = columns_of(clean, self._true_crops, ValueError) if self.saliency_metric else {}
        for item, row in zip(loaded, rows, strict=True):
            row.true_crop = crops.get(item, {}).get("true_crop")
        return rows

    def rows(self, tasks: Sequence[_Task], start: int, clean: Batches) -> Rows:
        work = _Work(start, clean)
        for stage, of_stage in groupby(tasks, itemgetter(0)):
            batches, attack_rows = clean, []
            if stage.perturb is not None:
                batches = self.reader.attacked(clean, stage.name, stage.perturb, start)
                attack_rows = self._attack_rows(batches, stage, work)
            for _, method in of_stage:
                if stage.perturb is not None and method not in work.clean_maps:
                    # A run that goes on behind the method's clean rows.
                    self._results(clean, method, self.tasks[0][0], work)
                yield self._results(batches, method, stage, work), attack_rows
                attack_rows = []

    def _results(self, batches: Batches, method: str, stage: Stage, work: _Work) -> list[ResultRow]:
        if stage.perturb is None:
            work.clean_maps[method] = {}
        columns = columns_of(batches, partial(self._explained, method, stage, work))
        return [
            ResultRow(item.position, method, stage.attack, item.image, **row)
            for item, row in columns.items()
        ]

    def _explained(self, method: str, stage: Stage, work: _Work, batch: Batch) -> Columns:
        """The columns of one batch; of one image alone also where the method fails on it."""
        transforms = self.methods[method].transforms
        facts = {"predicted": batch.predicted, "confidence": batch.confidence}
        facts["explained"] = batch.label if self.target == "label" else batch.predicted
        try:
            if transforms:
                facts["decided"], _ = self._decided(batch, transforms, stage.name, work)
                if self.target == "prediction":
                    facts["explained"] = facts["decided"]
            measured = self._measured(batch, method, stage, facts["explained"], work)
        except Exception as error:
            if len(batch) > 1 or is_of_machine(error):
                raise
            measured = [{"error": one_line(error)}]
        source = {} if stage.name == stage.attack else {"source": stage.name}
        rows = zip(rows_of(facts), measured, strict=True)
        return {i: {**fact, **source, **row} for i, (fact, row) in zip(batch, rows, strict=True)}

    def _measured(
        self, batch: Batch, name: str, stage: Stage, explained: Tensor, work: _Work
    ) -> list[dict[str, Any]]:
        """The columns of each image's map: its cost, the metrics and the pictures."""
        method, n = self.methods[name], len(batch)
        images = batch.images.clone()
        by_itself = method.transforms and self.target == "prediction"
        target = None if by_itself else explained.clone()
        draws = (work.start, name + stage.attack)
        with self.reader.undisturbed(*draws), count_passes(self.reader.model) as passes:
            began = _now(images.device)
            explanation = method.explain(images, target)
            seconds = _now(images.device) - began
        maps = explanation.maps.detach().float().cpu()
        expected, got = (n, *batch.images.shape[2:]), tuple(maps.shape)
        check(got == expected, f"expected maps {'×'.join(map(str, expected))}, got {got}")
        cost = {
            "seconds": seconds / n,
            "forward_passes": passes.forward / n,
            "backward_passes": passes.backward / n,
        }
        parts = [[cost] * n, measure.map_columns(maps, batch, method.boxes(explanation))]
        if explanation.perturbation is not None:
            parts.append(measure.change_columns(explanation.perturbation, batch))
        if stage.perturb is None:
            scores, shown = self.reader.scores, (batch.images, maps, explained)
            if self.saliency_metric:
                parts.append(measure.crop_columns(scores, *shown, method))
            if self.faithfulness:
                parts.append(measure.removal_columns(scores, *shown, _REMOVAL, _ROAD))
                worth = self._infidelity(batch, maps, explained, work)
                parts.append(rows_of({"infidelity": worth}))

            def again(images: Tensor, classes: Tensor) -> Tensor:
                with self.reader.undisturbed(*draws):
                    return method.explain(images, None if by_itself else classes).maps.cpu()

            if self.sensitivity:
                moved = metrics.sensitivity(again, batch.images, explained, maps=maps, **_NOISE)
                parts.append(rows_of({"sensitivity": moved}))
            if self.randomization:
                of = (self.reader.model, again, batch.images, maps, explained, _STAGES)
                parts.append(measure.randomization_columns(*of))
            if self.certify is not None:
                asked = self.reader.model, method, batch.images, target
                with self.reader.undisturbed(*draws):
                    parts.append(measure.certificate_columns(self.certify.of(*asked), batch))
            work.clean_maps[name].update(zip(batch, maps, strict=True))
        elif method.box is None:  # a fixed box is drawn whatever the image
            parts.append(measure.stability_columns(batch.items, work.clean_maps[name], maps))
        return [dict(chain.from_iterable(map(dict.items, row))) for row in zip(*parts, strict=True)]

    def _infidelity(self, batch: Batch, maps: Tensor, explained: Tensor, work: _Work) -> Tensor:
        """N, of what squares are worth to the classifier, which is the same for all methods."""
        keys = list(zip(batch, explained.tolist(), strict=True))
        if any(key not in work.drops for key in keys):
            squares, drops = measure.drops_of(self.reader.scores, batch.images, explained, _SQUARES)
            work.drops.update({key: (squares, own) for key, own in zip(keys, drops, strict=True)})
        known = [work.drops[key] for key in keys]
        return metrics.infidelity_of(maps, known[0][0], torch.stack([d for _, d in known]).cpu())

    def _true_crops(self, batch: Batch) -> Columns:
        classes = batch.label if self.target == "label" else batch.predicted
        crops = measure.true_crops(self.reader.scores, batch.images, batch.samples, classes)
        return {item: {"true_crop": crop} for item, crop in zip(batch, crops, strict=True)}

    def _decided(
        self, batch: Batch, transforms: tuple[Transform, ...], images: str, work: _Work
    ) -> tuple[Tensor, Tensor]:
        """The classes of the scores averaged over the transforms, and their probabilities."""
        known = work.decisions.setdefault((images, repr(transforms)), {})
        if any(item not in known for item in batch):
            # Not in the method's own time: there it finds the class by itself.
            defended = DefendedModel(self.reader.model, transforms, transforms_per_eval=1)
            both = self.reader.classified(batch.images, defended)
            known.update(zip(batch, zip(*both, strict=True), strict=True))
        classes, confidence = zip(*(known[item] for item in batch), strict=True)
        return torch.stack(classes), torch.stack(confidence)

    def _attack_rows(self, attacked: Batches, stage: Stage, work: _Work) -> list[AttackRow]:
        """What became of the images that could be read, whatever the methods."""
        batches, failed = attacked

        def judged(batch: Batch) -> Columns:
            if stage.transforms:  # by the scores that the attack is on
                clean = replace(batch, images=batch.clean)
                before, _ = self._decided(clean, stage.transforms, CLEAN, work)
                after, confidence = self._decided(batch, stage.transforms, stage.name, work)
                batch = replace(batch, before=before, predicted=after, confidence=confidence)
            return dict(zip(batch, measure.attack_columns(batch), strict=True))

        read = {item: row for item, row in failed.items() if item.sample is not None}
        columns = columns_of((batches, read), judged)
        return [
            AttackRow(item.position, stage.name, item.image, **row) for item, row in columns.items()
        ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
