"""Adversarial images as PNG files that still fool when they are read back; resumable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_robust._checks import printable
from captum_robust._files import write_whole
from captum_robust._processes import progress_bar, ranks
from captum_robust.attacks import Attack
from captum_robust.benchmark.batches import (
    Batch,
    BatchReader,
    Perturb,
    SampleSource,
    check_classifier,
    check_settings,
    image_row,
)
from captum_robust.benchmark.robust_accuracy import in_ball, rounded_attack
from captum_robust.catalog.attacks import strength_of
from captum_robust.catalog.description import describe_run
from captum_robust.data import LocalizationDataset, Sample, load_image
from captum_robust.data.images import EXTENSIONS
from captum_robust.draw import as_rgb, encode_png
from captum_robust.models import Classifier
from captum_robust.report.outcomes import attack_series, attack_table, attacks_text
from captum_robust.runs.store import AttackRow, RunStore

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LONGEST = 180
"""Bytes of a file's or folder's name; most file systems take 255."""


class Photograph(LocalizationDataset):
    """One image file as a data set, without a label."""

    kind = "image"

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image or folder")
        self.root = path
        self.ids = [printable(path.name)]

    def _load(self, index: int) -> Sample:
        image = load_image(self.root)
        return Sample(image, None, torch.zeros(0, 4), self.ids[index], source=str(self.root))


def attack_images(
    model: Classifier,
    dataset: SampleSource,
    attacks: Mapping[str, Attack],
    out: str | Path,
    *,
    target: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    fit: str = "squash",
    seed: int = 0,
    keep_all: bool = False,
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
        dataset: the images; see :mod:`captum_robust.data`.
        attacks: name -> attack; see :func:`captum_robust.benchmark.build_attacks`. The files of
            each have a folder of their own.
        out: folder of the run.
        target: the class to move towards instead of away from the label. Images of that class are
            skipped.
        limit: only the first so many images.
        batch_size: images that are attacked at once; part of what a resumed run must repeat.
        fit, seed: as for :func:`captum_robust.benchmark.compare`.
        keep_all: also write the images that do not fool.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: ``model`` is no ``Classifier``.
        ValueError: a number out of range, no attack, a target that all images are of, or a folder
            that holds another run.
    """
    check_classifier(model)
    count = check_settings(dataset, limit, batch_size, fit, "float32")
    if not attacks:
        raise ValueError("attacks: expected at least one")
    folders = [_folder_of(name) for name in attacks]
    if len(set(folders)) < len(folders):
        raise ValueError(f"attacks: the folders of {list(attacks)} would be the same")
    reader = BatchReader(model, dataset, fit, seed=seed, eight_bit=True)
    if target is not None:
        if not 0 <= target < reader.classes:
            raise ValueError(f"target: expected a class from 0 to {reader.classes - 1}: {target}")
        _refuse_target_of_all(reader, count, target)
    settings = {
        "batch_size": batch_size,
        "target": target,
        "fit": fit,
        "seed": seed,
        "written": "all" if keep_all else "fooled",
    }
    configuration = describe_run(model, dataset, count, [], attacks, settings)
    store = RunStore(Path(out), configuration)
    store.write_classes(model.class_names or ())
    ids = getattr(dataset, "ids", None) or [str(i) for i in range(count)]
    runner = _Runner(reader, attacks, store, target, keep_all, png_names(ids[:count]))
    with (
        torch.inference_mode(False),
        ranks() as (rank, world),
        progress_bar(count * len(attacks), "image", progress and rank == 0) as advance,
    ):
        for start in range(rank * batch_size, count, world * batch_size):
            runner.run_batch(start, min(start + batch_size, count), advance)
    store.close()
    return AttackRun(out)


