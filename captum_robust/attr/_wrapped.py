"""What attributions around another one share: how that is run, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from captum.attr import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
)
from torch import Tensor

from captum_robust._captum import format_tensor_into_tuples
from captum_robust._checks import check, check_finite, check_type, shape_or_type
from captum_robust._contexts import alone, as_written
from captum_robust._scores import given_copies, model_scores, without_inference
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import as_given, as_tuple
from captum_robust.attr._layer_maps import attributed


class Wrapper(Attribution):
    """An attribution around another one.

    Raises:
        TypeError: ``attribution`` is no attribution.
    """

    def __init__(self, attribution: Attribution) -> None:
        check_attribution(attribution, "attribution", "an Attribution")
        super().__init__(attribution.forward_func)
        self.attribution = attribution

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the wrapped attribution does."""
        return bool(self.attribution.multiplies_by_inputs)

    def _scores_of(self, inputs: tuple[Tensor, ...], additional_forward_args: object) -> Tensor:
        """The scores of the inputs, without gradients; ``ValueError`` where they are not finite."""
        with torch.no_grad():
            passed = without_inference(additional_forward_args)
            scores = model_scores(self.forward_func, inputs, passed)
        scores = scores.reshape(1) if scores.ndim == 0 else scores
        check_finite(scores, "forward_func, scores")
        return scores

    def _predicted(
        self, inputs: tuple[Tensor, ...], additional_forward_args: object
    ) -> Tensor | None:
        """N classes, or None for scores that have none; where N×K×…, Captum says what it wants."""
        scores = self._scores_of(inputs, additional_forward_args)
        return scores.argmax(dim=1) if scores.ndim == 2 and scores.shape[1] > 1 else None

    def _check_finite(
        self,
        inputs: tuple[Tensor, ...],
        additional_forward_args: object,
        **results: tuple[Tensor, ...],
    ) -> None:
        """``ValueError`` for NaN or infinity in a result, or in the scores that are to blame."""
        try:
            for name, parts in results.items():
                for part in parts:
                    check_finite(part, name)
        except ValueError:
            self._scores_of(inputs, additional_forward_args)
            raise


def check_attribution(value: object, name: str, expected: str) -> None:
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    check(isinstance(value, Attribution), f"{name}: expected {expected}, got {got}", TypeError)


def passed_on(
    target: Target, additional_forward_args: object, arguments: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of an inner attribution: what is not None, and the caller's own."""
    shared = {"target": target, "additional_forward_args": additional_forward_args}
    return {name: value for name, value in shared.items() if value is not None} | arguments


def needs_target(attribution: Attribution) -> bool:
    """Whether it takes a target and, as Captum's own, does not find the predicted class itself."""
    return takes_target(attribution) and not getattr(attribution, "explains_prediction", False)


def takes_target(attribution: Attribution) -> bool:
    """Whether ``attribute`` takes a target: that of a neuron or of an activation does not."""
    # Wrappers pass on what comes; NoiseTunnel to a neuron's too, which takes no target.
    parameters = inspect.signature(innermost(attribution).attribute).parameters
    return "target" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def innermost(attribution: Attribution) -> Attribution:
    """The attribution that wrappers, ours and Captum's, are around."""
    while isinstance(attribution, (NoiseTunnel, Wrapper)):
        is_tunnel = isinstance(attribution, NoiseTunnel)
        attribution = attribution.attribution_method if is_tunnel else attribution.attribution
    return attribution


def is_of_layer(attribution: Attribution) -> bool:
    """Whether its result is a map of a layer, not of the inputs."""
    return isinstance(innermost(attribution), LayerAttribution)


def run(
    attribution: Attribution,
    inputs: Tensor | tuple[Tensor, ...],
    arguments: dict[str, Any],
    target: Target = None,
    additional_forward_args: object = None,
) -> Any:
    """Run it on copies of the inputs, which it or the model may change."""
    copies = copied(format_tensor_into_tuples(inputs))
    if isinstance(attribution, GradientAttribution) and not isinstance(attribution, LayerGradCam):
        # It would turn them on by itself, but with a warning. A class activation map needs none:
        # with them, all that comes before its layer would be recorded.
        copies = tuple(x.requires_grad_() if x.is_floating_point() else x for x in copies)
    passed = {
        name: without_inference(value)
        for name, value in passed_on(target, additional_forward_args, arguments).items()
        if name != "target" or takes_target(attribution)
    }
    with alone(attribution.forward_func), as_written(), given_copies(attribution, copies):
        return attributed(attribution, as_given(inputs, copies), **passed)


def copied(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone() for x in inputs)


def without_details(
    result: Any, attribution: Attribution, is_inputs_tuple: bool, arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], Any]:
    """The attributions, and what came behind them: (attributions, something) is a tuple too."""
    # A layer has a tuple of its own, whatever the inputs are.
    asked = arguments.get("return_convergence_delta")
    is_of_two = asked if is_of_layer(attribution) else not is_inputs_tuple
    if isinstance(result, tuple) and (isinstance(result[0], tuple) or is_of_two):
        return as_tuple(result[0]), result[1:]
    return as_tuple(result), ()


def shapes(values: tuple[Any, ...]) -> list[Any]:
    return list(map(shape_or_type, values))


def listed(values: tuple[Any, ...]) -> str:
    return " and ".join(map(str, shapes(values)))


def over_tensors(function: Callable[..., Any], *results: Any) -> Any:
    """The function of results that are tensors, or (nested) tuples of such, part by part."""
    if isinstance(results[0], tuple):
        return tuple(over_tensors(function, *parts) for parts in zip(*results, strict=True))
    return function(*results)


def check_result(result: Any) -> Any:
    """A result as it is, detached; ``ValueError`` where it is not finite."""

    def checked(part: Any) -> Any:
        check_type("attribution", part, Tensor, "tensors")
        check_finite(part, "attribution")
        return part.detach()

    return over_tensors(checked, result)
