"""A forward pass whose graph begins at a layer, and the gradients of many scores there at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LayerCut:
    """The layer's tensors as leaves of the graph, and the linear layer that ran last."""

    leaves: tuple[Tensor, ...] = ()
    is_tuple: bool = False
    linear: tuple[nn.Linear, Tensor, Tensor] | None = None

    def linear_weight(self, scores: Tensor) -> Tensor | None:
        """K×C, if the scores are a linear layer of the average-pooled leaf; else None."""
        if self.linear is None or len(self.leaves) != 1 or self.leaves[0].ndim != 4:
            return None
        module, pooled, output = self.linear
        leaf = self.leaves[0].detach()
        if pooled.shape != leaf.shape[:2] or output.shape != scores.shape:
            return None
        # A subclass or a hook may have made more of it than its weight and bias say.
        plain = F.linear(pooled, module.weight, module.bias)
        same = (
            _close(pooled, leaf.mean(dim=(2, 3)), scale=leaf)
            & _close(output, plain, scale=plain)
            & (output == scores).all()
        )
        return module.weight.detach() if same else None


def _close(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Whether a and b differ by rounding only, next to the largest value of ``scale``."""
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    tolerance = (4 if eps > 1e-4 else 32) * eps  # half precision: one rounding; else a sum's
    return ((a - b).abs() <= tolerance * scale.abs().amax().clamp(min=1e-30)).all()


@contextmanager
def cut_at(
    forward_func: Callable[..., Tensor],
    layer: nn.Module,
    cut: LayerCut,
    at_input: bool,
    heads: bool,
) -> Iterator[None]:
    """While it lasts, a forward pass cuts the graph at ``layer`` and records from there on."""

    def leaves_of(value: Any) -> tuple[Tensor, ...]:
        values = value if isinstance(value, tuple) else (value,)
        for v in values:
            if not isinstance(v, Tensor):
                raise TypeError(
                    f"layer: expected a tensor or a tuple of tensors, got {type(v).__name__}"
                )
            if not v.is_floating_point():
                raise TypeError(f"layer: expected floating-point tensors, got {v.dtype}")
        torch.set_grad_enabled(True)  # until the no_grad around the forward pass ends
        # A layer that runs twice overwrites: its last call counts, as in Captum.
        cut.leaves = tuple(v.detach().requires_grad_() for v in values)
        # Clones, as the next layer may write into its input.
        return tuple(v.clone() for v in cut.leaves)

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        cut.is_tuple = isinstance(output, tuple)
        clones = leaves_of(output)
        return clones if cut.is_tuple else clones[0]

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        cut.is_tuple = len(args) > 1
        return leaves_of(args)

    def on_linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, nn.Linear)
        if args and isinstance(output, Tensor) and output.ndim == 2:
            # Copies, as the model may write into them behind the layer.
            cut.linear = (module, args[0].detach().clone(), output.detach().clone())

    handles = [
        layer.register_forward_pre_hook(on_input)
        if at_input
        else layer.register_forward_hook(on_output)
    ]
    if heads and isinstance(forward_func, nn.Module):
        for module in forward_func.modules():
            if isinstance(module, nn.Linear) and module is not layer:
                handles.append(module.register_forward_hook(on_linear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_of(selected: Tensor, leaves: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Of each of the N×k scores with respect to each leaf: k×N×C×…."""
    k = selected.shape[1]
    basis = torch.eye(k, dtype=selected.dtype, device=selected.device)
    basis = basis.unsqueeze(1).expand(k, *selected.shape)
    try:
        if k == 1:  # nothing to batch, and no need for the head to have batching rules
            single = torch.autograd.grad(selected, leaves, basis[0], allow_unused=True)
            gradients = [None if g is None else g.unsqueeze(0) for g in single]
        else:
            gradients = list(
                torch.autograd.grad(
                    selected,
                    leaves,
                    basis,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            )
    except RuntimeError:
        if k == 1:
            raise
        # An operation in the head has no batching rule: one backward pass a class.
        gradients = []
        for leaf in leaves:
            each = [
                torch.autograd.grad(selected, leaf, b, retain_graph=True, allow_unused=True)[0]
                for b in basis
            ]
            gradients.append(None if each[0] is None else torch.stack(each))
    found = [g for g in gradients if g is not None]
    if len(found) < len(leaves):
        raise ValueError("layer: the scores do not depend on all of its tensors")
    return found
