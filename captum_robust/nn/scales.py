"""The maps that a network makes on its way, at several scales, and the layers that make them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, printable
from captum_robust._contexts import outputs_of, probing


def features_of(
    network: Callable[..., Any], layers: Sequence[nn.Module], *arguments: Any
) -> tuple[list[Tensor], Any]:
    """The output of each of the layers that run in one pass, and what the network returns."""
    with outputs_of(layers) as outputs:
        result = network(*arguments)
    return [outputs[i] for i in range(len(layers)) if i in outputs], result


def channels_of_maps(maps: Sequence[Any], layers: Sequence[nn.Module], of: str) -> tuple[int, ...]:
    """C of each map N×C×h×w; ``ValueError`` unless each of the layers gives one."""
    are_maps = all(isinstance(m, Tensor) and m.ndim == 4 for m in maps)
    check(
        are_maps and len(maps) == len(layers),
        f"layers: expected layers of the {of}, each of which gives maps N×C×h×w",
    )
    return tuple(int(m.shape[1]) for m in maps)


def channels_of(network: nn.Module) -> int:
    """How many channels an image for the network has: as many as its first convolution takes."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def name_of(encoder: nn.Module) -> str:
    """Its own name, or that of its class."""
    name = getattr(encoder, "name", None)
    return name if isinstance(name, str) else type(encoder).__name__


def find_scales(
    encoder: nn.Module, input_size: tuple[int, int] = (224, 224)
) -> tuple[nn.Module, ...]:
    """The last layer of each scale, from the finest to the coarsest, found by a probe.

    Scales are powers of 2 of the image's size, up to rounding. A layer counts if it runs once,
    gives a map N×C×h×w, smaller than the image and larger than one position, that depends on it
    and that nothing overwrites later, and is not inside of a block that ends at a coarser scale.
    One black image, of as many channels as the first convolution takes, is run in evaluation mode.

    Raises:
        ValueError: no layer gives such a map.
    """
    runs: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Tensor, int]] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad:
            outputs.pop(module, None)
            outputs[module] = output, output._version

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        probing(encoder, record) as image_of,
    ):
        image = image_of(channels_of(encoder), *input_size)
        encoder(image.requires_grad_().clone())
    usable = {
        module: stage
        for module, (output, version) in outputs.items()
        if runs[module] == 1
        and output._version == version
        and (stage := _stage(output, input_size)) is not None
    }
    inside = _inside_of_coarser(encoder, usable)
    last = {stage: module for module, stage in usable.items() if module not in inside}
    if not last:
        raise ValueError(
            f"encoder: no layer of {type(encoder).__name__} gives an N×C×h×w map smaller than the "
            "image; give the layers yourself"
        )
    return tuple(last[stage] for stage in sorted(last))


def _stage(output: Tensor, input_size: tuple[int, int]) -> int | None:
    """How often the image was halved; None: this is no map of it, or a single position."""
    height, width = output.shape[2:]
    down, across = (math.log2(i / o) for i, o in zip(input_size, (height, width), strict=True))
    if height * width == 1 or abs(down - across) > 0.5 or round(down) < 1:
        return None
    return round(down)


def _inside_of_coarser(encoder: nn.Module, usable: dict[nn.Module, int]) -> set[nn.Module]:
    """What is at work within a block whose own output is coarser; a block is not half of all."""
    half = sum(1 for _ in encoder.modules()) / 2
    inside: set[nn.Module] = set()
    for block, stage in usable.items():
        parts = [m for m in block.modules() if m is not block]
        is_plain = isinstance(block, nn.Sequential) and (
            type(block).forward is nn.Sequential.forward
        )
        if is_plain or len(parts) > half:
            continue
        inside.update(m for m in parts if usable.get(m, stage) < stage)
    return inside


def shapes_of(module: nn.Module, prefix: str = "") -> dict[str, torch.Size]:
    """Name in the state dict, behind the prefix -> shape."""
    return {prefix + name: t.shape for name, t in module.state_dict().items()}


def check_fit(where: str, wanted: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    """``ValueError`` that names the first tensor of a file that is not as wanted."""
    fitting = {name for name, t in tensors.items() if t.shape == wanted.get(name)}
    if different := sorted({*tensors, *wanted} - fitting):
        raise ValueError(
            f"{where}: {printable(different[0])} is missing, of another shape, or unknown"
        )
