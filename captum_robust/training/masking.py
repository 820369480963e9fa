"""Training the masking network of Dabkowski and Gal on any differentiable classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from captum_robust._checks import check, check_choice, check_count, check_number, check_type
from captum_robust._contexts import frozen, seeded
from captum_robust._draws import drawn
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust.metrics.functional import saliency_metric
from captum_robust.metrics.functional.saliency import SMALLEST_AREA
from captum_robust.nn import EvidenceRemoval, MaskingNetwork, blend, upsampled
from captum_robust.nn.mask_decoder import MaskDecoder
from captum_robust.nn.mask_objective import Objective, PaperObjective
from captum_robust.nn.soft_crop import cropped, soft_boxes
from captum_robust.training.acceleration import half_precision, training_device
from captum_robust.training.loop import Observe, TrainingResult, fit
from captum_robust.training.parts import Part, part_of
from captum_robust.training.preparation import CheckedLabels, adamw, class_scores, count_classes
from captum_robust.training.schedule import Batch, Schedule
from captum_robust.training.settings import TrainingSettings

FAKES = ("area", "swapped")


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
        crop: weight of the saliency metric of the mask's box
            (:func:`captum_robust.metrics.functional.saliency_metric`), the mean over all
            thresholds, whose sides have a gradient (``captum_robust.nn.soft_crop.soft_boxes``). It
            costs half a pass more.

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
    crop: float = 0.0

    def __post_init__(self) -> None:
        check_number("fake_probability", self.fake_probability, 0, 1, open_high=True)
        check_choice("fakes", self.fakes, FAKES)
        check_number("image_noise", self.image_noise, 0)
        check_number("crop", self.crop, 0)

    def __call__(self, decoder: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """``"loss"``, the mean over a batch of images N×3×H×W and classes N, and its terms.

        A class below 0 is not known: the black box says it.
        """
        images, labels = batch
        device, n = images.device, len(images)
        part = part_of(seed, n)
        generators = part.of_images(n)
        noise = drawn(torch.randn, images.shape, generators).to(device)
        images = images + self.image_noise * noise
        features, classes = _features_and_classes(self.network, self.model, images, labels)
        is_fake, steps = self._fakes(part, n)
        others = (classes + steps.to(device)) % self.network.decoder.shape.num_classes
        fake = is_fake.to(device)
        asked = torch.where(fake, others, classes)
        masks = upsampled(decoder(features, asked), (images.shape[2], images.shape[3]))
        is_scored = ~is_fake if self.fakes == "area" else torch.ones_like(is_fake)
        scored = is_scored.nonzero()[:, 0].to(device)
        own = [g for g, counts in zip(generators, is_scored.tolist(), strict=True) if counts]
        kept, destroyed = self._scores(images[scored], masks[scored], own)
        if self.fakes == "swapped":
            swap = fake[:, None]
            kept, destroyed = torch.where(swap, destroyed, kept), torch.where(swap, kept, destroyed)
        terms = self.objective(masks[scored], kept, destroyed, classes[scored])
        total = terms.pop("total").sum()
        if self.crop:
            real = (~is_fake).nonzero()[:, 0].to(device)
            terms["crop"] = self.crop * self._of_crops(images[real], masks[real], classes[real])
            total = total + terms["crop"].sum()
        if self.fakes == "area":
            of_mask = self.objective.of_mask(masks[fake])
            total = total + torch.stack(list(of_mask.values())).sum()
        named = {name: v.detach().sum() / max(1, len(v)) for name, v in terms.items()}
        real, asked_for = ~fake, masks.detach().flatten(1).mean(dim=1)
        return {
            "loss": total / n,
            **named,
            "mask_of_the_class": _mean_of(asked_for, real),
            "mask_of_a_fake": _mean_of(asked_for, fake),
        }

    def _fakes(self, part: Part, n: int) -> tuple[Tensor, Tensor]:
        """Return which images are asked for another class, N, and how many classes further it is.

        Drawn for the whole batch, in which one image at least keeps its class where the black box
        would else be asked nothing.
        """
        generator = part.of_batch()
        is_fake = torch.rand(part.batch_size, generator=generator) < self.fake_probability
        if bool(is_fake.all()) and self.fakes == "area":
            is_fake[0] = False
        steps = _other_classes(part.batch_size, self.network.decoder, generator)
        own = slice(part.start, part.start + n)
        return is_fake[own], steps[own]

    def _scores(
        self, images: Tensor, masks: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return the black box's scores of the kept and of the destroyed images, in one pass."""
        if not len(images):
            none = masks.new_zeros(0, self.network.decoder.shape.num_classes)
            return none, none
        kept = blend(images, masks, self.removal(images, generators))
        destroyed = blend(images, 1 - masks, self.removal(images, generators))
        both = class_scores(self.model, torch.cat([kept, destroyed]))
        return both[: len(images)], both[len(images) :]

    def _of_crops(self, images: Tensor, masks: Tensor, classes: Tensor) -> Tensor:
        """Return the saliency metric of the boxes around the masks: N numbers."""
        if not len(images):
            return masks.new_zeros(0)
        boxes = soft_boxes(masks)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        scores = class_scores(self.model, cropped(images, boxes))
        lost = F.cross_entropy(scores.float(), classes, reduction="none")
        return area.clamp(min=SMALLEST_AREA).log() + lost


