"""An attack on a model that tells its classes only, by way of a substitute trained on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from captum.log import log_usage
from captum.robust import Perturbation
from torch import Tensor, nn

from captum_robust._checks import (
    as_number,
    check,
    check_batch,
    check_callable,
    check_count,
    check_finite,
    check_inputs,
    check_number,
    check_type,
    checked_bounds,
)
from captum_robust._contexts import seeded
from captum_robust._progress import counted
from captum_robust._scores import warn_of_probabilities, without_inference
from captum_robust.attacks.attack import Attack
from captum_robust.attacks.backward import gradients_or_zeros, no_gradient
from captum_robust.attacks.gradient import FGSM
from captum_robust.attacks.image_batches import ForwardFunction, checked_scores, one_an_image
from captum_robust.attacks.rank import Share
from captum_robust.attacks.victim import clipped

MakeAttack = Callable[[ForwardFunction], Perturbation]


@dataclass(frozen=True)
class SubstituteRound:
    """What a round of training a substitute came to."""

    labelled: int
    """Images that it was trained on."""
    queries: int
    """Labels asked of the oracle so far."""
    agreement_on_new: float
    """The share of the images new in this round to which it gave the oracle's class before it
    was trained on them. In the first round: untrained."""
    agreement: float
    """The share of all labelled images to which it gives the oracle's class after training."""


