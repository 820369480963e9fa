"""The attacker who knows the input transforms, and attacks the defended model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_robust._checks import check, check_batch, check_callable, check_count, check_type
from captum_robust._scores import arguments_of, at_least_float, model_scores, one_row_a_sample
from captum_robust.attacks import Attack, EnsembleTransfer, ExplanationAttack, UniversalPerturbation
from captum_robust.transforms.transform import Transform, as_transforms, backward_differentiable

SomeAttack = TypeVar("SomeAttack", bound=Attack)

_SEEDS = 2**31


class DefendedModel(nn.Module):
    """A model whose scores are those of transformed images, averaged over the transforms.

    It decides as :class:`captum_robust.attr.Defended` does. Forward the transforms are exact;
    backward each has the gradient of its surrogate, so an attack on this model is the backward pass
    differentiable approximation (BPDA) through all transforms: Athalye et al., "Obfuscated
    Gradients Give a False Sense of Security" (https://arxiv.org/abs/1802.00420). A transform that
    draws has its own seed, so the attacker knows even the defender's draws; ``redraw`` makes one
    who does not, and takes the expectation over draws instead.

    Transformed images of one size go through the model together.

    Args:
        model: images N×C×H×W -> scores N×K, for pixels that the transforms take.
        transforms: as for :class:`captum_robust.attr.Defended`.
        redraw: in each call a transform that draws gets new seeds.
        samples: with ``redraw``, the draws of such a transform that a call averages.
        seed: of these seeds; two models with the same one draw alike, call by call.
        transforms_per_eval: at most so many transforms in a batch; None: all. With gradients each
            batch then runs again on the way back, so that memory holds one of them at a time.

    Raises:
        TypeError: ``model`` is no function, a transform neither transform nor function.
        ValueError: no transforms; one that draws without a seed; numbers out of range; several
            samples of what is not redrawn.

    >>> from captum_robust.defenses import BitDepth
    >>> model = DefendedModel(lambda x: x.flatten(1), [BitDepth(1), lambda x: x])
    >>> x = torch.tensor([[[[0.25, 0.75]]]], requires_grad=True)
    >>> model(x)
    tensor([[0.1250, 0.8750]], grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        transforms: Transform | Callable[[Tensor], Tensor] | Sequence[Any],
        *,
        redraw: bool = False,
        samples: int = 1,
        seed: int = 0,
        transforms_per_eval: int | None = None,
    ) -> None:
        super().__init__()
        check_callable("model", model)
        self.samples = check_count("samples", samples, 1)
        check_count("seed", seed)
        most = check_count("transforms_per_eval", transforms_per_eval, 1, optional=True)
        self.transforms_per_eval = most
        check(redraw or samples == 1, "samples: without redraw every draw is the same")
        self.model = model
        self.transforms = as_transforms(transforms)
        draws = any(t.draws for t in self.transforms)
        check(draws or not redraw, "redraw: none of the transforms draws")
        self.redraw = redraw
        self._generator = torch.Generator().manual_seed(seed)
        # Train mode, which modules begin in, would not be the model's.
        self.training = getattr(model, "training", False)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """The mean scores N×K; ``arguments`` go to the model, tensors of N rows once a transform.

        Raises:
            ValueError: an empty batch, NaN or infinity, pixels that a transform does not take.
        """
        n = check_batch((x,))
        has_graph = torch.is_grad_enabled() and x.requires_grad
        run: Callable[..., tuple[Tensor, torch.dtype]] = self._weighted_scores
        if has_graph and self.transforms_per_eval is not None:
            run = partial(checkpoint, run, use_reentrant=False)
        groups: dict[tuple[int, ...], list[tuple[Tensor, float]]] = {}
        for transform, weight in self._weighted():
            # A copy: a transform of the user's may write to what it is given.
            image = backward_differentiable(transform, x) if has_graph else transform(x.clone())
            groups.setdefault(tuple(image.shape[1:]), []).append((image, weight))
        parts: list[Tensor] = []
        for same in groups.values():
            most = self.transforms_per_eval or len(same)
            for i in range(0, len(same), most):
                images, weights = zip(*same[i : i + most], strict=True)
                passed = arguments_of(arguments, list(range(n)) * len(images), n)
                part, dtype = run(weights, passed, n, *images)
                parts.append(part)
        return (sum(parts[1:], parts[0]) / len(self.transforms)).to(dtype)

    def _weighted_scores(
        self, weights: Sequence[float], arguments: Any, n: int, *images: Tensor
    ) -> tuple[Tensor, torch.dtype]:
        """N×K: the scores of the images of several transforms, weighted and added up.

        They are at least in float32, as a sum may exceed float16; their own dtype goes with them.
        """
        scores = model_scores(self.model, (torch.cat(images),), arguments)
        scores = one_row_a_sample(scores, n * len(images))
        by_transform = at_least_float(scores).reshape(len(images), n, *scores.shape[1:])
        weight = by_transform.new_tensor(weights).reshape(-1, *[1] * scores.ndim)
        return (by_transform * weight).sum(dim=0), scores.dtype

    def _weighted(self) -> list[tuple[Transform, float]]:
        """The transforms of one call; the weights of all add up to their number."""
        weighted: list[tuple[Transform, float]] = []
        for transform in self.transforms:
            if self.redraw and transform.draws:
                seeds = torch.randint(_SEEDS, (self.samples,), generator=self._generator)
                weighted += [(transform.with_seed(s), 1 / self.samples) for s in seeds.tolist()]
            else:
                weighted.append((transform, 1.0))
        return weighted


