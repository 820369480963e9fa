"""Attacks that know how a method defends itself, made for some of the methods only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check
from captum_robust.attacks import Attack
from captum_robust.benchmark.batches import Perturb
from captum_robust.benchmark.robust_accuracy import in_ball
from captum_robust.catalog.attacks import DEFAULT_STEPS, LEVELS, strength_name
from captum_robust.catalog.methods import Method
from captum_robust.defenses import adaptive_attack
from captum_robust.defenses.adaptive_attack import can_adapt
from captum_robust.transforms.transform import Transform

EXPLANATION = "explanation"
"""The attack on the map itself, which keeps the class."""


@dataclass(frozen=True)
class Stage:
    """Images, clean or attacked, and the methods that are shown them."""

    attack: str
    """The attack in the tables; of a case of an adaptive one such as "pgd 2/255, adaptive"."""
    name: str
    """The name of these images, such as "pgd 2/255, adaptive (defended_cam)"; where there is one
    case alone, the attack's."""
    methods: tuple[str, ...]
    perturb: Perturb | None
    transforms: tuple[Transform, ...] = ()
    """Those that are attacked through, by whose averaged scores an image is fooled; none: by the
    classifier's own."""
    of: str | None = None
    """The attack that it adapts, which is adaptive already for methods without a defence; None: it
    adapts none. An attack on the map says nothing of other methods."""


def adaptive_stages(
    methods: Mapping[str, Method], attacks: Mapping[str, Any], batch_size: int, target: str
) -> list[Stage]:
    """For each attack its adaptive cases, and at the same strengths the attack on each map.

    Args:
        methods: those of the run.
        attacks: name -> attack of the classifier. One that cannot be adapted has no case.
        batch_size: images of a method's batch; the attacks hold about as many transformed ones.
        target: "label" or "prediction": what the methods explain, and the map is attacked for.

    Raises:
        ValueError: an attack has the name of a case.
    """
    groups: dict[str, list[str]] = {}
    for name, method in methods.items():
        if method.transforms:
            groups.setdefault(repr(method.transforms), []).append(name)
    stages = []
    strengths: dict[float, int] = {}
    for name, attack in attacks.items():
        if not can_adapt(attack):
            continue
        for group in groups.values():
            transforms = methods[group[0]].transforms
            column = f"{name}, adaptive"
            own = column if len(groups) == 1 else f"{column} ({group[0]})"
            perturb = _in_parts(adaptive_attack(attack, transforms), len(transforms), batch_size)
            stages.append(Stage(column, own, tuple(group), perturb, transforms, name))
        if in_ball(attack) and attack.epsilon:
            strengths.setdefault(attack.epsilon, getattr(attack, "steps", 0) or DEFAULT_STEPS)
    by_label = target == "label"
    for epsilon, steps in strengths.items():
        column = strength_name(EXPLANATION, round(epsilon * LEVELS, 6))
        for name, method in methods.items():
            if method.attack_map is not None:
                attack, n = method.attack_map(epsilon, steps), len(method.transforms) or 1
                perturb = _in_parts(attack, n, batch_size, by_label)
                own = f"{column} ({name})"
                stages.append(Stage(column, own, (name,), perturb, method.transforms))
    for stage in stages:
        taken = attacks.keys() & {stage.attack, stage.name}
        check(not taken, f"attacks: {stage.attack!r} is the name of an adaptive attack")
    return stages


def describe_stages(stages: list[Stage]) -> dict[str, Any]:
    """What a run keeps of them: for each attack what it adapts, and the images of each method."""
    described: dict[str, Any] = {}
    for stage in stages:
        entry = described.setdefault(stage.attack, {"of": stage.of, "images": {}})
        entry["images"] |= dict.fromkeys(stage.methods, stage.name)
    return described


def _in_parts(attack: Attack, transforms: int, batch_size: int, by_label: bool = True) -> Perturb:
    """The attack on so few images at once that their transforms fill one batch.

    Without the label it takes what the attacked model, with its defence, predicts.
    """
    most = max(1, batch_size // transforms)

    def perturb(images: Tensor, label: Tensor) -> Tensor:
        parts = zip(torch.split(images, most), torch.split(label, most), strict=True)
        return torch.cat([attack.perturb(x, y if by_label else None) for x, y in parts])

    return perturb
