"""The maps that an attribution gives for samples under attack, and their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Tensor

from captum_robust._captum import format_output
from captum_robust._checks import check, check_finite
from captum_robust._contexts import seeded
from captum_robust._scores import arguments_of, at_least_float, target_of
from captum_robust.attacks._second_derivatives import recorded_gradients
from captum_robust.attacks.norms import Tensors
from captum_robust.attacks.victim import Victim, gradients_or_zeros

Explainer: TypeAlias = Attribution | Callable[..., Any]
"""A Captum attribution, or a function (inputs, target) -> maps."""


def check_explainer(name: str, value: object) -> None:
    """``TypeError`` for what is neither an attribution nor a function; a class is none."""
    is_class = isinstance(value, type)
    is_one = isinstance(value, Attribution) or (callable(value) and not is_class)
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    check(is_one, f"{name}: expected a Captum attribution or a function, got {got}", TypeError)


@dataclass(frozen=True)
class AttributionMaps:
    """An attribution with what it takes to run it on some samples of a batch."""

    name: str
    """The argument that it came as, for messages."""
    explainer: Explainer
    arguments: Mapping[str, Any]
    """Keyword arguments of the attribution."""
    seed: int | None
    """Seeds an attribution that draws, so that it draws the same each time."""

    def __call__(self, victim: Victim, x: Tensors, rows: Tensor, graph: bool = False) -> Tensor:
        """The maps n×… of samples ``rows`` at x; with ``graph`` one back to x."""
        explainer, places = self.explainer, rows.tolist()
        # The label, in the form of the target where that also selects among N×K×… scores.
        is_indexed = isinstance(victim.target, tuple) or (
            isinstance(victim.target, list) and isinstance(victim.target[0], tuple)
        )
        target = target_of(victim.target, places, victim.n) if is_indexed else victim.label[rows]
        run: Any = explainer.attribute if isinstance(explainer, Attribution) else explainer
        passed = dict(self.arguments)
        if victim.arguments is not None:
            rest = arguments_of(victim.arguments, places, victim.n)
            passed["additional_forward_args"] = rest
        if run is explainer or _takes_target(run):
            passed["target"] = target
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(seeded(self.seed, victim.x[0].device))
            leaves = x if graph else tuple(t.detach().requires_grad_() for t in x)
            if graph and hasattr(explainer, "differentiable"):
                run = explainer.differentiable
            elif graph:
                stack.enter_context(recorded_gradients())
            attributed = run(format_output(len(leaves) > 1, leaves), **passed)
        maps = _as_maps(attributed, leaves, isinstance(explainer, LayerAttribution))
        check_finite(maps, "attribution")
        return maps if graph else maps.detach()

    def gradients(
        self, victim: Victim, goal: Callable[[Tensor, Tensor], Tensor], x: Tensors, rows: Tensor
    ) -> tuple[Tensors, Tensor]:
        """The gradients n×… of the objective of samples ``rows``, and the maps n×…."""
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in x)
            maps = self(victim, leaves, rows, graph=True)
            objective = goal(maps, rows)
        gradients = gradients_or_zeros(objective, leaves, "attribution, second derivative")
        if gradients is None:
            kind = getattr(self.explainer, "__name__", type(self.explainer).__name__)
            raise ValueError(
                f"{self.name}: no gradient flows from the map of {kind} to the inputs, and this "
                "attack needs one; give surrogate=, another attribution of the same model, such as "
                "captum.attr.Saliency, whose map is moved in its stead"
            )
        return gradients, maps.detach()


def _as_maps(attributed: Any, inputs: Tensors, is_of_layer: bool) -> Tensor:
    """Maps n×h×w of an attribution; of several inputs one after the other, n×P."""
    parts = attributed if isinstance(attributed, (tuple, list)) else (attributed,)
    n = len(inputs[0])
    for part in parts:
        got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        is_batch = isinstance(part, Tensor) and part.ndim >= 2 and len(part) == n
        check(is_batch, f"attribution: expected {n} maps, got {got}")
    is_each = len(parts) == len(inputs) and not is_of_layer
    maps = []
    for i, part in enumerate(parts):
        m = at_least_float(part)
        if is_each and m.shape == inputs[i].shape:
            m = m.abs()
            maps.append(m.sum(dim=1) if m.ndim > 2 else m)
            continue
        has_channels = m.ndim > 3 or (is_of_layer and m.ndim == 3)
        maps.append((m.sum(dim=1) if has_channels else m).clamp(min=0))
    return maps[0] if len(maps) == 1 else torch.cat([m.flatten(1) for m in maps], dim=1)


def _takes_target(attribute: Callable[..., Any]) -> bool:
    """Whether ``attribute`` takes a target: that of a neuron or of an activation does not."""
    parameters = inspect.signature(attribute).parameters
    return "target" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
