"""TopClasses: an attribution averaged over the top classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._checks import check
from captum_robust._scores import one_row_a_sample
from captum_robust.attr._classes import Ranking, Target, class_weights, top_classes
from captum_robust.attr._inputs import checked
from captum_robust.attr._wrapped import Wrapper, check_result, over_tensors, run, takes_target


class TopClasses(Wrapper):
    r"""The weighted sum of an attribution over the k top classes: RobustCAM's average for any.

    .. math:: \hat A = \sum_{i=1}^{k} w_i A_{c_i}

    Equation 2 of Prakash et al., "Robust Discriminative Localization Maps" (2018), with another
    attribution in the place of the class activation map. It costs one forward pass and k
    attributions; of class activation maps, :class:`RobustCAM` gives the same for one.

    Args:
        attribution: any that takes a target.
        k: how many classes; at most the number there is. Default 5, or as many as ``weights``.
        weights: ``"exponential"``: 2^-i for the i-th class, from 1. Or the k weights.

    Raises:
        TypeError: ``attribution`` is no attribution.
        ValueError: it takes no target; a wrong ``k`` or ``weights``.

    >>> from captum.attr import InputXGradient
    >>> weight = torch.tensor([[8.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    >>> top = TopClasses(InputXGradient(lambda x: x @ weight.T), k=2)
    >>> top.attribute(torch.ones(1, 2))
    tensor([[4., 1.]])
    """

    explains_prediction = True
    ranks_classes = True

    def __init__(
        self,
        attribution: Attribution,
        k: int | None = None,
        weights: str | Sequence[float] = "exponential",
    ) -> None:
        super().__init__(attribution)
        refusal = f"{type(attribution).__name__} takes no target, so it is the same for all classes"
        check(takes_target(attribution), f"attribution: {refusal}")
        self.weights = class_weights(k, weights)

    @property
    def k(self) -> int:
        """How many classes."""
        return len(self.weights)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        *,
        ranking: Ranking | None = None,
        **arguments: Any,
    ) -> Any:
        """The sum, in the shape that the attribution gives.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: N×…, or a tuple.
            target: None: the k classes with the highest scores. A given class comes first, the
                other top classes follow. With scores N×K×…, a tuple's first index is the class.
            additional_forward_args: passed on as they are.
            ranking: scores N×K -> the numbers N×K that rank the classes in their stead.
            arguments: those of the attribution's ``attribute``.

        Returns:
            The sum. (sum, something) where the attribution gives (attributions, something); that
            is summed likewise, as fits the ``convergence_delta`` of linear completeness.

        Raises:
            ValueError: NaN or infinity in the inputs, scores or attributions.
        """
        tensors = checked(inputs)
        with torch.inference_mode(False), torch.enable_grad():
            scores = self._scores_of(tensors, additional_forward_args)
            scores = one_row_a_sample(scores, len(tensors[0]))
            _, classes = top_classes(scores, target, self.k, ranking)
            targets: list[Any] = [target]
            if classes is not None:
                targets = [_with_class(target, column) for column in classes.unbind(dim=1)]
            total: Any = None
            for weight, each in zip(self.weights, targets, strict=False):
                result = run(self.attribution, inputs, arguments, each, additional_forward_args)
                result = over_tensors(lambda a, w=weight: w * a, check_result(result))
                total = result if total is None else over_tensors(torch.add, total, result)
        return over_tensors(Tensor.contiguous, total)


def _with_class(target: Target, classes: Tensor) -> Any:
    """The targets of N samples with other classes: where tuples, only their first index changes."""
    if isinstance(target, tuple):
        return [(c, *target[1:]) for c in classes.tolist()]
    if isinstance(target, list) and isinstance(target[0], tuple):
        return [(c, *t[1:]) for c, t in zip(classes.tolist(), target, strict=True)]
    return classes