@dataclass(frozen=True)
class _Runner:
    reader: BatchReader
    attacks: Mapping[str, Attack]
    store: RunStore
    target: int | None
    keep_all: bool
    names: list[str]

    def run_batch(self, start: int, stop: int, advance: Callable[[int], None]) -> None:
        """Attack one batch by all attacks that have not all their rows and files of it yet."""
        have = self.store.count_attacked(start, stop)
        lost = self._without_file(start, stop)
        missing = [n for n in self.attacks if have.get(n, 0) < stop - start or n in lost]
        advance((stop - start) * (len(self.attacks) - len(missing)))
        if not missing:
            return
        loaded = self.reader.load(start, stop)
        images = [image_row(item, picture=False) for item in loaded]
        batches, failed = self.reader.clean(loaded)
        ids = {item.position: item.image for item in loaded}
        for attack in missing:
            rows = [AttackRow(p, attack, ids[p], error=error) for p, error in failed.items()]
            for batch in batches:
                rows += self._attack(batch, attack, start)
            self.store.write([], images, rows)  # behind the files: a row's file is there
            images = []
            advance(stop - start)

    def _without_file(self, start: int, stop: int) -> set[str]:
        """The attacks that have a row of the batch whose file is gone."""
        rows = self.store.select(
            "SELECT attack, file FROM attacked "
            "WHERE position >= ? AND position < ? AND file IS NOT NULL",
            (start, stop),
        )
        return {row["attack"] for row in rows if not (self.store.folder / row["file"]).is_file()}

    def _attack(self, batch: Batch, attack: str, start: int) -> list[AttackRow]:
        """One row for each image of the batch; those that can be attacked are."""
        right = batch.before == batch.label
        skipped = torch.zeros_like(right) if self.target is None else batch.label == self.target
        columns = zip(
            batch.items,
            batch.label.tolist(),
            batch.before.tolist(),
            batch.confidence.tolist(),
            right.tolist(),
            skipped.tolist(),
            strict=True,
        )
        rows = {
            item.position: AttackRow(
                item.position,
                attack,
                item.image,
                label=label,
                before=before,
                predicted=before,
                confidence=confidence,
                already=not is_right,
                fooled=False,
                skipped=is_skipped,
                linf=0.0,
                l2=0.0,
            )
            for item, label, before, confidence, is_right, is_skipped in columns
        }
        chosen = (right & ~skipped).nonzero()[:, 0]
        if len(chosen):
            whole = [batch.take(chosen)]
            found, failed = self.reader.attacked((whole, {}), attack, self._perturb(attack), start)
            for position, error in failed.items():
                rows[position] = AttackRow(position, attack, rows[position].image, error=error)
            for part in found:
                for row in self._written(part, rows, attack):
                    rows[row.position] = row
        return list(rows.values())

    def _perturb(self, attack: str) -> Perturb:
        perturb = self.attacks[attack].perturb
        if self.target is None:
            return perturb  # type: ignore[no-any-return]
        target = self.target

        def towards(images: Tensor, labels: Tensor) -> Tensor:
            aimed: Tensor = perturb(images, torch.full_like(labels, target), targeted=True)
            return aimed

        return towards

    def _written(self, batch: Batch, rows: Mapping[int, AttackRow], attack: str) -> list[AttackRow]:
        """Write the files of those that fool as they are read back, and complete their rows."""
        used = self.attacks[attack]
        images = rounded_attack(batch.clean, batch.images, used.epsilon if in_ball(used) else None)
        files = [encode_png(as_rgb(image)) for image in images]
        read = torch.stack([load_image(data) for data in files]).to(batch.clean)
        probabilities = self.reader.scores(read).float().softmax(dim=1)
        predicted = probabilities.argmax(dim=1)
        aimed = batch.label if self.target is None else torch.full_like(predicted, self.target)
        fooled = (predicted == aimed) != (self.target is None)
        change = (read - batch.clean).flatten(1)
        columns = {
            "predicted": predicted,
            "confidence": probabilities.amax(dim=1),
            "fooled": fooled,
            "linf": change.abs().amax(dim=1),
            "l2": change.norm(dim=1),
        }
        lists = {name: values.tolist() for name, values in columns.items()}
        done = []
        for i, item in enumerate(batch.items):
            one = {name: values[i] for name, values in lists.items()}
            if one["fooled"] or self.keep_all:
                one["file"] = f"{_folder_of(attack)}/{self.names[item.position]}"
                write_whole(self.store.folder / one["file"], files[i])
            done.append(replace(rows[item.position], **one))
        return done


