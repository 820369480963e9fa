"""Training a denoiser that stands in front of a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from captum_robust._checks import check, check_number, check_type
from captum_robust._contexts import frozen, outputs_of
from captum_robust._draws import drawn
from captum_robust._processes import device_of
from captum_robust.nn.denoiser import Denoiser
from captum_robust.training.acceleration import half_precision, training_device
from captum_robust.training.loop import TrainingResult, fit
from captum_robust.training.parts import part_of
from captum_robust.training.preparation import adamw, class_scores
from captum_robust.training.schedule import Batch, Schedule
from captum_robust.training.settings import TrainingSettings

_PIXELS, _CLASSES = 2.0, 0.2
"""Weights of the terms beside that of the features."""


@dataclass(frozen=True)
class DenoisingLoss:
    r"""What a classifier makes of denoised images, against what it makes of the clean ones.

    The squared error of the pixels, divided by σ; of the map of ``layer``, relative to the clean
    one's squared length; and the Kullback-Leibler divergence of the classes: the "stability" of
    Salman et al., "Denoised Smoothing" (https://arxiv.org/abs/2003.01908), and, as class activation
    maps are made of it, of the layer.

    Args:
        model: images -> scores N×K; frozen.
        layer: of the model.
        sigma: the noise of an image has a standard deviation drawn from this range.
        features: weight of the last two terms; 0 spares the model's passes.
    """

    model: nn.Module
    layer: nn.Module
    sigma: tuple[float, float] = (0.05, 0.5)
    features: float = 1.0

    def __post_init__(self) -> None:
        check_number("features", self.features, 0)
        low, high = self.sigma
        check(0 < low <= high < math.inf, f"sigma: expected a range above 0, got ({low}, {high})")

    def __call__(self, denoiser: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """``"loss"``, the mean over a batch of images N×3×H×W, and its terms."""
        images = batch[0]
        n = len(images)
        generators = part_of(seed, n).of_images(n)
        low, high = self.sigma
        sigma = low + (high - low) * drawn(torch.rand, (n,), generators)
        noise = drawn(torch.randn, images.shape, generators) * sigma[:, None, None, None]
        denoised = denoiser(images + noise.to(images.device)).float()
        error = (denoised - images).square().mean(dim=(1, 2, 3)) / sigma.to(images.device)
        terms = {"pixels": error.mean()}
        loss = _PIXELS * terms["pixels"]
        if self.features:
            with torch.no_grad():
                clean, wanted = self._seen(images)
            seen, scores = self._seen(denoised)
            lengths = clean.square().sum(dim=(1, 2, 3)).clamp(min=1e-12)
            terms["map"] = ((seen - clean).square().sum(dim=(1, 2, 3)) / lengths).mean()
            logs = scores.log_softmax(dim=1), wanted.log_softmax(dim=1)
            terms["classes"] = F.kl_div(*logs, reduction="batchmean", log_target=True)
            loss = loss + self.features * (terms["map"] + _CLASSES * terms["classes"])
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map of the layer N×C×h×w, and the scores."""
        with outputs_of([self.layer]) as outputs:
            scores = class_scores(self.model, images)
        return outputs[0].float(), scores


@dataclass(frozen=True)
class DenoisingEvaluation:
    """How often the class of held-out images stays under noise, with the denoiser and without.

    Args:
        model: images -> scores N×K.
        images: items (3×H×W, anything).
        sigma: of the noise.
        batch_size: images at once.
        precision: as in training.
    """

    model: nn.Module
    images: Dataset[Any]
    sigma: float = 0.25
    batch_size: int = 16
    precision: str = "float32"

    def __call__(self, denoiser: nn.Module) -> dict[str, float]:
        """``kept`` and ``kept_without``, shares of the images; ``error``, the mean square."""
        device, generator = device_of(denoiser), torch.Generator().manual_seed(0)
        rows = []
        with torch.no_grad(), half_precision(device, self.precision):
            for images, *_ in DataLoader(self.images, self.batch_size, generator=torch.Generator()):
                noise = self.sigma * torch.randn(images.shape, generator=generator)
                noisy = (images + noise).to(device)
                denoised = denoiser(noisy).float()
                each = [class_scores(self.model, x) for x in (images.to(device), denoised, noisy)]
                top, *others = (scores.argmax(dim=1) for scores in each)
                error = (denoised - images.to(device)).square().mean(dim=(1, 2, 3))
                rows.append(torch.stack([*((o == top).float() for o in others), error], dim=1))
        means = torch.cat(rows).double().mean(dim=0).tolist()
        return dict(zip(("kept", "kept_without", "error"), means, strict=True))


def denoising_training(
    denoiser: Denoiser,
    dataset: Dataset[Any],
    model: nn.Module,
    layer: nn.Module,
    settings: TrainingSettings | None = None,
    *,
    sigma: tuple[float, float] = (0.05, 0.5),
    features: float = 1.0,
    validation: Dataset[Any] | None = None,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a denoiser, in place, that leaves a classifier's map and classes as they were.

    Everything of :func:`captum_robust.training.fit` holds. The optimiser is AdamW.

    Args:
        denoiser: images -> images.
        dataset: items (image 3×H×W with pixels in [0, 1], anything).
        model: images -> scores N×K; frozen.
        layer: of the model, whose map N×C×h×w is to stay.
        settings: 30 epochs of batches of 8 with a learning rate of .0005 by default.
        sigma, features: see :class:`DenoisingLoss`.
        validation: more such items, measured before, during and after
            (:class:`DenoisingEvaluation`).
        out, configuration, progress: see :func:`captum_robust.training.fit`.

    Raises:
        TypeError: a network or a model that is none.
        ValueError: numbers out of range; see also :func:`captum_robust.training.fit`.
    """
    settings = settings or TrainingSettings(batch_size=8, learning_rate=5e-4, weight_decay=1e-4)
    check_type("denoiser", denoiser, nn.Module, "a torch.nn.Module")
    check_type("model", model, nn.Module, "a torch.nn.Module")
    Schedule(dataset, settings)  # refuses too few images
    device = training_device(settings)
    denoiser.to(device)
    model.to(device)
    evaluation = None
    if validation is not None:
        evaluation = DenoisingEvaluation(model, validation, precision=settings.precision)
    described = {"sigma": list(sigma), "features": features}
    with frozen(model):
        return fit(
            denoiser,
            dataset,
            DenoisingLoss(model, layer, sigma, features),
            settings,
            optimizer=adamw(denoiser.parameters(), settings),
            evaluate=evaluation,
            out=out,
            configuration={**described, **(configuration or {})},
            progress=progress,
        )
