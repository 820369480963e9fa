"""The base of all attacks: one way to call them."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from captum.log import log_usage
from captum.robust import Perturbation
from torch import Tensor

from captum_robust._captum import TargetType, format_output, format_tensor_into_tuples, is_tuple
from captum_robust._checks import (
    as_number,
    check,
    check_batch,
    check_callable,
    check_inputs,
    check_type,
    checked_bounds,
)
from captum_robust._scores import without_inference
from captum_robust.attacks.norms import Norm, Tensors, norm_of
from captum_robust.attacks.victim import AttackDetails, Victim, clipped


class Attack(Perturbation):
    """The base of all attacks; see :mod:`captum_robust.attacks` for the shared arguments.

    An attack is a dataclass of its settings, which ``__post_init__`` checks, and ``_attack``.
    """

    forward_func: Callable[..., Tensor]
    epsilon: float | None
    norm: str
    bounds: tuple[float, float] | None
    quantize: bool

    def __post_init__(self) -> None:
        # vars() tell one attack from another, also by the settings that its kind fixes.
        fixed = getattr(self, "__dataclass_fields__", ())
        self.__dict__.update({name: getattr(self, name) for name in fixed})
        check_callable("forward_func", self.forward_func)
        norm_of(self.norm)
        self.bounds = None if self.bounds is None else checked_bounds(self.bounds)
        if self.epsilon is not None:
            self._check_epsilon(self.epsilon, None)

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
                ``bounds`` by more than rounding; ``epsilon`` below 0 or above what the bounds
                allow; a target that is out of range; a model of a single class, or one through
                which no gradient flows (the message says which layer broke it).
            TypeError: inputs that are not floating point.
        """
        strength = self.epsilon if epsilon is None else epsilon
        inputs_tuple: Tensors = format_tensor_into_tuples(inputs)
        check_batch(inputs_tuple)
        check_inputs(inputs_tuple, self.bounds)
        if strength is not None:
            self._check_epsilon(strength, inputs_tuple)
            strength = float(strength)
        if targeted:
            check(target is not None, "target: a targeted attack needs the class to move towards")
        with torch.inference_mode(False):
            normal = clipped(tuple(map(without_inference, inputs_tuple)), self.bounds)
            normal = tuple(x.detach() for x in normal)
            aim = (target, additional_forward_args, targeted)
            quantize = self.quantize or _QUANTIZED.get()
            limits = (_masks(mask, normal), self.bounds, quantize)
            victim = self._victim(self.forward_func, normal, *aim, *limits)
            victim.ball = self._norm, self._ball(strength)
            with torch.no_grad():
                adversarial = victim.to_be_saved(self._attack(victim, strength))
                _tell_of_no_gradient(victim)
                results = tuple(
                    a.to(x.dtype).contiguous()
                    for a, x in zip(adversarial, inputs_tuple, strict=True)
                )
                details = self._details(victim, results) if return_details else None
        result = format_output(is_tuple(inputs), results)
        return result if details is None else (result, details)

    def _victim(self, *arguments: Any) -> Victim:
        """The batch under attack; with a success of its own where fooled means something else."""
        return Victim(*arguments)

    def _details(self, victim: Victim, results: Tensors) -> AttackDetails:
        """What became of the samples; called without gradients."""
        return victim.details(results)

    @abstractmethod
    def _attack(self, victim: Victim, epsilon: float | None) -> Tensors:
        """The adversarial inputs, all N rows; called without gradients."""

    @property
    def _norm(self) -> Norm:
        return norm_of(self.norm)

    def _ball(self, epsilon: float | None) -> float:
        """The radius of the ball that no result leaves."""
        return math.inf if epsilon is None else epsilon

    def _check_epsilon(self, epsilon: float, inputs: Tensors | None) -> None:
        number, highest = as_number(epsilon), math.inf
        if self.bounds is not None:
            dimensions = None if inputs is None else sum(x[0].numel() for x in inputs)
            highest = self._norm.largest(self.bounds[1] - self.bounds[0], dimensions)
        check(
            0 <= number <= highest and math.isfinite(number),
            f"epsilon: expected a number from 0 to {highest:.4g} in units of the inputs (such as "
            f"8/255 for pixels in [0, 1]), got {epsilon!r}",
        )


_WATCHED: ContextVar[list[Tensor] | None] = ContextVar("without_gradient", default=None)


@contextmanager
def watched_gradients() -> Iterator[list[Tensor]]:
    """Inside, each attack adds at its end which of its N samples had no gradient, N booleans.

    So it is known of attacks inside of functions too, and without the pass that details cost.
    """
    ended: list[Tensor] = []
    token = _WATCHED.set(ended)
    try:
        yield ended
    finally:
        _WATCHED.reset(token)


_QUANTIZED: ContextVar[bool] = ContextVar("quantized", default=False)


@contextmanager
def of_8_bits() -> Iterator[None]:
    """Inside, attacks look for images that still fool when they are rounded, as with ``quantize``.

    What is judged by such images would otherwise take the others for images that hold out.
    """
    token = _QUANTIZED.set(True)
    try:
        yield
    finally:
        _QUANTIZED.reset(token)


def _tell_of_no_gradient(victim: Victim) -> None:
    without = victim.without_gradient
    if (ended := _WATCHED.get()) is not None:
        ended.append(without)
    stuck = int(without.sum())
    if stuck:
        warnings.warn(
            f"the gradient of {stuck} of {victim.n} samples was zero in every step, or not finite: "
            "the attack could not try them, and that they are not fooled does not make them robust",
            stacklevel=4,
        )


def _masks(mask: Tensor | Tensors | None, inputs: Tensors) -> Tensors | None:
    if mask is None:
        return None
    masks: Tensors = format_tensor_into_tuples(mask)
    count = len(inputs)
    check(len(masks) == count, f"mask: expected {count}, one an input, got {len(masks)}")
    expanded = []
    for m, x in zip(masks, inputs, strict=True):
        check_type("mask", m, Tensor, "tensors")
        try:
            expanded.append(m.to(device=x.device, dtype=x.dtype).expand(x.shape))
        except RuntimeError:
            raise ValueError(
                f"mask: expected the shape of the inputs, {tuple(x.shape)}, got {tuple(m.shape)}"
            ) from None
        check(((m == 0) | (m == 1)).all(), "mask: expected zeros and ones")
    return tuple(expanded)
