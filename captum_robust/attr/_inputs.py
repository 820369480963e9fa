"""What comes from the caller, checked, and what goes back, in the caller's structure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust._captum import format_output, format_tensor_into_tuples, is_tuple
from captum_robust._checks import check, check_batch, check_finite, check_inputs, check_type
from captum_robust._scores import at_least_float

MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}
"""How maps of so many dimensions are enlarged."""


def checked(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as a tuple: batches of finite numbers, not empty."""
    tensors: tuple[Tensor, ...] = format_tensor_into_tuples(inputs)
    check_batch(tensors)
    return tensors


def checked_numbers(inputs: Any, bounds: tuple[float, float] | None = None) -> tuple[Tensor, ...]:
    """The inputs as :func:`checked` gives them, of floating point and within the bounds."""
    tensors = checked(inputs)
    check_inputs(tensors, bounds)
    return tensors


def checked_images(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as :func:`checked_numbers` gives them, N×C×H×W, which a mask can hide."""
    images = checked_numbers(inputs)
    advice = "give what no mask shall hide as additional_forward_args"
    for i, x in enumerate(images):
        got = f"{tuple(x.shape)} at position {i}"
        check(x.ndim == 4, f"inputs: expected images N×C×H×W, got {got}; {advice}")
    return images


def module_of(forward_func: object, layer: nn.Module | str, name: str = "layer") -> nn.Module:
    """The layer, or that of this dotted name in the model, or in the one that it wraps.

    Args:
        forward_func: the model, or a method of it.
        layer: a module, which need not be of the model, or a name, such as ``"layer4"``.
        name: of the argument.

    Raises:
        TypeError: it is neither, or a name where ``forward_func`` is no model.
        ValueError: the model has no such layer; says which are near.
    """
    if not isinstance(layer, str):
        check_type(name, layer, nn.Module, "a torch.nn.Module or its dotted name")
        return layer
    from captum_robust.models.layers import layer_of

    model: Any = getattr(forward_func, "__self__", forward_func)
    check_type(f"{name} {layer!r}: forward_func", model, nn.Module, "a model to find the name in")
    inner: Any = getattr(model, "module", None)  # of a Classifier, or of nn.DataParallel
    is_own = not isinstance(inner, nn.Module) or layer in dict(model.named_modules())
    return layer_of(model if is_own else inner, layer, name)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def as_given(inputs: Any, parts: Iterable[Tensor]) -> Any:
    """One tensor for one input, a tuple of them for a tuple."""
    return format_output(is_tuple(inputs), tuple(parts))


def input_of(inputs: tuple[Tensor, ...], i: int) -> Tensor:
    """The input that part i of a result belongs to: its own, or the first where there is none."""
    return inputs[i] if i < len(inputs) else inputs[0]


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of images N×C×H×W."""
    return x.shape[2], x.shape[3]


def in_dtype_of(x: Tensor, values: Tensor) -> Tensor:
    """The values in the input's dtype, or in float32 for one of integers; contiguous.

    ``ValueError`` for finite values that half precision cannot hold.
    """
    result = values.to(x.dtype if x.dtype.is_floating_point else torch.float32).contiguous()
    if result.dtype.itemsize < values.dtype.itemsize:
        check_finite(result, f"attribution in {result.dtype}")
    return result


def over_channels(masks: Tensor, x: Tensor, first_sample: int = 0) -> Tensor:
    """Finite masks N×1×H×W in the shape and dtype of images N×C×H×W."""
    check_finite(masks, "masks", first_sample)
    return masks.to(x).expand_as(x).contiguous()


def enlarged(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps N×C×… of one to three spatial dimensions at another resolution, (bi-, tri-)linearly."""
    return F.interpolate(maps, tuple(size), mode=MODES[maps.ndim], align_corners=False)


def divided(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and x where that is not positive."""
    return x / torch.where(by > 0, by, torch.ones_like(by))


def of_largest_one(x: Tensor) -> Tensor:
    """Each sample N×… divided by its largest magnitude; zeros stay zeros."""
    x = at_least_float(x)
    top = x.detach().reshape(len(x), -1).abs().amax(dim=1)
    return divided(x, top.reshape(-1, *[1] * (x.ndim - 1)))
