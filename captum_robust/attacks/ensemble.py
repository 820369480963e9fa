"""An attack on several models at once, to fool one that is not among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from captum.robust import Perturbation
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_batch,
    check_callable,
    check_count,
    check_number,
    shape_or_type,
)
from captum_robust._scores import (
    at_least_float,
    copies_of,
    depends_on,
    two_classes,
    warn_of_probabilities,
    where_the_graph_breaks,
)
from captum_robust.attacks.ascent import GradientAscent
from captum_robust.attacks.image_batches import ForwardFunction, class_scores, one_an_image
from captum_robust.attacks.losses import Reading
from captum_robust.attacks.rank import Share
from captum_robust.attacks.victim import Victim

if TYPE_CHECKING:
    import pandas as pd


@dataclass(eq=False, repr=False)
class EnsembleTransfer(GradientAscent):
    r"""Signed steps on the mean loss of several models, to fool one that is not among them.

    .. math:: x \leftarrow \Pi(x \pm \alpha \, \mathrm{sgn} \, \nabla \tfrac1M \sum_k L_k(T(x), y))

    with the loss L of each model's scores and transformations T, as in Elsayed et al.,
    "Adversarial Examples that Fool both Computer Vision and Time-Limited Humans"
    (https://arxiv.org/abs/1802.08195). That what fools several models fools others is the finding
    of Liu et al., "Delving into Transferable Adversarial Examples and Black-box Attacks"
    (https://arxiv.org/abs/1611.02770).
    :func:`held_out` measures it.

    ``predicted`` of the details is the class with the highest mean of log-probabilities. A sample
    is ``fooled`` when enough of the models are; it was so ``already`` when enough of them were
    before. With one model this is :class:`PGD`. A step holds the activations of all models.

    Args:
        models: forward functions with the same K classes; each takes the same inputs.
        share: of the models that must be fooled for the sample to be; 1: all.
        epsilon: as for :class:`PGD`, like all that is not named here.
        early_stop: False, unlike for :class:`PGD`: what just crosses the boundaries of the models
            that it knows transfers less than what goes on.
    """

    models: Sequence[ForwardFunction]
    epsilon: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    _: KW_ONLY
    share: float = 1.0
    early_stop: bool = False
    forward_func: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        is_list = isinstance(self.models, (Sequence, nn.ModuleList))
        check(
            is_list and not isinstance(self.models, str),
            f"models: expected a list of models or functions, got {type(self.models).__name__}",
            TypeError,
        )
        check(len(self.models) > 0, "models: expected at least one, got none")
        for place, model in enumerate(self.models):
            check_callable(f"models, forward_func at {place}", model)
        self.share = check_number("share", self.share, 0, 1, open_low=True)
        self.models = list(self.models)
        self.forward_func = _Ensemble(self.models, self.share)
        super().__post_init__()

    def _victim(self, forward_func: ForwardFunction, *arguments: Any) -> Victim:
        models = forward_func.models if isinstance(forward_func, _Ensemble) else [forward_func]
        # One a call, so that calls do not see each other.
        ensemble = _Ensemble(models, self.share)
        return Victim(ensemble, *arguments, success=ensemble.is_lost)

    def _losses(self, victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG002
        """The mean of each model's."""
        ensemble, read = victim.forward_func, victim.class_scores
        assert isinstance(ensemble, _Ensemble)
        assert read is not None
        places, label = victim.places(victim.seen), victim.label[rows]
        each = [
            self._loss_of(read(scores, places), label, reading, read(reading.units)[rows])
            for scores, reading in zip(ensemble.of_each, ensemble.readings, strict=True)
        ]
        losses = torch.stack(each)
        if self._are_logarithms:
            return losses.logsumexp(dim=0) - math.log(len(each))
        return losses.mean(dim=0)


class _Ensemble:
    """Inputs -> mean over the models of their log-probabilities, N×K×…."""

    def __init__(self, models: Sequence[ForwardFunction], share: float) -> None:
        self.models = list(models)
        self.needed = math.ceil(share * len(models) - 1e-9)
        """So many must be fooled for a sample to be."""
        self.of_each: list[Tensor] = []
        """The logits of the last call, one tensor a model."""
        self.readings: list[Reading] = []
        """How each model's scores become logits; known after the first call."""

    def __call__(self, *args: Any) -> Tensor:
        each: list[Tensor] = []
        for place in range(len(self.models)):
            scores, resolution = self._scores(place, args)
            self._check(scores, place, each, args)
            if len(self.readings) == place:
                warn_of_probabilities(scores, f"models, model {place}")
                self.readings.append(Reading(scores, partial(self._ask, place, args), resolution))
            each.append(self.readings[place].logits(scores))
        self.of_each = each
        # Divided first: the sum may overflow.
        return torch.stack([scores.log_softmax(dim=1) / len(each) for scores in each]).sum(dim=0)

    def _scores(self, place: int, args: tuple[Any, ...]) -> tuple[Any, float]:
        """What a model gives, at least in float32, and the resolution that it came in."""
        raw = self.models[place](*copies_of(args))
        scores = two_classes(raw, len(args[0]), f"models, model {place}")
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            return scores, 0.0
        return at_least_float(scores), torch.finfo(scores.dtype).eps

    def _ask(self, place: int, args: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The scores of a model once more, with a graph, and its inputs."""
        is_float = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        with torch.enable_grad():
            asking = [
                a.detach().requires_grad_() if f else a for a, f in zip(args, is_float, strict=True)
            ]
            leaves = tuple(a for a, f in zip(asking, is_float, strict=True) if f)
            return self._scores(place, tuple(asking))[0], leaves

    def _check(self, scores: Any, place: int, before: list[Tensor], args: tuple[Any, ...]) -> None:
        got = shape_or_type(scores)
        is_batch = isinstance(scores, Tensor) and scores.ndim >= 2
        check(is_batch, f"models: expected scores N×K of model {place}, got {got}")
        first = tuple(before[0].shape) if before else got
        expected = f"expected the classes of model 0, scores {first}, of model {place}"
        check(first == got, f"models: {expected}, got {got}")
        inputs = tuple(a for a in args if isinstance(a, Tensor) and a.requires_grad)
        if torch.is_grad_enabled() and inputs and not depends_on(scores, *inputs):
            rest = args[len(inputs) :]
            raise ValueError(
                f"models: no gradient flows from its scores to the inputs of model {place}"
                f"{where_the_graph_breaks(self.models[place], inputs, rest or None)}"
            )

    def is_lost(self, victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:
        """n booleans: enough of the models, in the last pass, lost or reached the class.

        Where that was of several draws a sample, the mean of a model's probabilities counts.
        """
        assert victim.class_scores is not None
        places = victim.places(victim.seen)
        n = len(rows)
        lost = torch.zeros(n, dtype=torch.long, device=rows.device)
        for each in self.of_each:
            scores = victim.class_scores(each.detach(), places)
            if len(each) > n:
                scores = scores.softmax(dim=1).reshape(n, len(each) // n, -1).mean(dim=1)
            classes = scores.argmax(dim=1)
            lost += (classes == victim.label[rows]) == victim.targeted
        return lost >= self.needed


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

    count = len(models) if isinstance(models, Mapping) else type(models).__name__
    is_enough = isinstance(models, Mapping) and len(models) > 1
    check(is_enough, f"models: expected two or more by name, one to leave out, got {count}")
    check_count("batch_size", batch_size, 1, optional=True)
    n = check_batch((images,))
    true = one_an_image("labels", labels, images)
    aims = None if targets is None else one_an_image("targets", targets, images)
    if aims is not None and bool((aims == true).any()):
        image = int((aims == true).nonzero()[0])
        raise ValueError(f"targets: expected other classes, got that of image {image}")
    parts = [slice(i, i + (batch_size or n)) for i in range(0, n, batch_size or n)]
    right = {name: _classes(model, images, parts) == true for name, model in models.items()}
    aimed = true if aims is None else aims
    rows = []
    for name in models:
        attack = make([model for other, model in models.items() if other != name])
        attacked = torch.cat(
            [attack.perturb(images[p], aimed[p], targeted=aims is not None) for p in parts]
        )
        after = {other: _classes(model, attacked, parts) for other, model in models.items()}
        fooled, of_sources = _shares(name, right, {other: c != true for other, c in after.items()})
        row: dict[str, Any] = {
            "held_out": name,
            "n": fooled.n,
            "fooled": fooled.value,
            "low": fooled.low,
            "high": fooled.high,
            "sources_fooled": of_sources,
        }
        if aims is not None:
            hit = {other: c == aims for other, c in after.items()}
            reached, of_sources = _shares(name, right, hit)
            row |= {"reached": reached.value, "sources_reached": of_sources}
        rows.append(row)
    return pd.DataFrame(rows).set_index("held_out")


def _shares(
    name: str, right: Mapping[str, Tensor], hit: Mapping[str, Tensor]
) -> tuple[Share, float]:
    """Return the share of hit images among those that a model gets right; the others' mean."""
    shares = {n: Share.of(int((r & hit[n]).sum()), int(r.sum())) for n, r in right.items()}
    own = shares.pop(name)
    return own, sum(share.value for share in shares.values()) / len(shares)


@torch.no_grad()
def _classes(model: ForwardFunction, images: Tensor, parts: Sequence[slice]) -> Tensor:
    """N, the predicted classes."""
    scores = [class_scores(model, (images[part],), "models", part.start) for part in parts]
    return torch.cat([s.argmax(dim=1) for s in scores])