@dataclass(eq=False, repr=False)
class SubstituteAttack(Perturbation):
    r"""An attack on a model that tells its classes only, made on a substitute trained on them.

    Papernot et al., "Practical Black-Box Attacks against Machine Learning"
    (https://arxiv.org/abs/1602.02697). :meth:`fit` labels a few images by the oracle, trains the
    substitute F, and in each further round adds to every image x of class c the one at

    .. math:: x + \lambda \, \mathrm{sgn} \, \nabla_x F_c(x)

    clipped to the bounds and labelled by the oracle. The paper prints λ = 0.1, a step further into
    the class that x has, where the substitute nearly always knows the answer already. The authors'
    code begins with λ = -0.1, towards the boundary, and so does this by default: for as many
    queries the substitute agrees with the oracle more often.

    :meth:`perturb` runs an attack on the substitute. It asks the oracle nothing, and its details
    speak of the substitute. Whether the oracle is fooled, :meth:`judge` asks.

    Args:
        oracle: images -> classes N or N×1, as whole numbers or (of two) as truth values; or a
            model, images -> scores N×K or one logit a sample, of which only the class is used.
        budget: labels to ask at most, by all methods together; None: no limit.
        make: the substitute as a function -> the attack on it. By default :class:`FGSM` of every
            image, also of those that the substitute misclassifies: the oracle may not.
        bounds: lowest and highest value of an image; None: no limit. An attack of ``make`` has its
            own.

    Attributes:
        queries: labels asked so far. Those of a call that failed count too.
        substitute: the trained network; None before :meth:`fit`.
    """

    oracle: ForwardFunction
    _: KW_ONLY
    budget: int | None = 2000
    make: MakeAttack | None = None
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_callable("oracle", self.oracle)
        check_count("budget", self.budget, 1, optional=True)
        self.bounds = None if self.bounds is None else checked_bounds(self.bounds)
        self.queries = 0
        self.substitute: nn.Module | None = None
        make = self.make or partial(FGSM, early_stop=False, bounds=self.bounds)
        self.attack = make(self._scores)

    @property
    def queries_left(self) -> float:
        """Infinite without a budget."""
        return math.inf if self.budget is None else self.budget - self.queries

    def fit(
        self,
        images: Tensor,
        substitute: nn.Module,
        *,
        rounds: int = 6,
        step: float = -0.1,
        epochs: int = 10,
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int | None = 0,
    ) -> list[SubstituteRound]:
        """Train the substitute to give what the oracle gives.

        The set doubles each round while the budget lasts. Where it leaves fewer labels than there
        are images, so many are drawn; where it leaves none, the training ends. Of the first images
        as many are used as there are labels left.

        Args:
            images: N×…, to begin with. A few of each class; their true classes are not needed.
            substitute: images -> scores N×K. It is trained itself, with Adam, its weights as they
                are to begin with, and is left in evaluation mode. Frozen parameters stay.
            rounds: of training; the set grows between them.
            step: λ, in units of the images; negative: towards the boundary.
            epochs: passes over the labelled set in each round.
            lr: learning rate.
            batch_size: images at a time, in training and in questions.
            seed: of the order of the images, of dropout and of the draw; None: torch's global
                generator.

        Raises:
            ValueError: nothing left of the budget; an empty batch, NaN, or values outside of the
                bounds; a substitute without trainable parameters, or with fewer classes than the
                oracle; an oracle that gives neither classes nor scores.
        """
        for name, value in (("rounds", rounds), ("epochs", epochs), ("batch_size", batch_size)):
            check_count(name, value, 1)
        check_number("lr", lr, 0, open_low=True)
        is_step = 0 < abs(as_number(step)) < math.inf
        check(is_step, f"step: expected a number other than 0, got {step!r}")
        check_type("substitute", substitute, nn.Module, "a torch.nn.Module")
        weights = [p for p in substitute.parameters() if p.requires_grad]
        check(weights, "substitute: expected parameters to train (requires_grad), got none")
        check_batch((images,))
        check_inputs((images,), self.bounds)
        check(self.queries_left > 0, f"budget: all {self.budget} queries are spent")
        self.substitute = substitute
        optimizer = torch.optim.Adam(weights, lr=lr)
        finished = []
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed, images.device):
            try:
                x = without_inference(images).detach()
                x = x[: int(min(len(x), self.queries_left))]
                labels = self._ask(x, batch_size)
                known = 0
                for number in counted(range(rounds), "round", None, "substitute"):
                    fresh = self._agreement(x[known:], labels[known:], batch_size)
                    self._train(optimizer, x, labels, epochs, batch_size)
                    whole = self._agreement(x, labels, batch_size)
                    finished.append(SubstituteRound(len(x), self.queries, fresh, whole))
                    more = int(min(len(x), self.queries_left))
                    if more == 0 or number == rounds - 1:
                        break
                    rows = torch.arange(len(x))
                    if more < len(x):
                        rows = torch.randperm(len(x))[:more]
                    rows = rows.to(x.device)
                    new = self._augmented(x[rows], labels[rows], step, batch_size)
                    known = len(x)
                    x = torch.cat([x, new])
                    labels = torch.cat([labels, self._ask(new, batch_size)])
            finally:
                substitute.eval()
                optimizer.zero_grad(set_to_none=True)
        return finished

    @log_usage()
    @wraps(Attack.perturb, assigned=(), updated=())  # its signature
    def perturb(self, *args: Any, **options: Any) -> Any:
        """What the attack on the substitute makes of the inputs; see its ``perturb``.

        Without a target the substitute's predictions take its place.

        Raises:
            RuntimeError: there is no substitute yet.
        """
        return self.attack.perturb(*args, **options)

    def judge(
        self,
        adversarial: Tensor,
        target: Tensor | Sequence[int],
        *,
        targeted: bool = False,
        batch_size: int = 64,
    ) -> Tensor:
        """N booleans: the oracle gives another class than ``target``; targeted: that class.

        Costs N queries.

        Raises:
            ValueError: fewer are left.
        """
        check_count("batch_size", batch_size, 1)
        check_batch((adversarial,))
        classes = one_an_image("target", target, adversarial)
        return (self._ask(adversarial.detach(), batch_size) == classes) == targeted

    def agreement(self, images: Tensor, *, batch_size: int = 64) -> Share:
        """The share of N images to which the substitute gives the oracle's class.

        Costs N queries.

        Raises:
            ValueError: fewer are left.
            RuntimeError: there is no substitute yet.
        """
        check_count("batch_size", batch_size, 1)
        n = check_batch((images,))
        self._fitted()
        share = self._agreement(images, self._ask(images.detach(), batch_size), batch_size)
        return Share.of(round(share * n), n)

    def _scores(self, *args: Any) -> Tensor:
        scores: Tensor = self._fitted()(*args)
        return scores

    def _fitted(self) -> nn.Module:
        if self.substitute is None:
            raise RuntimeError("there is no substitute yet: call fit() first")
        return self.substitute

    @torch.no_grad()
    def _ask(self, images: Tensor, batch_size: int) -> Tensor:
        """N classes, by the oracle."""
        left = f"{self.queries_left} of {self.budget} queries left"
        is_paid = len(images) <= self.queries_left
        check(is_paid, f"budget: {len(images)} images to ask about, but {left}")
        answers = []
        for part in counted(torch.split(images, batch_size), "batch", None, "queries"):
            self.queries += len(part)
            answers.append(_classes_of(self.oracle(part), len(part)))
        return torch.cat(answers).to(images.device)

    @torch.no_grad()
    def _agreement(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        substitute = self._fitted().eval()
        agree = [
            self._checked(substitute(x), y).argmax(dim=1) == y
            for x, y in _parts(batch_size, images, labels)
        ]
        return float(torch.cat(agree).float().mean())

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        epochs: int,
        batch_size: int,
    ) -> None:
        substitute = self._fitted().train()
        # Parts of nearly one size: batch normalisation can't take a single image.
        parts = min(math.ceil(len(images) / batch_size), max(1, len(images) // 2))
        for _ in counted(range(epochs), "epoch", None, "substitute"):
            order = torch.randperm(len(images)).to(images.device)
            for rows in order.tensor_split(parts):
                scores = self._checked(substitute(images[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(scores, labels[rows])
                no_graph = "substitute: its scores do not depend on its parameters differentiably"
                check(loss.requires_grad, no_graph)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def _augmented(self, images: Tensor, labels: Tensor, step: float, batch_size: int) -> Tensor:
        """Each image one step up the substitute's score of its class."""
        substitute = self._fitted().eval()
        moved = []
        for x, y in _parts(batch_size, images, labels):
            leaf = x.detach().requires_grad_()
            chosen = self._checked(substitute(leaf), y).gather(1, y[:, None]).sum()
            gradients = gradients_or_zeros(chosen, (leaf,))
            if gradients is None:
                raise no_gradient(substitute, (x,), None)
            check_finite(gradients[0], "substitute, gradient")
            moved.append(x + step * gradients[0].sign())
        return clipped((torch.cat(moved),), self.bounds)[0]

    @staticmethod
    def _checked(scores: Tensor, labels: Tensor) -> Tensor:
        scores = checked_scores(scores, len(labels), "substitute")
        highest, classes = int(labels.max()), scores.shape[1]
        expected = f"scores of the oracle's classes, of which one is {highest}"
        check(highest < classes, f"substitute: expected {expected}, got those of {classes}")
        return scores


def _classes_of(answer: Any, n: int) -> Tensor:
    """The n classes of an oracle's answer: those, n or n×1, or scores n×K, or one logit a sample.

    One truth value a sample is class 1 or 0.
    """
    is_tensor = isinstance(answer, Tensor)
    got = f"{answer.dtype} of shape {tuple(answer.shape)}" if is_tensor else type(answer).__name__
    classes: Tensor
    is_whole = is_tensor and not answer.is_floating_point()
    if is_whole and answer.shape in ((n,), (n, 1)) and bool((answer >= 0).all()):
        classes = answer.reshape(n).long()
        return classes
    is_scores = is_tensor and answer.ndim in (1, 2) and len(answer) == n
    if is_scores and answer.ndim == 1:
        # Numbers in [0, 1] may as well be classes, or probabilities.
        is_scores = not is_whole and not bool(((answer >= 0) & (answer <= 1)).all())
    expected = f"{n} classes, whole numbers from 0, or scores {n}×K"
    check(is_scores, f"oracle: expected {expected}, got {got}")
    scores = checked_scores(answer, n, "oracle")
    warn_of_probabilities(scores, "oracle")
    classes = scores.argmax(dim=1)
    return classes


def _parts(size: int, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, size), torch.split(labels, size), strict=True)
