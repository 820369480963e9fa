"""Where in a network its class activation maps and perceptual features come from."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from captum_robust._checks import check, check_choice
from captum_robust._contexts import AS_WRITTEN, probing
from captum_robust.nn.layout import fitting
from captum_robust.nn.places import Layouts, Places
from captum_robust.nn.scales import channels_of, is_plain_sequence, lasting_outputs

_POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
# VGG's ReLUs in each of its five stages, which max-pooling ends.
_VGG_STAGES = ((1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4))
# The paper counts VGG19's ReLUs from 1: first and last.
_PAPER_RELUS = {"unguided": (5, 10), "guided": (2, 13)}


def layer_of(module: nn.Module, layer: nn.Module | str, argument: str = "layer") -> nn.Module:
    """The module itself or the one of that dotted name; ``ValueError`` if it is no part."""
    if isinstance(layer, nn.Module):
        is_part = any(layer is m for m in module.modules())
        check(is_part, f"{argument}: {type(layer).__name__} is not a part of the module")
        return layer
    named: dict[str, nn.Module] = {name: part for name, part in module.named_modules() if name}
    # A compiled module holds the one that it was made of under a name of its own.
    own = {name.replace("_orig_mod.", ""): part for name, part in named.items()}
    check_choice(argument, layer, named if layer in named else own)
    return named.get(layer, own[layer.replace("_orig_mod.", "")])


def find_cam_layer(module: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """The layer whose output a class activation map is made of, found by running a shape probe.

    It is the last module, in order of completion, whose output is N×C×h×w with h·w > 1, or
    N×h×w×C by the way it was computed, and is not made by a pooling module: the outermost of those
    that return the same map, so that it runs once a forward pass, after its activation. Where
    tokens N×T×C follow it, it is the last normalisation of tokens whose places in the image are
    known and that the scores depend on, not by a class token alone. One forward pass of one black
    image is run in evaluation mode.

    Args:
        module: the network; its mode is left as it was.
        input_shape: (C, H, W) of an input.

    Raises:
        ValueError: no module gives a map, or tokens (N×T×C) follow the last one and none of them
            is known to be it.
    """
    outputs: list[tuple[nn.Module, Tensor, int]] = []

    def record(m: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((m, output, followed.channels(output)))

    with torch.no_grad(), probing(module, record) as image_of:
        image = image_of(*input_shape)
        with Layouts(image) as followed:
            module(image)
    runs = Counter(m for m, *_ in outputs)
    pooled = {id(output) for m, output, _ in outputs if isinstance(m, _POOLING)}
    # Of one image, tokens are several in whichever dimension.
    spread = [
        (m, o)
        for m, o, c in outputs
        if (_is_map(o, c) or (o.ndim == 3 and len(o) > 1)) and id(o) not in pooled
    ]
    maps = [(m, o) for m, o in spread if o.ndim == 4]
    if not maps or spread[-1][1].ndim == 3:
        reason = "tokens follow the last one" if maps else "no module gives an N×C×h×w map"
        tokens = _last_of_tokens(module, input_shape) if spread else None
        advice = "pass the layer yourself (--layer), with a reshape_transform where it gives tokens"
        advice = advice if spread else f"{advice}, or take a method without one, such as saliency"
        advice = f"{advice}; {AS_WRITTEN}" if _hides_layers(module) else advice
        check(tokens, f"cam_layer: none found ({reason}); {advice}")
        assert tokens is not None
        return tokens
    layer, last = maps[-1]
    if runs[layer] > 1:  # a shared activation: prefer a module that returns the same map once
        once = [m for m, output in maps if output is last and runs[m] == 1]
        layer = once[-1] if once else layer
    return layer


def _last_of_tokens(module: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module | None:
    """The last normalisation of tokens, at several places, that the head's input depends on."""
    norms: list[tuple[nn.Module, Tensor, Places | None]] = []
    heads: list[Tensor] = []

    def record(m: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 3 and hasattr(m, "normalized_shape"):
            norms.append((m, output, followed.of(output)))
        if isinstance(m, nn.Linear) and isinstance(output, Tensor) and output.ndim == 2:
            heads[:] = given[:1]

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        probing(module, record) as image_of,
    ):
        # Cloned: a network may write into its input, but not into one that asks for a gradient.
        image = image_of(*input_shape).requires_grad_().clone()
        with Layouts(image) as followed:
            scores = module(image)
    # Not the scores, where that can be: those of a head that begins at zero depend on nothing.
    head = heads[0] if heads else scores
    if not head.requires_grad:
        return None
    directions = torch.linspace(1, 2, head.numel()).reshape(head.shape).to(head)
    for layer, output, places in reversed(norms):
        if not output.requires_grad or max(output.shape[:2]) == 1:
            continue
        (gradient,) = torch.autograd.grad(
            head, output, directions, retain_graph=True, allow_unused=True
        )
        if gradient is None or not gradient.any():
            continue
        with suppress(ValueError):  # their places are not known
            reshape = fitting(places, output, image)
            if reshape is None:  # channels, as it seems
                continue
            if reshape(gradient).any():
                return layer
            continue  # it is the class token alone
        return None
    return None


