"""Attributions for Quantus, which asks for them by a function on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from captum_robust._checks import check, check_finite, check_shape, check_type

if TYPE_CHECKING:
    import numpy as np
    from captum.attr import Attribution
    from torch import nn


def quantus_explain_func(
    attribution: Attribution | Callable[[nn.Module], Attribution], **arguments: Any
) -> Callable[..., np.ndarray[Any, Any]]:
    """Return an attribution as the ``explain_func`` of Quantus' metrics.

    What it returns has Quantus' signature ``(model, inputs, targets, **kwargs)``: inputs N×C×H×W
    and N targets as arrays; attributions N×1×H×W or N×C×H×W as a float32 array. Inputs get the
    dtype of the model's weights. Maps of a layer are enlarged to the size of the inputs,
    bilinearly. ``kwargs``, Quantus' ``explain_func_kwargs``, go to ``attribute`` as well;
    ``device`` among them is where the inputs go, by default where the model is.

    Args:
        attribution: an attribution of this package or of Captum; or, for metrics that change the
            model, such as those that randomise its weights, a function that makes the attribution
            of a model: ``lambda model: RobustCAM(model, model.cam_layer)``.
        arguments: of ``attribute``, but for the inputs and the target.

    Raises:
        TypeError: ``attribution`` is neither.
        ValueError: when called, with another model than that of ``attribution``, with inputs or
            targets of another shape, NaN or infinity, or where a map is not N×1×h×w, N×C×h×w or
            N×h×w.

    >>> from captum.attr import Saliency
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    >>> explain = quantus_explain_func(Saliency)
    >>> explain(net, torch.ones(1, 3, 2, 2).numpy(), [1]).shape
    (1, 3, 2, 2)
    """
    from captum.attr import Attribution

    given: Any = attribution
    is_made = isinstance(given, Attribution)
    check_type("attribution", given, Attribution | Callable, "an attribution or a function")

    def explain_func(
        model: nn.Module, inputs: Any, targets: Any, **kwargs: Any
    ) -> np.ndarray[Any, Any]:
        import torch

        from captum_robust._processes import device_of
        from captum_robust._resize import resized
        from captum_robust.attr._layer_maps import attributed

        if is_made:
            remedy = "give quantus_explain_func a function that makes the attribution of a model"
            known = f"model: expected that of the attribution, got another; {remedy}"
            check(given.forward_func is model, known)
        made = given if is_made else given(model)
        device = torch.device(kwargs.pop("device", None) or device_of(model))
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        x = torch.as_tensor(inputs, dtype=weight.dtype, device=device)
        check_shape("inputs", x, "N×C×H×W")
        check(len(x), "inputs: expected at least one, got none")
        check_finite(x, "inputs")
        target = torch.as_tensor(targets, device=device)
        is_whole = target.shape == x.shape[:1] and bool((target == target.long()).all())
        got = f"{tuple(target.shape)} of {target.dtype}"
        check(is_whole, f"targets: expected {len(x)} class indices, got {got}")
        target = target.long()
        maps = attributed(made, x, target=target, **{**arguments, **kwargs})
        maps = (maps[0] if isinstance(maps, tuple) else maps).detach().float()
        maps = maps[:, None] if maps.ndim == 3 else maps
        fits = maps.ndim == 4 and len(maps) == len(x) and maps.shape[1] in (1, x.shape[1])
        expected = f"{len(x)}×1×h×w or {len(x)}×{x.shape[1]}×h×w"
        check(fits, f"attribution: expected maps {expected}, got {tuple(maps.shape)}")
        height, width = x.shape[2:]
        array: np.ndarray[Any, Any]
        array = resized(maps, (height, width), antialias=False).cpu().numpy()
        return array

    return explain_func
