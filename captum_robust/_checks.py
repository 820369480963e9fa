"""The checks on arguments, inputs and scores that all rooms make."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor


def as_number(value: object) -> float:
    """NaN for what is no number, which fails each comparison as NaN does."""
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last for a tensor of many
        return math.nan


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number from ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")


def checked_positive(name: str, value: Any) -> float:
    """A finite number above 0; ``ValueError`` otherwise."""
    number = as_number(value)
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def check_finite(tensor: Tensor, where: str, first_sample: int = 0) -> None:
    """Raise ``ValueError`` if a sample (a row of the first dimension) holds NaN or infinity.

    ``first_sample`` is the number of the first row in the caller's batch.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # Smallest and largest pass NaN and infinity on, without a copy of the tensor.
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    finite = torch.isfinite(rows.amin(dim=1)) & torch.isfinite(rows.amax(dim=1))
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"{where}: NaN or infinity in sample {first_sample + first} "
            f"({int((~finite).sum())} of {len(finite)} samples)"
        )


def check_batch(inputs: tuple[Tensor, ...]) -> int:
    """The batch size of finite, non-empty inputs; ``TypeError`` or ``ValueError`` otherwise."""
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs: expected tensors, got {type(x).__name__} at position {i}")
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(f"inputs: the batch is empty (shape {tuple(x.shape)})")
        check_finite(x, "inputs")
    return int(inputs[0].shape[0])


def check_classes(classes: Tensor, n: int, count: int) -> None:
    """Before they are indices, of which a wrong one ends all work on a GPU."""
    if not isinstance(classes, Tensor) or classes.dtype not in (torch.int32, torch.int64):
        got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"classes: expected a tensor of integers, got {got}")
    if classes.shape != (n,):
        raise ValueError(
            f"classes: expected one for each of {n} images, got {tuple(classes.shape)}"
        )
    wrong = (classes < 0) | (classes >= count)
    if bool(wrong.any()):  # waits for a GPU, once a call
        first = int(classes[wrong][0])
        raise ValueError(f"classes: expected numbers from 0 to {count - 1}, got {first}")


def checked_bounds(bounds: Any) -> tuple[float, float]:
    numbers = [as_number(b) for b in bounds] if isinstance(bounds, (tuple, list)) else []
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError(f"bounds: expected two numbers (lowest, highest), got {bounds!r}")
    return numbers[0], numbers[1]


def check_images(inputs: tuple[Tensor, ...]) -> None:
    """Raise ``ValueError`` unless each input is a batch of images N×C×H×W, as masks need."""
    for i, x in enumerate(inputs):
        if x.ndim != 4:
            raise ValueError(
                f"inputs: expected images N×C×H×W, got {tuple(x.shape)} at position {i}; give "
                "what no mask shall hide as additional_forward_args"
            )


def check_inputs(inputs: tuple[Tensor, ...], bounds: tuple[float, float] | None) -> None:
    n = len(inputs[0])
    for i, x in enumerate(inputs):
        if not x.is_floating_point():
            raise TypeError(f"inputs: expected floating point, got {x.dtype} at position {i}")
        if len(x) != n:
            raise ValueError(f"inputs: batches of {n} and {len(x)} samples")
        if x[0].numel() == 0:
            raise ValueError(f"inputs: no elements (shape {tuple(x.shape)})")
    if bounds is None:
        return
    lowest, highest = bounds
    for x in inputs:
        rows = x.detach().reshape(n, -1)
        outside = (rows.amin(dim=1) < lowest) | (rows.amax(dim=1) > highest)
        if outside.any():
            sample = int(outside.nonzero()[0])
            raise ValueError(
                f"inputs: sample {sample} has values from {float(rows[sample].min()):.4g} to "
                f"{float(rows[sample].max()):.4g}, outside of the bounds {bounds}"
            )


def printable(text: str) -> str:
    r"""The text on one line, with what is not UTF-8 or not printable in a file name written out.

    A terminal obeys some of the latter: a name could colour or hide what is around it.

    >>> printable("a\udcff.png\n is torn")
    'a\\xff.png is torn'
    >>> printable("\x1b[31mred.png")
    '\\x1b[31mred.png'
    """
    line = " ".join(text.split())
    line = line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def unknown_name(what: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error to raise when ``name`` is none of the ``valid`` names of a ``what``.

    >>> str(unknown_name("method", "robust_can", ["robust_cam", "occlusion"]))
    "unknown method 'robust_can'; did you mean 'robust_cam'? (2 known: occlusion, robust_cam)"
    >>> str(unknown_name("class", "dog", []))
    "unknown class 'dog' (there are none)"
    """
    known = sorted(valid)
    if not known:
        return ValueError(f"unknown {what} {name!r} (there are none)")
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    listing = ", ".join(known if len(known) <= 24 else [*known[:24], "…"])
    return ValueError(f"unknown {what} {name!r}{hint} ({len(known)} known: {listing})")
