"""What the functions of this room accept, checked in one place."""

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_count,
    check_finite,
    check_number,
    check_shape,
    check_type,
)

LARGEST_VALUE = 1e150
"""Of a map's pixels: sums and squares of larger ones are infinite."""
ROUNDING = 1e-6
"""That what is computed of floats may exceed its range by."""
LARGEST_SIDE = 2**24
"""In pixels: float32 does not count further."""
LARGEST_COORDINATE = 1e9
"""Of boxes: areas of larger ones are infinite in float32."""


def check_real(
    name: str, value: Tensor, expected: str = "a tensor", *, truths: bool = False
) -> None:
    """Refuse what is no dense tensor of real numbers; with ``truths`` truth values are such."""
    check_type(name, value, Tensor, expected)
    kind = "meta" if value.is_meta else value.layout
    message = f"{name}: expected {expected} that holds its numbers, got {kind}"
    check(kind == torch.strided and not value.is_quantized, message, TypeError)
    is_truth = value.dtype == torch.bool and not truths
    wrong = f"{name}: expected real numbers, got {value.dtype}"
    check(not (value.dtype.is_complex or is_truth), wrong, TypeError)


def check_within(
    name: str, values: Tensor, low: float, high: float, *, may_be_nan: bool = False
) -> None:
    """Refuse values outside of [low, high], and NaN where it means nothing."""
    inside = (values >= low) & (values <= high)
    inside = inside | values.isnan() if may_be_nan else inside
    or_nan = " or NaN" if may_be_nan else ""
    if not inside.all():
        first = values[~inside].flatten()[0].item()
        raise ValueError(f"{name}: expected numbers in [{low:g}, {high:g}]{or_nan}, got {first!r}")


def check_truths(name: str, values: Tensor) -> Tensor:
    """Return truth values, or zeros and ones, as float64; at least one."""
    check_real(name, values, "a tensor of truth values", truths=True)
    check(values.numel(), f"{name}: expected at least one truth value, got none")
    fits = ((values == 0) | (values == 1)).all()
    check(fits, f"{name}: expected truth values, or zeros and ones, got others")
    return on_device_with_float64(values.detach()).double()


def check_seed(seed: int) -> None:
    """Refuse what seeds no generator."""
    check_count("seed", seed, -(2**63), 2**64 - 1)


def check_flag(name: str, value: bool | None, *, optional: bool = False) -> None:
    """Refuse what is neither True nor False: a text would count as True."""
    fits = isinstance(value, bool) or (optional and value is None)
    check(fits, f"{name}: expected True or False, got {type(value).__name__}", TypeError)


def numbers_in(name: str, values: Sequence[float], low: float, high: float) -> list[float]:
    """Return a list of at least one number in [low, high]."""
    expected = f"{name}: expected a list of numbers"
    is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    check(is_list, f"{expected}, got {type(values).__name__}", TypeError)
    check(values, f"{expected}, at least one, got none")
    return [check_number(name, value, low, high) for value in values]


def without_channel(maps: Tensor) -> Tensor:
    """Return maps N×1×H×W, as attributions return them, as N×H×W; anything else as it is."""
    is_lone = isinstance(maps, Tensor) and maps.ndim == 4 and maps.shape[1] == 1
    return maps[:, 0] if is_lone else maps


def check_maps(maps: Tensor, name: str = "maps") -> Tensor:
    """Return heat maps N×H×W as float32 or float64, or say what is wrong with them.

    Maps N×1×H×W become N×H×W.
    A Boolean or integer map becomes float32; a half-precision one too, exactly.
    """
    maps = without_channel(maps)
    check_real(name, maps, "a tensor N×H×W", truths=True)
    _check_pixels(name, maps)
    maps = on_device_with_float64(maps.detach())
    if maps.dtype != torch.float64:
        maps = maps.to(torch.float32)
    check_finite(maps, name)
    if maps.dtype == torch.float64 and maps.numel():
        check_within(name, maps, -LARGEST_VALUE, LARGEST_VALUE)
    return maps


def size_of(maps: Tensor) -> tuple[int, int]:
    """Return (H, W) of maps N×H×W."""
    return maps.shape[1], maps.shape[2]


