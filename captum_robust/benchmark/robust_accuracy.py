"""Robust accuracy: the share of images that are still classified right under an attack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_robust._checks import check, check_count
from captum_robust._contexts import evaluation, without_new_gradients
from captum_robust._processes import device_of
from captum_robust._progress import progress_bar
from captum_robust.attacks import Attack, GradientStep
from captum_robust.attacks.attack import of_8_bits, watched_gradients
from captum_robust.attacks.image_batches import class_scores
from captum_robust.attacks.outcome import Outcome, last_of, outcome
from captum_robust.benchmark.batches import samples_of
from captum_robust.benchmark.reading import to_levels
from captum_robust.data import Sample, resize
from captum_robust.data.given import SampleSource
from captum_robust.models import Classifier
from captum_robust.models.classifier import in_channels_of
from captum_robust.report.outcomes import NOTHING_TO_ATTACK, summarize_attack

if TYPE_CHECKING:
    import pandas as pd


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
    progress: bool | None = None,
) -> pd.DataFrame:
    """The robust accuracy of a model at several strengths of an attack.

    Every strength attacks every image afresh: an image that a weaker attack fools and a stronger
    one does not counts as fooled by the weaker one only, so accuracies need not fall.

    The claim is about 8-bit images: the images are rounded to 256 levels before the attack, and
    what the attack makes of them is rounded and classified again. Of an L∞ attack the rounding
    stays inside the ball: at ε = 1.5/255 a pixel changes by one level. So attacks look for 8-bit
    images here, as with ``quantize``.

    Args:
        model: takes images N×C×H×W with pixels in [0, 1]; in evaluation mode while this runs, if
            it is a module.
        attack: an object with ``perturb(images, labels, epsilon=…)``, such as
            ``captum_robust.attacks.PGD(model)``.
        data: a data set of ``captum_robust.data.Sample``, resized to ``model.input_size``, or
            batches (images, labels) as from a ``DataLoader``, whose labels are classes of the
            model. Of a ``Classifier`` also a data set of torchvision or the path of a folder, as
            :func:`captum_robust.benchmark.compare` takes them. An image without a label is
            measured against the model's own prediction.
        epsilons: strengths in pixel units, such as ``[1 / 255, 8 / 255]``.
        limit: only the first so many images.
        batch_size: of images from a data set.
        level, seed: of the bootstrap interval.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

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
    check(strengths, "epsilons: expected at least one strength")
    check_count("limit", limit, 1, optional=True)
    outcomes: dict[float, list[Outcome]] = {e: [] for e in strengths}
    is_module = isinstance(model, torch.nn.Module)
    without_traces = without_new_gradients(model) if is_module else nullcontext()
    bar = progress_bar(limit, "image", progress, "attacking")
    with evaluation(model), without_traces, bar as advance:
        for images, labels in _batches(model, data, batch_size, limit):
            images = to_levels(images)
            before = _classes(model, images)
            labels = torch.where(labels < 0, before, labels)
            for epsilon in outcomes:
                with watched_gradients() as ended, of_8_bits():
                    attacked = attack.perturb(images.clone(), labels.clone(), epsilon=epsilon)
                attacked = attacked.detach()
                rounded = rounded_attack(images, attacked, epsilon if in_ball(attack) else None)
                after = _classes(model, rounded)
                without = last_of(ended, labels)
                became = outcome(images, rounded, labels, before, after, None, without)
                outcomes[epsilon].append(became)
            advance(len(images))
    check(outcomes[strengths[0]], "data: expected images, got none")
    joined = {epsilon: _joined(parts) for epsilon, parts in outcomes.items()}
    already = joined[strengths[0]]["already"]
    check(not already.all(), f"data: {NOTHING_TO_ATTACK.format(len(already))}")
    summaries = [summarize_attack(**joined[e], level=level, seed=seed) for e in strengths]
    rows = [{"epsilon": e, **vars(s)} for e, s in zip(strengths, summaries, strict=True)]
    return pd.DataFrame(rows)


def _joined(parts: list[Outcome]) -> dict[str, Tensor]:
    """The columns of all images, on the CPU."""
    names = vars(parts[0])
    return {name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names}


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
        return class_scores(model, (images,), "model").argmax(dim=1)


def _batches(
    model: Any, data: Any, batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels on the model's device; labels of -1 are not known."""
    device = device_of(model) if isinstance(model, torch.nn.Module) else None
    left = math.inf if limit is None else limit
    if isinstance(model, Classifier) and isinstance(data, (str, Path, Dataset)):
        data, _ = samples_of(model, data, limit)
    is_set = hasattr(data, "__getitem__") and len(data) > 0 and isinstance(data[0], Sample)
    for batch in _of_samples(model, data, batch_size, limit) if is_set else data:
        is_pair = isinstance(batch, Sequence) and len(batch) >= 2
        what = f"samples, or batches (images, labels), got {type(batch).__name__}"
        check(is_pair, f"data: expected {what}", TypeError)
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
        images = torch.stack([sample.image for sample in samples])
        images = in_channels_of(model, images) if isinstance(model, Classifier) else images
        yield images, torch.tensor(labels)
