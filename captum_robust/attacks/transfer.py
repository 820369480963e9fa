"""Attacks on a model whose gradients are not known: made on others, and carried over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from captum.log import log_usage
from captum.robust import Perturbation
from torch import Tensor, nn

from captum_robust._captum import TargetType
from captum_robust._checks import (
    as_number,
    check_batch,
    check_count,
    check_finite,
    check_inputs,
    check_number,
    checked_bounds,
)
from captum_robust._contexts import seeded
from captum_robust._scores import (
    at_least_float,
    depends_on,
    model_scores,
    one_row_a_sample,
    where_the_graph_breaks,
)
from captum_robust.attacks._attack import Tensors, Victim
from captum_robust.attacks.gradient import FGSM, PGD
from captum_robust.attacks.rank import Share

if TYPE_CHECKING:
    import pandas as pd

ForwardFunction = Callable[..., Tensor]
MakeAttack = Callable[[ForwardFunction], Perturbation]


class EnsembleTransfer(PGD):
    r"""Signed steps on the mean loss of several models, to fool one that is not among them.

    .. math:: x \leftarrow \Pi(x \pm \alpha \, \mathrm{sgn} \, \nabla \tfrac1M \sum_k L_k(T(x), y))

    with the cross-entropy L and transformations T, as in Elsayed et al., "Adversarial Examples that
    Fool both Computer Vision and Time-Limited Humans" (https://arxiv.org/abs/1802.08195). That what
    fools several models fools others is the finding of Liu et al., "Delving into Transferable
    Adversarial Examples and Black-box Attacks" (https://arxiv.org/abs/1611.02770).
    :func:`held_out` measures it.

    ``predicted`` of the details is the class with the highest mean of log-probabilities. A sample
    is ``fooled`` when enough of the models are; it was so ``already`` when enough of them were
    before. With one model this is :class:`PGD`. A step holds the activations of all models.

    Args:
        models: forward functions with the same K classes; each takes the same inputs.
        share: of the models that must be fooled for the sample to be; 1: all.
        epsilon, steps, step_size, norm, random_start, restarts, momentum, transform, samples,
            bounds, keep_best, quantize, seed: as for :class:`PGD`.
        early_stop: False, unlike for :class:`PGD`: what just crosses the boundaries of the models
            that it knows transfers less than what goes on.
    """

    def __init__(
        self,
        models: Sequence[ForwardFunction],
        epsilon: float = 16 / 255,
        steps: int = 10,
        step_size: float | None = None,
        *,
        share: float = 1.0,
        norm: str = "Linf",
        random_start: bool = False,
        restarts: int = 1,
        momentum: float = 0.0,
        transform: Callable[..., Any] | None = None,
        samples: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        early_stop: bool = False,
        keep_best: bool = True,
        quantize: bool = True,
        seed: int | None = 0,
    ) -> None:
        if not isinstance(models, (Sequence, nn.ModuleList)) or isinstance(models, str):
            kind = type(models).__name__
            raise TypeError(f"models: expected a list of models or functions, got {kind}")
        if len(models) == 0:
            raise ValueError("models: expected at least one")
        for place, model in enumerate(models):
            if not callable(model):
                kind = type(model).__name__
                raise TypeError(f"models: each is a forward_func, but at {place} is {kind}")
        if not 0 < as_number(share) <= 1:
            raise ValueError(f"share: expected a number in (0, 1], got {share!r}")
        super().__init__(
            _Ensemble(models),
            epsilon,
            steps,
            step_size,
            norm=norm,
            random_start=random_start,
            restarts=restarts,
            momentum=momentum,
            loss_func=_mean_cross_entropy,
            transform=transform,
            samples=samples,
            bounds=bounds,
            early_stop=early_stop,
            keep_best=keep_best,
            quantize=quantize,
            seed=seed,
        )
        self.models = list(models)
        self.share = float(share)

    def _victim(self, forward_func: ForwardFunction, *arguments: Any) -> Victim:
        models = forward_func.models if isinstance(forward_func, _Ensemble) else [forward_func]
        return _EnsembleVictim(models, self.share, *arguments)


def _mean_cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """Of the mean of log-probabilities. Not the cross-entropy of it, which would normalise it."""
    return F.nll_loss(scores, classes, reduction="none")


class _Ensemble:
    """Inputs -> mean over the models of their log-probabilities, N×K×…."""

    def __init__(self, models: Sequence[ForwardFunction]) -> None:
        self.models = list(models)
        self.of_each: list[Tensor] = []
        """The log-probabilities of the last call, one tensor a model, without a graph."""

    def __call__(self, *args: Any) -> Tensor:
        found: list[Tensor] = []
        self.of_each = []
        for place, model in enumerate(self.models):
            # A model may write to what it is given.
            scores = model(*(a.clone() if isinstance(a, Tensor) else a for a in args))
            self._check(scores, place, found, args)
            found.append(at_least_float(scores).log_softmax(dim=1))
            self.of_each.append(found[-1].detach())
        return torch.stack(found).mean(dim=0)

    def _check(self, scores: Any, place: int, before: list[Tensor], args: tuple[Any, ...]) -> None:
        if not isinstance(scores, Tensor) or scores.ndim < 2:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"models: expected scores N×K of model {place}, got {got}")
        if before and scores.shape != before[0].shape:
            raise ValueError(
                f"models: model 0 gives scores {tuple(before[0].shape)}, and model {place} "
                f"{tuple(scores.shape)}; they need the same classes"
            )
        inputs = tuple(a for a in args if isinstance(a, Tensor) and a.requires_grad)
        if torch.is_grad_enabled() and inputs and not depends_on(scores, *inputs):
            rest = args[len(inputs) :]
            raise ValueError(
                f"models: no gradient flows from its scores to the inputs of model {place}"
                f"{where_the_graph_breaks(self.models[place], inputs, rest or None)}"
            )


class _EnsembleVictim(Victim):
    """A batch that is fooled when enough of several models are."""

    def __init__(self, models: Sequence[ForwardFunction], share: float, *arguments: Any) -> None:
        self._ensemble = _Ensemble(models)
        self._needed = math.ceil(share * len(models) - 1e-9)
        super().__init__(self._ensemble, *arguments)
        self._rows = self.everyone

    def scores(self, inputs: Tensors, rows: Tensor) -> Tensor:
        self._rows = rows
        return super().scores(inputs, rows)

    def succeeds(self, scores: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG002 – of all models
        """n booleans: of the last pass, whether enough models lost, or reached, the class.

        Where that was of several draws a sample, the mean of a model's probabilities counts.
        """
        assert self._class_scores is not None
        places = self.places(self._rows)
        n = len(rows)
        lost = torch.zeros(n, dtype=torch.long, device=rows.device)
        for each in self._ensemble.of_each:
            probabilities = self._class_scores(each, places).exp()
            classes = probabilities.reshape(n, len(each) // n, -1).mean(dim=1).argmax(dim=1)
            lost += (classes == self.label[rows]) == self.targeted
        return lost >= self._needed

    def _see_clean(self, scores: Tensor) -> None:
        super()._see_clean(scores)
        if not self.targeted:
            self.already = self.succeeds(scores, self.everyone)


def held_out(
    models: Mapping[str, ForwardFunction],
    images: Tensor,
    labels: Tensor | Sequence[int],
    make: Callable[[list[ForwardFunction]], Perturbation] = EnsembleTransfer,
    *,
    targets: Tensor | Sequence[int] | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """How often an attack on all models but one fools that one; each is left out in turn.

    Args:
        models: name -> forward function, two or more. Give those that need images of another size
            as functions that resize.
        images: N×…, in [0, 1].
        labels: N, the true classes.
        make: the models that are attacked -> the attack.
        targets: N, the classes to aim at; None: away from the labels.
        batch_size: images at a time; None: all.

    Returns:
        A row for each model, as ``held_out``: ``n``, the images that it classifies right; the share
        ``fooled`` of them, with Wilson's 95 % interval from ``low`` to ``high``; and
        ``sources_fooled``, the mean over the attacked models of the same share. With targets also
        ``reached`` and ``sources_reached``, the shares that got the class aimed at. NaN where a
        model classifies no image right.

    Raises:
        ValueError: fewer than two models; labels or targets that are not one an image; a target
            that is the label.
    """
    import pandas as pd

    if not isinstance(models, Mapping) or len(models) < 2:
        got = len(models) if isinstance(models, Mapping) else type(models).__name__
        raise ValueError(f"models: expected two or more by name, one to leave out, got {got}")
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    n = check_batch((images,))
    true = _one_an_image("labels", labels, images)
    aims = None if targets is None else _one_an_image("targets", targets, images)
    if aims is not None and bool((aims == true).any()):
        image = int((aims == true).nonzero()[0])
        raise ValueError(f"targets: image {image} is of class {int(true[image])}")
    parts = [slice(i, i + (batch_size or n)) for i in range(0, n, batch_size or n)]
    right = {name: _classes(model, images, parts) == true for name, model in models.items()}
    rows = []
    for name in models:
        sources = [other for other in models if other != name]
        attack = make([models[other] for other in sources])
        aimed = true if aims is None else aims
        found = [
            attack.perturb(images[part], aimed[part], targeted=aims is not None) for part in parts
        ]
        attacked = torch.cat(found)
        after = {other: _classes(model, attacked, parts) for other, model in models.items()}
        fooled = {
            other: Share.of(int((right[other] & (c != true)).sum()), int(right[other].sum()))
            for other, c in after.items()
        }
        own = fooled[name]
        row: dict[str, Any] = {
            "held_out": name,
            "n": own.n,
            "fooled": own.value,
            "low": own.low,
            "high": own.high,
            "sources_fooled": sum(fooled[other].value for other in sources) / len(sources),
        }
        if aims is not None:
            reached = {
                other: Share.of(int((right[other] & (c == aims)).sum()), fooled[other].n).value
                for other, c in after.items()
            }
            row["reached"] = reached[name]
            row["sources_reached"] = sum(reached[other] for other in sources) / len(sources)
        rows.append(row)
    return pd.DataFrame(rows).set_index("held_out")


@dataclass(frozen=True)
class SubstituteRound:
    """What a round of training a substitute came to."""

    labelled: int
    """Images that it was trained on."""
    queries: int
    """Labels asked of the oracle so far."""
    agreement_on_new: float
    """Of the images new in this round, the share to which it gave the oracle's class before it
    was trained on them. In the first round: untrained."""
    agreement: float
    """Of all labelled images, the share to which it gives the oracle's class after training."""


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
        oracle: images -> classes N, as whole numbers; or a model, images -> scores N×K, of which
            only the argmax is used.
        budget: labels to ask at most, by all methods together; None: no limit.
        make: the substitute as a function -> the attack on it. By default :class:`FGSM` of every
            image, also of those that the substitute misclassifies: the oracle may not.
        bounds: lowest and highest value of an image; None: no limit. An attack of ``make`` has its
            own.

    Attributes:
        queries: labels asked so far. Those of a call that failed count too.
        substitute: the trained network; None before :meth:`fit`.
    """

    def __init__(
        self,
        oracle: ForwardFunction,
        *,
        budget: int | None = 2000,
        make: MakeAttack | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if not callable(oracle):
            kind = type(oracle).__name__
            raise TypeError(f"oracle: expected a model or a function, got {kind}")
        if budget is not None:
            check_count("budget", budget, 1)
        self.oracle = oracle
        self.budget = budget
        self.bounds = None if bounds is None else checked_bounds(bounds)
        self.queries = 0
        self.substitute: nn.Module | None = None
        if make is None:
            self.attack: Perturbation = FGSM(self._scores, early_stop=False, bounds=self.bounds)
        else:
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
        if not 0 < abs(as_number(step)) < math.inf:
            raise ValueError(f"step: expected a number other than 0, got {step!r}")
        if not isinstance(substitute, nn.Module):
            kind = type(substitute).__name__
            raise TypeError(f"substitute: expected a torch.nn.Module, got {kind}")
        weights = [p for p in substitute.parameters() if p.requires_grad]
        if not weights:
            raise ValueError("substitute: it has no parameters to train (requires_grad)")
        check_batch((images,))
        check_inputs((images,), self.bounds)
        if self.queries_left <= 0:
            raise ValueError(f"budget: all {self.budget} queries are spent")
        self.substitute = substitute
        optimizer = torch.optim.Adam(weights, lr=lr)
        found = []
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed, images.device):
            try:
                x = (images.clone() if images.is_inference() else images).detach()
                x = x[: int(min(len(x), self.queries_left))]
                labels = self._ask(x, batch_size)
                known = 0
                for number in range(rounds):
                    fresh = self._agreement(x[known:], labels[known:], batch_size)
                    self._train(optimizer, x, labels, epochs, batch_size)
                    whole = self._agreement(x, labels, batch_size)
                    found.append(SubstituteRound(len(x), self.queries, fresh, whole))
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
        return found

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
        return_details: bool = False,
    ) -> Any:
        """What the attack on the substitute makes of the inputs; see its ``perturb``.

        Without a target the substitute's predictions take its place.

        Raises:
            RuntimeError: there is no substitute yet.
        """
        return self.attack.perturb(
            inputs,
            target,
            epsilon,
            additional_forward_args,
            targeted,
            mask,
            return_details=return_details,
        )

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
        classes = _one_an_image("target", target, adversarial)
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
        if len(images) > self.queries_left:
            raise ValueError(
                f"budget: {len(images)} images to ask about, but {self.queries_left} of "
                f"{self.budget} queries left"
            )
        found = []
        for part in torch.split(images, batch_size):
            self.queries += len(part)
            answer = self.oracle(part)
            if isinstance(answer, Tensor) and answer.shape == (len(part),):
                is_class = not answer.is_floating_point() and answer.dtype != torch.bool
                if is_class and bool((answer >= 0).all()):
                    found.append(answer.long())
                    continue
            if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(part):
                got = type(answer).__name__
                if isinstance(answer, Tensor):
                    got = f"{answer.dtype} of shape {tuple(answer.shape)}"
                raise ValueError(
                    f"oracle: expected {len(part)} classes, whole numbers from 0, or scores "
                    f"{len(part)}×K, got {got}"
                )
            check_finite(answer, "oracle, scores")
            found.append(answer.argmax(dim=1))
        return torch.cat(found).to(images.device)

    @torch.no_grad()
    def _agreement(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        substitute = self._fitted().eval()
        found = [
            self._checked(substitute(x), y).argmax(dim=1) == y
            for x, y in _parts(batch_size, images, labels)
        ]
        return float(torch.cat(found).float().mean())

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        epochs: int,
        batch_size: int,
    ) -> None:
        substitute = self._fitted().train()
        # Parts of nearly one size: batch normalisation can't take a single image at the end.
        parts = math.ceil(len(images) / batch_size)
        for _ in range(epochs):
            order = torch.randperm(len(images)).to(images.device)
            for rows in order.tensor_split(parts):
                scores = self._checked(substitute(images[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(scores, labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def _augmented(self, images: Tensor, labels: Tensor, step: float, batch_size: int) -> Tensor:
        """Each image one step up the substitute's score of its class."""
        substitute = self._fitted().eval()
        found = []
        for x, y in _parts(batch_size, images, labels):
            leaf = x.detach().requires_grad_()
            chosen = substitute(leaf).gather(1, y[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf)
            check_finite(gradient, "substitute, gradient")
            found.append(x + step * gradient.sign())
        new = torch.cat(found)
        return new if self.bounds is None else new.clamp(*self.bounds)

    @staticmethod
    def _checked(scores: Any, labels: Tensor) -> Tensor:
        n = len(labels)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != n:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"substitute: expected scores {n}×K, got {got}")
        check_finite(scores, "substitute, scores")
        if int(labels.max()) >= scores.shape[1]:
            raise ValueError(
                f"substitute: the oracle gives class {int(labels.max())}, and it has the classes 0 "
                f"to {scores.shape[1] - 1} only"
            )
        return scores


def _parts(size: int, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, size), torch.split(labels, size), strict=True)


def _one_an_image(name: str, classes: Tensor | Sequence[int], images: Tensor) -> Tensor:
    """N classes on the images' device."""
    found = torch.as_tensor(classes, device=images.device)
    if found.shape != (len(images),) or found.is_floating_point():
        raise ValueError(
            f"{name}: expected {len(images)} classes, one an image, got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    return found


@torch.no_grad()
def _classes(model: ForwardFunction, images: Tensor, parts: Sequence[slice]) -> Tensor:
    """N, the predicted classes."""
    found = []
    for part in parts:
        x = images[part]
        scores = one_row_a_sample(model_scores(model, x, None), len(x))
        if scores.ndim != 2:
            raise ValueError(f"models: expected scores {len(x)}×K, got {tuple(scores.shape)}")
        check_finite(scores, "models, scores", part.start)
        found.append(scores.argmax(dim=1))
    return torch.cat(found)
