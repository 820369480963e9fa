"""What a network computes on the way: the outputs of some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_finite, check_type, unknown_name
from captum_robust._contexts import DID_NOT_RUN, hooked
from captum_robust._scores import copies_of

SUMMARIES = ("mean", "max", "flatten")


def layers_of(
    model: Callable[[Tensor], Any], layers: Any
) -> tuple[tuple[nn.Module, ...], tuple[str | None, ...]]:
    """The modules, and their names in the model where they have one."""
    check_type("layers", layers, (nn.Module, str, Iterable), "modules or names")
    listed = [layers] if isinstance(layers, (nn.Module, str)) else list(layers)
    check(listed, "layers: expected at least one")
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = {module: name for name, module in named.items()}
    modules = []
    for layer in listed:
        check_type("layers", layer, (nn.Module, str), "modules or names")
        if isinstance(layer, str):
            check(named, f"layers: {layer!r} names a layer, and the model is a function")
            if layer not in named:
                raise unknown_name("layer", layer, filter(None, named))
            layer = named[layer]
        modules.append(layer)
    return tuple(modules), tuple(map(names.get, modules))


def output_and_activations(
    model: Callable[[Tensor], Any], x: Tensor, layers: Sequence[nn.Module], summary: str
) -> tuple[Any, Tensor]:
    """The model's output for inputs n×…, and the activations n×D of all layers, float32."""
    summaries: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        # Summarised here and now: the next layer may write into its input.
        summaries[layer] = _summarised(output, summary, layer, len(x))

    with hooked(dict.fromkeys(layers), keep):
        output = model(copies_of(x))
    for i, layer in enumerate(layers):
        check(layer in summaries, f"layers: number {i}, {type(layer).__name__}, {DID_NOT_RUN}")
    activations = torch.cat([summaries[layer].to(x.device) for layer in layers], dim=1)
    check_finite(activations, "layers, activations")
    return output, activations


def _summarised(output: Any, summary: str, layer: nn.Module, n: int) -> Tensor:
    """Activations n×D, float32, in memory of their own."""
    name = type(layer).__name__
    got = getattr(output, "dtype", type(output).__name__)
    is_floating = isinstance(output, Tensor) and output.is_floating_point()
    check(is_floating, f"layers: expected floating point from {name}, got {got}", TypeError)
    is_each = output.ndim > 0 and len(output) == n
    check(is_each, f"layers: expected an output {n}×… of {name}, got {tuple(output.shape)}")
    own: Tensor = output.clone().float()
    if own.ndim <= 2 or summary == "flatten":
        return own.reshape(n, -1)
    positions = (1,) if own.ndim == 3 else tuple(range(2, own.ndim))
    return own.mean(positions) if summary == "mean" else own.amax(positions)
