"""What all attacks share: the model under attack, its labels, what an image can hold."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from captum.log import log_usage
from captum.robust import Perturbation
from torch import Tensor

from captum_robust._captum import (
    TargetType,
    format_output,
    format_tensor_into_tuples,
    is_tuple,
)
from captum_robust._checks import as_number, check_batch, check_finite, check_inputs, checked_bounds
from captum_robust._scores import (
    ClassScores,
    FastScores,
    arguments_of,
    at_least_float,
    check_target,
    one_row_a_sample,
    where_the_graph_breaks,
    without_inference,
)

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Scores n×K and classes n -> n losses, which an attack raises (targeted: lowers)."""

NORMS = ("Linf", "L2")
Tensors = tuple[Tensor, ...]


def cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """The loss of each sample: -log of the class's softmax."""
    return F.cross_entropy(scores, classes, reduction="none")


@dataclass(frozen=True)
class AttackDetails:
    """What became of each of N samples."""

    label: Tensor
    """N, the class that was attacked; of a targeted attack the class aimed at."""
    predicted: Tensor
    """N, the class of the result (with ``quantize`` of its 8-bit rounding)."""
    already: Tensor
    """N booleans: misclassified before the attack. With early stop such samples are unchanged."""
    fooled: Tensor
    """N booleans: classified right before, and not any more; targeted: now of the class aimed at.

    Robust accuracy is the mean of ``~already & ~fooled``.
    """
    linf: Tensor
    """N, largest change of a pixel."""
    l2: Tensor
    """N, Euclidean length of the change, over all tensors of a tuple together."""
    forward_passes: Tensor
    """N, forward passes of the attack, without those that only wrote these details."""
    backward_passes: Tensor
    """N."""


