"""Attributions of a layer whose output is not N×C×h×w, with its dimensions put in their places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from captum.attr import Attribution, GuidedGradCam, LayerAttribution, LayerGradCam, NoiseTunnel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captum_robust._captum import format_tensor_into_tuples
from captum_robust._checks import check
from captum_robust._contexts import hooked, owned, private_hooks
from captum_robust.attr.robust_cam import RobustCAM, reshape_of
from captum_robust.attr.score_cam import ScoreCAM
from captum_robust.nn.layout import followed_outputs, placed, recognised

_TAKEN = {"target", "additional_forward_args", "attribute_to_layer_input"}
_plain: WeakKeyDictionary[Attribution, set[Any]] = WeakKeyDictionary()
"""The layers and inputs of attributions whose outputs are N×C×h×w already."""
_EXPECTED = "expected a layer N×C×h×w; take RobustCAM, which recognises others"


def attributed(attribution: Attribution, inputs: Any, **arguments: Any) -> Any:
    """What the attribution gives; of a layer with other dimensions than N×C×h×w, maps N×…×h×w.

    Captum's class activation maps take dimension 1 for the channels. For another layer they are
    computed again by RobustCAM, whose map of one class is the same with the dimensions in their
    places. A result in the shape of the layer's output is given these places.

    Raises:
        ValueError: such a layer, and an attribution or arguments for which that can't be done;
            tokens of an image whose places are not known.
    """
    inner = attribution.attribution_method if isinstance(attribution, NoiseTunnel) else attribution
    is_guided = isinstance(inner, GuidedGradCam)
    cam = inner.grad_cam if is_guided else inner
    layer = getattr(cam, "layer", None)
    is_captums = isinstance(cam, LayerAttribution) and not isinstance(cam, (RobustCAM, ScoreCAM))
    if not is_captums or not isinstance(layer, nn.Module):
        return _alone(attribution, inputs, arguments)
    is_cam = isinstance(cam, LayerGradCam)
    own = reshape_of(attribution.forward_func, layer)
    if is_cam and own is not None:
        return _class_activation_map(attribution, layer, inputs, arguments)
    at_input = bool(arguments.get("attribute_to_layer_input", False))
    tensors = format_tensor_into_tuples(inputs)
    is_cut = type(attribution) is LayerGradCam and not at_input
    cutting = _graph_from(layer, attribution.forward_func) if is_cut else nullcontext()
    # The layout is the same for all batches: once it is known to be plain, it isn't followed.
    key = (id(layer), id(attribution.forward_func), at_input, *(x.shape[1:] for x in tensors))
    plain = _plain.setdefault(cam, set())
    if own is None and key in plain:
        with cutting:
            return _alone(attribution, inputs, arguments)
    with followed_outputs(layer, at_input, tensors) as outputs, cutting:
        result = _alone(attribution, inputs, arguments)
    image = tensors[0]
    reshapes = [own or recognised(layer, layout, x, image) for x, layout in outputs]
    if all(reshape is None for reshape in reshapes):
        plain.add(key)
        return result
    if is_cam:
        return _class_activation_map(attribution, layer, inputs, arguments)
    return placed(result, outputs, reshapes)


@contextmanager
def _graph_from(layer: nn.Module, forward_func: Any) -> Iterator[None]:
    """Inside, passes of a network record no graph before the layer, whose gradients are asked for.

    ``LayerGradCam`` of Captum asks for a gradient by the inputs too, and throws it away.
    """
    parts = forward_func.modules() if isinstance(forward_func, nn.Module) else ()
    if layer is forward_func or layer not in set(parts):
        yield
        return

    def begin(*_: Any) -> None:
        torch.set_grad_enabled(False)  # Captum puts it back behind the pass

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        torch.set_grad_enabled(True)
        return tree_map_only(Tensor, _leaf, output)

    with forward_func.register_forward_pre_hook(owned(begin)), hooked([layer], cut):
        yield


def _leaf(x: Tensor) -> Tensor:
    """A copy whose graph begins here; a later layer may write into it."""
    return x.detach().requires_grad_().clone() if x.is_floating_point() else x


def _alone(attribution: Attribution, inputs: Any, arguments: dict[str, Any]) -> Any:
    with private_hooks(attribution.forward_func):
        return attribution.attribute(inputs, **arguments)


def _class_activation_map(
    attribution: Attribution, layer: nn.Module, inputs: Any, arguments: dict[str, Any]
) -> Any:
    """The map of ``LayerGradCam`` or ``GuidedGradCam``."""
    is_wrapped = isinstance(attribution, NoiseTunnel)
    check(not is_wrapped, f"{type(attribution).__name__} of a class activation map: {_EXPECTED}")
    name, is_guided = type(attribution).__name__, isinstance(attribution, GuidedGradCam)
    options = {"interpolate_mode"} if is_guided else {"relu_attributions"}
    other = sorted(set(arguments) - _TAKEN - options)
    check(not other, f"{name} with {', '.join(other)}: {_EXPECTED}")
    shared = {option: value for option, value in arguments.items() if option in _TAKEN}
    cam = RobustCAM(attribution.forward_func, layer, base="gradcam")
    maps = cam.attribute(inputs, **shared, weights=[1.0], normalize=None)
    if is_guided or arguments.get("relu_attributions"):
        maps = tuple(m.clamp(min=0) for m in maps) if isinstance(maps, tuple) else maps.clamp(min=0)
    if not is_guided:
        return maps
    is_one = isinstance(maps, Tensor) and isinstance(inputs, Tensor)
    check(is_one, f"{name} of several tensors: {_EXPECTED}")
    shared.pop("attribute_to_layer_input", None)
    mode = arguments.get("interpolate_mode", "nearest")
    enlarged = LayerAttribution.interpolate(maps, inputs.shape[2:], mode)
    return enlarged * attribution.guided_backprop.attribute(inputs, **shared)
