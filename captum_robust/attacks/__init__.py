"""Attacks on a classifier, each a ``captum.robust.Perturbation``.

``attack.perturb(inputs, target)`` returns the adversarial inputs. Captum's ``AttackComparator`` and
``MinParamPerturbation`` take every attack as it is; the strength is ``epsilon``. Arguments that all
attacks share, explained once:

``forward_func``
    Inputs -> scores N×K; any function. One logit a sample, N×1 or N, is that of class 1 of two:
    where it is not positive, class 0 is predicted. Nothing of it is changed: modes, parameters,
    gradients and hooks stay as they are. In training mode its own passes still update the averages
    of batch norm and mix the samples: give it in evaluation mode. Pixels are in [0, 1] and the
    normalisation is inside (as in :class:`captum_robust.models.Classifier`), so ``epsilon`` is in
    pixel units.
``epsilon``
    The strength; each attack says of what. ``perturb(…, epsilon=…)`` overrides it for a call.
``bounds``
    Lowest and highest value of an input; None: no limit. Inputs outside of them are an error.
``quantize``
    A sample counts as fooled only if it still is when it is rounded to the 256 levels of an
    8-bit image of that range. Without bounds it has no effect.
``seed``
    Seeds all that is drawn; None: torch's global generator is drawn from.

No sample sees another, and random draws are the same for each, so a batch gives what its samples
give one by one. A sample that is misclassified to begin with comes back unchanged; the details that
``perturb(…, return_details=True)`` returns count it apart.
"""

from captum_robust.attacks._second_derivatives import recorded_gradients, smooth_activations
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.deepfool import DeepFool
from captum_robust.attacks.ensemble import EnsembleTransfer, held_out
from captum_robust.attacks.explanation import ExplanationAttack, ExplanationDetails
from captum_robust.attacks.fooling import Elites, FoolingImage, MapElites, map_elites
from captum_robust.attacks.fooling_rates import FoolingRate, fooling_rate, transfer_matrix
from captum_robust.attacks.gradient import (
    FGSM,
    PGD,
    GradientStep,
    LeastLikelyClass,
    MostLikelyClassMap,
    most_likely_class_map,
)
from captum_robust.attacks.lbfgs_attack import LBFGSAttack
from captum_robust.attacks.losses import cross_entropy
from captum_robust.attacks.rank import RankAnalysis, Share, rank_analysis
from captum_robust.attacks.substitute import SubstituteAttack, SubstituteRound
from captum_robust.attacks.universal import UniversalPerturbation
from captum_robust.attacks.victim import AttackDetails

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackDetails",
    "DeepFool",
    "Elites",
    "EnsembleTransfer",
    "ExplanationAttack",
    "ExplanationDetails",
    "FoolingImage",
    "FoolingRate",
    "GradientStep",
    "LBFGSAttack",
    "LeastLikelyClass",
    "MapElites",
    "MostLikelyClassMap",
    "RankAnalysis",
    "Share",
    "SubstituteAttack",
    "SubstituteRound",
    "UniversalPerturbation",
    "cross_entropy",
    "fooling_rate",
    "held_out",
    "map_elites",
    "most_likely_class_map",
    "rank_analysis",
    "recorded_gradients",
    "smooth_activations",
    "transfer_matrix",
]
