"""What a network computes on the way: the outputs of some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check_finite, unknown_name

SUMMARIES = ("mean", "max", "flatten")


def layers_of(
    model: Callable[[Tensor], Any], layers: Any
) -> tuple[tuple[nn.Module, ...], tuple[str | None, ...]]:
    """The modules, and their names in the model where they have one."""
    if not isinstance(layers, (nn.Module, str, Iterable)):
        raise TypeError(f"layers: expected modules or names, got {type(layers).__name__}")
    listed = [layers] if isinstance(layers, (nn.Module, str)) else list(layers)
    if not listed:
        raise ValueError("layers: expected at least one")
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = {id(module): name for name, module in named.items()}
    found = []
    for layer in listed:
        if isinstance(layer, str):
            if not named:
                raise ValueError(f"layers: {layer!r} names a layer, and the model is a function")
            if layer not in named:
                raise unknown_name("layer", layer, [n for n in named if n])
            found.append(named[layer])
        elif isinstance(layer, nn.Module):
            found.append(layer)
        else:
            raise TypeError(f"layers: expected modules or names, got {type(layer).__name__}")
    return tuple(found), tuple(names.get(id(module)) for module in found)


def output_and_activations(
    model: Callable[[Tensor], Any], x: Tensor, layers: Sequence[nn.Module], summary: str
) -> tuple[Any, Tensor]:
    """The model's output for inputs n×…, and the activations n×D of all layers, float32."""
    found: list[Tensor | None] = [None] * len(layers)

    def hook_of(i: int) -> Any:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            # Summarised here and now: the next layer may write into its input.
            found[i] = _summarised(output, summary, layer, len(x))

        return hook

    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(hook_of(i)).remove)
        # A copy: a model may write to what it is given.
        output = model(x.clone())
    missing = [i for i, f in enumerate(found) if f is None]
    if missing:
        i = missing[0]
        raise ValueError(f"layers: number {i}, {type(layers[i]).__name__}, did not run")
    activations = torch.cat([f.to(x.device) for f in found if f is not None], dim=1)
    check_finite(activations, "layers, activations")
    return output, activations


def _summarised(output: Any, summary: str, layer: nn.Module, n: int) -> Tensor:
    """Activations n×D, float32, in memory of their own."""
    name = type(layer).__name__
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = getattr(output, "dtype", type(output).__name__)
        raise TypeError(f"layers: the output of {name} is no floating-point tensor, but {kind}")
    if output.ndim == 0 or len(output) != n:
        raise ValueError(
            f"layers: the output of {name} has the shape {tuple(output.shape)}, expected {n}×… for "
            f"a batch of {n}"
        )
    own = output.clone().float()
    if own.ndim <= 2 or summary == "flatten":
        return own.reshape(n, -1)
    positions = (1,) if own.ndim == 3 else tuple(range(2, own.ndim))
    return own.mean(positions) if summary == "mean" else own.amax(positions)
