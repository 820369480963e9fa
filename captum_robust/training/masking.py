"""Training the masking network of Dabkowski and Gal on any differentiable classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from captum_robust._checks import as_number, check_count, unknown_name
from captum_robust._contexts import frozen, seeded
from captum_robust.metrics.functional import saliency_metric
from captum_robust.nn import EvidenceRemoval, MaskingNetwork, blend, upsampled
from captum_robust.nn.mask_decoder import MaskDecoder
from captum_robust.nn.mask_objective import Objective, PaperObjective
from captum_robust.training.image_sets import CroppedImages, LabelledImages
from captum_robust.training.loop import (
    Batch,
    TrainingResult,
    check_dataset,
    fit,
    training_device,
)
from captum_robust.training.settings import TrainingSettings

FAKES = ("area", "swapped")
_GATE_RATE = 10.0
"""Of the learning rate; scale and shift of the feature filter."""


@dataclass(frozen=True)
class MaskingLoss:
    """The objective of a batch, some of its images asked for a class that is not there.

    Dabkowski and Gal (https://arxiv.org/abs/1705.07857), section 4. Without fake classes a network
    shows the most salient object whatever the class.

    Args:
        network: whose decoder is trained.
        model: the black box: images -> scores N×K. Where it is the network's encoder, one pass
            serves both.
        objective: what a mask is trained for.
        removal: what stands in for removed pixels, drawn anew for the kept and the destroyed image.
        fake_probability: share of the images that are asked for a class drawn from the others.
        fakes: ``"area"``: for these the loss is of the mask alone (paper); ``"swapped"``: the true
            class must be lost from the kept image and stay in the destroyed one (authors' code).
        image_noise: standard deviation of the noise on the images.

    Raises:
        ValueError: a number out of range, unknown ``fakes``.
    """

    network: MaskingNetwork
    model: nn.Module
    objective: Objective = field(default_factory=PaperObjective)
    removal: EvidenceRemoval = field(default_factory=EvidenceRemoval)
    fake_probability: float = 0.3
    fakes: str = "area"
    image_noise: float = 0.015

    def __post_init__(self) -> None:
        if not 0 <= as_number(self.fake_probability) < 1:
            raise ValueError(
                f"fake_probability: expected a share in [0, 1), got {self.fake_probability!r}"
            )
        if self.fakes not in FAKES:
            raise unknown_name("fakes", self.fakes, FAKES)
        if not 0 <= as_number(self.image_noise) < math.inf:
            raise ValueError(
                f"image_noise: expected a finite number from 0, got {self.image_noise!r}"
            )

    def __call__(self, decoder: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """``"loss"``, the mean over a batch of images N×3×H×W and classes N, and its terms.

        A class below 0 is not known: the black box says it.
        """
        images, labels = batch
        device = images.device
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(images.shape, generator=generator).to(device)
        images = images + self.image_noise * noise
        features, scores = self.network.encode(images)
        if self.model is not self.network.encoder and bool((labels < 0).any()):
            with torch.no_grad():
                scores = self.model(images)
        classes = torch.where(labels < 0, scores.argmax(dim=1), labels)
        count = self.network.decoder.shape.num_classes
        is_fake = torch.rand(len(images), generator=generator) < self.fake_probability
        if bool(is_fake.all()) and self.fakes == "area":
            is_fake[0] = False  # nothing would be asked of the black box
        others = torch.randint(1, max(2, count), (len(images),), generator=generator).to(device)
        fake = is_fake.to(device)
        asked = torch.where(fake, (classes + others) % count, classes)
        masks = upsampled(decoder(features, asked), (images.shape[2], images.shape[3]))
        scored = (
            torch.arange(len(images)) if self.fakes == "swapped" else (~is_fake).nonzero()[:, 0]
        )
        scored = scored.to(device)
        kept, destroyed = self._scores(images[scored], masks[scored], generator)
        if self.fakes == "swapped":
            swap = fake[:, None]
            kept, destroyed = torch.where(swap, destroyed, kept), torch.where(swap, kept, destroyed)
        terms = self.objective(masks[scored], kept, destroyed, classes[scored])
        total = terms.pop("total").sum()
        if self.fakes == "area":
            of_mask = self.objective.of_mask(masks[fake])
            total = total + torch.stack(list(of_mask.values())).sum()
        named = {name: value.detach().mean() for name, value in terms.items()}
        real, asked_for = ~fake, masks.detach().flatten(1).mean(dim=1)
        return {
            "loss": total / len(images),
            **named,
            "mask_of_the_class": _mean_of(asked_for, real),
            "mask_of_a_fake": _mean_of(asked_for, fake),
        }

    def _scores(
        self, images: Tensor, masks: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The black box's scores of the kept and of the destroyed images, in one pass."""
        kept = blend(images, masks, self.removal(images, generator))
        destroyed = blend(images, 1 - masks, self.removal(images, generator))
        scores = self.model(torch.cat([kept, destroyed])).float()
        return scores[: len(images)], scores[len(images) :]


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen ones; 0 where there is none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


@dataclass
class MaskingEvaluation:
    """How small a crop the masks of held-out images leave, and whether they follow the class.

    Args:
        network: whose decoder is evaluated.
        model: the black box.
        images: of (3×H×W, anything).
        batch_size: images at once.
        precision: ``"bfloat16"`` for a quicker, coarser look.
    """

    network: MaskingNetwork
    model: nn.Module
    images: Dataset[Any]
    batch_size: int = 16
    precision: str = "float32"
    shown: int = 8
    pictures: list[Tensor] = field(default_factory=list, repr=False)
    """Of the last evaluation, 3×H×W each: images beside what their masks keep."""

    def __call__(self, decoder: nn.Module) -> dict[str, float]:
        """Means over the images, each asked for the class that the black box sees in it.

        ``saliency_metric`` (:func:`captum_robust.metrics.functional.saliency_metric`), ``area``
        and ``probability`` of its crop, ``mask`` and, of another class, ``mask_of_another``.
        """
        del decoder  # the network's own
        device = next(self.network.decoder.parameters()).device
        rows: list[Tensor] = []
        self.pictures = []
        half = torch.autocast(
            device.type, torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=False
        )
        with torch.no_grad(), half:
            # With a generator: else it draws from torch's global one.
            drawn = torch.Generator()
            for images, *_ in DataLoader(self.images, self.batch_size, generator=drawn):
                rows.append(self._measured(images.to(device)))
        found = torch.cat(rows).double().mean(dim=0).tolist()
        names = ("saliency_metric", "area", "probability", "mask", "mask_of_another")
        return dict(zip(names, found, strict=True))

    def _measured(self, images: Tensor) -> Tensor:
        """N×5."""
        features, scores = self.network.encode(images)
        if self.model is not self.network.encoder:
            scores = self.model(images)
        classes = scores.argmax(dim=1)
        count = self.network.decoder.shape.num_classes
        size = (images.shape[2], images.shape[3])
        masks, others = (
            upsampled(self.network.decoder(features, asked), size).float()
            for asked in (classes, (classes + count // 2) % count)
        )
        for image, mask in zip(images, masks, strict=True):
            if len(self.pictures) < self.shown:
                self.pictures.append(torch.cat([image, image * mask], dim=2).cpu())
        found = saliency_metric(
            self.model, images, masks[:, 0], classes, batch_size=self.batch_size
        )
        of_masks = [m.flatten(1).mean(dim=1) for m in (masks, others)]
        return torch.stack([found.metric, found.area, found.probability, *of_masks], dim=1)


def warm_up(
    network: MaskingNetwork,
    dataset: Dataset[Any],
    *,
    model: nn.Module | None = None,
    steps: int = 200,
    images: int = 256,
    batch_size: int = 16,
    learning_rate: float | None = None,
    seed: int = 0,
) -> float:
    """Teach the feature filter which classes are in an image, before the rest is trained.

    The paper's first phase: the mean e over the positions of the log odds of a class is trained to
    tell the class of the image from one drawn among the others, half of the time each, with
    everything else left alone. The features are pooled once, as the encoder is frozen. Where the
    classes' vectors are the classifier's own only a scale and a shift are learned.

    Args:
        network: changed in place.
        dataset: of (image, class); a class below 0 is not known: ``model`` says it.
        model: the black box; None: the encoder.
        steps: of Adam, each over all pooled images.
        images: so many, drawn, are pooled.
        learning_rate: None: .05 for scale and shift, .01 where vectors are learned.
        seed: of what is drawn.

    Returns:
        the last loss, in nats; NaN without a step.

    Raises:
        ValueError: a class that the network does not have, a loss that is no finite number.
    """
    check_count("steps", steps, 0)
    check_count("images", images, 1)
    decoder = network.decoder
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    count = min(images, len(dataset))  # type: ignore[arg-type]
    order = torch.randperm(len(dataset), generator=generator)[:count].tolist()  # type: ignore[arg-type]
    pooled, classes = [], []
    with seeded(seed, None), torch.no_grad():
        for batch, labels, *_ in DataLoader(Subset(dataset, order), batch_size):
            shown, labels = batch.to(device), labels.to(device)
            features, scores = network.encode(shown)
            if model is not None and model is not network.encoder:
                scores = model(shown)
            pooled.append(features[-1].float().mean(dim=(2, 3), keepdim=True))
            classes.append(torch.where(labels < 0, scores.argmax(dim=1), labels))
    features_, classes_ = torch.cat(pooled), torch.cat(classes)
    total = decoder.shape.num_classes
    if int(classes_.amax()) >= total:
        raise ValueError(
            f"dataset: has class {int(classes_.amax())}, but the network has {total} classes"
        )
    trained: list[Tensor] = [decoder.scale, decoder.shift]
    if decoder.embedding is not None:
        trained.append(decoder.embedding.weight)
    rate = learning_rate or (0.05 if decoder.embedding is None else 0.01)
    optimizer = torch.optim.Adam(trained, rate)
    loss = torch.tensor(math.nan)
    with torch.enable_grad():
        for _ in range(steps):
            others = torch.randint(1, max(2, total), (count,), generator=generator).to(device)
            asked = torch.cat([classes_, (classes_ + others) % total])
            odds = decoder.evidence(features_.repeat(2, 1, 1, 1), asked)[:, 0, 0]
            present = torch.arange(2 * count, device=device) < count
            loss = F.binary_cross_entropy_with_logits(odds, present.float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if steps and not bool(loss.isfinite()):
        raise ValueError(f"warm-up: the loss is {float(loss.detach())}; is a feature or image NaN?")
    decoder.zero_grad(set_to_none=True)
    return float(loss.detach())


def masking_training(
    network: MaskingNetwork,
    dataset: Dataset[Any],
    settings: TrainingSettings | None = None,
    *,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    removal: EvidenceRemoval | None = None,
    fake_probability: float = 0.3,
    fakes: str = "area",
    image_noise: float = 0.015,
    warm_up_steps: int = 200,
    validation: Dataset[Any] | None = None,
    patience: int | None = None,
    out: str | Path | None = None,
    tensorboard: bool = False,
    configuration: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train a masking network, in place, for any differentiable classifier.

    Everything of :func:`captum_robust.training.fit` holds: several processes, a killed run goes on.
    The optimiser is AdamW; the encoder and the black box are frozen.

    Args:
        network: its decoder is trained.
        dataset: of (image with pixels in [0, 1], class); a class below 0 is not known: the black
            box says it.
        settings: 30 epochs of batches of 16 with a learning rate of .001 by default.
        model: the black box, images -> scores N×K with the network's classes; None: the encoder.
        objective, removal, fake_probability, fakes, image_noise: see :class:`MaskingLoss`.
        warm_up_steps: see :func:`warm_up`; 0: none.
        validation: of (image, anything): the weights with the lowest saliency metric on them win
            (:class:`MaskingEvaluation`).
        patience: stop after so many evaluations without a new lowest one, that before training not
            counted.
        out, configuration, progress: see :func:`captum_robust.training.fit`.
        tensorboard: write losses, numbers and masks to ``out/tensorboard`` while it runs.

    Raises:
        TypeError: a network or a model that is none.
        ValueError: numbers out of range, a class count that differs between network and model,
            only one class, a label that is none of them; see also
            :func:`captum_robust.training.fit`.
        ImportError: accelerate or tensorboard is missing; names the pip command.
    """
    if settings is None:
        settings = TrainingSettings(batch_size=16, learning_rate=1e-3, weight_decay=1e-4)
    if not isinstance(network, MaskingNetwork):
        raise TypeError(f"network: expected a MaskingNetwork, got {type(network).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_count("warm_up_steps", warm_up_steps, 0)
    check_dataset(dataset, settings)
    count = network.decoder.shape.num_classes
    if count < 2:
        raise ValueError("network: expected two or more classes, it has one")
    _check_labels(_labels_of(dataset), count)
    if tensorboard and out is None:
        raise ValueError("tensorboard: give out=, the folder to write to")
    if patience is not None and validation is None:
        raise ValueError("patience: give validation=, the images to look at")
    device = training_device(settings)
    black_box = network.encoder if model is None else model
    network.to(device)
    black_box.to(device)
    loss = MaskingLoss(
        network,
        black_box,
        PaperObjective() if objective is None else objective,
        EvidenceRemoval() if removal is None else removal,
        fake_probability,
        fakes,
        image_noise,
    )
    evaluation = None
    if validation is not None:
        evaluation = MaskingEvaluation(network, black_box, validation, precision=settings.precision)
    board = None
    if tensorboard and out is not None:
        board = Board(Path(out) / "tensorboard", evaluation)
    described = {
        "objective": repr(loss.objective),
        "removal": repr(loss.removal),
        "fakes": f"{fakes} {fake_probability:g}",
        "image_noise": image_noise,
        "warm_up_steps": warm_up_steps,
        "decoder": repr(network.decoder.shape),
        "validation": None if validation is None else len(validation),  # type: ignore[arg-type]
    }
    with frozen(network.encoder, black_box):
        _check_classes(network, black_box, dataset, settings.seed)
        if warm_up_steps and not _is_begun(out):
            warm_up(network, dataset, model=black_box, steps=warm_up_steps, seed=settings.seed)
        try:
            return fit(
                network.decoder,
                _CheckedLabels(dataset, count),
                loss,
                settings,
                optimizer=_optimizer(network.decoder, settings),
                evaluate=evaluation,
                best=None if evaluation is None else "saliency_metric",
                patience=patience,
                observe=board,
                out=out,
                configuration={**described, **(configuration or {})},
                progress=progress,
            )
        finally:
            if board is not None:
                board.close()


def _labels_of(dataset: Dataset[Any]) -> list[int]:
    """Of all images, where they are known without reading these; else none."""
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return [labels[i] for i in dataset.indices] if labels else []
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].flatten().tolist() if len(dataset.tensors) > 1 else []
    return dataset.labels if isinstance(dataset, (CroppedImages, LabelledImages)) else []


def _check_labels(labels: Sequence[int], count: int) -> None:
    highest = max(labels, default=-1)
    if highest >= count:
        raise ValueError(f"dataset: has class {highest}, but the network has {count} classes")


class _CheckedLabels(Dataset[Any]):
    """Refuses a label that is no class before it gets to a GPU, where it ends the process."""

    def __init__(self, dataset: Dataset[Any], count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        _check_labels([int(item[1])], self.count)
        return item


def _check_classes(
    network: MaskingNetwork, model: nn.Module, dataset: Dataset[Any], seed: int
) -> None:
    """Refuse a black box with other classes than the masks."""
    if model is network.encoder:
        return
    device = next(network.decoder.parameters()).device
    with seeded(seed, device), torch.no_grad():
        scores = model(torch.as_tensor(dataset[0][0])[None].to(device))
    count = network.decoder.shape.num_classes
    if not isinstance(scores, Tensor) or scores.shape != (1, count):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"model: expected scores 1×{count} of an image, as many as masks, got {got}"
        )


def _optimizer(decoder: MaskDecoder, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW; two numbers that move the whole mask may do so faster than the weights."""
    gate = [decoder.scale, decoder.shift]
    rest = [p for p in decoder.parameters() if all(p is not g for g in gate)]
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": gate, "lr": _GATE_RATE * settings.learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)


def _is_begun(out: str | Path | None) -> bool:
    """Whether there are weights to go on from: they have the warm-up behind them."""
    return out is not None and (Path(out) / "checkpoint.safetensors").is_file()


class Board:
    """Losses, numbers and masks for TensorBoard, as they come.

    Raises:
        ImportError: tensorboard is missing; names the pip command.
    """

    def __init__(self, folder: Path, evaluation: MaskingEvaluation | None) -> None:
        try:
            import tensorboard  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            raise ImportError(
                'the board needs the package tensorboard: pip install "captum-robust[train]"'
            ) from None
        self.folder, self.evaluation = folder, evaluation
        self._writer: Any = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write new rows of the log."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None and rows:
            # What a killed run wrote later than its checkpoint is written again.
            self._writer = SummaryWriter(self.folder, purge_step=rows[0]["step"])
        for row in rows:
            group = "training" if "loss" in row else "validation"
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])
            if group == "validation" and self.evaluation is not None:
                for number, picture in enumerate(self.evaluation.pictures):
                    self._writer.add_image(f"masks/{number}", picture.clamp(0, 1), row["step"])
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
