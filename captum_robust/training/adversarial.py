"""Training on adversarial images, so that the classifier itself withstands attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from captum_robust._checks import (
    as_number,
    check,
    check_choice,
    check_count,
    check_floating,
    check_number,
    check_numbers_below,
    check_type,
    checked_bounds,
)
from captum_robust._contexts import evaluation, seeded
from captum_robust._files import checksum
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust.attacks import PGD
from captum_robust.attacks.ascent import ascend, changed
from captum_robust.attacks.backward import gradients_or_zeros, no_gradient
from captum_robust.attacks.losses import log_cross_entropy
from captum_robust.attacks.norms import Tensors, norm_of
from captum_robust.training.acceleration import training_device
from captum_robust.training.loop import TrainingResult, bare_module, fit
from captum_robust.training.parts import part_of
from captum_robust.training.preparation import class_scores, count_classes
from captum_robust.training.schedule import Batch
from captum_robust.training.settings import TrainingSettings

METHODS = ("madry", "ensemble", "standard")


@dataclass(frozen=True)
class InnerAttack:
    """The attack within a training step: each image moves to raise the loss of its label.

    ``steps`` steps of ``step_size`` from a random point of the ball, projected on it each time; one
    step of length ε from the image itself is the fast gradient sign method. Unlike
    :class:`captum_robust.attacks.PGD`, each image starts at a point of its own, all take every
    step, and no pass judges the result.

    The network is attacked in evaluation mode, as Pang et al. found best, "Bag of Tricks for
    Adversarial Training" (https://arxiv.org/abs/2010.00467): the averages of batch norm are used
    and stay as they are, dropout is off, and no image sees another.

    Args:
        epsilon: radius of the ball, in units of the inputs.
        steps: how many.
        step_size: 2.5 ``epsilon`` / ``steps`` by default.
        norm: ``"Linf"`` or ``"L2"``.
        random_start: begin at a random point of the ball.
        bounds: lowest and highest value of an input; None: no limit.

    Raises:
        ValueError: a value out of range; names it.
    """

    epsilon: float = 8 / 255
    steps: int = 7
    step_size: float | None = None
    norm: str = "Linf"
    random_start: bool = True
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        norm = norm_of(self.norm)
        check_count("steps", self.steps, 1)
        highest = float("inf")
        if self.bounds is not None:
            low, high = checked_bounds(self.bounds)
            highest = norm.largest(high - low, None)
        epsilon = as_number(self.epsilon)
        check(
            0 < epsilon <= highest and epsilon < float("inf"),
            f"epsilon: expected a number above 0, at most {highest:g}, in units of the inputs "
            f"(such as 8/255 for pixels in [0, 1]), got {self.epsilon!r}",
        )
        if self.step_size is not None:
            check_number("step_size", self.step_size, 0, open_low=True)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The adversarial images N×…, without a graph; the weights get no gradients."""
        if images.ndim == 4:  # convolutions are some 10 to 20 % faster on channels_last
            laid_out = images.contiguous(memory_format=torch.channels_last)
            with suppress(RuntimeError):  # a network that calls view() on its features takes none
                return self._climb(network, laid_out, labels, seed)
        return self._climb(network, images.contiguous(), labels, seed)

    def _climb(self, network: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        norm = norm_of(self.norm)
        length = self.step_size or 2.5 * self.epsilon / self.steps
        start = images
        if self.random_start:
            n = len(images)
            generators = part_of(seed, n).of_images(n)
            start = images + norm.random_points((images,), self.epsilon, generators, n)[0]

        def look(x: Tensors, _: int) -> tuple[Tensors, Tensors]:
            leaf = x[0].requires_grad_()
            scores = class_scores(network, leaf)
            total = log_cross_entropy(scores, _checked(labels, scores)).sum()
            gradients = gradients_or_zeros(2**10 * total, (leaf,))  # half precision sees more
            if gradients is None:
                raise no_gradient(network, (images,), None)
            return x, gradients

        def move(x: Tensors, gradients: Tensors) -> Tensors:
            change = changed((x[0].detach(),), (images,), norm.steepest(gradients), length)
            return (self._within(images + norm.project(change, self.epsilon)[0]),)

        with evaluation(network), torch.enable_grad():
            return ascend((self._within(start),), self.steps, look, move)[0]

    def _within(self, images: Tensor) -> Tensor:
        images = images.detach()
        return images if self.bounds is None else images.clamp(*self.bounds)


@dataclass(frozen=True)
class MadryLoss:
    """The loss of the strongest images found in the ball: min_θ E max_{δ∈S} L(θ, x+δ, y).

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
    (https://arxiv.org/abs/1706.06083).
    """

    attack: InnerAttack = field(default_factory=InnerAttack)

    def __call__(self, network: nn.Module, batch: Batch, seed: int) -> Tensor:
        """The mean cross-entropy of the attacked images (N×…, labels N)."""
        images, labels = batch
        attacked = self.attack(bare_module(network), images, labels, seed)
        return _loss(network, attacked, labels)


@dataclass(frozen=True)
class EnsembleLoss:
    """The loss of images and of images that one of several networks was attacked with.

    Tramèr et al., "Ensemble Adversarial Training: Attacks and Defenses"
    (https://arxiv.org/abs/1705.07204). For each batch the source of the one-step attack is drawn
    from the network in training and ``static_models``, trained before, so that the network cannot
    learn to mask its own gradient. Half of the loss is of the clean images, as there; both halves
    go through the network as one batch.

    Args:
        static_models: take the same images, and have the same classes in the same order.
        epsilon: length of the step (fast gradient sign method).
        bounds: lowest and highest value of an input.

    Raises:
        ValueError: no static model, or an ``epsilon`` out of range.
        TypeError: a static model that is no ``nn.Module``.
    """

    static_models: Sequence[nn.Module] = field(repr=False)
    epsilon: float = 8 / 255
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check(self.static_models, "static_models: the ensemble variant needs at least one")
        for model in self.static_models:
            check_type("static_models", model, nn.Module, "torch.nn.Module")
        self._attack()

    def __call__(self, network: nn.Module, batch: Batch, seed: int) -> Tensor:
        """Return the mean cross-entropy over images and attacked images (N×…, labels N)."""
        images, labels = batch
        attacked = self._attack()(self.source(network, seed), images, labels, seed)
        return _loss(network, torch.cat([images, attacked]), labels.repeat(2))

    def source(self, network: nn.Module, seed: int) -> nn.Module:
        """Return the network that the attack of a step with this seed starts from."""
        sources = [bare_module(network), *self.static_models]
        generator = part_of(seed, 1).of_batch()
        return sources[int(torch.randint(0, len(sources), (), generator=generator))]

    def _attack(self) -> InnerAttack:
        return InnerAttack(self.epsilon, 1, self.epsilon, random_start=False, bounds=self.bounds)


def standard_loss(network: nn.Module, batch: Batch, seed: int) -> Tensor:  # noqa: ARG001
    """The mean cross-entropy of the images as they are (N×…, labels N)."""
    return _loss(network, batch[0], batch[1])


def _loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy."""
    scores = class_scores(network, images)
    return F.cross_entropy(scores, _checked(labels, scores))


def _checked(labels: Tensor, scores: Tensor) -> Tensor:
    """Labels N as int64, of any whole numbers; an error for others, and for those of no class."""
    is_whole = not (labels.is_floating_point() or labels.is_complex())
    check(is_whole, f"labels: expected whole numbers, got {labels.dtype}", TypeError)
    labels = labels.long()
    check_numbers_below("labels", labels, scores.shape[1])
    return labels


@dataclass(frozen=True)
class RobustAccuracy:
    """Share of images classified right, clean and under PGD, as a training loop evaluates.

    Args:
        dataset: pairs (image, label), with pixels in [0, 1].
        epsilon, steps: what the attack may do; see :class:`captum_robust.attacks.PGD`.
        batch_size: images at once.
    """

    dataset: Dataset[Any]
    epsilon: float = 8 / 255
    steps: int = 10
    batch_size: int = 64

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """``clean_accuracy`` and ``robust_accuracy``, of a network in evaluation mode."""
        attack = PGD(network, self.epsilon, self.steps, random_start=True)
        device = device_of(network)
        right = torch.zeros(2, device=device)
        count = 0
        loader = DataLoader(self.dataset, self.batch_size)
        for images, labels in counted(loader, "batch", None, "evaluation"):
            details = attack.perturb(images.to(device), labels.to(device), return_details=True)[1]
            kept = ~details.already
            robust = kept & ~details.fooled & ~details.without_gradient
            right += torch.stack([kept.sum(), robust.sum()])
            count += len(labels)
        clean, robust = (right / max(1, count)).tolist()
        return {"clean_accuracy": clean, "robust_accuracy": robust}


def adversarial_training(
    model: nn.Module,
    dataset: Dataset[Any],
    settings: TrainingSettings | None = None,
    *,
    method: str = "madry",
    epsilon: float = 8 / 255,
    steps: int = 7,
    step_size: float | None = None,
    static_models: Sequence[nn.Module] = (),
    held_out: Dataset[Any] | None = None,
    evaluation_images: int = 128,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a classifier, in place, to withstand attacks of strength ``epsilon``.

    Everything of :func:`captum_robust.training.fit` holds: it runs on several processes, and with
    ``out`` a killed run goes on where it was.

    Args:
        model: images -> scores N×K; any module.
        dataset: pairs (image with pixels in [0, 1], class), all of one size.
        settings: :class:`TrainingSettings` by default.
        method: ``"madry"`` (:class:`MadryLoss`), ``"ensemble"`` (:class:`EnsembleLoss`) or
            ``"standard"``, without attacks, to compare with.
        epsilon: strength of the attacks, in training and in evaluation, in units of the pixels.
        steps, step_size: those of the inner attack of ``"madry"``; see :class:`InnerAttack`.
        static_models: the fixed sources of ``"ensemble"``.
        held_out: what clean accuracy, and that under PGD with 10 steps, are measured on before,
            during and after training; the first ``evaluation_images`` of it.
        evaluation_images: see there.
        out, configuration, progress: see :func:`captum_robust.training.fit`.

    Raises:
        ValueError: an unknown method, ``epsilon`` or another number out of range, static models
            with another method or none with ``"ensemble"``, pixels outside of [0, 1] among the
            first images; see also :func:`captum_robust.training.fit`.
        TypeError: ``model`` is no ``nn.Module``, or does not return one tensor of scores N×K.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_choice("method", method, METHODS)
    takes_them = method == "ensemble" or not static_models
    check(takes_them, f"static_models: the method {method!r} takes none")
    check_count("evaluation_images", evaluation_images, 1)
    _check_images(dataset)
    attack = InnerAttack(epsilon, steps, step_size)
    loss: Any = standard_loss
    described: dict[str, Any] = {"method": method, "epsilon": epsilon}
    if method == "madry":
        loss = MadryLoss(attack)
        described["attack"] = repr(attack)
    elif method == "ensemble":
        loss = EnsembleLoss(tuple(static_models), epsilon)
        described["static_models"] = [
            f"{checksum(m.state_dict().values()):08x}" for m in static_models
        ]
    evaluate = None
    if held_out is not None:
        count = min(evaluation_images, len(held_out))  # type: ignore[arg-type]
        evaluate = RobustAccuracy(Subset(held_out, range(count)), epsilon)
        described["evaluation_images"] = count
    settings = settings or TrainingSettings()
    with _placed(static_models, training_device(settings)):
        models = (model, *static_models) if static_models else ()
        counts = [count_classes("model", each, dataset, 0) for each in models]
        for n in counts:
            has = f"one has {n} classes, the model in training {counts[0]}"
            check(n == counts[0], f"static_models: {has}")
        return fit(
            model,
            dataset,
            loss,
            settings,
            evaluate=evaluate,
            out=out,
            configuration={**described, **(configuration or {})},
            progress=progress,
        )


def _check_images(dataset: Dataset[Any]) -> None:
    """Refuse a data set whose first items are no images in [0, 1] with a class."""
    with seeded(0, None):
        for i in range(min(8, len(dataset))):  # type: ignore[arg-type]
            item = dataset[i]
            is_pair = isinstance(item, (tuple, list)) and len(item) == 2
            got = type(item).__name__
            check(is_pair, f"dataset: expected pairs (image, class), got {got}", TypeError)
            image, label = item
            check_floating("dataset: image", image)
            number = torch.as_tensor(label)
            is_class = not (number.is_floating_point() or number.ndim)
            expected = "expected a class number for each image"
            check(is_class, f"dataset: {expected}, got {label!r}", TypeError)
            low, high = float(image.min()), float(image.max())
            check(
                low >= 0 and high <= 1,
                f"dataset: image {i} has pixels from {low:.4g} to {high:.4g}, expected [0, 1]; "
                "normalise inside the model, as captum_robust.models.Classifier does",
            )


@contextmanager
def _placed(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Hold the models on the device; each is put back where it was."""
    places = [next((p.device for p in m.parameters()), device) for m in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in zip(models, places, strict=True):
            model.to(place)