def adaptive_attack(
    attack: SomeAttack,
    transforms: Transform | Callable[[Tensor], Tensor] | Sequence[Any],
    *,
    redraw: bool = False,
    samples: int = 1,
    seed: int = 0,
    transforms_per_eval: int | None = None,
) -> SomeAttack:
    """The same attack with the same settings, of the model behind the transforms.

    Args:
        attack: of the bare model, such as PGD, FGSM or DeepFool; it stays as it is.
        transforms: the defence, see :class:`DefendedModel`.
        redraw, samples, seed, transforms_per_eval: as :class:`DefendedModel` takes them: the
            attacker does not know the defender's draws; so many draws a step averages then; their
            seed; at most so many transforms in a batch.

    Raises:
        TypeError: ``attack`` is no :class:`captum_robust.attacks.Attack`.
        ValueError: it depends on more than one model that could be exchanged: a fitted universal
            perturbation (fit one on a ``DefendedModel``), an attack on several models or on an
            explanation (attack a ``Defended`` attribution).

    >>> from captum_robust.attacks import FGSM
    >>> from captum_robust.defenses import BitDepth
    >>> attack = FGSM(torch.nn.Flatten(), 0.25)
    >>> adaptive_attack(attack, BitDepth(1)).forward_func
    DefendedModel(
      (model): Flatten(start_dim=1, end_dim=-1)
    )
    """
    check_type("attack", attack, Attack, "a captum_robust.attacks.Attack")
    check(
        can_adapt(attack),
        f"attack: {type(attack).__name__} is made of more than the model that it attacks; make "
        "one of a DefendedModel, or of a Defended attribution",
    )
    adapted = copy.copy(attack)
    adapted.forward_func = DefendedModel(
        attack.forward_func,
        transforms,
        redraw=redraw,
        samples=samples,
        seed=seed,
        transforms_per_eval=transforms_per_eval,
    )
    return adapted


def can_adapt(attack: Any) -> bool:
    """Whether :func:`adaptive_attack` takes it."""
    fixed = (UniversalPerturbation, ExplanationAttack, EnsembleTransfer)
    return isinstance(attack, Attack) and not isinstance(attack, fixed)
