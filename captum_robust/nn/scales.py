"""The maps that a network makes on its way, at several scales, and the layers that make them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check
from captum_robust._contexts import DID_NOT_RUN, outputs_of, probing
from captum_robust._scores import copies_of
from captum_robust.nn.places import Layouts


def features_of(
    network: Callable[..., Any], layers: Sequence[nn.Module], *arguments: Any
) -> tuple[list[Tensor], Any]:
    """The output of each of the layers that run in one pass, and what the network returns.

    It is given copies of the tensors among the arguments.
    """
    with outputs_of(layers) as outputs:
        result = network(*copies_of(arguments))
    return [outputs[i] for i in range(len(layers)) if i in outputs], result


def channels_of_maps(
    maps: Sequence[Any], layers: Sequence[nn.Module], of: str, followed: Layouts
) -> tuple[int, ...]:
    """C of each map N×C×h×w; ``ValueError`` unless each of the layers gives one."""
    fits = len(maps) == len(layers) and all(map(followed.is_map, maps))
    why = "" if len(maps) == len(layers) else f"; one {DID_NOT_RUN}"
    check(fits, f"layers: expected layers of the {of}, each of which gives maps N×C×h×w{why}")
    return tuple(int(m.shape[1]) for m in maps)


def channels_of(network: nn.Module, size: tuple[int, int] | None = None) -> int:
    """How many channels an image for the network has: as many as its first convolution takes.

    Where a linear layer comes first, the pixels of an image of ``size`` (H, W) say it; else 3.
    """
    kinds = (nn.Conv2d, nn.Linear)
    first = next((m for m in network.modules() if isinstance(m, kinds)), None)
    if isinstance(first, nn.Conv2d):
        return first.in_channels or 3  # 0: a lazy one
    if first is None or size is None or first.in_features % (size[0] * size[1]):
        return 3
    return first.in_features // (size[0] * size[1]) or 3


def input_size_of(
    network: nn.Module | None, given: tuple[int, int] | None, otherwise: int
) -> tuple[int, int]:
    """(H, W) that is given, else the network's ``input_size``, else a square."""
    size: Any = getattr(network, "input_size", otherwise) if given is None else given
    height, width = (size, size) if isinstance(size, int) else size[-2:]  # also C, H, W
    return int(height), int(width)


def check_scales(name: str, network: object, layers: Sequence[nn.Module], least: int = 2) -> None:
    """``ValueError`` for fewer layers than the ``least`` number of scales."""
    got = f"found {len(layers)} in {type(network).__name__}; give the layers yourself"
    check(len(layers) >= least, f"{name}: expected maps at two or more scales, {got}")


def lasting_outputs(
    network: nn.Module, shape: tuple[int, int, int], followed: Layouts | None = None
) -> tuple[dict[nn.Module, Tensor], Counter[nn.Module]]:
    """The outputs of a network's parts for a black image C×H×W, and how often each part runs.

    They are in order of completion, of those parts that run once and return a tensor that depends
    on the image and that nothing overwrites later.
    """
    runs: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Tensor, int]] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] += 1
        # The weights are frozen: what needs a gradient depends on the image.
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[module] = output, output._version

    with (
        torch.inference_mode(False),  # its tensors have no versions
        torch.enable_grad(),
        probing(network, record) as image_of,
    ):
        # Cloned: a network may write into its input, but not into one that asks for a gradient.
        image = image_of(*shape).requires_grad_().clone()
        if followed is not None:
            followed.begin_at(image)
        network(image)
    lasting = {m: o for m, (o, version) in outputs.items() if o._version == version}
    return {m: o for m, o in lasting.items() if runs[m] == 1}, runs


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
    with Layouts() as followed:
        outputs, _ = lasting_outputs(encoder, (channels_of(encoder), *input_size), followed)
    usable = {
        module: stage
        for module, output in outputs.items()
        if followed.is_map(output) and (stage := _stage(output, input_size)) is not None
    }
    inside = _inside_of_coarser(encoder, usable)
    last = {stage: module for module, stage in usable.items() if module not in inside}
    check(
        last,
        f"encoder: no layer of {type(encoder).__name__} gives an N×C×h×w map smaller than the "
        "image; give the layers yourself",
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
        if not is_plain_sequence(block) and len(parts) <= half:
            inside.update(m for m in parts if usable.get(m, stage) < stage)
    return inside


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether it runs its parts one after another, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
