"""The norms that changes are measured in; the tensors of a tuple count together as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_robust._checks import check_choice
from captum_robust._draws import Generators, drawn
from captum_robust._scores import at_least_float

Tensors = tuple[Tensor, ...]


class Linf:
    """The largest change of a value."""

    shrinks: tuple[float, ...] = ()
    """Multiples of a change that are rounded in its place, where rounding makes it too long."""

    def lengths(self, changes: Tensors) -> Tensor:
        """Return the n lengths of changes n×…."""
        return torch.stack([c.reshape(len(c), -1).abs().amax(dim=1) for c in changes]).amax(dim=0)

    def dual_lengths(self, gradients: Tensors) -> Tensor:
        """Return the n gains that a change of length 1 can make along each gradient."""
        sums = [at_least_float(g.reshape(len(g), -1)).abs().sum(dim=1) for g in gradients]
        return torch.stack(sums).sum(dim=0)

    def project(self, changes: Tensors, epsilon: float) -> Tensors:
        """Return the nearest changes in the ball of radius ``epsilon``."""
        return tuple(c.clamp(-epsilon, epsilon) for c in changes)

    def outside(self, changes: Tensors, epsilon: float, least: Tensors) -> Tensors:  # noqa: ARG002
        """Return booleans that expand to the changes: what makes them longer than ``epsilon``.

        ``least``: changes n×… that rounding takes in any case, which L2 lengths may exceed it by.
        """
        return tuple(c.abs() > epsilon for c in changes)

    def steepest(
        self,
        gradients: Tensors,
        dual_lengths: Tensor | None = None,  # noqa: ARG002
    ) -> Tensors:
        """Return the change of length 1 that gains most; zeros where the gradient is zero.

        ``dual_lengths``: those of the gradients, where they are known.
        """
        return tuple(g.sign() for g in gradients)

    def largest(self, width: float, dimensions: int | None) -> float:  # noqa: ARG002
        """Return the length of the change where each of so many values moves by ``width``.

        With ``dimensions`` None: infinity where it depends on them.
        """
        return width

    def random_points(
        self, like: Tensors, epsilon: float, generator: Generators, n: int = 1
    ) -> Tensors:
        """Return ``n`` uniformly drawn points of the ball; one is the same for all samples."""
        points = [drawn(torch.rand, (n, *x.shape[1:]), generator) * 2 - 1 for x in like]
        return tuple((epsilon * p).to(x) for p, x in zip(points, like, strict=True))


class L2:
    """The Euclidean length; for the rest see :class:`Linf`."""

    shrinks: tuple[float, ...] = (0.97, 0.93, 0.87, 0.8, 0.7, 0.6)

    def lengths(self, changes: Tensors) -> Tensor:  # noqa: D102
        flat = [at_least_float(c.reshape(len(c), -1)) for c in changes]
        largest = torch.stack([c.abs().amax(dim=1) for c in flat]).amax(dim=0)
        unit = torch.where(largest > 0, largest, 1.0)  # squares of small and large values are lost
        squares = [(c / unit[:, None]).square().sum(dim=1) for c in flat]
        return torch.stack(squares).sum(dim=0).sqrt() * unit

    dual_lengths = lengths

    def project(self, changes: Tensors, epsilon: float) -> Tensors:  # noqa: D102
        if math.isinf(epsilon):
            return changes
        return scaled(changes, (epsilon / self.lengths(changes).clamp(min=1e-12)).clamp(max=1))

    def outside(self, changes: Tensors, epsilon: float, least: Tensors) -> Tensors:  # noqa: D102
        rounding = self.lengths(least)
        # Rounding is at right angles to a change that does not know of it.
        are = self.lengths(changes) > rounding.hypot(torch.full_like(rounding, epsilon))
        return tuple(per_sample(are, c).bool() for c in changes)

    def steepest(  # noqa: D102
        self, gradients: Tensors, dual_lengths: Tensor | None = None
    ) -> Tensors:
        if dual_lengths is None:
            dual_lengths = self.lengths(gradients).clamp(min=torch.finfo(torch.float32).tiny)
        return tuple(divided(g, dual_lengths) for g in gradients)

    def largest(self, width: float, dimensions: int | None) -> float:  # noqa: D102
        return math.inf if dimensions is None else width * math.sqrt(dimensions)

    def random_points(  # noqa: D102
        self, like: Tensors, epsilon: float, generator: Generators, n: int = 1
    ) -> Tensors:
        points = tuple(drawn(torch.randn, (n, *x.shape[1:]), generator) for x in like)
        radius = drawn(torch.rand, (n,), generator) ** (1 / sum(x[0].numel() for x in like))
        points = scaled(points, radius / self.lengths(points))
        return tuple((epsilon * p).to(x) for p, x in zip(points, like, strict=True))


Norm = Linf | L2
NORMS: dict[str, Norm] = {"Linf": Linf(), "L2": L2()}


def norm_of(name: str) -> Norm:
    """Return the norm that a ``norm`` argument names; ``ValueError`` if there is none."""
    check_choice("norm", name, NORMS)
    return NORMS[name]


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Return n values in the shape n×1×… that multiplies n×…."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def scaled(changes: Tensors, factors: Tensor) -> Tensors:
    """Multiply each of n samples by a factor of its own."""
    return tuple(c * per_sample(factors, c) for c in changes)


def plus(a: Tensors, b: Tensors) -> Tensors:
    """Add tuples of tensors."""
    return tuple(s + t for s, t in zip(a, b, strict=True))


def minus(a: Tensors, b: Tensors) -> Tensors:
    """Subtract tuples of tensors."""
    return tuple(s - t for s, t in zip(a, b, strict=True))


def divided(x: Tensor, values: Tensor) -> Tensor:
    """Divide n×… by n values, at least in float32: in half precision small ones are 0."""
    precise = at_least_float(x)
    return (precise / per_sample(values, precise)).to(x.dtype)


def of_mean_one(gradients: Tensors) -> Tensors:
    """Divide each sample by its mean magnitude over all tensors; zeros stay zeros."""
    mean = Linf().dual_lengths(gradients) / sum(g[0].numel() for g in gradients)
    return tuple(divided(g, mean.clamp(min=torch.finfo(torch.float32).tiny)) for g in gradients)