def on_device_with_float64(tensor: Tensor) -> Tensor:
    """Return the tensor, on the CPU if it was on MPS: thresholds are compared in float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def check_mask(mask: Tensor, name: str = "mask") -> None:
    """Refuse what is no Boolean masks N×H×W."""
    check_real(name, mask, "Boolean masks N×H×W", truths=True)
    _check_pixels(name, mask)
    check(mask.dtype == torch.bool, f"{name}: expected Boolean, got {mask.dtype}", TypeError)


def check_masks(masks: Tensor, name: str) -> Tensor:
    """Return masks N×H×W or N×1×H×W as Boolean N×H×W.

    Those of uint8 may hold 0 and 1, or 0 and 255, as image files do.
    """
    masks = without_channel(masks)
    if isinstance(masks, Tensor) and masks.dtype == torch.uint8 and not masks.is_meta:
        are_two = any(((masks == 0) | (masks == top)).all() for top in (1, 255))
        masks = masks != 0 if are_two else masks
    check_mask(masks, name)
    return masks


def _check_pixels(name: str, maps: Tensor) -> None:
    check_shape(name, maps, "N×H×W")
    shape = tuple(maps.shape)
    check(0 not in shape[1:], f"{name}: expected at least one pixel, got shape {shape}")


def check_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Hold a tensor to the shape of the ``other`` one."""
    expected, got = tuple(like.shape), tuple(tensor.shape)
    check(expected == got, f"{name}: expected the shape of {other}, {expected}, got {got}")


def check_each(name: str, values: Sized | None, n: int) -> None:
    """Hold what may be given for each sample to one entry a sample."""
    if values is not None:
        check_type(name, values, Sized, f"one for each of {n} samples")
        check(len(values) == n, f"{name}: expected one for each of {n} samples, got {len(values)}")


def check_box_list(
    boxes: Tensor | Sequence[Tensor],
    n: int,
    name: str = "ground_truth",
    size: tuple[int, int] | None = None,
) -> None:
    """Hold boxes M_i×4, or N×M×4, to one entry a sample and to x0 ≤ x1, y0 ≤ y1.

    With the ``size`` (H, W) of maps, also to these, up to a pixel: boxes of the images do not fit
    smaller maps.
    """
    expected = "a list of tensors M×4, one a sample, or N×M×4"
    check_type(name, boxes, Sequence | Tensor, expected)
    if isinstance(boxes, Tensor):
        check_boxes(name, boxes, "N×M×4")
    check_each(name, boxes, n)
    if _fit_together(boxes, size):
        return
    for i, sample in enumerate(boxes):
        check_boxes(f"{name}[{i}]", sample, "M×4")
        if size is None or len(sample) == 0:
            continue
        sample = on_device_with_float64(sample).double()  # integers may be without a sign
        height, width = size
        reach = torch.cat([-sample[:, :2], sample[:, 2:] - sample.new_tensor([width, height])])
        if (reach > 1).any():
            expected = f"expected boxes in pixels of the maps of {height}×{width}"
            hint = "upsample the maps, or scale the boxes"
            raise ValueError(f"{name}[{i}]: {expected}, got {sample.tolist()}; {hint}")


def _fit_together(boxes: Tensor | Sequence[Tensor], size: tuple[int, int] | None) -> bool:
    """Whether plain boxes are all right, looked at together, which is faster; else unknown."""
    plain = all(
        type(b) is Tensor
        and b.dtype in (torch.float32, torch.float64)
        and b.device.type == "cpu"
        and b.layout == torch.strided
        and b.ndim == 2
        and b.shape[1] == 4
        for b in boxes
    )
    if not (plain and len(boxes)):
        return False
    every = torch.cat([b.detach().double() for b in boxes])
    far = [LARGEST_COORDINATE] * 2 if size is None else [size[1] + 1, size[0] + 1]
    least = -LARGEST_COORDINATE if size is None else -1
    ordered = every[:, :2] <= every[:, 2:]
    inside = (every[:, :2] >= least) & (every[:, 2:] <= every.new_tensor(far))
    return bool((ordered & inside).all())


def check_boxes(name: str, boxes: Tensor, shape: str | None = None) -> None:
    """Hold boxes …×4 to a shape, to finite coordinates, and to x0 ≤ x1, y0 ≤ y1."""
    check_real(name, boxes, f"a tensor {shape or '…×4'}")
    if shape is not None:
        check_shape(name, boxes, shape)
    got = tuple(boxes.shape)
    check(got[-1:] == (4,), f"{name}: expected …×4, got {got}")
    if not (boxes[..., :2] <= boxes[..., 2:]).all():  # not so of NaN
        first = boxes.reshape(-1, 4)[:8].tolist()
        raise ValueError(f"{name}: expected x0 ≤ x1 and y0 ≤ y1, got {first}")
    check_within(name, boxes, -LARGEST_COORDINATE, LARGEST_COORDINATE)


def check_connectivity(connectivity: int) -> None:
    """Refuse any neighbourhood but the 4 and the 8 nearest pixels."""
    fits = isinstance(connectivity, int) and connectivity in (4, 8)
    check(fits, f"connectivity: expected 4 or 8, got {connectivity!r}")


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), both positive."""
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    fits = is_pair and all(type(n) is int and 1 <= n <= LARGEST_SIDE for n in size)
    got = repr(size)[:200]
    check(fits, f"size: expected (height, width), both positive, at most 2²⁴, got {got}")
    return size[0], size[1]
