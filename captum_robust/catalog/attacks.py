"""The attacks that ``compare`` and ``attack`` know by name, and their strengths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_robust import attacks as kinds
from captum_robust._checks import as_levels, check, known_name
from captum_robust.attacks import Attack
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
    """How many an attack takes that takes several."""
    seed: int = 0
    universal: Path | None = None
    """File of a universal perturbation."""
    all_steps: bool = False
    """Whether PGD goes on with images that are fooled, as far as the strength allows."""


@dataclass(frozen=True)
class NamedAttack:
    """How an attack is built."""

    make: Callable[[Classifier, float, AttackOptions], Attack]
    """From a model, a strength in pixel units, and the options."""
    meaning: str
    has_strength: bool = True
    """False: it looks for the smallest change, or has a strength of its own; it runs once."""
    can_aim: bool = True
    """Whether it can move towards a given class."""


def _pgd(model: Classifier, epsilon: float, options: AttackOptions) -> Attack:
    early_stop = not options.all_steps
    return kinds.PGD(model, epsilon, steps=options.steps, early_stop=early_stop, seed=options.seed)


def _universal(model: Classifier, _: float, options: AttackOptions) -> Attack:
    if options.universal is None:
        raise ValueError("universal: this attack needs the file of a saved perturbation")
    return kinds.UniversalPerturbation.load(options.universal, model)


ATTACKS: dict[str, NamedAttack] = {
    "fgsm": NamedAttack(
        lambda model, epsilon, _: kinds.FGSM(model, epsilon),
        "one step along the sign of the gradient",
    ),
    "pgd": NamedAttack(_pgd, "projected gradient descent, several small steps"),
    "least_likely": NamedAttack(
        lambda model, epsilon, options: kinds.LeastLikelyClass(model, epsilon, options.steps),
        "steps towards the class with the lowest score",
        can_aim=False,
    ),
    "deepfool": NamedAttack(
        lambda model, *_: kinds.DeepFool(model, quantize=True),
        "the smallest change, by linearising the boundaries",
        has_strength=False,
    ),
    "lbfgs": NamedAttack(
        lambda model, *_: kinds.LBFGSAttack(model, quantize=True),
        "the smallest change, by box-constrained optimisation",
        has_strength=False,
    ),
    "universal": NamedAttack(
        _universal, "one saved perturbation for all images", has_strength=False, can_aim=False
    ),
}
"""The attacks that commands know, by name."""


def build_attacks(
    model: Classifier,
    names: Sequence[str],
    epsilons: Sequence[float],
    options: AttackOptions | None = None,
) -> dict[str, Attack]:
    """Attacks by name and strength, such as ``"pgd 2/255"``; without strength ``"deepfool"``.

    Args:
        model: to attack.
        names: of :data:`ATTACKS`, also as "PGD" or "L-BFGS".
        epsilons: strengths in levels of an 8-bit image, 0 to 255.
        options: what they share.

    Raises:
        ValueError: an unknown name, a name or strength twice, a strength out of range; no, or a
            damaged, file of a universal perturbation.
        FileNotFoundError: there is no such file.
    """
    names = [known_name("attack", name, ATTACKS) for name in names]
    for what, values in (("attack", names), ("epsilon", epsilons)):
        each_once = len(values) == len(set(values)) > 0
        check(each_once, f"{what}: expected at least one, and each once, got {list(values)}")
    strengths = [check_levels(epsilon) for epsilon in epsilons]
    attacks: dict[str, Attack] = {}
    for name in names:
        kind = ATTACKS[name]
        named = {strength_name(name, e): e / LEVELS for e in strengths}
        for own, epsilon in (named if kind.has_strength else {name: 0.0}).items():
            attacks[own] = kind.make(model, epsilon, options or AttackOptions())
    return attacks


def parse_epsilons(text: str) -> list[float]:
    """Strengths as they are written on the command line, in levels of an 8-bit image.

    Raises:
        ValueError: not numbers from 0 to 255, separated by commas.

    >>> parse_epsilons("1, 2,8/255")
    [1.0, 2.0, 8.0]
    """
    return [check_levels(part.strip()) for part in text.split(",")]


def check_levels(value: Any) -> float:
    """The strength as a number; ``ValueError`` outside 0 to 255."""
    number = as_levels(value)
    what = f"numbers from 0 to {LEVELS} (levels of an 8-bit image), separated by commas"
    check(0 <= number <= LEVELS, f"epsilon: expected {what}, got {value!r}")  # NaN too
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
    parts = re.fullmatch(pattern, name, re.DOTALL)
    return (parts[1] + (parts[3] or ""), float(parts[2])) if parts else (name, None)
