"""What the functions of this room accept, checked in one place."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_maps(maps: Tensor, name: str = "maps") -> Tensor:
    """Return heat maps N×H×W as float32 or float64, or say what is wrong with them.

    A Boolean or integer map becomes float32; a half-precision one too, exactly.
    """
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} must be a tensor N×H×W, not {type(maps).__name__}")
    if maps.dim() != 3:
        raise ValueError(f"{name} must have shape N×H×W, not {tuple(maps.shape)}")
    if maps.shape[1] == 0 or maps.shape[2] == 0:
        raise ValueError(f"{name} must have at least one pixel, not shape {tuple(maps.shape)}")
    if maps.is_complex():
        raise TypeError(f"{name} must be real, not {maps.dtype}")
    maps = on_device_with_float64(maps.detach())
    if maps.dtype != torch.float64:
        maps = maps.to(torch.float32)
    # The extremes carry NaN and infinity along, several times faster than isfinite on all pixels.
    finite = maps.amax(dim=(1, 2)).isfinite() & maps.amin(dim=(1, 2)).isfinite()
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"{name} hold NaN or infinity in sample(s) {broken}")
    return maps


def on_device_with_float64(tensor: Tensor) -> Tensor:
    """Return the tensor, on the CPU if it was on MPS: thresholds are compared in float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def check_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """Return Boolean masks N×H×W unchanged, or say what is wrong with them."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor N×H×W, not {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be Boolean, not {mask.dtype}")
    if mask.dim() != 3:
        raise ValueError(f"{name} must have shape N×H×W, not {tuple(mask.shape)}")
    if mask.shape[1] == 0 or mask.shape[2] == 0:
        raise ValueError(f"{name} must have at least one pixel, not shape {tuple(mask.shape)}")
    return on_device_with_float64(mask)


def check_box_list(boxes: Sequence[Tensor], n: int, name: str = "ground_truth") -> None:
    """Hold a list of M_i×4 boxes to one entry a sample and to x0 ≤ x1, y0 ≤ y1."""
    if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence):
        raise TypeError(
            f"{name} must be a list of M×4 tensors, one a sample, not {type(boxes).__name__}"
        )
    if len(boxes) != n:
        raise ValueError(f"{name} has {len(boxes)} entries for {n} samples")
    for i, sample in enumerate(boxes):
        if not isinstance(sample, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor M×4, not {type(sample).__name__}")
        if sample.dim() != 2 or sample.shape[1] != 4:
            raise ValueError(f"{name}[{i}] must have shape M×4, not {tuple(sample.shape)}")
        if not (sample[:, :2] <= sample[:, 2:]).all():
            raise ValueError(f"{name}[{i}] needs x0 ≤ x1 and y0 ≤ y1, not {sample.tolist()}")


def check_connectivity(connectivity: int) -> None:
    """Refuse any neighbourhood but the 4 and the 8 nearest pixels."""
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, not {connectivity!r}")


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Refuse a name that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, not {value!r}")


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), both positive."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width), both positive, not {size!r}")
    return int(height), int(width)