class AttackRun:
    """The outcome of :func:`attack_images`, read from the folder of its run.

    Args:
        folder: a run's folder; also one whose run was stopped half-way.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store = RunStore(self.folder)
        self.configuration = self._store.configuration
        self.attacks: list[str] = list(self.configuration["attacks"])

    def table(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row an attack, see :meth:`captum_robust.benchmark.Comparison.attack_table`.

        Of a targeted attack ``fooled`` is the share that reached the class aimed at, and
        ``skipped`` are the images that are of it.
        """
        return attack_table(self._store, self.attacks, level=level, seed=seed)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each image and attack.

        Columns: ``image``, ``attack``, ``epsilon`` (in pixel units), ``label`` (without one the
        prediction), ``before`` and ``after`` (classes of the model), their names, ``confidence``
        in the class after, ``already_wrong``, ``fooled``, ``skipped``, ``linf`` and ``l2`` (of the
        change, in pixel units), ``file`` (relative to the folder), ``error``.
        """
        import pandas as pd

        rows = self._store.select(
            "SELECT a.image, a.attack, a.label, a.before, a.predicted AS after, "
            "l.name AS label_name, b.name AS before_name, p.name AS after_name, a.confidence, "
            "a.already AS already_wrong, a.fooled, a.skipped, a.linf, a.l2, a.file, a.error "
            "FROM attacked a LEFT JOIN classes l ON l.number = a.label "
            "LEFT JOIN classes b ON b.number = a.before "
            "LEFT JOIN classes p ON p.number = a.predicted ORDER BY a.position"
        )
        order = {attack: i for i, attack in enumerate(self.attacks)}
        found = [dict(row) for row in rows]
        frame = pd.DataFrame(found, columns=list(found[0]) if found else ["image", "attack"])
        strengths = [_pixel_units(attack) for attack in frame["attack"]]
        frame.insert(2, "epsilon", strengths)
        at = frame.groupby("image", sort=False).ngroup()
        ranked = frame.assign(at=at, turn=frame["attack"].map(order)).sort_values(["at", "turn"])
        return ranked.drop(columns=["at", "turn"]).reset_index(drop=True)

    def to_text(self, most: int) -> str:
        """The first rows for a terminal: what became of each image under each attack."""
        import pandas as pd

        frame = self.to_dataframe()
        frame = frame[frame["error"].isna()] if len(frame) else frame
        if frame.empty:
            return ""
        first = frame.head(most)
        names = {
            which: [
                printable(str(number if name is None else name))
                for name, number in zip(first[f"{which}_name"], first[which], strict=True)
            ]
            for which in ("label", "before", "after")
        }
        outcome = [
            "already wrong" if wrong else "skipped" if skipped else "fooled" if fooled else "-"
            for wrong, skipped, fooled in zip(
                first["already_wrong"], first["skipped"], first["fooled"], strict=True
            )
        ]
        shown = pd.DataFrame(
            {
                "image": first["image"].map(printable),
                "attack": first["attack"],
                **names,
                "confidence": first["confidence"].map("{:.3f}".format),
                "Linf": (255 * first["linf"]).map("{:.0f}/255".format),
                "L2": first["l2"].map("{:.2f}".format),
                "outcome": outcome,
            }
        )
        text: str = shown.to_string(index=False)
        left = len(frame) - len(first)
        return text + (f"\nand {left} rows more, all in the table" if left else "")

    def table_text(self) -> str:
        """:meth:`table` for a terminal, with a line on what it counts."""
        target = self.configuration["settings"]["target"]
        if target is None:
            return attacks_text(self.table())
        rows = self._store.select("SELECT name FROM classes WHERE number = ?", (target,))
        return attacks_text(self.table(), next((row["name"] for row in rows), str(target)))

    def used(self) -> int:
        """How many images could be read."""
        rows = self._store.select("SELECT count(*) AS n FROM images WHERE error IS NULL")
        return int(next(rows)["n"])

    def failures(self) -> list[tuple[str, str]]:
        """Image and error of those that could not be read, and of those whose attack failed."""
        rows = self._store.select(
            "SELECT DISTINCT image, error FROM attacked WHERE error IS NOT NULL ORDER BY position"
        )
        return [(row["image"], row["error"]) for row in rows]

    def summary(self) -> str:
        """One line: how many images were read, and how many could not be used."""
        counts = next(self._store.select("SELECT count(*) AS n, count(error) AS e FROM images"))
        files = next(self._store.select("SELECT count(file) AS n FROM attacked"))["n"]
        return f"{counts['n']} images: {counts['e']} could not be used; {files} files written"

    def plot(self) -> Figure:
        """Robust accuracy with its interval against the strength, a line an attack."""
        from captum_robust.report.plots import plot_robust_accuracy

        return plot_robust_accuracy(attack_series(self.table()))

    def write_csv(self) -> Path:
        """Write :meth:`to_dataframe` as ``attacked.csv`` into the folder."""
        text = self.to_dataframe().to_csv(index=False)
        return write_whole(self.folder / "attacked.csv", text.encode("utf-8", "backslashreplace"))

    def write_curves(self) -> Path:
        """Write :meth:`plot` as ``curves.png`` into the folder.

        Raises:
            ImportError: matplotlib is missing.
        """
        import io

        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=120)
        return write_whole(self.folder / "curves.png", buffer.getvalue())


def png_names(ids: Sequence[str]) -> list[str]:
    """File names for the images, each once also where case does not count, inside their folder.

    >>> png_names(["a/1.jpg", "a/1.png", "b.JPEG", "../../etc/x"])
    ['a/1.jpg.png', 'a/1.png.png', 'b.png', 'etc/x.png']
    """
    safe = [_safe(name) for name in ids]
    stems = [_without_suffix(name) for name in safe]
    times = Counter(stem.casefold() for stem in stems)
    names = [
        stem if times[stem.casefold()] == 1 else name
        for stem, name in zip(stems, safe, strict=True)
    ]
    taken = {name.casefold() for name in names}
    folders = {str(folder).casefold() for name in names for folder in PurePosixPath(name).parents}
    if len(taken) < len(names) or folders & {f"{name}.png" for name in taken}:
        return [f"{i}-{PurePosixPath(name).name}.png" for i, name in enumerate(safe)]
    return [f"{name}.png" for name in names]


def _safe(name: str) -> str:
    """A relative path without anything that leads elsewhere or that a file system refuses."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    kept = []
    for part in parts:
        part = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", part)
        part = re.sub(r"^\.|[. ]$", "_", part)
        if len(part.encode("utf-8", "replace")) > _LONGEST:
            part = part.encode("utf-8", "replace")[:_LONGEST].decode("utf-8", "ignore")
        kept.append(part)
    return "/".join(kept) or "image"


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else name


def _folder_of(attack: str) -> str:
    """The folder of an attack's files: "pgd-8" for "pgd 8/255"."""
    name, levels = strength_of(attack)
    return _safe(name if levels is None else f"{name}-{levels:g}").replace("/", "_")


def _pixel_units(attack: str) -> float | None:
    levels = strength_of(attack)[1]
    return None if levels is None else levels / 255


def _refuse_target_of_all(reader: BatchReader, count: int, target: int) -> None:
    """``ValueError`` if no image is of another class; reads until the first that is."""
    same = 0
    for position in range(count):
        for batch in reader.clean(reader.load(position, position + 1))[0]:
            if bool((batch.label != target).any()):
                return
            same += 1
    if same:
        names = reader.model.class_names
        name = str(target) if names is None else names[target]
        what = "the image is" if same == 1 else f"all {same} images are"
        raise ValueError(f"target: {what} of class {name} already; aim at another")
