"""How often one perturbation changes the classes that models give to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_robust._checks import check, check_type, shape_or_type
from captum_robust._resize import resized
from captum_robust._scores import FastScores, warn_of_probabilities
from captum_robust.attacks.image_batches import (
    ForwardFunction,
    Loader,
    check_loader,
    checked_scores,
    image_batches,
    place_of,
)
from captum_robust.attacks.rank import Share

if TYPE_CHECKING:
    import pandas as pd


def image_scores(forward_func: ForwardFunction) -> Callable[[Tensor], Tensor]:
    """N×C×H×W -> float scores N×K; ``ValueError`` for another shape, NaN or infinity."""
    run = FastScores(forward_func)
    return lambda x: checked_scores(run((x,), None), len(x))


@dataclass(frozen=True)
class FoolingRate:
    """The share of n images whose class changes, and Wilson's 95 % interval around it."""

    rate: float
    n: int
    low: float
    high: float


def fooling_rate(
    forward_func: Callable[..., Tensor],
    perturbation: Tensor | Callable[[Tensor], Tensor],
    loader: Loader,
) -> FoolingRate:
    """The share of images whose predicted class changes; their true classes do not matter.

    The interval is that of Wilson, "Probable inference, the law of succession, and statistical
    inference" (1927), which also holds for rates near 0 and 1.

    Args:
        forward_func: images N×C×H×W -> scores N×K.
        perturbation: v, C×H×W, added and clipped to [0, 1], resized where the images have another
            size; or any attack or function, images -> images.
        loader: as for :meth:`UniversalPerturbation.fit`; read once.

    Raises:
        ValueError, TypeError: as :meth:`UniversalPerturbation.fit`.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images = torch.tensor([[0.4, 0.3], [0.9, 0.1]])
    >>> fooling_rate(model, torch.tensor([-0.1, 0.1]), [images])
    FoolingRate(rate=0.5, n=2, low=0.0945..., high=0.9054...)
    """
    changed, n = _label_changes({"": perturbation}, {"": forward_func}, loader)
    share = Share.of(changed[""][""], n)
    return FoolingRate(rate=share.value, n=n, low=share.low, high=share.high)


def transfer_matrix(
    perturbations: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    models: Mapping[str, Callable[..., Tensor]],
    loader: Loader,
) -> pd.DataFrame:
    """How often what was fitted on one model fools another: label-change rates, not accuracies.

    Each model sees the clean images once, and once those of each perturbation.

    Args:
        perturbations: name -> v, attack or function, as for :func:`fooling_rate`; the rows.
        models: name -> forward function; the columns.
        loader: as for :meth:`UniversalPerturbation.fit`; read once.

    Raises:
        ValueError, TypeError: as :meth:`UniversalPerturbation.fit`; nothing to compare.
    """
    import pandas as pd

    check(perturbations, "perturbations: expected at least one, got none")
    check(models, "models: expected at least one, got none")
    changed, n = _label_changes(perturbations, models, loader)
    return (pd.DataFrame(changed) / n).rename_axis(index="source", columns="attacked")


@torch.no_grad()
def _label_changes(
    perturbations: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    models: Mapping[str, Callable[..., Tensor]],
    loader: Loader,
) -> tuple[dict[str, dict[str, int]], int]:
    """Model -> perturbation -> how many of the n images change their class; and n."""
    check_loader(loader, 1)
    scores = {name: image_scores(model) for name, model in models.items()}
    devices = {name: place_of(model) for name, model in models.items()}
    changed: dict[str, dict[str, Tensor | int]]
    changed = {model: dict.fromkeys(perturbations, 0) for model in models}
    n = 0
    for x in image_batches(loader, (0.0, 1.0)):
        n += len(x)
        perturbed = {name: _apply(p, name, x) for name, p in perturbations.items()}
        for model in models:
            of_clean = scores[model](x.to(devices[model] or x.device))
            warn_of_probabilities(of_clean)
            clean = of_clean.argmax(dim=1)
            for source, y in perturbed.items():
                predicted = scores[model](y.to(clean.device)).argmax(dim=1)
                changed[model][source] = changed[model][source] + (predicted != clean).sum()
    return {m: {source: int(c) for source, c in of_m.items()} for m, of_m in changed.items()}, n


def _apply(perturbation: Tensor | Callable[[Tensor], Tensor], name: str, x: Tensor) -> Tensor:
    if isinstance(perturbation, Tensor):
        v = sized_as(perturbation.to(x), x.shape[1:])
        return (x + v).clamp(0, 1)
    check_type(f"perturbation {name!r}", perturbation, Callable, "a tensor or an attack")
    y = perturbation(x)
    got, expected = shape_or_type(y), tuple(x.shape)
    check(got == expected, f"perturbation {name!r}: expected {expected} as it came, got {got}")
    return y


def sized_as(v: Tensor, shape: torch.Size) -> Tensor:
    """v for images of ``shape``; averages of its values only, so none exceeds the largest."""
    if v.shape == shape:
        return v
    fits = v.ndim == len(shape) == 3 and v.shape[0] == shape[0]
    got = tuple(v.shape)
    check(fits, f"inputs: images of shape {tuple(shape)}, but the perturbation has {got}")
    height, width = shape[1:]
    return resized(v[None], (height, width))[0]
