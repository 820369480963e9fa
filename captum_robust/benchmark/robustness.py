"""Robust accuracy: the share of images that are still classified right under an attack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_robust.attacks import Attack, GradientStep
from captum_robust.benchmark.attacks import LEVELS, strength_of
from captum_robust.benchmark.batches import SampleSource, evaluation, to_levels
from captum_robust.benchmark.configuration import device_of
from captum_robust.benchmark.running import progress_bar
from captum_robust.benchmark.store import RunStore
from captum_robust.data import Sample, resize
from captum_robust.metrics.functional import bootstrap_interval
from captum_robust.models import Classifier

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AttackSummary:
    """What an attack did to n images. Shares are in [0, 1], sizes in pixel units."""

    n: int
    clean_accuracy: float
    n_right: int
    """Classified right before the attack."""
    already_wrong: int
    """Misclassified before; these count as wrong, and the attack is not credited with them."""
    fooled: float
    """The share of those that were right before which the attack fooled; NaN if none was."""
    robust_accuracy: float
    """The share of all n that was right before and still is."""
    robust_low: float
    robust_high: float
    """Its bootstrap interval over the images."""
    linf: float
    l2: float
    """Mean size of the change of those that were right before."""


def summarize_attack(
    already: Tensor,
    fooled: Tensor,
    linf: Tensor,
    l2: Tensor,
    *,
    lost: Tensor | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> AttackSummary:
    """Counts, shares and the interval of the robust accuracy.

    Args:
        already: n booleans, misclassified before.
        fooled: n booleans, right before and fooled.
        linf, l2: n, sizes of the change.
        lost: n booleans, right before and not after; None: those that are fooled. A targeted
            attack may lose an image the label without reaching the class aimed at.
        level, seed: of the bootstrap.

    >>> no, yes = torch.tensor([False, False, False]), torch.tensor([True, False, False])
    >>> one = summarize_attack(yes, ~yes & torch.tensor([False, True, False]), no + 0.5, no + 2.0)
    >>> one.n, one.already_wrong, one.fooled, round(one.robust_accuracy, 3), one.l2
    (3, 1, 0.5, 0.333, 2.0)
    """
    right = ~already
    n, n_right = len(already), int(right.sum())
    robust = right & ~(fooled if lost is None else lost)
    interval = bootstrap_interval(robust.double(), level=level, seed=seed) if n else None

    def mean_of_right(values: Tensor) -> float:
        return float(values.double()[right].mean()) if n_right else math.nan

    return AttackSummary(
        n=n,
        clean_accuracy=n_right / n if n else math.nan,
        n_right=n_right,
        already_wrong=n - n_right,
        fooled=mean_of_right(fooled),
        robust_accuracy=interval.mean if interval else math.nan,
        robust_low=interval.low if interval else math.nan,
        robust_high=interval.high if interval else math.nan,
        linf=mean_of_right(linf),
        l2=mean_of_right(l2),
    )


def attack_table(
    store: RunStore, attacks: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """One row for each attack of a run, see :meth:`Comparison.attack_table`."""
    import pandas as pd

    rows = []
    for attack in attacks:
        found = list(
            store.select(
                "SELECT a.already, a.fooled, a.linf, a.l2, a.skipped, a.error, i.label, "
                "a.predicted <> a.label AS lost "
                "FROM attacked a JOIN images i USING (position) "
                "WHERE a.attack = ? AND i.error IS NULL ORDER BY position",
                (attack,),
            )
        )
        done = [row for row in found if row["error"] is None and not row["skipped"]]
        summary = summarize_attack(
            torch.tensor([row["already"] for row in done], dtype=torch.bool),
            torch.tensor([row["fooled"] for row in done], dtype=torch.bool),
            torch.tensor([row["linf"] for row in done]),
            torch.tensor([row["l2"] for row in done]),
            lost=torch.tensor([row["lost"] for row in done], dtype=torch.bool),
            level=level,
            seed=seed,
        )
        levels = strength_of(attack)[1]
        rows.append(
            {
                "attack": attack,
                "epsilon": None if levels is None else levels / LEVELS,
                **vars(summary),
                "unlabelled": sum(row["label"] is None for row in done),
                "skipped": sum(bool(row["skipped"]) for row in found),
                "failed": sum(row["error"] is not None for row in found),
            }
        )
    counted = [field.name for field in fields(AttackSummary)]
    columns = ["attack", "epsilon", *counted, "unlabelled", "skipped", "failed"]
    return pd.DataFrame(rows, columns=columns)


def attack_series(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of an attack table by attack, weakest first; only of attacks with a strength."""
    rows = table[table["epsilon"].notna()]
    names = rows["attack"].map(lambda name: strength_of(name)[0])
    return {
        str(name): block.sort_values("epsilon", kind="stable")
        for name, block in rows.groupby(names, sort=False)
    }


