"""Images that mean nothing to us, and a class with high confidence to a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_number,
    checked_bounds,
    checked_device,
    checked_size,
)
from captum_robust._progress import progress_bar
from captum_robust._scores import probabilities_of
from captum_robust.attacks.gradient import PlainAscent
from captum_robust.attacks.image_batches import check_class, class_scores, place_of
from captum_robust.attacks.losses import LossFunction
from captum_robust.attacks.norms import Tensors
from captum_robust.attacks.victim import Victim, is_lost

OBJECTIVES = ("log_probability", "score")


@dataclass(eq=False, repr=False)
class FoolingImage(PlainAscent):
    """Gradient ascent on a class, from noise or a mean image, until the model is sure of it.

    Nguyen et al., "Deep Neural Networks are Easily Fooled" (https://arxiv.org/abs/1412.1897), and
    with ``l2_decay`` the class model of Simonyan et al. (https://arxiv.org/abs/1312.6034).

    The inputs are where the ascent starts (:meth:`noise` draws some), and ``target`` is always the
    class to become, whatever ``targeted`` says. A sample leaves the batch as soon as its softmax
    has reached ``confidence``; one that has it from the start comes back as it was. In the details
    such samples are ``already``, and those that got there are ``fooled``.

    Args:
        forward_func, bounds, quantize: see :mod:`captum_robust.attacks`.
        epsilon: radius of the ball around the start that the image must stay in; None: no limit.
        steps: at most so many.
        step_size: root mean square of the change of a value in one step, in units of the inputs,
            before decay and bounds: the same for images of all sizes.
        l2_decay: the share by which each step shrinks what an image differs from the middle of the
            bounds (without bounds: from 0).
        confidence: when the model is sure enough: a probability.
        objective: ``"log_probability"`` lowers the other classes too; ``"score"`` raises that of
            the class alone.
        norm: ``"L2"``: steps along the gradient; ``"Linf"``: along its sign. And of the ball.
        early_stop: False: all steps, also of samples that are sure.
        keep_best: return the iterate with the highest objective instead of the last.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.tensor([[0.0, 0.0], [6.0, -8.0]])
    >>> attack = FoolingImage(model, step_size=0.5**0.5 / 5, steps=2, confidence=0.9)
    >>> attack.perturb(torch.tensor([[0.5, 0.5]]), target=1)
    tensor([[0.7400, 0.1800]])
    """

    epsilon: float | None = None  # type: ignore[assignment]
    steps: int = 200
    step_size: float = 2 / 255
    _: KW_ONLY
    l2_decay: float = 0.0
    confidence: float = 0.99
    objective: str = "log_probability"
    norm: str = "L2"
    keep_best: bool = True
    loss: str = field(default="cross_entropy", init=False)
    loss_func: LossFunction | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_number("confidence", self.confidence, 0, 1, open_low=True, open_high=True)
        check_number("step_size", self.step_size, 0, open_low=True)
        self.l2_decay = check_number("l2_decay", self.l2_decay, 0, 1, open_high=True)
        self.loss_func = None if self.objective == "log_probability" else _minus_score
        super().__post_init__()

    @staticmethod
    def noise(
        n: int, size: int | tuple[int, int], channels: int = 3, *, seed: int | None = 0
    ) -> Tensor:
        """Uniform noise in [0, 1], N×C×H×W; ``size`` is (H, W), or a number for both."""
        check_count("n", n, 1)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.rand(n, channels, *checked_size("size", size), generator=generator)

    @log_usage()
    def perturb(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        epsilon: float | None = None,
        additional_forward_args: object | None = None,
        targeted: bool = True,  # noqa: ARG002 – Captum's attacks take it
        mask: Tensor | Tensors | None = None,
        *,
        return_details: bool = False,
    ) -> Any:
        """Images of which the model is sure, in the shape of ``inputs``, detached.

        Args:
            inputs: N×…, or a tuple of such tensors: where to start.
            target: the classes to become.
            epsilon, additional_forward_args, mask, return_details: as for all attacks.
            targeted: has no effect; the target is always the class to become.

        Raises:
            ValueError: no target; else as for all attacks.
        """
        check(target is not None, "target: expected the classes that the images shall become")
        arguments = (inputs, target, epsilon, additional_forward_args, True, mask)
        return super().perturb(*arguments, return_details=return_details)

    def _victim(self, *arguments: Any) -> Victim:
        return Victim(*arguments, success=self._is_sure)

    def _is_sure(self, victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:
        """n booleans: the model gives the sample its class with the probability asked for."""
        probability = _of_class(scores.softmax(dim=1), victim.label[rows])
        return is_lost(victim, scores, rows) & (probability >= self.confidence)

    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        return super()._attack(victim, math.inf if epsilon is None else epsilon)

    def _direction(self, gradients: Tensors) -> Tensors:
        """The direction has root mean square 1, as signs have it."""
        unit = super()._direction(gradients)
        if self.norm == "Linf":
            return unit
        values = sum(g[0].numel() for g in unit)
        return tuple(math.sqrt(values) * g for g in unit)

    def _moved(
        self, victim: Victim, clean: Tensors, change: Tensors, rows: Tensor, epsilon: float
    ) -> Tensors:
        if self.l2_decay:
            middle = 0.0 if self.bounds is None else sum(self.bounds) / 2
            kept = 1 - self.l2_decay
            change = tuple(
                middle + kept * (c + d - middle) - c for c, d in zip(clean, change, strict=True)
            )
        return super()._moved(victim, clean, change, rows, epsilon)


def _minus_score(scores: Tensor, classes: Tensor) -> Tensor:
    return -_of_class(scores, classes)


def _of_class(values: Tensor, classes: Tensor) -> Tensor:
    """n of the values n×K."""
    return values.gather(1, classes[:, None])[:, 0]


@dataclass(frozen=True)
class Elites:
    """The best image of each class so far."""

    classes: Tensor
    """K, the classes, in ascending order."""
    confidence: Tensor
    """K, the model's probability of the class for its image; 0 before the first generation."""
    levels: Tensor
    """K×C×H×W, the images' 8-bit values."""
    bounds: tuple[float, float]
    """What the levels 0 and 255 stand for."""
    generations: int
    evaluations: int
    """Images that the model has scored."""
    history: tuple[float, ...]
    """The mean confidence after each generation."""

    @property
    def images(self) -> Tensor:
        """K×C×H×W, within the bounds."""
        return _from_levels(self.levels, self.bounds)


@dataclass(eq=False, repr=False)
class MapElites:
    r"""An elite image for each of many classes at once, by evolution; no gradients are needed.

    The MAP-Elites of Nguyen et al., "Deep Neural Networks are Easily Fooled"
    (https://arxiv.org/abs/1412.1897), with direct encoding. Each generation draws parents among
    the elites, mutates them, scores all children in one forward pass, and lets every child take
    the place of the elite of any class for which the model is surer of it. Values mutate
    independently, with a rate that halves now and then, by Deb's polynomial mutation, which stays
    within the bounds. Images are kept in 8-bit levels, so the confidences are those of the files.

    ``run`` goes on where the last one ended; what an interrupt (Ctrl-C) leaves is in ``elites``
    and can be run on. Generations draw from seeds of their own, so two runs of 5 give what one of
    10 gives.

    Args:
        forward_func: images -> scores N×K; any function.
        shape: (C, H, W) of an image.
        classes: those to find images for; None: all.
        batch_size: children a generation, scored in one pass.
        mutation_rate: share of the values that mutate in the first generations.
        halve_every: generations after which the rate halves, each time.
        strength: η of the mutation: higher changes less. A value changes by about 1 / η of the
            range.
        bounds: lowest and highest value.
        seed: of all that is drawn.
        device: where images are kept and scored; None: that of the model's parameters.

    Memory: C·H·W bytes a class, so 150 MB for 1000 classes at 224×224.
    """

    forward_func: Callable[..., Tensor]
    shape: Sequence[int]
    _: KW_ONLY
    classes: Sequence[int] | None = None
    batch_size: int = 32
    mutation_rate: float = 0.1
    halve_every: int = 1000
    strength: float = 15.0
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_callable("forward_func", self.forward_func)
        is_shape = bool(self.shape) and all(isinstance(s, int) and s > 0 for s in self.shape)
        check(is_shape, f"shape: expected (C, H, W) from 1, got {self.shape!r}")
        self.shape = tuple(self.shape)
        check_count("batch_size", self.batch_size, 1)
        check_count("halve_every", self.halve_every, 1)
        check_count("seed", self.seed, 0)
        check_number("mutation_rate", self.mutation_rate, 0, 1, open_low=True)
        check_number("strength", self.strength, 0, open_low=True)
        self.bounds = checked_bounds(self.bounds)
        self.device = checked_device(self.device or place_of(self.forward_func) or "cpu")
        self._classes = None if self.classes is None else _checked_classes(self.classes)
        self._elites: Elites | None = None

    @property
    def elites(self) -> Elites:
        """A copy of what there is.

        Raises:
            RuntimeError: no generation has been run, so the classes are not known yet.
        """
        if self._elites is None:
            raise RuntimeError("there are no elites yet: call run() first")
        tensors = ("classes", "confidence", "levels")
        copies = {name: getattr(self._elites, name).clone() for name in tensors}
        return replace(self._elites, **copies)

    def run(self, generations: int, *, progress: bool | None = None) -> Elites:
        """So many generations more.

        Args:
            generations: each costs one forward pass of ``batch_size`` images.
            progress: show a bar on standard error; None: after two seconds, on a terminal or
                in a notebook.

        Raises:
            ValueError: scores that are not N×K, or NaN or infinity among them; a class that the
                model does not have.
        """
        check_count("generations", generations, 1)
        bar = progress_bar(generations, "generation", progress, "evolving")
        with torch.no_grad(), bar as advance:
            for _ in range(generations):
                self._generation()
                advance(1)
        return self.elites

    def _generation(self) -> None:
        elites = self._elites
        history = () if elites is None else elites.history
        number = len(history)
        # One seed a generation, so that an interrupted one can be run again.
        device = checked_device(self.device or "cpu")
        generator = torch.Generator(device).manual_seed(self.seed + 1_000_003 * number)
        if elites is None:
            shape = (self.batch_size, *self.shape)
            values = torch.rand(shape, generator=generator, device=device)
        else:
            count, n = len(elites.levels), self.batch_size
            places = torch.randint(count, (n,), generator=generator, device=device)
            rate = self.mutation_rate * 0.5 ** (number // self.halve_every)
            values = mutated(elites.levels[places].float() / 255, rate, self.strength, generator)
        children = (255 * values).round().to(torch.uint8)
        classes, probabilities = self._judge(_from_levels(children, self.bounds))
        confidence, parent = probabilities.max(dim=0)
        if elites is None:
            levels = children[parent]
        else:
            better = confidence > elites.confidence
            # An interrupt after this leaves images that are better than is said.
            levels = elites.levels
            levels[better] = children[parent[better]]
            confidence = torch.where(better, confidence, elites.confidence)
        self._elites = Elites(
            classes=classes,
            confidence=confidence,
            levels=levels,
            bounds=self.bounds,
            generations=number + 1,
            evaluations=(number + 1) * self.batch_size,
            history=(*history, float(confidence.mean())),
        )

    def _judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The K classes to find images for, and their probabilities n×K."""
        scores = class_scores(self.forward_func, (images,))
        classes = self._classes
        if classes is None:
            classes = torch.arange(scores.shape[1], device=scores.device)
        check_class("classes", int(classes[-1]), scores)
        return classes, probabilities_of(scores)[:, classes.to(scores.device)]


def map_elites(
    forward_func: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    generations: int = 1000,
    progress: bool | None = None,
    **options: Any,
) -> Elites:
    """An elite image for each class, in one call.

    Args:
        forward_func, shape, options: as for :class:`MapElites`, which can also be interrupted and
            run on.
        generations, progress: as for its ``run``.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> elites = map_elites(model, (1, 2, 2), generations=20)
    >>> elites.images.shape, elites.evaluations
    (torch.Size([3, 1, 2, 2]), 640)
    """
    return MapElites(forward_func, shape, **options).run(generations, progress=progress)


def mutated(
    values: Tensor, rate: float, strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """Values in [0, 1], a share of them changed by Deb's polynomial mutation, as in NSGA-II: small
    changes are more likely than large ones, and none leaves [0, 1].

    Args:
        values: of any shape.
        rate: the probability of each value to be changed.
        strength: η.
        generator: on the values' device.
    """
    drawn = torch.rand(values.shape, generator=generator, device=values.device)
    # Of those below the rate, drawn / rate is uniform again.
    at = (drawn < rate).nonzero(as_tuple=True)
    x, u = values[at], drawn[at] / rate
    result = values.clone()
    result[at] = x + polynomial_change(x, u, strength)
    return result.clamp(0, 1)  # of rounding


def polynomial_change(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """What a uniform draw ``u`` in [0, 1) adds to ``x`` in [0, 1]: -x at 0, nothing at ½, 1 - x
    at 1."""
    down = u < 0.5
    room = torch.where(down, 1 - x, x) ** (strength + 1)
    share = torch.where(down, 2 * u, 2 * (1 - u))
    size = 1 - (share + (1 - share) * room) ** (1 / (strength + 1))
    return torch.where(down, -size, size)


def _from_levels(levels: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return (levels.float() / 255).mul(high - low).add(low).clamp(low, high)


def _checked_classes(classes: Sequence[int]) -> Tensor:
    """Ascending, each once."""
    numbers = torch.as_tensor(classes)
    is_list = numbers.ndim == 1 and len(numbers) > 0 and not numbers.is_floating_point()
    expected = "classes: expected whole numbers from 0"
    check(is_list and not bool((numbers < 0).any()), f"{expected}, got {classes!r}")
    ascending: Tensor = torch.unique(numbers.long())
    return ascending
