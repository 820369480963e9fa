"""The demonstration: a handful of methods on the sample photographs, attacked and defended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_robust.attacks import PGD
from captum_robust.benchmark.compare import compare
from captum_robust.data import load_dataset
from captum_robust.defenses import default_transforms
from captum_robust.models import Classifier
from captum_robust.report.comparison import Comparison
from captum_robust.report.demo_page import ATTACKED, DEFENDED, LEVELS_CHANGED

METHODS = (
    "grad_cam",
    "robust_cam",
    "real_time_masking",
    "perceptual_ball_cam",
    "box_vote_fast",
)


_SETTINGS: dict[str, Any] = {
    "epsilon": LEVELS_CHANGED / 255,
    "steps": 10,
    "early_stop": False,
    "seed": 0,
}


class _Shared:
    """An attack that runs once for the same images, however often it is asked."""

    def __init__(self, attack: PGD, settings: str) -> None:
        self.attack = attack
        self.settings = settings  # for run.json
        self._last: tuple[Tensor, Tensor] | None = None

    def perturb(self, images: Tensor, target: Tensor) -> Tensor:
        if self._last is None or not torch.equal(self._last[0], images):
            self._last = images.clone(), self.attack.perturb(images, target)
        return self._last[1]


def behind(shared: _Shared, transform: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The attacked images as a classifier sees them that has the transform before it."""

    def defended(images: Tensor, target: Tensor) -> Tensor:
        return transform(shared.perturb(images, target))

    return defended


def demonstrate(model: Classifier, out: Path) -> Comparison:
    """Run five methods on seven photographs: clean, under PGD, and attacked behind a transform.

    The map explains the class that the classifier sees there. PGD takes all of its steps, or the
    change would end where the class does. The transform is the first of
    :func:`captum_robust.defenses.default_transforms`; the defended methods average over all.

    Args:
        model: the classifier.
        out: folder of the run.
    """
    pgd = _Shared(PGD(model, **_SETTINGS), repr(_SETTINGS))
    attacks = {ATTACKED: pgd, DEFENDED: behind(pgd, default_transforms()[0])}
    samples = load_dataset("samples")
    return compare(model, samples, METHODS, attacks, out=out, target="prediction")
