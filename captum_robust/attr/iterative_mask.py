"""IterativeMask: the mask of a class, for each image by descent on the mask itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._checks import check, check_count, check_number, check_type
from captum_robust._progress import counted
from captum_robust._scores import ClassScores, at_least_float
from captum_robust.attr._classes import Target, explained
from captum_robust.attr._inputs import as_given, checked_images, over_channels, size_of
from captum_robust.attr._samples import Samples, in_batches
from captum_robust.nn import CodeObjective, EvidenceRemoval, PaperObjective, blend, upsampled

PER_IMAGE = CodeObjective(area=11.0, smoothness=0.5, preserver=0.2)
"""The authors' weights for masks that are optimised for one image."""

_EPSILON = 1e-3
"""The authors' code adds it to |a| + |b|."""


@dataclass(frozen=True)
class MaskDetails:
    """What ``return_details`` adds, for each of N samples."""

    explained_class: Tensor
    """N."""
    objective: Tensor
    """N×(steps + 1): of the mask before each step, and of the returned one in the end. It wavers,
    as the evidence removal draws anew each time."""
    flat: Tensor
    """N, whether the scores had no slope at any step, as behind a dead ReLU: the mask is zero then,
    which says nothing of the sample."""


class IterativeMask(Attribution):
    """The smallest smooth mask that keeps the evidence of a class, and leaves none outside.

    Each step removes what the mask hides, and what it shows; the objective wants the class to
    stay in the first image and to go in the second. Dabkowski and Gal, "Real Time Image Saliency
    for Black Box Classifiers" (https://arxiv.org/abs/1705.07857), section 3, as in the authors'
    ``IterativeSaliency``: the mask is ``|a| / (|a| + |b| + .001)`` of two channels of 32×32,
    enlarged to the image, and SGD with Nesterov's momentum starts where both are .5.

    A sample costs two images through the classifier a step, forward and backward, in one pass;
    without a target one more forward to begin with. What stands in for removed pixels is drawn
    anew for the kept and the destroyed image of each step, the same for all samples, so that no
    sample depends on its batch.

    Args:
        forward_func: images N×C×H×W with pixels in [0, 1] -> scores N×K… (logits). For a model of
            normalised images, a :class:`captum_robust.models.Classifier` around it.
        objective: what a mask has to achieve; None: ``PER_IMAGE``, the authors' hinges on the
            margins of the scores. Or a :class:`~captum_robust.nn.PaperObjective`; with its weights
            by default, which are a network's, masks of photographs are speckled.
        removal: what stands in for removed pixels; None: ``EvidenceRemoval()``.
        image_noise: standard deviation of the noise on the images, drawn like the removal; the
            authors' .03 of pixels in [-1, 1].
        mask_size: cells of a mask each way, at most one a pixel.
        steps: of SGD.
        learning_rate: of SGD.
        momentum: of SGD, Nesterov's; 0: none.
        seed: of all that is drawn; None: from torch's global generator.

    Raises:
        TypeError: an objective or a removal of another kind.
        ValueError: a number out of range.
    """

    explains_prediction = True

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        objective: PaperObjective | CodeObjective | None = None,
        removal: EvidenceRemoval | None = None,
        image_noise: float = 0.015,
        mask_size: int = 32,
        steps: int = 200,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        seed: int | None = 0,
    ) -> None:
        super().__init__(forward_func)
        objective = PER_IMAGE if objective is None else objective
        removal = EvidenceRemoval() if removal is None else removal
        kinds = (PaperObjective, CodeObjective)
        check_type("objective", objective, kinds, "a PaperObjective or a CodeObjective")
        check_type("removal", removal, EvidenceRemoval, "an EvidenceRemoval")
        check_count("mask_size", mask_size, 1)
        check_count("steps", steps, 1)
        check_count("seed", seed, 0, optional=True)
        self.objective = objective
        self.removal = removal
        self.image_noise = check_number("image_noise", image_noise, 0)
        self.mask_size = mask_size
        self.steps = steps
        self.learning_rate = check_number("learning_rate", learning_rate, 0, open_low=True)
        self.momentum = check_number("momentum", momentum, 0, 1, open_high=True)
        self.seed = seed

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        *,
        steps: int | None = None,
        internal_batch_size: int | None = None,
        return_details: bool = False,
    ) -> Any:
        """The mask of each sample, in [0, 1], in the shape of the inputs: alike in all channels.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W, or a tuple of such, each of which gets a mask of its own.
            target: the explained class; None: the predicted one. What a function makes of the
                scores is the margin of a class: high where it is there, below 0 where it is gone.
            additional_forward_args: passed on to ``forward_func``. Of a tensor whose first
                dimension is N, each sample keeps its row, for its kept and its destroyed image.
            steps: None: as for the class.
            internal_batch_size: samples that are worked on at once; None: all. Twice as many
                images go through ``forward_func`` in one pass.
            return_details: return (attributions, :class:`MaskDetails`). Costs one pass more.

        Raises:
            ValueError: inputs that are no images, numbers out of range, scores of one class, or
                that do not depend on the inputs. A step that gives NaN or infinity names its
                sample.
        """
        steps = self.steps if steps is None else steps
        check_count("steps", steps, 1)
        images = checked_images(inputs)
        n = len(images[0])
        whole = Samples(self.forward_func, images, target, additional_forward_args, 0, n)

        def explain(samples: Samples) -> tuple[tuple[Tensor, ...], MaskDetails]:
            descent = _Descent(self, samples)
            descent.descend(steps)
            if return_details:
                descent.evaluate()
            history = torch.stack(descent.history, dim=1)
            return descent.attributions, MaskDetails(descent.classes, history, descent.flat)

        masks, details = in_batches(whole, internal_batch_size, explain)
        result = as_given(inputs, masks)
        return (result, details) if return_details else result