def attacks_text(table: pd.DataFrame, aimed_at: str | None = None) -> str:
    """An attack table for a terminal, with a line on what it counts.

    Args:
        table: of :func:`attack_table`.
        aimed_at: the class of a targeted attack.
    """
    import pandas as pd

    shown = pd.DataFrame({"attack": table["attack"], "n": table["n"]})
    shown["clean accuracy"] = _texts(table["clean_accuracy"], "{:.3f}")
    shown["already wrong"] = table["already_wrong"]
    shown["fooled"] = [
        f"{share} of {n}" if n else "-"
        for share, n in zip(_texts(table["fooled"], "{:.3f}"), table["n_right"], strict=True)
    ]
    shown["robust accuracy"] = [
        f"{row.robust_accuracy:.3f} [{row.robust_low:.3f}, {row.robust_high:.3f}]" if row.n else "-"
        for row in table.itertuples()
    ]
    shown["Linf"] = _texts(table["linf"] * LEVELS, "{:.1f}/255")
    shown["L2"] = _texts(table["l2"], "{:.2f}")
    for column in ("skipped", "failed"):
        if table[column].any():
            shown[column] = table[column]
    towards = "" if aimed_at is None else f", and now {aimed_at}"
    note = (
        f"fooled: of those classified right before{towards}; robust accuracy: share of all n "
        "still right, 95 % bootstrap interval;\nLinf, L2: mean change of those right before"
    )
    if unlabelled := int(table["unlabelled"].max()):
        note += f"\nwithout a label: {unlabelled}; there the prediction counts as the label"
    return f"{shown.to_string(index=False)}\n{note}"


def _texts(values: pd.Series[float], form: str) -> list[str]:
    return ["-" if math.isnan(value) else form.format(value) for value in values]


