"""Layers of a network and what they give for a batch: maps N×C×h×w, or features N×D."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_type
from captum_robust._contexts import DID_NOT_RUN, evaluation, hooked, probing
from captum_robust.models import Classifier
from captum_robust.models.layers import layer_of
from captum_robust.nn.layout import fitting
from captum_robust.nn.places import Layouts
from captum_robust.nn.scales import find_scales, input_size_of


@dataclass(frozen=True, eq=False)
class Watched:
    """A layer, and how its output, or input, becomes what is looked at."""

    module: nn.Module
    name: str
    runs: int
    """How often it runs in one pass; the last time counts."""
    place: Callable[[Tensor], Tensor]
    """Its output as maps N×C×h×w, or its input as features N×D."""
    shape: tuple[int, ...]
    """C, h, w of its maps, or D."""
    at_input: bool = False


class _AllSeenError(Exception):
    """Raised in a hook, as the rest of the network need not run."""


def as_classifier(model: nn.Module, input_size: tuple[int, int] | None = None) -> Classifier:
    """The model, or a plain network as one that takes pixels as they are.

    Its input size is the one given, else its attribute ``input_size``, else 224.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    if isinstance(model, Classifier):
        return model
    return Classifier(model, input_size=input_size_of(model, input_size, 224))


def _unchanged(x: Tensor) -> Tensor:
    return x


def layers_of(
    model: Classifier,
    layers: Sequence[nn.Module | str] | None,
    input_size: tuple[int, int] | None = None,
    *,
    argument: str = "layer",
) -> list[Watched]:
    """The layers with their names and shapes, found by a pass of one black image.

    Outputs N×h×w×C, and tokens whose places in the image are known, become maps too. Without
    layers they are the last one of each scale, or else the model's ``cam_layer``.

    Raises:
        ValueError: a layer that is no part of the model, does not run or gives no maps; the message
            begins with the ``argument``.
    """
    try:
        modules = _usual(model) if layers is None else [layer_of(model.module, x) for x in layers]
        return _probed(model, modules, model.input_size if input_size is None else input_size)
    except ValueError as error:
        raise ValueError(re.sub("^layer:", f"{argument}:", str(error))) from None


def _probed(
    model: Classifier, modules: Sequence[nn.Module], size: tuple[int, int]
) -> list[Watched]:
    names = {part: name for name, part in model.module.named_modules()}
    runs: dict[nn.Module, int] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        outputs[module] = output

    with torch.no_grad(), probing(model) as image_of, hooked(dict.fromkeys(modules), record):
        image = image_of(model.input_shape[0], *size)
        with Layouts(image) as followed:
            _run(model, image, modules, runs)
    watched = []
    for module in modules:
        name = names[module] or "the network itself"
        kind = f"{type(module).__name__} {name!r}"
        check(module in outputs, f"layer: {kind} {DID_NOT_RUN}")
        output = outputs[module]
        is_tensor = isinstance(output, Tensor) and output.ndim > 2
        got = "×".join(map(str, getattr(output, "shape", ()))) or type(output).__name__
        check(is_tensor, f"layer: expected maps N×C×h×w, got {got} from {kind}")
        layout = fitting(followed.of(output), output, image)
        own = model.reshape_transform if _is_own(model, module) else None
        place: Callable[[Tensor], Tensor] = own or layout or _unchanged
        maps = place(output)
        check(maps.ndim == 4, f"layer: expected maps N×C×h×w, got {got} from {kind}")
        watched.append(Watched(module, name, runs[module], place, tuple(maps.shape[1:])))
    return watched


def _run(model: Classifier, image: Tensor, modules: Sequence[nn.Module], runs: Any) -> None:
    """A pass, whose failure behind the layers does not matter: a head may want another size."""
    try:
        model.module(image)
    except RuntimeError:
        if not all(module in runs for module in modules):
            raise


def _is_own(model: Classifier, module: nn.Module) -> bool:
    return model.reshape_transform is not None and model.cam_layer is module


def _usual(model: Classifier) -> list[nn.Module]:
    if model.reshape_transform is None:
        with suppress(ValueError):
            return list(find_scales(model.module, model.input_size))
    return [model.cam_layer]


def penultimate(model: Classifier) -> Watched:
    """What the last linear layer, that of the scores, is given; else the means of the last maps.

    A network may return a tuple, list or mapping with the scores among others.
    """
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, given: Any, output: Any) -> None:
        if given:  # not by its keyword
            seen.append((module, given[0], output))

    linear = [m for m in model.module.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad(), probing(model) as image_of, hooked(linear, record):
        scores = model.module(image_of(*model.input_shape))
    if isinstance(scores, Mapping):
        scores = tuple(scores.values())
    outputs = scores if isinstance(scores, (tuple, list)) else (scores,)
    shapes = [each.shape for each in outputs if isinstance(each, Tensor)]
    seen = [one for one in seen if getattr(one[2], "shape", None) in shapes]
    names = {part: name for name, part in model.module.named_modules()}
    if seen:
        head, given, _ = seen[-1]
        runs = sum(one[0] is head for one in seen)
        shape = (given[0].numel(),)
        name = f"the input of {names[head]}"
        return Watched(head, name, runs, lambda x: x.flatten(1), shape, at_input=True)
    (last,) = layers_of(model, [model.cam_layer])
    name = f"the means of the maps of {last.name}"
    return Watched(
        last.module, name, last.runs, lambda x: last.place(x).mean((2, 3)), last.shape[:1]
    )


def watch(model: Classifier, watched: Sequence[Watched], x: Tensor) -> list[Tensor]:
    """What the layers give for normalised images N×C×H×W, without a graph; the rest does not run.

    Copies: what comes behind a layer may write into its output.
    """
    left = {layer.module: layer.runs for layer in watched}
    values: dict[tuple[nn.Module, bool], Tensor] = {}
    asked = {(layer.module, layer.at_input) for layer in watched}

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        left[module] -= 1
        for at_input in (True, False):
            if (module, at_input) in asked and left[module] == 0:
                values[module, at_input] = (given[0] if at_input else output).clone()
        if not any(left.values()):
            raise _AllSeenError

    with torch.no_grad(), evaluation(model), hooked(left, keep), suppress(_AllSeenError):
        model.module(x)
    for layer in watched:
        check((layer.module, layer.at_input) in values, f"layer: {layer.name} {DID_NOT_RUN}")
    return [layer.place(values[layer.module, layer.at_input]) for layer in watched]