class _Descent:
    """The masks of n samples."""

    def __init__(self, method: IterativeMask, samples: Samples) -> None:
        self.method = method
        self.samples = samples
        self.images = samples.inputs
        self.history: list[Tensor] = []  # the objective n, at each evaluation
        # One generator a batch: each of them meets the same draws.
        seed = method.seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.scores_of: ClassScores | None = None
        self.classes: Tensor  # n, the explained ones
        if samples.target is None:
            with torch.no_grad():
                scores = self._scores(self.images, copies=1)
            self.scores_of, self.classes = explained(scores, None)
        self.flat = torch.ones(samples.n, dtype=torch.bool, device=self.images[0].device)
        self.seen: tuple[Tensor, ...] = ()  # the images that the model was given last
        self.cells: list[Tensor] = []  # n×2×h×w, what the masks of each of the images are made of
        for x in self.images:
            sides = [min(method.mask_size, side) for side in size_of(x)]
            cells = at_least_float(x.new_full((samples.n, 2, *sides), 0.5))
            self.cells.append(cells.requires_grad_())

    def descend(self, steps: int) -> None:
        """Stochastic gradient descent with Nesterov's momentum."""
        learning_rate, momentum = self.method.learning_rate, self.method.momentum
        velocities = [torch.zeros_like(cells) for cells in self.cells]
        for _ in counted(range(steps), "step", None, "mask"):
            value = self.evaluate()
            # The area of a mask has a gradient whatever the model is: that of what the model was
            # given tells whether its scores have one too.
            wanted = [*self.cells, *self.seen]
            gradients = torch.autograd.grad(value.sum(), wanted, allow_unused=True)
            of_seen = [g for g in gradients[len(self.cells) :] if g is not None]
            check(of_seen, "forward_func: its scores do not depend on the inputs differentiably")
            for g in of_seen:
                slopes = g.flatten(1).any(dim=1)
                self.flat &= ~(slopes[: self.samples.n] | slopes[self.samples.n :])
            with torch.no_grad():
                each = zip(self.cells, velocities, gradients, strict=False)
                for cells, velocity, gradient in each:
                    velocity.mul_(momentum).add_(gradient)
                    cells.sub_(learning_rate * (gradient + momentum * velocity))

    @property
    def attributions(self) -> tuple[Tensor, ...]:
        """The masks in the shape of the images."""
        with torch.no_grad():
            masks = [m.masked_fill(self.flat.view(-1, 1, 1, 1), 0) for m in self._masks()]
        pairs = zip(masks, self.images, strict=True)
        return tuple(over_channels(mask, x, self.samples.first) for mask, x in pairs)

    def evaluate(self) -> Tensor:
        """The objective n at the masks as they are."""
        masks = self._masks()
        images = tuple(
            torch.cat([self._kept(x, mask), self._kept(x, 1 - mask)]).to(x.dtype)
            for x, mask in zip(self.images, masks, strict=True)
        )
        self.seen = images
        kept, destroyed = self._scores(images, copies=2).chunk(2)
        if self.scores_of is None:
            self.scores_of, self.classes = explained(kept.detach(), self.samples.target)
        if not self.history and torch.equal(kept, destroyed):
            self.samples.check_not_constant(kept.detach(), (0, 1))
        assert self.scores_of is not None
        terms = self.method.objective(
            masks[0], self.scores_of(kept), self.scores_of(destroyed), self.classes
        )
        value = terms["total"]
        for mask in masks[1:]:
            value = value + torch.stack(list(self.method.objective.of_mask(mask).values())).sum(0)
        self.history.append(value.detach())
        return value

    def _masks(self) -> list[Tensor]:
        """n×1×H×W for each of the images."""
        masks = []
        for cells, x in zip(self.cells, self.images, strict=True):
            a, b = torch.split(cells.abs(), 1, dim=1)
            masks.append(upsampled(a / (a + b + _EPSILON), size_of(x)))
        return masks

    def _kept(self, x: Tensor, mask: Tensor) -> Tensor:
        """The images with what the mask hides removed."""
        device = x.device if self.generator is None else self.generator.device
        noise = torch.randn(x[:1].shape, generator=self.generator, device=device).to(x)
        x = x + self.method.image_noise * noise
        return blend(x, mask, self.method.removal(x, self.generator, shared=True))

    def _scores(self, images: tuple[Tensor, ...], copies: int) -> Tensor:
        """Scores of ``copies`` images of each sample, all samples of a copy together."""
        s, rows = self.samples, self.samples.everyone * copies
        scores = s.model.in_fitting_layout(lambda: s.run(images, rows))
        return s.checked_scores(scores, "a mask of a class", copies)
