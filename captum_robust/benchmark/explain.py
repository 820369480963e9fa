"""One picture that shows where a classifier looks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from captum_robust.benchmark.methods import Method
from captum_robust.benchmark.overlay import (
    PREDICTED_COLOR,
    RGB,
    as_rgb,
    draw_boxes,
    overlay,
    panel,
    save_png,
)
from captum_robust.data import DataError, load_image
from captum_robust.data.transforms import resize_image
from captum_robust.metrics.functional import largest_component, mask_to_box
from captum_robust.metrics.functional import threshold as threshold_map
from captum_robust.models import Classifier

_DISPLAY_SIDE = 360


def explain_image(
    model: Classifier,
    file: Path,
    methods: Mapping[str, Method],
    picture: Path,
    *,
    target: int | None = None,
    threshold: float = 0.2,
    top: int = 5,
) -> tuple[list[tuple[str, float]], Path]:
    """Draw the map and box of each method over an image file, and write the picture as PNG.

    The box is drawn around the largest component of the pixels with at least ``threshold`` of
    the map's range, 20 % as for class activation maps (Zhou et al., 2016).

    Returns:
        The ``top`` classes with their probabilities, and the path of the picture.

    Raises:
        DataError: the image can't be read, or the model gives no finite score for it.
        ValueError: ``threshold`` outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    image = load_image(file)
    device = next(model.parameters()).device
    x = resize_image(image, model.input_size)[None].to(device)
    with torch.no_grad():
        probabilities = model(x)[0].float().softmax(dim=0)
    if not torch.isfinite(probabilities).all():
        raise DataError(f"{file}: the model gives no finite scores")
    best = probabilities.topk(min(top, len(probabilities)))
    classes = [
        (_name(model, int(i)), float(p)) for p, i in zip(best.values, best.indices, strict=True)
    ]
    explained = int(best.indices[0]) if target is None else target
    shown = resize_image(image, _display_size(image))
    panels = [as_rgb(shown)]
    captions = [_name(model, explained)]
    for name, method in methods.items():
        heat = method.explain(x, torch.tensor([explained], device=device)).detach().float().cpu()
        panels.append(_explained(shown, heat, method, threshold))
        captions.append(name)
    columns = len(panels) if len(panels) < 5 else 3  # three fit a page and a phone
    save_png(picture, panel(panels, captions, columns))
    return classes, picture


def _explained(shown: Tensor, heat: Tensor, method: Method, threshold: float) -> RGB:
    """The map over the image, with its box, H×W×3."""
    size = (heat.shape[1], heat.shape[2])
    if method.box is not None:
        box = method.box(size)[None]
    else:
        box = mask_to_box(largest_component(threshold_map(heat, "value", threshold)))
    height, width = shown.shape[1:]
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    return draw_boxes(overlay(shown, heat[0]), box * scale, PREDICTED_COLOR)


def _display_size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[1:]
    scale = _DISPLAY_SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _name(model: Classifier, number: int) -> str:
    return str(number) if model.class_names is None else model.class_names[number]
