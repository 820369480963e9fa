"""The batch under attack: its model, its labels, what an image can hold, when it is fooled."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import check, shape_or_type
from captum_robust._scores import (
    ClassScores,
    FastScores,
    arguments_of,
    at_least_float,
    check_target,
    finite_scores,
    two_classes,
    warn_of_probabilities,
)
from captum_robust.attacks.backward import (
    FIRST_SCALE,
    ScaleSearch,
    gradients_or_zeros,
    no_gradient,
)
from captum_robust.attacks.losses import Reading, others_of
from captum_robust.attacks.norms import Linf, Norm, Tensors, minus, per_sample, plus
from captum_robust.attacks.outcome import sizes_of

LEVEL_TOLERANCE = 0.01
"""Of a level of 8 bits: a clean value that is so near to one counts as it, whatever computed it."""


@dataclass(frozen=True)
class AttackDetails:
    """What became of each of N samples."""

    label: Tensor
    """N, the class that was attacked; of a targeted attack the class aimed at."""
    predicted: Tensor
    """N, the class of the result (with ``quantize`` of its 8-bit rounding)."""
    already: Tensor
    """N booleans: misclassified before the attack; targeted: of the class aimed at before it.

    With early stop such samples are unchanged.
    """
    fooled: Tensor
    """N booleans: classified right before, and not any more; targeted: now of the class aimed at.

    Robust accuracy is the mean of ``~already & ~fooled & ~without_gradient``.
    """
    linf: Tensor
    """N, largest change of a pixel."""
    l2: Tensor
    """N, Euclidean length of the change, over all tensors of a tuple together."""
    forward_passes: Tensor
    """N, forward passes of the attack, without those that only wrote these details."""
    backward_passes: Tensor
    """N."""
    without_gradient: Tensor
    """N booleans: not fooled, but the gradient was zero or not finite in every step tried.

    So the attack had nothing to go by, as where the model rounds: this says nothing of robustness.
    """


def is_lost(victim: Victim, scores: Tensor, rows: Tensor) -> Tensor:
    """n booleans: the class of the sample is lost, or with a targeted attack reached."""
    is_label = scores.argmax(dim=1) == victim.label[rows]
    return is_label if victim.targeted else ~is_label


@dataclass(eq=False)
class Victim:
    """A batch of N samples and the model under attack. Counts the passes of each sample."""

    forward_func: Callable[..., Tensor]
    x: Tensors
    """The clean inputs."""
    target: TargetType = None
    arguments: object = None
    targeted: bool = False
    masks: Tensors | None = None
    bounds: tuple[float, float] | None = None
    quantize: bool = False
    success: Callable[[Victim, Tensor, Tensor], Tensor] = field(default=is_lost, kw_only=True)
    """(victim, scores n×K, rows) -> n booleans: when samples are fooled."""
    class_scores: ClassScores | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        n, device = len(self.x[0]), self.x[0].device
        self.n = n
        # Without inference tensors, which autograd does not take.
        self.arguments = arguments_of(self.arguments, list(range(n)), n)
        self.quantize = self.quantize and self.bounds is not None
        self._model_scores = FastScores(self.forward_func)
        is_images = all(x.ndim == 4 for x in self.x)
        layout = torch.channels_last if is_images else torch.contiguous_format
        self._dtypes = tuple(x.dtype for x in self.x)
        # At least in float32: steps, balls and gradients are too fine for half precision.
        self.x = tuple(at_least_float(x).contiguous(memory_format=layout) for x in self.x)
        self.ball: tuple[Norm, float] = (Linf(), math.inf)
        """The norm and the radius that no result leaves, nor its rounding to 8 bits."""
        self.everyone = self.seen = torch.arange(n, device=device)
        """N, all rows; and the rows of the last pass."""
        self.label = torch.zeros(n, dtype=torch.long, device=device)
        """N, the class attacked or aimed at; known after the clean pass."""
        self.already = torch.zeros(n, dtype=torch.bool, device=device)
        """N, misclassified before; known after the clean pass."""
        self.fooled = torch.zeros_like(self.already)
        """N, known to be fooled by what the attack returns; the attack keeps it."""
        self.forward_passes = torch.zeros_like(self.label)
        self.backward_passes = torch.zeros_like(self.label)
        self.saw_gradient = torch.zeros_like(self.already)
        """N, whether any gradient of the attack was not zero, nor infinite."""
        self._scale = torch.full((n,), FIRST_SCALE, device=device)
        """N, powers of two that objectives are multiplied by before the backward pass, so that
        the gradients within a network in half precision neither vanish nor overflow."""
        self._has_half = torch.float16 in self._dtypes
        self.resolution = 0.0
        """The share of a score by which two that the model tells apart differ at least."""
        self.reading: Reading
        """How the model's scores become logits, which are attacked; known after the clean pass."""
        self.donates = False
        """Whether the model was compiled so that a graph serves one backward pass."""
        self.has_one_score = False
        """Whether the model gives one logit a sample, which is read as two classes."""

    @property
    def knows_labels(self) -> bool:
        """Whether the clean scores have been seen."""
        return self.class_scores is not None

    def scores(self, inputs: Tensors, rows: Tensor) -> Tensor:
        """Float scores n×K of samples ``rows`` (n numbers), in place of their clean inputs.

        The first call must be of the clean inputs of everyone: it finds the labels. Records a
        graph if gradients are on.
        """
        self.seen = rows
        places = self.places(rows)
        arguments = self.arguments
        if places is not None:
            arguments = arguments_of(arguments, places, self.n)
        raw = self._model_scores(self.as_given(inputs, rows), arguments)
        self._has_half |= raw.dtype == torch.float16
        if raw.dtype.is_floating_point:
            self.resolution = torch.finfo(raw.dtype).eps
        if not self._model_scores.channels_last:
            self.x = tuple(x.contiguous() for x in self.x)
        raw = finite_scores(raw, len(rows)).to(rows.device)
        scores = two_classes(raw, len(rows))
        self.has_one_score = scores.shape != raw.shape
        scores = at_least_float(scores)
        self.forward_passes.index_add_(0, rows, torch.ones_like(rows))
        if self.class_scores is not None:
            return self.reading.logits(self.class_scores(scores, places))
        warn_of_probabilities(scores)
        check_target(self.target, scores)
        self.class_scores = ClassScores(scores, self.target)
        scores = self.class_scores(scores)
        self.reading = Reading(scores, self._ask, self.resolution)
        scores = self.reading.logits(scores)
        self._see_clean(scores.detach(), self.class_scores.classes)
        return scores

    def _ask(self) -> tuple[Tensor, Tensors]:
        """The model's scores of the first sample once more, with a graph, and its inputs."""
        assert self.class_scores is not None
        with torch.enable_grad():
            leaves = tuple(x[:1].detach().requires_grad_() for x in self.x)
            arguments = arguments_of(self.arguments, [0], self.n)
            raw = self._model_scores(self.as_given(leaves, self.everyone[:1]), arguments)
            return self.class_scores(at_least_float(two_classes(raw, 1)), [0]), leaves

    def as_given(self, inputs: Tensors, rows: Tensor) -> Tensors:
        """Inputs of samples ``rows`` in the dtype that came, with the graph, as results will be."""
        with torch.no_grad():
            held = self.held(inputs, rows)
        pairs = zip(inputs, held, self._dtypes, strict=True)
        return tuple(x if x.dtype == d else (x + (h - x).detach()).to(d) for x, h, d in pairs)

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
        places: Tensor | None = None,
        again: Callable[[], tuple[Tensor, Tensors]] | None = None,
    ) -> Tensors:
        """The gradients of the n objectives with respect to each of the inputs.

        Those that are not finite are zeros.

        Args:
            objective: n, with their graph.
            inputs: what they are of.
            rows: n, the samples.
            times: how many backward passes of a sample this is.
            keep_graph: for another backward pass.
            places: n, where samples ``rows`` stand among the inputs, if these are of more samples.
            again: objectives and inputs anew, for another try with another scale.

        Raises:
            ValueError: the objective does not depend on the inputs differentiably.
        """
        search = ScaleSearch(len(rows), rows.device)
        while True:
            scale = self._scale[rows].to(objective.dtype)
            try:
                kept = keep_graph and not self.donates
                gradients = gradients_or_zeros(objective, inputs, kept, scale)
            except RuntimeError as error:
                if again is None or self.donates or "donated buffer" not in str(error):
                    raise
                self.donates = True
                objective, inputs = again()
                continue
            if gradients is None:
                raise no_gradient(self.forward_func, self.x, self.arguments)
            if places is not None:
                gradients = take_each(gradients, places)
            self.backward_passes[rows] += times
            lengths = Linf().lengths(gradients)
            is_finite = lengths.isfinite()
            vanished = is_finite & (lengths == 0) & self._has_half
            search.note(self._scale[rows].log2(), vanished, ~is_finite)
            differs = search.goes_on
            if again is None or not bool(differs.any()):
                break
            self._scale[rows[differs]] = 2.0 ** search.exponents[differs]
            objective, inputs = again()
        self.saw_gradient[rows] |= is_finite & (lengths > 0)
        factors = torch.where(is_finite, 1 / scale, 0.0)
        return tuple(
            torch.where(per_sample(is_finite, g).bool(), g * per_sample(factors, g), 0.0)
            for g in gradients
        )

    @property
    def without_gradient(self) -> Tensor:
        """N booleans: not fooled, and no step that was tried had a gradient to go by."""
        asked = (self.backward_passes > 0) & ~self.saw_gradient
        return asked & ~self.fooled & ~self.already

    def succeeds(self, scores: Tensor, rows: Tensor) -> Tensor:
        """n booleans: fooled by ``success``."""
        return self.success(self, scores, rows)

    def to_bytes(self, inputs: Tensors, rows: Tensor) -> Tensors:
        """The nearest inputs that an 8-bit image of the bounds' range can hold, within the ball.

        Where that holds none (the clean input is none itself), the one nearest to the clean input.
        """
        if self.bounds is None:
            return inputs
        clean = take_each(self.x, rows)
        nearest = self._levels(inputs, torch.round)
        if math.isinf(self.ball[1]):
            return nearest
        norm, radius = self.ball
        # The clean image may be one of 8 bits that arithmetic or half precision has rounded.
        low, high = self.bounds
        rounding = max(torch.finfo(d).eps for d in self._dtypes) / 4 * max(-low, high)
        radius += max(1e-6 * radius, (high - low) / 255 * LEVEL_TOLERANCE, rounding)
        rounded = self._levels(clean, torch.round)
        # An image that is none of 8 bits moves by its own rounding too.
        kept, least = nearest, minus(rounded, clean)
        for other in self._nearer(inputs, clean, rounded, norm.shrinks):
            outside = norm.outside(minus(kept, clean), radius, least)
            if not any(bool(each.any()) for each in outside):
                break
            parts = zip(outside, kept, other, strict=True)
            kept = tuple(torch.where(is_outside, b, a) for is_outside, a, b in parts)
        return kept

    def _nearer(
        self, inputs: Tensors, clean: Tensors, rounded: Tensors, shrinks: Iterable[float]
    ) -> Iterator[Tensors]:
        """Images of 8 bits ever nearer to the clean one, whose nearest is ``rounded``."""
        for shrink in shrinks:
            between = (torch.lerp(c, x, shrink) for c, x in zip(clean, inputs, strict=True))
            yield self._levels(tuple(between), torch.round)
        floors, ceils = self._levels(inputs, torch.floor), self._levels(inputs, torch.ceil)
        ways = zip(inputs, clean, floors, ceils, strict=True)
        yield tuple(torch.where(x > c, low, high) for x, c, low, high in ways)
        yield rounded

    def _levels(self, inputs: Tensors, integer: Callable[[Tensor], Tensor]) -> Tensors:
        assert self.bounds is not None
        low, high = self.bounds
        unit = (high - low) / 255
        levels = []
        for x in inputs:
            steps = (x - low) / unit
            is_level = (steps - steps.round()).abs() < 2e-4  # to the bit as it is
            moved = (integer(steps) * unit + low).clamp(low, high)
            levels.append(torch.where(is_level, x, moved))
        return tuple(levels)

    def to_be_saved(self, results: Tensors) -> Tensors:
        """Results N×… as their dtype can hold them, without a step out of the ball.

        With ``quantize`` a fooled one stays in it when it is rounded to the nearest 8 bits: values
        that would leave it are what :meth:`to_bytes` makes of them.
        """
        if self.quantize and not math.isinf(self.ball[1]):
            nearest = self._levels(results, torch.round)
            inside = self.to_bytes(results, self.everyone)
            results = tuple(
                torch.where((n == i) | ~per_sample(self.fooled, x).bool(), x, i)
                for x, n, i in zip(results, nearest, inside, strict=True)
            )
        return self.held(results, self.everyone)

    def held(self, inputs: Tensors, rows: Tensor) -> Tensors:
        """Inputs as the dtype that came can hold them, rounded without a step out of the ball."""
        norm, radius = self.ball
        pairs = zip(inputs, self._dtypes, strict=True)
        nearest = tuple(x if x.dtype == d else x.to(d).to(x.dtype) for x, d in pairs)
        clean = take_each(self.x, rows)
        # A transform may have made others of the inputs.
        is_same = all(x.shape == c.shape for x, c in zip(inputs, clean, strict=True))
        if math.isinf(radius) or not is_same or all(map(operator.is_, nearest, inputs)):
            return nearest
        outside = norm.outside(minus(nearest, clean), radius, tuple(map(torch.zeros_like, clean)))
        inner = map(_towards, inputs, nearest, clean, self._dtypes)
        parts = zip(outside, inner, nearest, strict=True)
        return tuple(torch.where(is_outside, i, n) for is_outside, i, n in parts)

    def within(self, inputs: Tensors) -> Tensors:
        """Clipped to the bounds."""
        return clipped(inputs, self.bounds)

    def masked(self, changes: Tensors, rows: Tensor) -> Tensors:
        """Changes of ``rows``, zero where the mask is."""
        if self.masks is None:
            return changes
        return tuple(c * take(m, rows) for c, m in zip(changes, self.masks, strict=True))

    def moved(
        self, clean: Tensors, change: Tensors, rows: Tensor, epsilon: float, norm: Norm
    ) -> Tensors:
        """Clean inputs changed by what the mask, the ball and the bounds leave of ``change``."""
        change = norm.project(self.masked(change, rows), epsilon)
        return self.within(plus(clean, change))

    def details(self, results: Tensors) -> AttackDetails:
        """What became of the samples; the passes that only this needs are not counted."""
        forward = self.forward_passes.clone()
        if not self.knows_labels:
            self.scores(self.x, self.everyone)
        results = tuple(map(at_least_float, results))
        final = self.to_bytes(results, self.everyone) if self.quantize else results
        scores = self.scores(final, self.everyone)
        changes = [c.reshape(self.n, -1) for c in minus(results, self.x)]
        linf, l2 = sizes_of(torch.cat(changes, dim=1))
        fooled = self.succeeds(scores, self.everyone) & ~self.already
        return AttackDetails(
            label=self.label,
            predicted=scores.argmax(dim=1),
            already=self.already,
            fooled=fooled,
            linf=linf,
            l2=l2,
            forward_passes=forward,
            backward_passes=self.backward_passes,
            without_gradient=self.without_gradient & ~fooled,
        )

    def _see_clean(self, scores: Tensor, classes: Tensor | None) -> None:
        predicted = scores.argmax(dim=1)
        self.label = predicted if classes is None else classes.long().expand(self.n)
        self.already = self.succeeds(scores, self.everyone)
        steps = self.resolution * scores.amax(dim=1).abs()
        count = int((steps > scores.std(dim=1, correction=0) / 10).sum())
        if count:
            warnings.warn(
                f"forward_func: the scores of {count} of {self.n} samples are rounded to steps of "
                "more than a tenth of their deviation (they are in half precision, or a constant "
                "is added to them), so that many are equal and an attack may find less than there "
                "is; give them in float32, without the constant",
                stacklevel=2,
            )