class Attack(Perturbation):
    """The base of all attacks; see :mod:`captum_robust.attacks` for the shared arguments."""

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        epsilon: float | None,
        norm: str,
        bounds: tuple[float, float] | None,
        quantize: bool,
    ) -> None:
        super().__init__()
        if not callable(forward_func):
            kind = type(forward_func).__name__
            raise TypeError(f"forward_func: expected a model or a function, got {kind}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
        self.forward_func = forward_func
        self.norm = norm
        self.bounds = None if bounds is None else checked_bounds(bounds)
        self.quantize = quantize
        self.epsilon = epsilon
        if epsilon is not None:
            self._check_epsilon(epsilon, None)

    @log_usage()
    def perturb(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        epsilon: float | None = None,
        additional_forward_args: object | None = None,
        targeted: bool = False,
        mask: Tensor | Tensors | None = None,
        *,
        return_details: bool = False,
    ) -> Any:
        """The adversarial inputs, in the shape of ``inputs``, detached.

        Args:
            inputs: N×…, or a tuple of such tensors.
            target: the labels; with ``targeted`` the classes aimed at. None: the predictions.
            epsilon: overrides the strength for this call.
            additional_forward_args: passed to ``forward_func`` behind the inputs.
            targeted: move towards ``target`` instead of away from it.
            mask: where the inputs may change: 1, and 0 elsewhere; of a shape that expands to that
                of the inputs, or a tuple of such masks.
            return_details: also return :class:`AttackDetails`.

        Raises:
            ValueError: an empty batch; NaN or infinity in inputs or scores; inputs outside of
                ``bounds``; ``epsilon`` below 0 or above what the bounds allow; a target that is
                out of range, or, with ``targeted``, the class that the model gives already; a
                model of a single class, or one through which no gradient flows (the message says
                which layer broke it).
            TypeError: inputs that are not floating point.
        """
        strength = self.epsilon if epsilon is None else epsilon
        inputs_tuple: Tensors = format_tensor_into_tuples(inputs)
        check_batch(inputs_tuple)
        check_inputs(inputs_tuple, self.bounds)
        if strength is not None:
            self._check_epsilon(strength, inputs_tuple)
            strength = float(strength)
        if targeted and target is None:
            raise ValueError("target: a targeted attack needs the class to move towards")
        with torch.inference_mode(False):
            normal = tuple(without_inference(x).detach() for x in inputs_tuple)
            victim = self._victim(
                self.forward_func,
                normal,
                target,
                additional_forward_args,
                targeted,
                _masks(mask, normal),
                self.bounds,
                self.quantize,
            )
            with torch.no_grad():
                found = self._attack(victim, strength)
                results = tuple(
                    f.to(x.dtype).contiguous() for f, x in zip(found, inputs_tuple, strict=True)
                )
                details = victim.details(results) if return_details else None
        result = format_output(is_tuple(inputs), results)
        return result if details is None else (result, details)

    def _victim(self, *arguments: Any) -> Victim:
        """The batch under attack; another kind where being fooled means something else."""
        return Victim(*arguments)

    @abstractmethod
    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        """The adversarial inputs, all N rows; called without gradients."""

    def _check_epsilon(self, epsilon: float, inputs: Tensors | None) -> None:
        number = as_number(epsilon)
        highest = math.inf
        if self.bounds is not None and (self.norm == "Linf" or inputs is not None):
            highest = self.bounds[1] - self.bounds[0]
            if self.norm == "L2" and inputs is not None:
                highest *= math.sqrt(sum(x[0].numel() for x in inputs))
        if not (0 <= number <= highest and math.isfinite(number)):
            raise ValueError(
                f"epsilon: expected a number from 0 to {highest:.4g} in units of the inputs (such "
                f"as 8/255 for pixels in [0, 1]), got {epsilon!r}"
            )


class Victim:
    """A batch of N samples and the model under attack. Counts the passes of each sample."""

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        inputs: Tensors,
        target: TargetType,
        arguments: object,
        targeted: bool,
        masks: Tensors | None,
        bounds: tuple[float, float] | None,
        quantize: bool,
    ) -> None:
        self.forward_func = forward_func
        self.n = len(inputs[0])
        self.target = target
        # Without inference tensors, which autograd does not take.
        self.arguments = arguments_of(arguments, list(range(self.n)), self.n)
        self.targeted = targeted
        self.masks = masks
        self.bounds = bounds
        self.quantize = quantize and bounds is not None
        self._model_scores = FastScores(forward_func)
        is_images = all(x.ndim == 4 for x in inputs)
        layout = torch.channels_last if is_images else torch.contiguous_format
        self.x = tuple(x.contiguous(memory_format=layout) for x in inputs)
        """The clean inputs."""
        device = inputs[0].device
        self.everyone = torch.arange(self.n, device=device)
        self.label = torch.zeros(self.n, dtype=torch.long, device=device)
        """N, the class attacked or aimed at; known after the clean pass."""
        self.already = torch.zeros(self.n, dtype=torch.bool, device=device)
        """N, misclassified before; known after the clean pass."""
        self.fooled = torch.zeros(self.n, dtype=torch.bool, device=device)
        """N, known to be fooled by what the attack returns; the attack keeps it."""
        self.forward_passes = torch.zeros(self.n, dtype=torch.long, device=device)
        self.backward_passes = torch.zeros(self.n, dtype=torch.long, device=device)
        self._class_scores: ClassScores | None = None

    @property
    def knows_labels(self) -> bool:
        """Whether the clean scores have been seen."""
        return self._class_scores is not None

    def scores(self, inputs: Tensors, rows: Tensor) -> Tensor:
        """Float scores n×K of samples ``rows`` (n numbers), in place of their clean inputs.

        The first call must be of the clean inputs of everyone: it finds the labels. Records a
        graph if gradients are on.
        """
        places = self.places(rows)
        arguments = self.arguments
        if places is not None:
            arguments = arguments_of(arguments, places, self.n)
        raw = self._model_scores(inputs, arguments)
        if not self._model_scores.channels_last:
            self.x = tuple(x.contiguous() for x in self.x)
        scores = at_least_float(one_row_a_sample(raw, len(rows)))
        check_finite(scores, "forward_func, scores")
        self.forward_passes.index_add_(0, rows, torch.ones_like(rows))
        if self._class_scores is None:
            check_target(self.target, scores)
            self._class_scores = ClassScores(scores, self.target)
            scores = self._class_scores(scores)
            self._see_clean(scores.detach())
            return scores
        return self._class_scores(scores, places)

    def places(self, rows: Tensor) -> list[int] | None:
        """The rows as numbers; None for everyone in order."""
        # As many rows as there are samples may also be several draws of some of them.
        is_everyone = rows is self.everyone or torch.equal(rows, self.everyone)
        return None if is_everyone else rows.tolist()

    def gradients(
        self,
        objective: Tensor,
        inputs: Tensors,
        rows: Tensor,
        times: int = 1,
        keep_graph: bool = False,
    ) -> Tensors:
        """Of the n objectives with respect to each of the inputs.

        Raises:
            ValueError: the objective does not depend on the inputs differentiably, or a gradient
                is not finite.
        """
        found: Any = (None,)
        if objective.requires_grad:
            with torch.enable_grad():
                total = objective.sum()
            found = torch.autograd.grad(total, inputs, retain_graph=keep_graph, allow_unused=True)
        if all(g is None for g in found):
            raise ValueError(
                "forward_func: no gradient flows from its scores to the inputs, and this attack "
                f"needs one{where_the_graph_breaks(self.forward_func, self.x, self.arguments)}"
            )
        self.backward_passes[rows] += times
        gradients = tuple(
            torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)
        )
        for g in gradients:
            check_finite(g, "forward_func, gradient")
        return gradients

    def succeeds(self, scores: Tensor, rows: Tensor) -> Tensor:
        """n booleans: the class is lost, or with ``targeted`` reached."""
        is_label = scores.argmax(dim=1) == self.label[rows]
        return is_label if self.targeted else ~is_label

    def to_bytes(self, inputs: Tensors) -> Tensors:
        """The nearest inputs that an 8-bit image of the bounds' range can hold."""
        if self.bounds is None:
            return inputs
        low, high = self.bounds
        unit = (high - low) / 255
        return tuple(((x - low) / unit).round().mul(unit).add(low).clamp(low, high) for x in inputs)

    def within(self, inputs: Tensors) -> Tensors:
        """Clipped to the bounds."""
        if self.bounds is None:
            return inputs
        return tuple(x.clamp(*self.bounds) for x in inputs)

    def masked(self, changes: Tensors, rows: Tensor) -> Tensors:
        """Changes of ``rows``, zero where the mask is."""
        if self.masks is None:
            return changes
        return tuple(c * take(m, rows) for c, m in zip(changes, self.masks, strict=True))

    def moved(
        self, clean: Tensors, change: Tensors, rows: Tensor, epsilon: float, norm: str
    ) -> Tensors:
        """Clean inputs changed by what the mask, the ball and the bounds leave of ``change``."""
        change = project(self.masked(change, rows), epsilon, norm)
        return self.within(tuple(c + d for c, d in zip(clean, change, strict=True)))

    def details(self, results: Tensors) -> AttackDetails:
        """Of the attack's results; one more forward pass, which is not counted."""
        forward = self.forward_passes.clone()
        shown = self.to_bytes(results) if self.quantize else results
        scores = self.scores(shown, self.everyone)
        changes = [
            (at_least_float(r) - at_least_float(x)).reshape(self.n, -1)
            for r, x in zip(results, self.x, strict=True)
        ]
        change = torch.cat(changes, dim=1)
        return AttackDetails(
            label=self.label,
            predicted=scores.argmax(dim=1),
            already=self.already,
            fooled=self.succeeds(scores, self.everyone) & ~self.already,
            linf=change.abs().amax(dim=1),
            l2=change.norm(dim=1),
            forward_passes=forward,
            backward_passes=self.backward_passes,
        )

    def _see_clean(self, scores: Tensor) -> None:
        predicted = scores.argmax(dim=1)
        classes = self._class_scores.classes if self._class_scores else None
        self.label = predicted if classes is None else classes.long().expand(self.n)
        reached = predicted == self.label
        if not self.targeted:
            self.already = ~reached
        elif reached.any():
            sample = int(reached.nonzero()[0])
            raise ValueError(
                f"target: the model gives sample {sample} the class {int(self.label[sample])} "
                "already; a targeted attack needs another one"
            )


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows, without a copy if they are all."""
    return x if len(rows) == len(x) else x[rows]


def take_each(inputs: Tensors, rows: Tensor) -> Tensors:
    """The given rows of each tensor."""
    return tuple(take(x, rows) for x in inputs)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """n values in the shape n×1×… that multiplies n×…."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def divided(x: Tensor, values: Tensor) -> Tensor:
    """n×… by n values, at least in float32: in half precision small ones are 0."""
    precise = at_least_float(x)
    return (precise / per_sample(values, precise)).to(x.dtype)


