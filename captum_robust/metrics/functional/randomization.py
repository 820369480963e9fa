"""The sanity check of Adebayo et al. (2018): a map must change with the weights of the model.

"Sanity Checks for Saliency Maps" (arXiv 1810.03292), section 3, cascading randomization: the layers
of the model are given new weights one after the other, from the last one to the first. After each
the map is compared with that of the model as it was trained. A method whose maps stay the same
shows the image, or the architecture, but not what the model has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_shape,
    check_type,
)
from captum_robust._contexts import evaluation, restored, seeded, without_new_gradients
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust._scores import copies_of
from captum_robust.metrics.functional._validate import check_maps, check_seed
from captum_robust.metrics.functional.saliency import check_question
from captum_robust.metrics.functional.stability import spearman_correlation, structural_similarity

Explain: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images N×C×H×W and classes N -> maps N×H×W or N×1×H×W of the model as it is at that moment."""


@dataclass(frozen=True, eq=False)
class RandomizationScores:
    """The outcome of :func:`model_randomization`, after each of L layers, or groups of them."""

    layers: tuple[str, ...]
    """L names, in the order in which the layers lost their weights; the last of each group."""
    spearman: Tensor
    """L×N float64 in [-1, 1], the rank correlation of each map with the original one."""
    ssim: Tensor
    """L×N float64 in [-1, 1], their structural similarity."""


def layers_with_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that have parameters of their own, last first.

    In the order of their definition, which is that in which most models run them.

    >>> layers_with_weights(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    ('2', '0')
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    named = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    return tuple(reversed(named))


def model_randomization(
    model: nn.Module,
    explain: Explain,
    images: Tensor,
    classes: Tensor,
    *,
    layers: Sequence[str] | None = None,
    stages: int | None = None,
    maps: Tensor | None = None,
    seed: int = 0,
) -> RandomizationScores:
    """Return how far the maps stay the same while the model loses its weights, last layer first.

    A layer with ``reset_parameters`` is initialised by it, as torch's own are; in another each
    parameter is drawn from a normal distribution around 0 of the size that it has. The model is in
    evaluation mode while this lasts, and is given back with the very weights and buffers it had,
    also after an error; gradients that parameters did not have before are gone.

    Args:
        model: whose layers are randomised.
        explain: ``explain(images, classes)`` gives the maps of that very model, at least 11×11
            pixels, such as ``lambda x, y: RobustCAM(model, layer).attribute(x, y, upsample=True)``.
        images: N×C×H×W.
        classes: N class indices.
        layers: names of ``model.named_modules()``, in the order in which they are randomised; None:
            :func:`layers_with_weights`.
        stages: how often maps are made: after so many groups of layers, as equal as they can be,
            the last after all of them; None: after each layer.
        maps: those of the model as it is, where they are known already.
        seed: of the new weights; the same seed gives the same ones. Torch's own random state is
            left as it was.

    Raises:
        ValueError: no layer with parameters, or an unknown one; maps of another shape, or smaller
            than the window of the structural similarity; NaN or infinity.
        TypeError: arguments of another kind.
    """
    known = layers_with_weights(model)
    check(known, "model: expected layers with parameters, got none")
    check_callable("explain", explain)
    check_question(images, classes, 1)
    check_seed(seed)
    names = known if layers is None else tuple(layers)
    check(names, "layers: expected at least one, got none")
    for name in names:
        check_choice("layers", name, known)
    parts = [model.get_submodule(name) for name in names]
    count = len(names) if stages is None else check_count("stages", stages, 1, len(names))
    ends = [round((stage + 1) * len(names) / count) - 1 for stage in range(count)]

    def checked(made: Tensor, name: str) -> Tensor:
        check_shape(name, made := check_maps(made, name), f"{len(images)}×H×W")
        return made

    def explained() -> Tensor:
        return checked(explain(copies_of(images), classes.clone()), "maps of explain")

    spearman, ssim = [], []
    with evaluation(model), without_new_gradients(model), restored(parts):
        original = explained() if maps is None else checked(maps, "maps")
        for number, part in enumerate(counted(parts, "layer", None, "randomization")):
            with seeded((seed + number) % 2**63, device_of(model)):
                _randomize(part)
            if number not in ends:
                continue
            now = explained()
            spearman.append(spearman_correlation(original, now))
            ssim.append(structural_similarity(original, now))
    return RandomizationScores(
        tuple(names[end] for end in ends), torch.stack(spearman), torch.stack(ssim)
    )


@torch.no_grad()
def _randomize(layer: nn.Module) -> None:
    reset = getattr(layer, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in layer.parameters(recurse=False):
        size = parameter.square().mean().sqrt()
        parameter.copy_(torch.randn_like(parameter) * size)
