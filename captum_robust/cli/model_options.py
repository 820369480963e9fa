"""What the commands' options name: a classifier, one of its classes, and a device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from captum_robust._checks import check, unknown_name

if TYPE_CHECKING:
    from captum_robust.models import Classifier


def load_model(name: str, weights: str, device: str, layer: str | None = None) -> Classifier:
    """Load the classifier onto its device."""
    from captum_robust.models import load_classifier
    from captum_robust.models.zoo import published_weights

    chosen = chosen_device(device)
    return load_classifier(name, published_weights(weights), cam_layer=layer).to(chosen)


def chosen_device(device: str) -> str:
    """The device, or what is there for ``auto``.

    Raises:
        ValueError: it is not available.
    """
    import torch

    if device == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        mps = torch.backends.mps.is_available()
        device = f"cuda:{local}" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter without CUDA
        first = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available here: {first}") from None
    return device


def class_number(model: Classifier, target: str | None, option: str) -> int | None:
    """The number of a class of the model, from its name or number; None: none was given.

    Raises:
        ValueError: there is no such class.
    """
    if target is None:
        return None
    from captum_robust.data.classes import ClassIndex

    names = model.class_names or []
    number = ClassIndex(names)(target)
    is_number = number is None and target.isdecimal()
    last = len(names) - 1
    check(not is_number, f"{option}: the model has the classes 0 to {last}, not {target}")
    if number is None:
        raise unknown_name("class", target, names)
    return number
