"""Batches of images out of what a user has, and the class scores that a model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_batch,
    check_finite,
    check_inputs,
    check_type,
    shape_or_type,
)
from captum_robust._progress import counted
from captum_robust._scores import (
    at_least_float,
    model_scores,
    two_classes,
    without_inference,
)
from captum_robust.attacks.norms import Tensors

ForwardFunction = Callable[..., Tensor]
Loader = Iterable[Any]
"""Batches of images N×C×H×W, or tuples that begin with one, such as (images, labels)."""


def check_loader(loader: Loader, passes: int) -> None:
    """``TypeError`` or ``ValueError`` unless the loader can be read so many times."""
    kind = type(loader).__name__
    can_iterate = isinstance(loader, Iterable) and not isinstance(loader, Tensor)
    expected = "an iterable of image batches, such as a list or a DataLoader"
    check(can_iterate, f"loader: expected {expected}, got {kind}", TypeError)
    check(
        passes == 1 or not isinstance(loader, Iterator),
        f"loader: {kind} is exhausted after one pass, and there are {passes}; give a list of "
        "batches or a DataLoader, or passes=1",
    )


def image_batches(
    loader: Loader,
    bounds: tuple[float, float] | None,
    batch_size: int | None = None,
    number: int = 0,
    progress: bool | None = None,
) -> Iterator[Tensor]:
    """The checked mini-batches of pass ``number``, at least one."""
    is_empty = True
    batches = counted(loader, "batch", progress, f"pass {number + 1}")
    for place, batch in enumerate(batches):
        x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch
        where = f"loader, batch {place}"
        check_type(where, x, Tensor, "images N×C×H×W")
        check(x.ndim >= 2, f"{where}: expected images N×C×H×W, got shape {tuple(x.shape)}")
        x = x.detach()
        try:
            check_batch((x,))
            check_inputs((x,), bounds)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}, {error}") from None
        is_empty = False
        yield from torch.split(without_inference(x), batch_size or len(x))
    later = f"exhausted, no images in pass {number + 1}; it must start anew each pass"
    check(not is_empty, f"loader: {later if number else 'no images'}")


def class_scores(
    forward_func: ForwardFunction,
    inputs: Tensors,
    name: str = "forward_func",
    first_sample: int = 0,
) -> Tensor:
    """Checked scores n×K, at least in float32, of copies of the inputs.

    Args:
        forward_func: inputs -> scores.
        inputs: n×….
        name: of the argument that ``forward_func`` is, for messages.
        first_sample: the number that messages give to the first sample.
    """
    n = len(inputs[0])
    return checked_scores(model_scores(forward_func, inputs, None), n, name, first_sample)


def checked_scores(
    scores: Any, n: int, name: str = "forward_func", first_sample: int = 0
) -> Tensor:
    """Scores n×K, at least in float32; ``ValueError`` for another shape, NaN or infinity.

    One logit a sample is read as two classes, see :func:`captum_robust._scores.two_classes`.
    """
    got = shape_or_type(scores)
    read = two_classes(scores, n, name)
    is_batch = isinstance(read, Tensor) and read.ndim == 2 and len(read) == n and read.numel() > 0
    check(is_batch, f"{name}: expected scores {n}×K, one row a sample, got {got}")
    check_finite(read, f"{name}, scores", first_sample)
    return at_least_float(read)


def check_class(name: str, number: int, scores: Tensor) -> None:
    """``ValueError`` if scores n×K are not of so many classes."""
    highest = scores.shape[1] - 1
    expected = f"but the model has the classes 0 to {highest}"
    check(number <= highest, f"{name}: class {number}, {expected}")


def one_an_image(name: str, classes: Tensor | Sequence[int], images: Tensor) -> Tensor:
    """N classes on the images' device."""
    numbers = torch.as_tensor(classes, device=images.device)
    check(
        numbers.shape == (len(images),) and not numbers.is_floating_point(),
        f"{name}: expected {len(images)} classes, one an image, got {numbers.dtype} of shape "
        f"{tuple(numbers.shape)}",
    )
    return numbers


def place_of(forward_func: ForwardFunction) -> torch.device | None:
    """The device of a network's first parameter; None for what has none."""
    parameters = forward_func.parameters() if isinstance(forward_func, nn.Module) else ()
    first = next(iter(parameters), None)
    return None if first is None else first.device