def l2_norms(tensors: Tensors) -> Tensor:
    """n, the Euclidean lengths over all tensors together."""
    n = len(tensors[0])
    squares = [at_least_float(t.reshape(n, -1)).square().sum(dim=1) for t in tensors]
    return torch.stack(squares).sum(dim=0).sqrt()


def project(changes: Tensors, epsilon: float, norm: str) -> Tensors:
    """The nearest changes in the ball of radius ``epsilon``."""
    if norm == "Linf":
        return tuple(c.clamp(-epsilon, epsilon) for c in changes)
    lengths = l2_norms(changes)
    factor = (epsilon / lengths.clamp(min=1e-12)).clamp(max=1)
    return tuple(c * per_sample(factor, c) for c in changes)


def steepest(gradients: Tensors, norm: str) -> Tensors:
    """n×…, the direction of length 1 in which each sample's gradient rises most."""
    if norm == "Linf":
        return tuple(g.sign() for g in gradients)
    lengths = l2_norms(gradients).clamp(min=torch.finfo(torch.float32).tiny)
    return tuple(divided(g, lengths) for g in gradients)


def _masks(mask: Tensor | Tensors | None, inputs: Tensors) -> Tensors | None:
    if mask is None:
        return None
    masks: Tensors = format_tensor_into_tuples(mask)
    if len(masks) != len(inputs):
        raise ValueError(f"mask: expected {len(inputs)}, one an input, got {len(masks)}")
    found = []
    for m, x in zip(masks, inputs, strict=True):
        if not isinstance(m, Tensor):
            raise TypeError(f"mask: expected tensors, got {type(m).__name__}")
        try:
            found.append(m.to(device=x.device, dtype=x.dtype).expand(x.shape))
        except RuntimeError:
            raise ValueError(
                f"mask: expected the shape of the inputs, {tuple(x.shape)}, got {tuple(m.shape)}"
            ) from None
        if not ((m == 0) | (m == 1)).all():
            raise ValueError("mask: expected zeros and ones")
    return tuple(found)
