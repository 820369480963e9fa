"""``compare``: any mix of attribution methods over a data set, one row an image, resumable."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_finite, check_type
from captum_robust._contexts import PRECISIONS
from captum_robust._processes import is_first, world_size
from captum_robust._threads import copied
from captum_robust.benchmark import measure
from captum_robust.benchmark.adaptive_cases import Stage, adaptive_stages, describe_stages
from captum_robust.benchmark.batches import (
    Batch,
    Batches,
    BatchReader,
    Columns,
    check_settings,
    columns_of,
    each,
    image_row,
    perturb_of,
    rows_of,
    samples_of,
)
from captum_robust.benchmark.beside import Pool
from captum_robust.benchmark.explained import (
    Explained,
    Measuring,
    MethodResults,
    Work,
    is_compiled,
    joined,
    now,
    scores_seen,
)
from captum_robust.benchmark.measures import (
    NOISE,
    REMOVAL,
    ROAD,
    SQUARES,
    STAGES,
    described_measures,
)
from captum_robust.benchmark.passes import count_passes
from captum_robust.benchmark.reading import Loaded, one_line
from captum_robust.benchmark.runner import Coming, Runner
from captum_robust.catalog.certification import Certification
from captum_robust.catalog.description import describe_run
from captum_robust.catalog.methods import (
    Explanation,
    Method,
    build_methods,
    named_methods,
    usual_methods,
)
from captum_robust.catalog.words import words_of
from captum_robust.defenses import DefendedModel, Transform
from captum_robust.metrics.functional import infidelity_of, layers_with_weights
from captum_robust.metrics.functional import sensitivity as sensitivity_of
from captum_robust.metrics.functional.stability import SSIM_WINDOW
from captum_robust.models import Classifier
from captum_robust.report.comparison import Comparison
from captum_robust.report.results import CLEAN, GALLERY_POOL
from captum_robust.runs.machine import is_of_machine
from captum_robust.runs.rows import AttackRow, ImageRow
from captum_robust.runs.store import RunStore

_TARGETS = ("label", "prediction")


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
    workers: int = 0,
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
        workers: processes that read the images ahead of the model. 0: threads of this process do,
            and on a CPU of which the model uses all cores, only where no method is timed. The rows
            are the same.
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
    check_settings(model, limit, batch_size, fit, workers)
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
    certify = _certification(certify)
    also = (saliency_metric, faithfulness, sensitivity, randomization, certify)
    configuration["settings"] |= described_measures(*also)
    alone = out is not None or world_size() == 1
    check(alone, "out: the processes of a distributed run need one folder to share")
    temporary = TemporaryDirectory(prefix="captum-robust-") if out is None else None
    folder = Path(temporary.name if temporary else str(out))
    reader = BatchReader(model, source, fit, precision, seed, pictured=GALLERY_POOL)
    store = RunStore(folder, configuration)
    # The methods that are shown the same images follow each other.
    tasks = [(stage, method) for stage in [*stages, *cases] for method in stage.methods]
    runner = _Comparing(reader, store, tasks, built, target, *also)
    runner.run(count, batch_size, "map", progress, retry, workers)
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
class _Comparing(Runner[_Task]):
    """Explains each batch by all methods; it is attacked once by each attack."""

    methods: Mapping[str, Method]
    target: str
    saliency_metric: bool
    faithfulness: bool
    sensitivity: bool
    randomization: bool
    certify: Certification | None
    foretold: dict[tuple[str, tuple[Loaded, ...]], tuple[Explanation, dict[str, float]]] = field(
        default_factory=dict
    )
    """What the first method said of the clean images, whose classes were read off its pass."""

    def missing(self, start: int, stop: int, kept: Collection[int]) -> list[_Task]:
        pairs = dict.fromkeys((method, stage.attack) for stage, method in self.tasks)
        keys = [{"method": method, "attack": attack} for method, attack in pairs]
        rows = self.store.of_positions("results", "", start, stop, keys)
        done = (row for row in rows if row["error"] is None or row["position"] in kept)
        have = Counter((row["method"], row["attack"]) for row in done)
        names = [{"attack": name} for name in dict.fromkeys(s.name for s, _ in self.tasks)]
        rows = self.store.of_positions("attacked", "", start, stop, names)
        wrong = (row for row in rows if row["error"] is not None)
        failed = {row["attack"] for row in wrong if row["position"] not in kept}
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
        rows = [image_row(item) for item in loaded]
        # Without the images whose boxes cannot be cut out.
        crops = columns_of(clean, self._true_crops, ValueError) if self.saliency_metric else {}
        for item, row in zip(loaded, rows, strict=True):
            row.true_crop = crops.get(item, {}).get("true_crop")
        return rows

    def rows(
        self, tasks: Sequence[_Task], start: int, clean: Batches, pool: Pool
    ) -> Iterator[Coming]:
        work = Work(start, clean, pool)
        for stage, of_stage in groupby(tasks, itemgetter(0)):
            batches, attack_rows = clean, []
            if stage.perturb is not None:
                batches = self.reader.attacked(clean, stage.name, stage.perturb, start)
                attack_rows = self._attack_rows(batches, stage, work)
            for _, method in of_stage:
                if stage.perturb is not None:
                    if method not in work.clean_rows:
                        # A run that goes on behind the method's clean rows.
                        self._results(clean, method, self.tasks[0][0], work)
                    work.clean_rows[method].results()  # without the maps of which there are none
                made = self._results(batches, method, stage, work)
                yield Coming(made.results, made.is_ready, attack_rows)
                attack_rows = []
        work.clean_rows.clear()  # they know the work: what knows each other is freed late

    def _results(self, batches: Batches, method: str, stage: Stage, work: Work) -> MethodResults:
        if stage.perturb is None:
            work.clean_maps[method] = {}

        def again(batch: Batch) -> Columns:
            """The columns of a batch of which some could not be measured."""
            if stage.perturb is None:
                for item in batch:
                    work.clean_maps[method].pop(item, None)
            one_by_one = [batch[i : i + 1] for i in range(len(batch))]
            measured = partial(self._explained, method, stage, work)
            return columns_of((one_by_one, {}), lambda one: measured(one, at_once=True).columns())

        made, failed = each(batches, partial(self._explained, method, stage, work))
        results = MethodResults(method, stage.attack, made, failed, again)
        if stage.perturb is None:
            work.clean_rows[method] = results
        return results

    def _explained(
        self, method: str, stage: Stage, work: Work, batch: Batch, *, at_once: bool = False
    ) -> Explained:
        """What is known of one batch; of one image alone also where the method fails on it.

        It is still being measured, unless ``at_once``.
        """
        transforms = self.methods[method].transforms
        facts = {"predicted": batch.predicted, "confidence": batch.confidence}
        facts["explained"] = batch.label if self.target == "label" else batch.predicted
        try:
            if transforms:
                facts["decided"], _ = self._decided(batch, transforms, stage.name, work)
                if self.target == "prediction":
                    facts["explained"] = facts["decided"]
            measured, coming = self._measured(batch, method, stage, facts["explained"], work)
            if at_once:
                for future in chain.from_iterable(coming):
                    future.result()
        except Exception as error:
            if len(batch) > 1 or is_of_machine(error):
                raise
            measured, coming = [{"error": one_line(error)}], []
        source = {} if stage.name == stage.attack else {"source": stage.name}
        rows = zip(rows_of(facts), measured, strict=True)
        known = [{**fact, **source, **row} for fact, row in rows]
        return Explained(batch, known, coming)

    def _measured(
        self, batch: Batch, name: str, stage: Stage, explained: Tensor, work: Work
    ) -> tuple[list[dict[str, Any]], list[Measuring]]:
        """The columns of each image's map: cost and pictures, and metrics still being measured."""
        method, n = self.methods[name], len(batch)
        images = copied(batch.images) if method.box is None else batch.images
        by_itself = method.transforms and self.target == "prediction"
        target = None if by_itself else explained.clone()
        draws = (work.start, name + stage.attack)
        known = None if stage.perturb else self.foretold.pop((name, batch.items), None)
        explanation, cost = known or self._called(name, draws, images, target)
        maps = explanation.maps.detach().float().cpu()
        expected, got = (n, *batch.images.shape[2:]), tuple(maps.shape)
        check(got == expected, f"expected maps {'×'.join(map(str, expected))}, got {got}")
        check_finite(maps, "maps")
        boxes = method.boxes(explanation)
        coming = [work.pool.submit_parts(measure.map_columns, maps, batch, boxes)]
        parts = [[cost] * n]
        if explanation.perturbation is not None:
            parts.append(measure.change_columns(explanation.perturbation, batch))
        if stage.perturb is None:
            scores, shown = self.reader.scores, (batch.images, maps, explained)
            if self.saliency_metric:
                parts.append(measure.crop_columns(scores, *shown, method))
            if self.faithfulness:
                parts.append(measure.removal_columns(scores, *shown, REMOVAL, ROAD))
                worth = self._infidelity(batch, maps, explained, work)
                parts.append(rows_of({"infidelity": worth}))

            def again(images: Tensor, classes: Tensor) -> Tensor:
                with self.reader.undisturbed(*draws):
                    return method.explain(images, None if by_itself else classes).maps.cpu()

            if self.sensitivity:
                moved = sensitivity_of(again, batch.images, explained, maps=maps, **NOISE)
                parts.append(rows_of({"sensitivity": moved}))
            if self.randomization:
                of = (self.reader.model, again, batch.images, maps, explained, STAGES)
                parts.append(measure.randomization_columns(*of))
            if self.certify is not None:
                asked = self.reader.model, method, batch.images, target
                with self.reader.undisturbed(*draws):
                    parts.append(measure.certificate_columns(self.certify.of(*asked), batch))
            work.clean_maps[name].update(zip(batch, maps, strict=True))
        elif method.box is None:  # a fixed box is drawn whatever the image
            made = partial(measure.stability_columns, dict(work.clean_maps[name]))
            coming.append(work.pool.submit_parts(made, batch.items, maps))
        return joined(parts), coming

    def _called(
        self, name: str, draws: tuple[int, str], images: Tensor, target: Tensor | None
    ) -> tuple[Explanation, dict[str, float]]:
        """What the method says of images, and what that costs for each of them."""
        with (
            self.turns.timed(),
            self.reader.undisturbed(*draws),
            count_passes(self.reader.model) as passes,
        ):
            began = now(images.device)
            explanation = self.methods[name].explain(images, target)
            seconds = now(images.device) - began
        of_all = (seconds, passes.forward, passes.backward)
        names = ("seconds", "forward_passes", "backward_passes")
        return explanation, {k: v / len(images) for k, v in zip(names, of_all, strict=True)}

    def clean(self, tasks: Sequence[_Task], start: int, loaded: Sequence[Loaded]) -> Batches:
        """The batch, whose classes are read off the pass of the first method where that has one."""
        self.foretold.clear()
        (stage, name), model = tasks[0], self.reader.model
        is_seen = stage.perturb is None and self.target == "label" and not is_compiled(model)
        if not is_seen or self.methods[name].scored_by is not model:
            return self.reader.clean(loaded)

        def scores(items: tuple[Loaded, ...], images: Tensor, labels: Tensor) -> Tensor | None:
            try:
                with scores_seen(model, images) as seen:
                    made = self._called(name, (start, name + stage.attack), copied(images), labels)
            except Exception as error:
                if is_of_machine(error):
                    raise
                return None  # it fails again where its row says so
            if len(seen) == 1:
                self.foretold[name, items] = made
            return seen[0] if len(seen) == 1 else None

        return self.reader.clean(loaded, scores)

    def _infidelity(self, batch: Batch, maps: Tensor, explained: Tensor, work: Work) -> Tensor:
        """N, of what squares are worth to the classifier, which is the same for all methods."""
        keys = list(zip(batch, explained.tolist(), strict=True))
        if any(key not in work.drops for key in keys):
            squares, drops = measure.drops_of(self.reader.scores, batch.images, explained, SQUARES)
            work.drops.update({key: (squares, own) for key, own in zip(keys, drops, strict=True)})
        known = [work.drops[key] for key in keys]
        return infidelity_of(maps, known[0][0], torch.stack([d for _, d in known]).cpu())

    def _true_crops(self, batch: Batch) -> Columns:
        classes = batch.label if self.target == "label" else batch.predicted
        crops = measure.true_crops(self.reader.scores, batch.images, batch.samples, classes)
        return {item: {"true_crop": crop} for item, crop in zip(batch, crops, strict=True)}

    def _decided(
        self, batch: Batch, transforms: tuple[Transform, ...], images: str, work: Work
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

    def _attack_rows(self, attacked: Batches, stage: Stage, work: Work) -> list[AttackRow]:
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