def find_perceptual_layers(
    module: nn.Module, input_shape: tuple[int, int, int] | None = None
) -> tuple[nn.Module, ...]:
    """The layers whose features measure perceptual distance: the later half of the trunk.

    The trunk is the chain of residual blocks, inception modules, dense blocks, transformer blocks
    and the like, with the activations between them; of a plain network, the chain of its
    activations. Of EfficientNet-Lite0's 16 blocks it is those from 8 to 15, of ResNet-50's the
    same, of a ViT-B's 12 those from 6 to 11. VGG has a rule of its own, the third stage and the
    first half of the fourth: of VGG19 the paper's ReLUs 5 to 10.

    Every layer returns a map N×C×h×w, or tokens N×T×C, once a forward pass, that depends on the
    input and that nothing overwrites later. Except for VGG, one forward pass of one black image
    is run in evaluation mode.

    Args:
        module: the network, or a wrapper around it; its mode is left as it was.
        input_shape: (C, H, W) of an input; by default that of the :class:`Classifier`, or
            C×224×224 without one, C as the first convolution takes it.

    Raises:
        ValueError: no module gives such a map.
    """
    if stages := _vgg_relus(module):
        return (*stages[2], *stages[3][: (len(stages[3]) + 1) // 2])
    if input_shape is None:
        shapes = (getattr(m, "input_shape", None) for m in module.modules())
        input_shape = next((s for s in shapes if isinstance(s, tuple)), None)
        input_shape = (channels_of(module), 224, 224) if input_shape is None else input_shape
    outputs, runs = lasting_outputs(module, input_shape)
    usable = {m: i for i, m in enumerate(outputs) if _is_map(outputs[m])}
    trunk = sorted(set(_trunk(module, usable, runs)), key=usable.__getitem__)
    blocks = [i for i, m in enumerate(trunk) if _leaves(m, runs) > 1]
    if len(blocks) > 1:  # leave out the activations of stem and head
        trunk = trunk[blocks[0] : blocks[-1] + 1]
    if not trunk:  # activations are functions: take convolutions and normalisations
        trunk = [m for m in usable if next(m.parameters(recurse=False), None) is not None]
    reason = "no module gives an N×C×h×w map or N×T×C tokens once a forward pass"
    advice = AS_WRITTEN if _hides_layers(module) else "pass the layers yourself"
    check(trunk, f"perceptual_layers: none found ({reason}); {advice}")
    return tuple(trunk[len(trunk) // 2 :])


def _hides_layers(network: nn.Module) -> bool:
    kinds = (torch.jit.ScriptModule, torch.fx.GraphModule)
    return any(isinstance(m, kinds) for m in network.modules())


def _is_map(output: Tensor, channels: int = 1) -> bool:
    """Whether it is a map N×C×h×w, or tokens N×T×C, of several positions.

    ``channels`` is the dimension of a map's channels.
    """
    if output.ndim == 4:
        return output[0].numel() > output.shape[channels]
    return output.ndim == 3 and output.shape[1] > 1


def _leaves(m: nn.Module, runs: Counter[nn.Module]) -> int:
    return sum(c in runs and next(c.children(), None) is None for c in m.modules())


def _trunk(
    network: nn.Module, usable: dict[nn.Module, int], runs: Counter[nn.Module]
) -> list[nn.Module]:
    """The blocks, and the activations outside blocks, of which the network is a chain.

    A module is a part of the trunk, rather than a block, where it is a plain sequence or holds
    more than half of the network.
    """
    half = _leaves(network, runs) / 2

    def parts(m: nn.Module) -> list[nn.Module]:
        inside = [x for c in m.children() for x in parts(c)]
        size = _leaves(m, runs)
        block = size > 1 and not is_plain_sequence(m) and (size <= half or not inside)
        return [m] if m in usable and (block or _is_activation(m)) else inside

    return parts(network)


def _is_activation(m: nn.Module) -> bool:
    return not isinstance(m, nn.MultiheadAttention) and any(
        c.__module__ == "torch.nn.modules.activation" for c in type(m).__mro__
    )


def _vgg_relus(module: nn.Module) -> list[list[nn.Module]] | None:
    """The ReLUs of VGG's five stages, or None where there is no VGG in the module."""
    for features in module.modules():
        if not isinstance(features, nn.Sequential):
            continue
        stages: list[list[nn.Module]] = [[]]
        for m in features.children():  # a shared ReLU counts once: no VGG that could be hooked
            if isinstance(m, nn.ReLU):
                stages[-1].append(m)
            elif isinstance(m, nn.MaxPool2d):
                stages.append([])
        if tuple(map(len, stages)) in [(*counts, 0) for counts in _VGG_STAGES]:
            return stages[:-1]
    return None


def paper_perceptual_layers(module: nn.Module, preset: str) -> tuple[nn.Module, ...]:
    """The layers of the perceptual-ball paper, in VGG19 with batch normalisation.

    Args:
        module: torchvision's ``vgg19_bn``, or a wrapper around it.
        preset: ``"unguided"``, ReLUs 5 to 10 counted from 1 (16, 19, …, 32 in ``features``), or
            ``"guided"``, ReLUs 2 to 13 (5, 9, …, 42).

    Raises:
        ValueError: another network or preset.
    """
    check_choice("preset", preset, _PAPER_RELUS)
    relus = [relu for stage in _vgg_relus(module) or () for relu in stage]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    expected = "16 ReLUs in five stages and 16 normalisations, as torchvision's vgg19_bn has"
    got = f"{type(module).__name__} with {len(relus)} such ReLUs and {norms} normalisations"
    named = f"preset {preset!r}: expected VGG19 with batch normalisation ({expected})"
    check(len(relus) == norms == 16, f"{named}, got {got}")
    first, last = _PAPER_RELUS[preset]
    return tuple(relus[first - 1 : last])


def tokens_to_map(tokens: Tensor) -> Tensor:
    """Tokens N×(1+h·w)×C, the class token first, as a square map N×C×h×w.

    Raises:
        ValueError: the patch tokens do not fill a square.

    >>> tokens_to_map(torch.zeros(2, 1 + 14 * 14, 8)).shape
    torch.Size([2, 8, 14, 14])
    """
    side = int((tokens.shape[1] - 1) ** 0.5)
    fits = tokens.ndim == 3 and side * side + 1 == tokens.shape[1]
    check(fits, f"tokens: expected N×(1+h·w)×C with a square h·w, got {tuple(tokens.shape)}")
    return tokens[:, 1:].transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