def _towards(x: Tensor, nearest: Tensor, clean: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to ``dtype`` towards clean values, which that can hold."""
    inner = torch.nextafter(nearest.to(dtype), clean.to(dtype)).to(x.dtype)
    return torch.where((nearest - clean).abs() > (x - clean).abs(), inner, nearest)


def clipped(inputs: Tensors, bounds: tuple[float, float] | None) -> Tensors:
    """The inputs within the bounds."""
    return inputs if bounds is None else tuple(x.clamp(*bounds) for x in inputs)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows, without a copy if they are all."""
    return x if len(rows) == len(x) else x[rows]


def take_each(inputs: Tensors, rows: Tensor) -> Tensors:
    """The given rows of each tensor."""
    return tuple(take(x, rows) for x in inputs)


def leads_of(scores: Tensor, label: Tensor) -> Tensor:
    """n, how far the score of the label is ahead of all others."""
    own = scores.gather(1, label[:, None])[:, 0]
    return own - others_of(scores, label).amax(dim=1)


def put_each(kept: Tensors, rows: Tensor, new: Tensors) -> None:
    """Write new rows n×… over the given n rows of each tensor."""
    for old, x in zip(kept, new, strict=True):
        old[rows] = x


def check_losses(loss: object, n: int) -> None:
    """``ValueError`` unless a loss function gave n losses."""
    got = shape_or_type(loss)
    check(
        got == (n,),
        f"loss_func: expected {n} losses, one a sample, got {got}; give it reduction='none'",
    )
