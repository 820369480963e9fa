"""What the functions of this room accept, checked in one place."""

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from captum_robust._checks import check, check_finite, check_shape, check_type


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
    _check_pixels(name, maps)
    check(not maps.is_complex(), f"{name}: expected real numbers, got {maps.dtype}", TypeError)
    maps = on_device_with_float64(maps.detach())
    if maps.dtype != torch.float64:
        maps = maps.to(torch.float32)
    check_finite(maps, name)
    return maps


def size_of(maps: Tensor) -> tuple[int, int]:
    """Return (H, W) of maps N×H×W."""
    return maps.shape[1], maps.shape[2]


def on_device_with_float64(tensor: Tensor) -> Tensor:
    """Return the tensor, on the CPU if it was on MPS: thresholds are compared in float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def check_mask(mask: Tensor, name: str = "mask") -> None:
    """Refuse what is no Boolean masks N×H×W."""
    _check_pixels(name, mask)
    check(mask.dtype == torch.bool, f"{name}: expected Boolean, got {mask.dtype}", TypeError)


def check_masks(masks: Tensor, name: str) -> Tensor:
    """Return masks N×H×W or N×1×H×W as Boolean N×H×W.

    Those of uint8 may hold 0 and 1, or 0 and 255, as image files do.
    """
    masks = without_channel(masks)
    if isinstance(masks, Tensor) and masks.dtype == torch.uint8:
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
    check_type(name, boxes, Sequence | Tensor, "a list of tensors M×4, one a sample, or N×M×4")
    if isinstance(boxes, Tensor):
        check_shape(name, boxes, "N×M×4")
    check_each(name, boxes, n)
    for i, sample in enumerate(boxes):
        check_shape(f"{name}[{i}]", sample, "M×4")
        if not (sample[:, :2] <= sample[:, 2:]).all():
            raise ValueError(f"{name}[{i}]: expected x0 ≤ x1 and y0 ≤ y1, got {sample.tolist()}")
        if size is None or len(sample) == 0:
            continue
        height, width = size
        reach = torch.cat([-sample[:, :2], sample[:, 2:] - sample.new_tensor([width, height])])
        if (reach > 1).any():
            expected = f"expected boxes in pixels of the maps of {height}×{width}"
            hint = "upsample the maps, or scale the boxes"
            raise ValueError(f"{name}[{i}]: {expected}, got {sample.tolist()}; {hint}")


def check_connectivity(connectivity: int) -> None:
    """Refuse any neighbourhood but the 4 and the 8 nearest pixels."""
    check(connectivity in (4, 8), f"connectivity: expected 4 or 8, got {connectivity!r}")


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), both positive."""
    height, width = size
    check(min(size) >= 1, f"size: expected (height, width), both positive, got {size!r}")
    return int(height), int(width)
