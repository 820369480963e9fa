"""The attacks that ``compare`` and ``attack`` know by name, and their strengths."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_robust._checks import unknown_name
from captum_robust.attacks import (
    FGSM,
    PGD,
    Attack,
    DeepFool,
    LBFGSAttack,
    LeastLikelyClass,
    UniversalPerturbation,
)
from captum_robust.models import Classifier

LEVELS = 255
"""Strengths are given in levels of an 8-bit image: 8 means 8/255 of the pixels' range."""

DEFAULT_STEPS = 10
COMPARED_EPSILONS = (8.0,)
SWEPT_EPSILONS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class AttackOptions:
    """What the attacks of a run share."""

    steps: int = DEFAULT_STEPS
    """Of attacks that take several."""
    seed: int = 0
    universal: Path | None = None
    """File of a universal perturbation."""
    all_steps: bool = False
    """Of PGD: go on with images that are fooled, as far as the strength allows."""


@dataclass(frozen=True)
class NamedAttack:
    """How an attack is made."""

    make: Callable[[Classifier, float | None, AttackOptions], Attack]
    """Of a model, a strength in pixel units where it takes one, and the options."""
    meaning: str
    has_strength: bool = True
    """False: it looks for the smallest change, or has a strength of its own; it runs once."""
    can_aim: bool = True
    """Whether it can move towards a given class."""


def _universal(model: Classifier, _: float | None, options: AttackOptions) -> Attack:
    if options.universal is None:
        raise ValueError("universal: this attack needs the file of a saved perturbation")
    return UniversalPerturbation.load(options.universal, model)


ATTACKS: dict[str, NamedAttack] = {
    "fgsm": NamedAttack(
        lambda model, epsilon, _: FGSM(model, epsilon or 0.0),
        "one step along the sign of the gradient",
    ),
    "pgd": NamedAttack(
        lambda model, epsilon, options: PGD(
            model,
            epsilon or 0.0,
            steps=options.steps,
            early_stop=not options.all_steps,
            seed=options.seed,
        ),
        "projected gradient descent, several small steps",
    ),
    "least_likely": NamedAttack(
        lambda model, epsilon, options: LeastLikelyClass(model, epsilon or 0.0, options.steps),
        "steps towards the class with the lowest score",
        can_aim=False,
    ),
    "deepfool": NamedAttack(
        lambda model, _, __: DeepFool(model, quantize=True),
        "the smallest change, by linearising the boundaries",
        has_strength=False,
    ),
    "lbfgs": NamedAttack(
        lambda model, _, __: LBFGSAttack(model, quantize=True),
        "the smallest change, by box-constrained optimisation",
        has_strength=False,
    ),
    "universal": NamedAttack(
        _universal, "one saved perturbation for all images", has_strength=False, can_aim=False
    ),
}


def build_attacks(
    model: Classifier,
    names: Sequence[str],
    epsilons: Sequence[float],
    options: AttackOptions | None = None,
) -> dict[str, Attack]:
    """Attacks by name and strength, such as ``"pgd 2/255"``; without strength ``"deepfool"``.

    Args:
        model: to attack.
        names: of :data:`ATTACKS`.
        epsilons: strengths in levels of an 8-bit image, 0 to 255.
        options: what they share.

    Raises:
        ValueError: an unknown name, a name or strength twice, a strength out of range; no, or a
            damaged, file of a universal perturbation.
        FileNotFoundError: there is no such file.
    """
    options = AttackOptions() if options is None else options
    for name in names:
        if name not in ATTACKS:
            raise unknown_name("attack", name, ATTACKS)
    for what, values in (("attack", names), ("epsilon", epsilons)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{what}: expected at least one, and each once, got {list(values)}")
    for epsilon in epsilons:
        check_levels(epsilon)
    built: dict[str, Attack] = {}
    for name in names:
        kind = ATTACKS[name]
        if kind.has_strength:
            for epsilon in epsilons:
                made = kind.make(model, epsilon / LEVELS, options)
                built[strength_name(name, epsilon)] = made
        else:
            built[name] = kind.make(model, None, options)
    return built


def parse_epsilons(text: str) -> list[float]:
    """Strengths as they are written on the command line, in levels of an 8-bit image.

    Raises:
        ValueError: not numbers from 0 to 255, separated by commas.

    >>> parse_epsilons("1, 2,8")
    [1.0, 2.0, 8.0]
    """
    return [check_levels(part.strip()) for part in text.split(",")]


def check_levels(value: Any) -> float:
    """The strength as a number; ``ValueError`` outside 0 to 255."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= LEVELS:  # NaN too
        raise ValueError(
            f"epsilon: expected numbers from 0 to {LEVELS} (levels of an 8-bit image), separated "
            f"by commas, got {value!r}"
        )
    return number


def strength_name(attack: str, epsilon: float) -> str:
    """The name of an attack of given strength, in levels.

    >>> strength_name("pgd", 2.0)
    'pgd 2/255'
    """
    return f"{attack} {epsilon:g}/{LEVELS}"


def strength_of(name: str) -> tuple[str, float | None]:
    """Attack and strength in levels out of :func:`strength_name`; any other name has no strength.

    >>> strength_of("pgd 2/255"), strength_of("deepfool")
    (('pgd', 2.0), ('deepfool', None))
    >>> strength_of("pgd 2/255, adaptive")
    ('pgd, adaptive', 2.0)
    """
    pattern = rf"(.+) (\d+(?:\.\d+)?(?:e-\d+)?)/{LEVELS}(, adaptive(?: \(.*\))?)?"
    found = re.fullmatch(pattern, name, re.DOTALL)
    return (found[1] + (found[3] or ""), float(found[2])) if found else (name, None)
