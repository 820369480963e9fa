"""A forward pass whose graph begins at a layer, and the gradients of many scores there at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_robust._checks import check
from captum_robust._contexts import check_takes_hooks, hooked, owned
from captum_robust._scores import two_classes, without_inference
from captum_robust.nn.places import Layouts, Places


@dataclass
class LayerCut:
    """The layer's tensors as leaves of the graph, and the linear layers that ran."""

    layer: nn.Module
    at_input: bool
    """Whether the tensors are the layer's input instead of its output."""
    keep_trunk: bool = False
    """Whether the graph is not cut: the layer's tensors keep that of the inputs."""
    others: tuple[nn.Module, ...] = ()
    """Further layers, whose tensors come behind those of the first; then nothing is cut off, but
    what runs before the first of all has no graph."""
    is_tuple: bool = False
    linears: list[tuple[nn.Linear, Tensor, Tensor]] = field(default_factory=list)
    by_layer: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    places_by_layer: dict[nn.Module, list[Places | None]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return (self.layer, *self.others)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors of all layers; none before each has run."""
        ran = all(layer in self.by_layer for layer in self.layers)
        return tuple(v for layer in self.layers for v in self.by_layer[layer]) if ran else ()

    @property
    def places(self) -> list[Places | None]:
        """What is known of the places of each tensor, where they are followed."""
        return [p for layer in self.layers for p in self.places_by_layer[layer]]

    def linear_weight(self, scores: Tensor) -> Tensor | None:
        """K×C, if the scores are a linear layer of the average-pooled leaf; else None."""
        if len(self.leaves) != 1 or self.leaves[0].ndim != 4:
            return None
        leaf = self.leaves[0].detach()
        for module, pooled, output in reversed(self.linears):
            is_logit = output.shape == (len(scores), 1) and scores.shape == (len(scores), 2)
            if pooled.shape != leaf.shape[:2] or not (is_logit or output.shape == scores.shape):
                continue
            weight = module.weight.detach()  # read once: a parametrization computes it anew
            bias = None if module.bias is None else module.bias.detach()
            # A subclass or a hook may have made more of it than its weight and bias say. The same
            # operation on the same numbers gives the same bits.
            plain = F.linear(pooled, weight, bias)
            if not (_is_mean(pooled.to(leaf.device), leaf) and (output == plain).all()):
                continue
            if is_logit:  # of a Classifier
                output, weight = two_classes(output, len(output)), torch.cat([-weight, weight]) / 2
            if (output.to(scores.device) == scores).all():
                return weight
        return None


def _is_mean(pooled: Tensor, leaf: Tensor) -> bool:
    """Whether N×C are the means of N×C×h×w, up to the rounding of each mean."""
    size = leaf.abs().mean(dim=(2, 3), dtype=torch.float32)
    tolerance = 8 * torch.finfo(torch.float32).eps * (leaf.shape[2] * leaf.shape[3]) ** 0.5
    if pooled.dtype.itemsize < 4:
        tolerance += 4 * torch.finfo(pooled.dtype).eps
    mean = leaf.mean(dim=(2, 3), dtype=torch.promote_types(leaf.dtype, torch.float32))
    return bool(((pooled - mean).abs() <= tolerance * size).all())


@contextmanager
def cut_at(
    cut: LayerCut,
    forward_func: Callable[..., Tensor],
    heads: bool,
    followed: Layouts | None = None,
) -> Iterator[None]:
    """While it lasts, a forward pass cuts the graph at the layer and records from there on.

    With ``heads`` it keeps what linear layers were given and gave; with ``followed``, what is
    known of the places of the layer's tensors.
    """

    def on_layer(layer: nn.Module, *values: Any) -> Any:
        # The output, or as a hook before the layer runs its arguments, some by their names.
        value = values if cut.at_input else values[-1]
        # Of a tuple, a dictionary or a mixture of them, the rest (None, numbers) stays as it is.
        flat, structure = tree_flatten(value)
        places = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.is_floating_point()]
        got = getattr(value, "dtype", type(value).__name__)
        wanted = "floating-point tensors, or a tuple or dictionary with such a tensor"
        check(places, f"layer: expected {wanted}, got {got}", TypeError)
        parts = [flat[i] for i in places]
        torch.set_grad_enabled(True)  # until the no_grad around the forward pass ends
        if followed is not None:
            cut.places_by_layer[layer] = [followed.of(v) for v in parts]
        # A layer that runs twice overwrites: its last call counts, as in Captum.
        normal = tuple(map(without_inference, parts))
        trunks = normal if cut.keep_trunk or cut.others else tuple(v.detach() for v in normal)
        leaves = tuple(v if v.requires_grad else v.detach().requires_grad_() for v in trunks)
        cut.by_layer[layer] = leaves
        is_whole = isinstance(value, tuple) and len(parts) == len(flat) and not cut.at_input
        cut.is_tuple = bool(cut.others) or len(parts) > 1 or is_whole
        for i, leaf in zip(places, leaves, strict=True):
            flat[i] = leaf.clone()  # as the next layer may write into its input
        return tree_unflatten(flat, structure)

    def on_linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, nn.Linear) or module in cut.layers:
            return
        if args and isinstance(output, Tensor) and output.ndim == 2:
            # Copies, as the model may write into them behind the layer.
            cut.linears.append((module, args[0].detach().clone(), output.detach().clone()))

    module = forward_func if isinstance(forward_func, nn.Module) else None
    parts = () if module is None else module.modules()
    linears = [m for m in parts if isinstance(m, nn.Linear)]
    with (
        ExitStack() as handles,
        hooked(linears if heads else [], on_linear),
        # A function does not show which modules it calls.
        register_module_forward_hook(owned(on_linear))
        if heads and module is None
        else nullcontext(),
        followed or nullcontext(),
    ):
        for layer in cut.layers:
            check_takes_hooks(layer)
            handles.enter_context(
                layer.register_forward_pre_hook(owned(on_layer), with_kwargs=True)
                if cut.at_input
                else layer.register_forward_hook(owned(on_layer))
            )
        yield


def gradients_of(
    selected: Tensor, leaves: tuple[Tensor, ...], create_graph: bool = False
) -> Sequence[Tensor]:
    """The gradients of each of the N×k scores by each leaf: k×N×C×…."""
    k = selected.shape[1]
    basis = torch.eye(k, dtype=selected.dtype, device=selected.device)
    basis = basis.unsqueeze(1).expand(k, *selected.shape)

    def differentiated(directions: Tensor, *, batched: bool = False) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            selected,
            leaves,
            directions,
            retain_graph=create_graph or k > 1,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )

    gradients: Sequence[Tensor | None] = ()
    if k > 1:
        # It fails where an operation in the head has no batching rule: then one pass a class.
        with suppress(RuntimeError):
            gradients = differentiated(basis, batched=True)
    if not gradients:
        each = zip(*(differentiated(direction) for direction in basis), strict=True)
        gradients = [None if g[0] is None else torch.stack(g) for g in each]
    none = all(gradient is None for gradient in gradients)
    check(not none, "layer: no gradient flows to it from the scores (a detached or quantised part)")
    used = [gradient for gradient in gradients if gradient is not None]
    check(len(used) == len(leaves), "layer: the scores do not depend on all of its tensors")
    return used