def _features_and_classes(
    network: MaskingNetwork, model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the features of each scale, and the classes; for a label below 0 the black box's."""
    features, scores = network.encode(images)
    if model is not network.encoder and bool((labels < 0).any()):
        with torch.no_grad():
            scores = class_scores(model, images)
    return features, torch.where(labels < 0, scores.argmax(dim=1), labels)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen ones; 0 where there is none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


@dataclass
class MaskingEvaluation:
    """How small a crop the masks of held-out images leave, and whether they follow the class.

    Args:
        network: whose decoder is evaluated.
        model: the black box.
        images: items (3×H×W, anything).
        batch_size: images at once.
        precision: ``"bfloat16"`` for a quicker, coarser look.
        shown: so many pictures are kept.
    """

    network: MaskingNetwork
    model: nn.Module
    images: Dataset[Any]
    batch_size: int = 16
    precision: str = "float32"
    shown: int = 8
    pictures: list[Tensor] = field(default_factory=list, repr=False)
    """Images of the last evaluation beside what their masks keep, 3×H×W each."""

    def __call__(self, decoder: nn.Module) -> dict[str, float]:
        """Means over the images, each asked for the class that the black box sees in it.

        ``saliency_metric`` (:func:`captum_robust.metrics.functional.saliency_metric`), ``area``
        and ``probability`` of its crop, ``mask`` and, of another class, ``mask_of_another``.
        """
        del decoder  # the network's own
        device = device_of(self.network.decoder)
        rows: list[Tensor] = []
        self.pictures = []
        with torch.no_grad(), half_precision(device, self.precision):
            # With a generator: else it draws from torch's global one.
            drawn = torch.Generator()
            loader = DataLoader(self.images, self.batch_size, generator=drawn)
            for images, *_ in counted(loader, "batch", None, "evaluation"):
                rows.append(self._measured(images.to(device)))
        means = torch.cat(rows).double().mean(dim=0).tolist()
        names = ("saliency_metric", "area", "probability", "mask", "mask_of_another")
        return dict(zip(names, means, strict=True))

    def _measured(self, images: Tensor) -> Tensor:
        """Return the five numbers of each image: N×5."""
        unknown = torch.full((len(images),), -1, device=images.device)
        features, classes = _features_and_classes(self.network, self.model, images, unknown)
        count = self.network.decoder.shape.num_classes
        size = (images.shape[2], images.shape[3])
        masks, others = (
            upsampled(self.network.decoder(features, asked), size).float()
            for asked in (classes, (classes + count // 2) % count)
        )
        for image, mask in zip(images, masks, strict=True):
            if len(self.pictures) < self.shown:
                self.pictures.append(torch.cat([image, image * mask], dim=2).cpu())
        crops = saliency_metric(
            self.model, images, masks[:, 0], classes, batch_size=self.batch_size
        )
        of_masks = [m.flatten(1).mean(dim=1) for m in (masks, others)]
        return torch.stack([crops.metric, crops.area, crops.probability, *of_masks], dim=1)


def _other_classes(n: int, decoder: MaskDecoder, generator: torch.Generator) -> Tensor:
    """Return how many classes further than its own another one is, drawn for each of N images."""
    return torch.randint(1, max(2, decoder.shape.num_classes), (n,), generator=generator)


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
        dataset: pairs (image, class); a class below 0 is not known: ``model`` says it.
        model: the black box; None: the encoder.
        steps: how many Adam takes, each over all pooled images.
        images: so many, drawn, are pooled.
        learning_rate: None: .05 for scale and shift, .01 where vectors are learned.
        seed: what is drawn follows from it.

    Returns:
        The last loss, in nats; NaN without a step.

    Raises:
        ValueError: a class that the network does not have, a loss that is no finite number.
    """
    check_count("steps", steps, 0)
    check_count("images", images, 1)
    decoder = network.decoder
    black_box = network.encoder if model is None else model
    device = device_of(decoder)
    generator = torch.Generator().manual_seed(seed)
    labelled = CheckedLabels(dataset, decoder.shape.num_classes, unknown=True)
    chosen = torch.randperm(len(labelled), generator=generator)[:images].tolist()
    parts = []
    with seeded(seed, None), torch.no_grad():
        loader = DataLoader(Subset(labelled, chosen), batch_size)
        for batch, labels in counted(loader, "batch", None, "warm-up"):
            features, classes = _features_and_classes(
                network, black_box, batch.to(device), labels.to(device)
            )
            parts.append((features[-1].float().mean(dim=(2, 3), keepdim=True), classes))
    pooled, classes = (torch.cat(each) for each in zip(*parts, strict=True))
    trained: list[Tensor] = [decoder.scale, decoder.shift]
    if decoder.embedding is not None:
        trained.append(decoder.embedding.weight)
    rate = learning_rate or (0.05 if decoder.embedding is None else 0.01)
    optimizer = torch.optim.Adam(trained, rate)
    loss = torch.tensor(math.nan)
    with torch.enable_grad():
        for _ in counted(range(steps), "step", None, "warm-up"):
            further = _other_classes(len(classes), decoder, generator).to(device)
            others = (classes + further) % decoder.shape.num_classes
            asked = torch.cat([classes, others])
            odds = decoder.evidence(pooled.repeat(2, 1, 1, 1), asked)[:, 0, 0]
            present = torch.arange(len(asked), device=device) < len(classes)
            loss = F.binary_cross_entropy_with_logits(odds, present.float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    last = float(loss.detach())
    is_number = math.isfinite(last) or not steps
    check(is_number, f"warm-up: the loss is {last}; is a feature or image NaN?")
    decoder.zero_grad(set_to_none=True)
    return last


@contextmanager
def board(folder: Path | None, evaluation: MaskingEvaluation | None) -> Iterator[Observe | None]:
    """Losses, numbers and masks for TensorBoard, as they come.

    Args:
        folder: where they go; None: nowhere.
        evaluation: whose pictures are shown after each look; None: nobody's.

    Raises:
        ImportError: tensorboard is missing; names the pip command.
    """
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            'the board needs the package tensorboard: pip install "captum-robust[train]"'
        ) from None
    writer: Any = None

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal writer
        # What a killed run wrote later than its checkpoint is written again.
        writer = writer or SummaryWriter(folder, purge_step=rows[0]["step"])
        for row in rows:
            group = "training" if "loss" in row else "validation"
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    writer.add_scalar(f"{group}/{name}", value, row["step"])
            if group == "validation" and evaluation is not None:
                for number, picture in enumerate(evaluation.pictures):
                    writer.add_image(f"masks/{number}", picture.clamp(0, 1), row["step"])
        writer.flush()

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


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
    crop: float = 0.0,
    warm_up_steps: int = 200,
    validation: Dataset[Any] | None = None,
    patience: int | None = None,
    out: str | Path | None = None,
    tensorboard: bool = False,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a masking network, in place, for any differentiable classifier.

    Everything of :func:`captum_robust.training.fit` holds: several processes, a killed run goes on.
    The optimiser is AdamW; the encoder and the black box are frozen.

    Args:
        network: its decoder is trained.
        dataset: pairs (image with pixels in [0, 1], class); a class below 0 is not known: the black
            box says it.
        settings: 30 epochs of batches of 16 with a learning rate of .001 by default.
        model: the black box, images -> scores N×K with the network's classes; None: the encoder.
        objective, removal, fake_probability, fakes, image_noise, crop: see :class:`MaskingLoss`.
        warm_up_steps: see :func:`warm_up`; 0: none.
        validation: items (image, anything): the weights with the lowest saliency metric on them win
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
    settings = settings or TrainingSettings(batch_size=16, learning_rate=1e-3, weight_decay=1e-4)
    check_type("network", network, MaskingNetwork, "a MaskingNetwork")
    black_box = network.encoder if model is None else model
    check_type("model", black_box, nn.Module, "a torch.nn.Module")
    check_count("warm_up_steps", warm_up_steps, 0)
    Schedule(dataset, settings)  # refuses too few images
    count = network.decoder.shape.num_classes
    check(count > 1, "network: expected two or more classes, it has one")
    labelled = CheckedLabels(dataset, count, unknown=True)
    check(not tensorboard or out is not None, "tensorboard: give out=, the folder to write to")
    can_wait = patience is None or validation is not None
    check(can_wait, "patience: give validation=, the images to look at")
    device = training_device(settings)
    network.to(device)
    black_box.to(device)
    objective, removal = objective or PaperObjective(), removal or EvidenceRemoval()
    chosen = (objective, removal, fake_probability, fakes, image_noise, crop)
    loss = MaskingLoss(network, black_box, *chosen)
    evaluation = None
    if validation is not None:
        evaluation = MaskingEvaluation(network, black_box, validation, precision=settings.precision)
    described = {
        "objective": repr(objective),
        "removal": repr(removal),
        "fakes": f"{fakes} {fake_probability:g}",
        "image_noise": image_noise,
        **({"crop": crop} if crop else {}),
        "warm_up_steps": warm_up_steps,
        "decoder": repr(network.decoder.shape),
        "validation": None if validation is None else len(validation),  # type: ignore[arg-type]
    }
    folder = Path(out) / "tensorboard" if tensorboard and out is not None else None
    with frozen(network.encoder, black_box), board(folder, evaluation) as observe:
        if black_box is not network.encoder:
            theirs = count_classes("model", black_box, dataset, settings.seed)
            expected = f"expected scores 1×{count} of an image, as many as masks"
            check(theirs == count, f"model: {expected}, got {(1, theirs)}")
        # Weights to go on from have the warm-up behind them.
        goes_on = out is not None and (Path(out) / "checkpoint.safetensors").is_file()
        if warm_up_steps and not goes_on:
            warm_up(network, dataset, model=black_box, steps=warm_up_steps, seed=settings.seed)
        gate = network.decoder.scale, network.decoder.shift
        return fit(
            network.decoder,
            labelled,
            loss,
            settings,
            optimizer=adamw(network.decoder.parameters(), settings, fast=gate),
            evaluate=evaluation,
            best=None if evaluation is None else "saliency_metric",
            patience=patience,
            observe=observe,
            out=out,
            configuration={**described, **(configuration or {})},
            progress=progress,
        )
