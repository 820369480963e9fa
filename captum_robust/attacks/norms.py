"""The norms that changes are measured in; the tensors of a tuple count together as one vector."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_robust._checks import check_choice
from captum_robust._scores import at_least_float

Tensors = tuple[Tensor, ...]


class Norm(ABC):
    """What an attack needs to know of a norm; each of n samples n×… has a length of its own."""

    @abstractmethod
    def lengths(self, changes: Tensors) -> Tensor:
        """Return the n lengths of the changes."""

    @abstractmethod
    def dual_lengths(self, gradients: Tensors) -> Tensor:
        """Return the n gains that a change of length 1 can make along each gradient."""

    @abstractmethod
    def project(self, changes: Tensors, epsilon: float) -> Tensors:
        """Return the nearest changes in the ball of radius ``epsilon``."""

    @abstractmethod
    def unit(self, gradient: Tensor, dual_lengths: Tensor) -> Tensor:
        """Return, of one tensor n×…, the change of length 1 that gains most along the gradient."""

    @abstractmethod
    def steepest(self, gradients: Tensors) -> Tensors:
        """Return the change of length 1 that gains most; zeros where the gradient is zero."""

    @abstractmethod
    def largest(self, width: float, dimensions: int | None) -> float:
        """Return the length of the longest change where each of so many values moves by ``width``.

        With ``dimensions`` None: infinity where it depends on them.
        """

    @abstractmethod
    def _drawn(
        self, shapes: Sequence[tuple[int, ...]], generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        """Return points of the unit ball."""

    def random_points(
        self, like: Tensors, epsilon: float, generator: torch.Generator | None, n: int = 1
    ) -> Tensors:
        """Return ``n`` uniformly drawn points of the ball; one is the same for all samples."""
        drawn = self._drawn([(n, *x.shape[1:]) for x in like], generator)
        return tuple((epsilon * d).to(x) for d, x in zip(drawn, like, strict=True))


class _Linf(Norm):
    def lengths(self, changes: Tensors) -> Tensor:
        return torch.stack([c.reshape(len(c), -1).abs().amax(dim=1) for c in changes]).amax(dim=0)

    def dual_lengths(self, gradients: Tensors) -> Tensor:
        sums = [at_least_float(g.reshape(len(g), -1)).abs().sum(dim=1) for g in gradients]
        return torch.stack(sums).sum(dim=0)

    def project(self, changes: Tensors, epsilon: float) -> Tensors:
        return tuple(c.clamp(-epsilon, epsilon) for c in changes)

    def unit(self, gradient: Tensor, dual_lengths: Tensor) -> Tensor:  # noqa: ARG002
        return gradient.sign()

    def steepest(self, gradients: Tensors) -> Tensors:
        return tuple(g.sign() for g in gradients)

    def largest(self, width: float, dimensions: int | None) -> float:  # noqa: ARG002
        return width

    def _drawn(
        self, shapes: Sequence[tuple[int, ...]], generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        return [torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes]


class _L2(Norm):
    def lengths(self, changes: Tensors) -> Tensor:
        squares = [at_least_float(c.reshape(len(c), -1)).square().sum(dim=1) for c in changes]
        return torch.stack(squares).sum(dim=0).sqrt()

    def dual_lengths(self, gradients: Tensors) -> Tensor:
        return self.lengths(gradients)

    def project(self, changes: Tensors, epsilon: float) -> Tensors:
        factor = (epsilon / self.lengths(changes).clamp(min=1e-12)).clamp(max=1)
        return tuple(c * per_sample(factor, c) for c in changes)

    def unit(self, gradient: Tensor, dual_lengths: Tensor) -> Tensor:
        return divided(gradient, dual_lengths)

    def steepest(self, gradients: Tensors) -> Tensors:
        lengths = self.lengths(gradients).clamp(min=torch.finfo(torch.float32).tiny)
        return tuple(divided(g, lengths) for g in gradients)

    def largest(self, width: float, dimensions: int | None) -> float:
        return math.inf if dimensions is None else width * math.sqrt(dimensions)

    def _drawn(
        self, shapes: Sequence[tuple[int, ...]], generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        drawn = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        dimensions = sum(d[0].numel() for d in drawn)
        radius = torch.rand(len(drawn[0]), generator=generator) ** (1 / dimensions)
        factor = radius / self.lengths(drawn)
        return [d * per_sample(factor, d) for d in drawn]


LINF, L2 = _Linf(), _L2()
NORMS: dict[str, Norm] = {"Linf": LINF, "L2": L2}


def norm_of(name: str) -> Norm:
    """Return the norm that a ``norm`` argument names; ``ValueError`` if there is none."""
    check_choice("norm", name, NORMS)
    return NORMS[name]


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Return n values in the shape n×1×… that multiplies n×…."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def divided(x: Tensor, values: Tensor) -> Tensor:
    """Divide n×… by n values, at least in float32: in half precision small ones are 0."""
    precise = at_least_float(x)
    return (precise / per_sample(values, precise)).to(x.dtype)


def of_mean_one(gradients: Tensors) -> Tensors:
    """Divide each sample by its mean magnitude over all tensors; zeros stay zeros."""
    mean = LINF.dual_lengths(gradients) / sum(g[0].numel() for g in gradients)
    return tuple(divided(g, mean.clamp(min=1e-30)) for g in gradients)