def robust_accuracy(
    model: Any,
    attack: Any,
    data: SampleSource | Iterable[tuple[Tensor, Tensor]],
    epsilons: Sequence[float],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """The robust accuracy of a model at several strengths of an attack.

    Every strength attacks every image afresh: an image that a weaker attack fools and a stronger
    one does not counts as fooled by the weaker one only, so accuracies need not fall.

    The claim is about 8-bit images: the images are rounded to 256 levels before the attack, and
    what the attack makes of them is rounded and classified again. Of an L∞ attack the rounding
    stays inside the ball: at ε = 1.5/255 a pixel changes by one level.

    Args:
        model: takes images N×C×H×W with pixels in [0, 1]; in evaluation mode while this runs, if
            it is a module.
        attack: an object with ``perturb(images, labels, epsilon=…)``, such as
            ``captum_robust.attacks.PGD(model)``.
        data: a data set of ``captum_robust.data.Sample``, resized to ``model.input_size``, or
            batches (images, labels) as from a ``DataLoader``. An image without a label is
            measured against the model's own prediction.
        epsilons: strengths in pixel units, such as ``[1 / 255, 8 / 255]``.
        limit: only the first so many images.
        batch_size: of images from a data set.
        level, seed: of the bootstrap interval.
        progress: show a progress bar on standard error.

    Returns:
        A row for each strength, in the order given: ``epsilon`` and the fields of
        :class:`AttackSummary`.

    Raises:
        ValueError: no image that the model classifies right, so that there is nothing to attack;
            no image at all; no strength; pixels outside [0, 1].
        TypeError: data that is neither.
    """
    import pandas as pd

    strengths = [float(e) for e in epsilons]
    if not strengths:
        raise ValueError("epsilons: expected at least one strength")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a whole number from 1, got {limit!r}")
    columns: dict[float, list[dict[str, Tensor]]] = {e: [] for e in strengths}
    restored = evaluation(model) if isinstance(model, torch.nn.Module) else nullcontext()
    with restored, progress_bar(limit, "image", progress) as advance:
        for images, labels in _batches(model, data, batch_size, limit):
            images = to_levels(images)
            before = _classes(model, images)
            labels = torch.where(labels < 0, before, labels)
            for epsilon in columns:
                columns[epsilon].append(_attacked(model, attack, images, labels, before, epsilon))
            advance(len(images))
    seen = next(iter(columns.values()))
    if not seen:
        raise ValueError("data: no images")
    if all(bool(batch["already"].all()) for batch in seen):
        n = sum(len(batch["already"]) for batch in seen)
        raise ValueError(
            f"data: the model classifies none of the {n} images right, so there is nothing to "
            "attack; do the labels count the model's classes?"
        )
    rows = []
    for epsilon in strengths:
        parts = columns[epsilon]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        summary = summarize_attack(**joined, level=level, seed=seed)
        rows.append({"epsilon": epsilon, **vars(summary)})
    return pd.DataFrame(rows)


def _attacked(
    model: Any, attack: Any, images: Tensor, labels: Tensor, before: Tensor, epsilon: float
) -> dict[str, Tensor]:
    found = attack.perturb(images.clone(), labels.clone(), epsilon=epsilon).detach()
    rounded = rounded_attack(images, found, epsilon if in_ball(attack) else None)
    change = (rounded - images).flatten(1).float()
    already = before != labels
    fooled = ~already & (_classes(model, rounded) != labels)
    sizes = {"linf": change.abs().amax(dim=1), "l2": change.norm(dim=1)}
    return {k: v.cpu() for k, v in {"already": already, "fooled": fooled, **sizes}.items()}


def in_ball(attack: Any) -> bool:
    """Whether the strength bounds the change of each pixel."""
    return (
        isinstance(attack, Attack)
        and attack.norm == "Linf"
        and not isinstance(attack, GradientStep)  # its epsilon is a factor of the gradient
    )


def rounded_attack(images: Tensor, attacked: Tensor, epsilon: float | None) -> Tensor:
    """Attacked images rounded to 256 levels, of images that are; no pixel moves beyond epsilon.

    >>> (rounded_attack(torch.zeros(1), torch.tensor([1.8 / 255]), 1.8 / 255) * 255).round()
    tensor([1.])
    """
    rounded = to_levels(attacked.clamp(0, 1))
    if epsilon is None:
        return rounded
    # A float32 strength such as 8/255 must not lose a level.
    most = math.floor(epsilon * 255 + 1e-3) / 255
    return to_levels(images + (rounded - images).clamp(-most, most))


def _classes(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        classes: Tensor = model(images).argmax(dim=1)
    return classes


def _batches(
    model: Any, data: Any, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels on the model's device; labels of -1 are not known."""
    device = device_of(model) if isinstance(model, torch.nn.Module) else None
    left = math.inf if limit is None else limit
    is_set = hasattr(data, "__getitem__") and len(data) > 0 and isinstance(data[0], Sample)
    source = _of_samples(model, data, batch_size, limit) if is_set else data
    for batch in source:
        if not isinstance(batch, Sequence) or len(batch) < 2:
            kind = type(batch).__name__
            raise TypeError(f"data: expected samples, or batches (images, labels), got {kind}")
        images, labels = (torch.as_tensor(part) for part in batch[:2])
        n = int(min(left, len(images)))
        if n == 0:
            return
        if not (images.is_floating_point() and images.amin() >= 0 and images.amax() <= 1):
            raise ValueError(
                f"data: expected pixels in [0, 1], got {images.dtype} from {images.amin():.4g} to "
                f"{images.amax():.4g}; the normalisation belongs into the model"
            )
        left -= n
        where = images.device if device is None else device
        yield images[:n].to(where), labels[:n].to(where)


def _of_samples(
    model: Any, data: SampleSource, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(data) if limit is None else min(limit, len(data))
    for start in range(0, count, batch_size):
        samples = [data[i] for i in range(start, min(start + batch_size, count))]
        if isinstance(model, Classifier):
            samples = [resize(sample, model.input_size) for sample in samples]
        labels = [-1 if sample.label is None else int(sample.label) for sample in samples]
        yield torch.stack([sample.image for sample in samples]), torch.tensor(labels)
