"""Attacks that follow the gradient of the loss within a ball of given size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import check, check_batch, check_inputs, check_number
from captum_robust._scores import check_rivals, without_inference
from captum_robust.attacks.ascent import GradientAscent
from captum_robust.attacks.losses import LossFunction, Reading, cross_entropy, odds_against
from captum_robust.attacks.norms import Tensors
from captum_robust.attacks.point import Point
from captum_robust.attacks.victim import Victim


@dataclass(eq=False, repr=False)
class PGD(GradientAscent):
    """Projected gradient descent: small steps up the loss, each projected on the ball.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (https://arxiv.org/abs/1706.06083). With ``momentum`` the iterates of Dong et al., "Boosting
    Adversarial Attacks with Momentum" (https://arxiv.org/abs/1710.06081); with ``transform`` the
    expectation over transformations of Athalye et al. (https://arxiv.org/abs/1707.07397).

    A step needs one forward and one backward pass. An image that is fooled leaves the working
    batch, so the rest of the steps cost it nothing.

    Args:
        forward_func: as for all attacks, see :mod:`captum_robust.attacks`; so are ``bounds``,
            ``quantize`` and ``seed``.
        epsilon: radius of the ball in units of the inputs.
        steps: at most so many.
        step_size: 2.5 ``epsilon`` / ``steps`` by default.
        norm: ``"Linf"``: steps along the sign of the gradient; ``"L2"``: along the gradient,
            of length ``step_size``.
        random_start: begin at a random point of the ball. Every sample gets the same draw.
        restarts: how often to begin; from the second time on at a random point, and only with
            the samples that are not fooled yet.
        momentum: decay of the sum of normalised gradients; 0: none.
        loss: what is raised, by name. ``"log_odds"``: the log odds against the label, of scores in
            units of a tenth of their deviation over the classes of the clean input, so that a
            factor of the scores changes nothing. ``"cross_entropy"``: as published, which sees
            the other classes the more evenly the smaller the scores are. ``"margin"``: the score
            of the highest other class less that of the label (Carlini and Wagner,
            https://arxiv.org/abs/1608.04644). ``"dlr"``: that over the difference of the highest
            and the third highest score (Croce and Hein, https://arxiv.org/abs/2003.01690).
        loss_func: in place of it, (scores n×K, classes n) -> n losses.
        transform: the attack averages the loss over ``samples`` draws of it, of one size. It takes
            the inputs n×… and returns the like, the same transform of each or one of its own. A
            sample counts as fooled when the mean of the probabilities says so. It draws from
            torch's global generators, which are seeded for each step and put back. What it draws
            for a row depends on the rows before, so draw once for all where a batch shall give
            what its samples give one by one.
        samples: how often a step calls the transform.
        early_stop: a fooled sample leaves the batch, so its change is often smaller than the ball
            allows. False: every sample takes all steps, also one that was misclassified to begin
            with.
        keep_best: return the iterate with the highest loss (targeted: lowest) instead of the last.
        lower_bound, upper_bound: ``bounds`` by the names of ``captum.robust.PGD``; both or none,
            where minus and plus infinity are none.

    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> attack = PGD(model, epsilon=0.25, steps=4)
    >>> attack.perturb(torch.tensor([[0.6, 0.4, 0.5]]), target=0)
    tensor([[0.4438, 0.5562, 0.5000]])
    """

    forward_func: Callable[..., Tensor]
    epsilon: float = 8 / 255
    steps: int = 10
    step_size: float | None = None

    @log_usage()
    def perturb(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        epsilon: float | None = None,
        additional_forward_args: object | None = None,
        targeted: bool = False,
        mask: Tensor | Tensors | None = None,
        *,
        radius: float | None = None,
        step_size: float | None = None,
        step_num: int | None = None,
        random_start: bool | None = None,
        norm: str | None = None,
        return_details: bool = False,
    ) -> Any:
        """As :meth:`Attack.perturb`, and by the names of ``captum.robust.PGD.perturb``.

        With ``early_stop``, ``keep_best`` and ``quantize`` off, and the same ``loss_func`` and
        bounds, the result is Captum's. Its order of the arguments is another: give them by name.

        Args:
            inputs, target, epsilon, additional_forward_args, targeted, mask: see there.
            radius: another name of ``epsilon``.
            step_size, random_start, norm: for this call, instead of the attack's own.
            step_num: ``steps`` for this call.
            return_details: see there.

        Raises:
            TypeError: an attack that has no such setting, as ``FGSM`` no ``step_num``; ``radius``
                and ``epsilon`` both; or a target that is no class, but a fraction.
        """
        message = "target: expected classes, got {!r}; give Captum's arguments by their names"
        check(not isinstance(target, float), message.format(target), TypeError)
        check(radius is None or epsilon is None, "radius: epsilon is the same; give one", TypeError)
        given: dict[str, Any] = {"step_size": step_size, "steps": step_num}
        given |= {"random_start": random_start, "norm": norm}
        changes = {name: value for name, value in given.items() if value is not None}
        free = {one.name for one in fields(self) if one.init}
        for name in changes:
            said = "step_num" if name == "steps" else name
            check(name in free, f"{said}: {type(self).__name__} takes none", TypeError)
        kept: dict[str, Any] = {"steps": None} if getattr(self, "iterated", False) else {}
        attack = replace(self, **(kept | changes)) if changes else self
        strength = epsilon if radius is None else radius
        return super(PGD, attack).perturb(
            *(inputs, target, strength, additional_forward_args, targeted, mask),
            return_details=return_details,
        )


@dataclass(eq=False, repr=False)
class PlainAscent(PGD):
    """From the inputs themselves up the gradient as it is; the base of attacks that offer no more.

    They return the last iterate.
    """

    random_start: bool = field(default=False, init=False)
    restarts: int = field(default=1, init=False)
    momentum: float = field(default=0.0, init=False)
    transform: Callable[..., Any] | None = field(default=None, init=False)
    samples: int = field(default=1, init=False)
    keep_best: bool = field(default=False, init=False)
    seed: int | None = field(default=0, init=False)


@dataclass(eq=False, repr=False)
class FGSM(PlainAscent):
    """Fast gradient sign method: one step of ``epsilon`` along the sign of the gradient.

    Goodfellow et al., "Explaining and Harnessing Adversarial Examples"
    (https://arxiv.org/abs/1412.6572), with the paper's loss where ``loss="cross_entropy"``. With
    ``norm="L2"`` the step goes along the gradient.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`.
        epsilon: length of the step in units of the inputs.
        norm, loss, loss_func, lower_bound, upper_bound: as for :class:`PGD`.
        early_stop: a sample that is misclassified to begin with stays as it is.
    """

    steps: int = field(default=1, init=False)
    step_size: float | None = field(default=None, init=False)


@dataclass(eq=False, repr=False)
class GradientStep(FGSM):
    """One step along the gradient itself: x + ``epsilon`` ∇L, neither signed nor normalised.

    Args:
        forward_func, bounds, quantize, loss_func, early_stop: as for :class:`FGSM`.
        loss: as for :class:`FGSM`; cross-entropy by default.
        epsilon: the factor η of the gradient; not the size of the change, and without a limit.
    """

    loss: str = field(default="cross_entropy", kw_only=True)

    @property
    def _are_logarithms(self) -> bool:
        return False

    def _loss_of(self, scores: Tensor, label: Tensor, reading: Reading, units: Tensor) -> Tensor:
        if self.loss_func is None and self.loss == "cross_entropy":
            return cross_entropy(scores, label)  # its length matters, so no logarithm
        return super()._loss_of(scores, label, reading, units)

    def _step_length(self, epsilon: float) -> float:
        return epsilon

    def _direction(self, gradients: Tensors) -> Tensors:
        return gradients

    def _ball(self, epsilon: float | None) -> float:  # noqa: ARG002 – none
        return math.inf

    def _check_epsilon(self, epsilon: float, inputs: Tensors | None) -> None:  # noqa: ARG002
        check_number("epsilon", epsilon, 0)


@dataclass(eq=False, repr=False)
class LeastLikelyClass(PlainAscent):
    """Steps down the loss of the class with the lowest score of the clean input.

    Kurakin et al., "Adversarial Machine Learning at Scale" (https://arxiv.org/abs/1611.01236).
    ``target`` is still the label: a sample that is misclassified to begin with stays as it is. In
    the details, ``label`` is the least likely class and ``fooled`` says that it was reached.

    Args:
        forward_func, epsilon, norm, loss, loss_func, bounds, early_stop, quantize: as for
            :class:`PGD`.
        steps: 1: a single step of ``epsilon``. None: the iterated attack, steps of one level of
            an 8-bit image, min(ε + 4, 1.25 ε) of them with ε in such levels.
        step_size: as for :class:`PGD`, where ``steps`` is given.
    """

    steps: int | None = 1  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.iterated = self.steps is None
        self.steps = 1 if self.steps is None else self.steps
        super().__post_init__()
        is_free = not self.iterated or (self.bounds is not None and self.step_size is None)
        check(is_free, "steps: None sets steps and step size by the bounds; leave both")

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        check(not victim.targeted, "targeted: this attack chooses the class itself; give the label")
        scores = victim.scores(victim.x, victim.everyone)
        check_rivals(scores)
        # Where all scores are equal, another one than the label still.
        others = scores.scatter(1, victim.label[:, None], torch.inf)
        victim.label, victim.targeted = others.argmin(dim=1), True
        return super()._attack(victim, epsilon)

    def _step_count(self, epsilon: float) -> int:
        if not self.iterated or self.bounds is None:
            return super()._step_count(epsilon)
        levels = epsilon * 255 / (self.bounds[1] - self.bounds[0])
        return math.ceil(min(levels + 4, 1.25 * levels) - 1e-9)

    def _step_length(self, epsilon: float) -> float:
        if self.iterated and self.bounds is not None:
            return (self.bounds[1] - self.bounds[0]) / 255
        return super()._step_length(epsilon)


@dataclass(frozen=True)
class MostLikelyClassMap:
    """What a signed step towards a class says about the pixels."""

    classes: Tensor
    """N, the class."""
    magnitude: Tensor
    """N×…, the absolute gradient of the loss, by default of ``log_odds`` as in :class:`PGD`,
    back in the units of the scores."""
    sign: Tensor
    """N×…, 1 where a brighter pixel supports the class, -1 where a darker one does."""


def most_likely_class_map(
    forward_func: Callable[..., Tensor],
    inputs: Tensor,
    target: TargetType = None,
    additional_forward_args: object | None = None,
    *,
    loss_func: LossFunction | None = None,
) -> MostLikelyClassMap:
    """The step of the fast gradient sign method towards the predicted class, read as a map.

    The same arithmetic that fools a classifier, with the class that it gives already: the sign of
    the step says which pixels support it. This is the link between attacks and gradient saliency
    (Simonyan et al., https://arxiv.org/abs/1312.6034).

    Args:
        forward_func, additional_forward_args: see :mod:`captum_robust.attacks`.
        inputs: N×…, of any range.
        target: the class to support instead of the most likely one.
        loss_func: (scores n×K, classes n) -> n losses; ``log_odds`` as in :class:`PGD` by default.
    """
    check_batch((inputs,))
    check_inputs((inputs,), None)
    with torch.inference_mode(False), torch.no_grad():
        normal = without_inference(inputs).detach()
        victim = Victim(forward_func, (normal,), target, additional_forward_args)
        point = Point(victim, victim.x, victim.everyone, graph=True)

        def loss(logits: Tensor) -> Tensor:
            if loss_func is None:
                units = victim.reading.units
                return units[:, 0] * odds_against(logits / units, victim.label)
            return loss_func(victim.reading.scores(logits), victim.label)

        _, (gradient,) = point.gradients(loss)
        gradient = gradient.contiguous()
    return MostLikelyClassMap(victim.label, gradient.abs(), -gradient.sign())
