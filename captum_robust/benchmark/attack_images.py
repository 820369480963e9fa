"""Adversarial images as PNG files that still fool when they are read back; resumable."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust._files import write_whole
from captum_robust._processes import is_first
from captum_robust._progress import counted
from captum_robust.attacks import Attack
from captum_robust.attacks.attack import of_8_bits
from captum_robust.benchmark.batches import (
    Batch,
    Batches,
    BatchReader,
    Columns,
    Perturb,
    check_settings,
    image_row,
    outcome_columns,
    rows_of,
    samples_of,
)
from captum_robust.benchmark.beside import Pool
from captum_robust.benchmark.reading import Loaded
from captum_robust.benchmark.robust_accuracy import in_ball, rounded_attack
from captum_robust.benchmark.runner import Coming, Runner
from captum_robust.catalog.attacks import strength_of
from captum_robust.catalog.description import describe_run
from captum_robust.data import LocalizationDataset, Sample, load_image
from captum_robust.data.image_lists import images_at, png_names, safe_name
from captum_robust.data.images import without_pillow_notes
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of
from captum_robust.report.attack_run import AttackRun
from captum_robust.runs.machine import stops
from captum_robust.runs.rows import AttackRow, ImageRow
from captum_robust.runs.store import RunStore


class Photographs(LocalizationDataset):
    """Image files as a data set, without labels.

    Args:
        paths: image files, and folders of such.
        without: a folder that is left out.

    Raises:
        FileNotFoundError: there is no such image or folder.
        ValueError: there are no images in a folder.
    """

    kind = "image"

    def __init__(self, paths: Sequence[Path], *, without: Path) -> None:
        self._files = images_at(paths, without=without)
        self.root = Path(os.path.commonpath([f.absolute() for f in self._files.values()]))
        self.ids = list(self._files)

    def _load(self, index: int) -> Sample:
        file = self._files[self.ids[index]]
        return Sample(load_image(file), None, torch.zeros(0, 4), self.ids[index], source=str(file))


def attack_images(
    model: Classifier,
    dataset: Any,
    attacks: Mapping[str, Attack],
    out: str | Path,
    *,
    target: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    fit: str = "squash",
    seed: int = 0,
    keep_all: bool = False,
    retry: bool = True,
    workers: int = 0,
    progress: bool = True,
) -> AttackRun:
    """Attack the images of a data set and write those that fool the model as PNG files.

    The files have the size of the model's input and hold what was scored: an image counts as
    fooled when the pixels of its file, read back, are misclassified. Images that are misclassified
    to begin with are not attacked, and counted apart. An image without a label is measured against
    the model's own prediction.

    A run that was killed goes on where it stopped when it is started again with the same
    arguments. Under ``torchrun`` the processes share the batches.

    Args:
        model: runs where its parameters are.
        dataset: as for :func:`captum_robust.benchmark.compare`; no boxes are needed.
        attacks: name -> attack; see :func:`captum_robust.benchmark.build_attacks`. The files of
            each have a folder of their own.
        out: folder of the run.
        target: the class to move towards instead of away from the label. Images of that class are
            skipped.
        limit: only the first so many images.
        batch_size: images that are attacked at once; part of what a resumed run must repeat.
        fit, seed: as for :func:`captum_robust.benchmark.compare`.
        keep_all: also write the images that do not fool.
        retry, workers: as for :func:`captum_robust.benchmark.compare`.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: ``model`` is no ``Classifier``.
        ValueError: a number out of range, no attack, a target that all images are of, or a folder
            that holds another run.
        OSError: as of :func:`captum_robust.benchmark.compare`.
    """
    check_settings(model, limit, batch_size, fit, workers)
    check(attacks, "attacks: expected at least one")
    apart = len({_folder_of(name) for name in attacks}) == len(attacks)
    check(apart, f"attacks: the folders of {list(attacks)} would be the same")
    source, count = samples_of(model, dataset, limit)
    reader = BatchReader(model, source, fit, seed=seed, eight_bit=True)
    if target is not None:
        last = reader.classes - 1
        check(0 <= target <= last, f"target: expected a class from 0 to {last}, got {target}")
        with stops():
            _refuse_target_of_all(reader, count, target)
    settings = {
        "batch_size": batch_size,
        "target": target,
        "fit": fit,
        "seed": seed,
        "written": "all" if keep_all else "fooled",
    }
    store = RunStore(Path(out), describe_run(model, source, count, {}, attacks, settings))
    ids = getattr(source, "ids", None) or [str(i) for i in range(count)]
    names = png_names(ids[:count])
    runner = _Attacking(reader, store, list(attacks), attacks, target, keep_all, names)
    runner.run(count, batch_size, "image", progress, retry, workers)
    return AttackRun(out, _lazy=not is_first())


@dataclass(frozen=True)
class _Attacking(Runner[str]):
    """Attacks each batch by all attacks that have not all their rows and files of it yet."""

    attacks: Mapping[str, Attack]
    target: int | None
    keep_all: bool
    names: list[str]

    def missing(self, start: int, stop: int, kept: Collection[int]) -> list[str]:
        rows = self.store.of_positions("attacked", "file", start, stop, self._keys)
        done = (row for row in rows if row["error"] is None or row["position"] in kept)
        files = ((row["attack"], row["file"]) for row in done)
        # A row whose file is gone is made again.
        have = Counter(a for a, f in files if f is None or (self.store.folder / f).is_file())
        return [attack for attack in self.tasks if have[attack] < stop - start]

    @property
    def _keys(self) -> list[dict[str, str]]:
        return [{"attack": attack} for attack in self.tasks]

    def name_of(self, task: str) -> str:
        return task

    def image_rows(self, loaded: Sequence[Loaded], clean: Batches) -> list[ImageRow]:  # noqa: ARG002
        return [image_row(item) for item in loaded]

    def rows(
        self,
        tasks: Sequence[str],
        start: int,
        clean: Batches,
        pool: Pool,  # noqa: ARG002
    ) -> Iterator[Coming]:
        batches, failed = clean
        for attack in tasks:
            columns = dict(failed)
            for batch in batches:
                columns |= self._attacked(batch, attack, start)
            # To be written behind the files: a row's file is there.
            rows = [AttackRow(i.position, attack, i.image, **row) for i, row in columns.items()]
            yield Coming(attacked=rows)

    def _attacked(self, batch: Batch, attack: str, start: int) -> Columns:
        """The columns of each image of the batch; those that can be attacked are."""
        columns = self._columns(batch)
        rows = dict(zip(batch, rows_of(columns), strict=True))
        chosen = (~columns["already"] & ~columns["skipped"]).nonzero()[:, 0].tolist()
        if chosen:
            clean: Batches = ([batch[chosen]], {})
            attacked, failed = self.reader.attacked(clean, attack, self._perturb(attack), start)
            rows |= failed
            for part in attacked:
                rows |= self._written(part, attack)
        return rows

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        """The facts about attacked images, or about clean ones, of which none is fooled."""
        skipped = batch.label == (-1 if self.target is None else self.target)
        aimed = None if self.target is None else torch.full_like(batch.label, self.target)
        columns = outcome_columns(batch, aimed)
        return columns | {"skipped": skipped, "fooled": columns["fooled"] & ~skipped}

    def _perturb(self, attack: str) -> Perturb:
        perturb: Callable[..., Tensor] = self.attacks[attack].perturb
        target = self.target

        def perturbed(x: Tensor, labels: Tensor) -> Tensor:
            with of_8_bits():  # as the files will be
                if target is None:
                    return perturb(x, labels)
                return perturb(x, torch.full_like(labels, target), targeted=True)

        return perturbed

    def _written(self, batch: Batch, attack: str) -> Columns:
        """Write the files of those that fool as they are read back, and return the columns."""
        used = self.attacks[attack]
        images = rounded_attack(batch.clean, batch.images, used.epsilon if in_ball(used) else None)
        files = [encode_png(as_rgb(image)) for image in images]
        read = torch.stack([load_image(data) for data in files]).to(batch.clean)
        read = in_channels_of(self.reader.model, read)
        judged = self.reader.judged(batch, read)
        rows = dict(zip(batch, rows_of(self._columns(judged)), strict=True))
        for file, (item, row) in zip(files, rows.items(), strict=True):
            if row["fooled"] or self.keep_all:
                row["file"] = f"{_folder_of(attack)}/{self.names[item.position]}"
                write_whole(self.store.folder / row["file"], file)
        return rows


def _folder_of(attack: str) -> str:
    """The folder of an attack's files: "pgd-8" for "pgd 8/255"."""
    name, levels = strength_of(attack)
    return safe_name(name if levels is None else f"{name}-{levels:g}").replace("/", "_")


def _refuse_target_of_all(reader: BatchReader, count: int, target: int) -> None:
    """``ValueError`` if no image is of another class; reads until the first that is."""
    same = 0
    with without_pillow_notes():
        for position in counted(range(count), "image", None, "looking for another class"):
            for batch in reader.clean([reader.samples(position)])[0]:
                if bool((batch.label != target).any()):
                    return
                same += 1
    names = reader.model.class_names
    name = str(target) if names is None else names[target]
    what = "the image is" if same == 1 else f"all {same} images are"
    check(not same, f"target: {what} of class {name} already; aim at another")
