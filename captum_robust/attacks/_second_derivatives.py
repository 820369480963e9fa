"""What it takes to differentiate an attribution, which is made of gradients already."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from captum_robust._checks import check_number
from captum_robust._contexts import alone, check_runs_itself, process_wide


@contextmanager
def recorded_gradients() -> Iterator[None]:
    """While it lasts, what ``torch.autograd.grad`` returns has a graph of its own.

    Attributions ask for gradients without one, so they could not be differentiated. Hooks on
    tensors that are registered meanwhile are taken off at the end: those of guided backpropagation
    act on the first derivative, and would bend the second one too. ``torch.autograd.grad`` and
    ``torch.Tensor.register_hook`` are replaced, for this thread alone, and put back also when an
    exception passes; another thread that wants the same waits.
    """
    owner = threading.get_ident()
    autograd: Any = torch.autograd
    tensor: Any = Tensor
    plain_grad, plain_hook = autograd.grad, tensor.register_hook
    handles: list[Any] = []

    signature = inspect.signature(plain_grad)

    @functools.wraps(plain_grad)
    def grad(*args: Any, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return plain_grad(*args, **options)
        call = signature.bind(*args, **options)
        # The new graph needs the old one.
        call.arguments |= {"create_graph": True, "retain_graph": True}
        return plain_grad(*call.args, **call.kwargs)

    @functools.wraps(plain_hook)
    def register_hook(self: Tensor, hook: Callable[..., Any]) -> Any:
        handle = plain_hook(self, hook)
        if threading.get_ident() == owner:
            handles.append(handle)
        return handle

    with process_wide:
        plain_grad, plain_hook = autograd.grad, tensor.register_hook
        autograd.grad, tensor.register_hook = grad, register_hook
        try:
            yield
        finally:
            autograd.grad, tensor.register_hook = plain_grad, plain_hook
            for handle in handles:
                handle.remove()


@contextmanager
def smooth_activations(module: nn.Module, beta: float) -> Iterator[None]:
    r"""While it lasts, the piecewise linear activations within ``module`` are smooth.

    The second derivative of max(x, 0) is zero, and that of what a network makes of it too. In its
    place comes the softplus, log(1 + e^{βx}) / β; ReLU6 and Hardtanh become the difference of two,
    and LeakyReLU, PReLU, Hardswish and Hardsigmoid are made of it likewise. Dombrowski et al.,
    "Explanations Can Be Manipulated and Geometry Is to Blame" (https://arxiv.org/abs/1906.07983).

    Both modules (``nn.ReLU``) and functions (``F.relu``, ``torch.relu``, ``x.relu_()``) are
    replaced, where they are called from Python within a forward pass of ``module`` or of a part of
    it; an activation in place writes into its input still. Clamping (``x.clamp(min=0)``), max
    pooling and compiled code (TorchScript) stay as they are. The modules run under another
    ``forward`` meanwhile, which smooths the passes of this thread alone; it is put back also when
    an exception passes.

    Args:
        module: its weights, its modes and its parts stay what they are.
        beta: β, positive; the larger, the closer to the original. The softplus is above
            max(x, 0) by log(2) / β at most.

    >>> relu = nn.ReLU()
    >>> with smooth_activations(relu, beta=1.0):
    ...     relu(torch.zeros(1))
    tensor([0.6931])
    >>> relu(torch.zeros(1))
    tensor([0.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    check_runs_itself(module)
    mode = _Smooth(check_number("beta", beta, 0, open_low=True))
    is_inside, owner = False, threading.get_ident()

    def smooth(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **options: Any) -> Any:
            nonlocal is_inside
            if is_inside or threading.get_ident() != owner:
                return forward(*args, **options)
            is_inside = True
            try:
                with mode:
                    return forward(*args, **options)
            finally:
                is_inside = False

        return run

    # All parts, as attributions may call them one by one.
    parts = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    with process_wide, alone(module):
        before = [vars(m).get("forward") for m in parts]
        try:
            for m in parts:
                vars(m)["forward"] = smooth(m.forward)
            yield
        finally:
            for m, forward in zip(parts, before, strict=True):
                if forward is None:
                    vars(m).pop("forward", None)
                else:
                    vars(m)["forward"] = forward


class _Smooth(TorchFunctionMode):
    """Calls the smooth function where an activation is called."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = {} if kwargs is None else dict(kwargs)
        if func not in _SMOOTH:
            return func(*args, **options)
        ramp = functools.partial(_ramp, self.beta)
        is_in_place = options.pop("inplace", func in (torch.relu_, Tensor.relu_))
        if not is_in_place:
            return _SMOOTH[func](ramp, *args, **options)
        # The backward pass needs the values from before.
        x, *rest = args
        return x.copy_(_SMOOTH[func](ramp, x.clone(), *rest, **options))


class _Ramp(torch.autograd.Function):
    """From 0 to ``width`` with slope 1 between, the two corners rounded by a softplus each.

    The same as ``softplus(x) - softplus(x - width)``, where the corners are far apart, for a
    third of the time: one exponential instead of two, and its logarithm is not ``log1p``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta, ctx.width = beta, width
        # The softplus is max(x, 0) and this: it adds at the lower corner, and takes at the upper.
        rounding = _from_corner(x, width).abs_().mul_(-beta).exp_().add_(1).log_().div_(beta)
        if width < math.inf:
            rounding.mul_((width / 2 - x).sign_())
        return rounding.add_(x.clamp(0, width))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _RampSlope.apply(gradient, x, ctx.beta, ctx.width), None, None


class _RampSlope(torch.autograd.Function):
    """The slope of the ramp at x, times a gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, beta: float, width: float) -> Tensor:
        slope = _from_corner(x, width).mul_(beta).sigmoid_()
        ctx.save_for_backward(gradient, x, slope)
        ctx.beta, ctx.width = beta, width
        return gradient * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient, x, slope = ctx.saved_tensors
        bend = (slope * (1 - slope)).mul_(ctx.beta)
        if ctx.width < math.inf:
            bend.mul_((ctx.width / 2 - x).sign_())
        return outer * slope, bend.mul_(gradient).mul_(outer), None, None


def _from_corner(x: Tensor, width: float) -> Tensor:
    """How far x is within the nearer corner, as a new tensor."""
    return x.clone() if width == math.inf else torch.minimum(x, width - x)


def _ramp(beta: float, x: Tensor, width: float = math.inf) -> Tensor:
    # Behind 20 / β the softplus is straight, as in F.softplus.
    if beta * width <= 40:
        return _ramp(beta, x) - _ramp(beta, x - width)
    smooth: Tensor = _Ramp.apply(x, beta, width)
    return smooth


def _relu(ramp: _Ramps, input: Tensor) -> Tensor:
    return ramp(input)


def _leaky_relu(ramp: _Ramps, input: Tensor, negative_slope: Tensor | float) -> Tensor:
    return negative_slope * input + (1 - negative_slope) * ramp(input)


def _prelu(ramp: _Ramps, input: Tensor, weight: Tensor) -> Tensor:
    return _leaky_relu(ramp, input, weight.reshape(-1, *[1] * max(0, input.ndim - 2)))


_Ramps = Callable[..., Tensor]
_SMOOTH: dict[Any, Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu,
    Tensor.relu_: _relu,
    F.relu6: lambda ramp, x: ramp(x, 6.0),
    F.hardtanh: lambda ramp, x, min_val, max_val: min_val + ramp(x - min_val, max_val - min_val),
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    F.hardsigmoid: lambda ramp, x: ramp(x + 3, 6.0) / 6,
    F.hardswish: lambda ramp, x: x * ramp(x + 3, 6.0) / 6,
}
"""Activation -> the smooth one, of slopes (x, width) as :class:`_Ramp` and the settings.

torch calls them by all settings, but for ``inplace``, which is taken care of before."""
