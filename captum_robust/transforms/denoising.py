"""Images drawn again from half of their pixels, with the least total variation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import check_count, check_number
from captum_robust._resize import blurred
from captum_robust.transforms.transform import Transform

# Primal step of the solver; the dual step is 1/8 of its inverse, 8 bounding the squared norm of the
# differences. Found on photographs: .25 to 1 converge alike.
_STEP = 0.5
# What the surrogate adds to the length of a difference, so that flat regions have a gradient.
_FLAT = 0.01
_SURROGATE_ITERATIONS = 30


class TotalVariation(Transform):
    """Pixels are dropped at random, and the image is reconstructed with a small total variation.

    Guo et al., "Countering Adversarial Images using Input Transformations"
    (https://arxiv.org/abs/1711.00117). The result z minimises

        ½ Σ mask (z − x)² + weight Σ √((∂z/∂row)² + (∂z/∂column)²)

    over pixels and channels, each channel for itself, ∂ the difference to the next pixel (zero at
    the border). The mask is drawn for each pixel and channel, as in the published code. That code
    runs split Bregman iterations until they move little; here a fixed number of primal-dual steps
    (Chambolle and Pock, https://hal.science/hal-00490826) goes on for all images at once, so that a
    batch gives what its images give.

    The surrogate solves the linear system that the optimum satisfies while the lengths of its
    differences are held fixed (lagged diffusivity; Vogel and Oman, "Iterative methods for total
    variation denoising", 1996), so its gradient spreads over flat regions, stops at edges and is
    zero at dropped pixels.

    Args:
        weight: of the total variation, for pixels in [0, 1].
        drop: the share of the pixels that are dropped; 0: none, which is plain denoising.
        iterations: of the solver. After 50 a photograph's pixels are .2/255 from the optimum in
            the mean.

    Raises:
        ValueError: ``weight`` not positive, ``drop`` not in [0, 1), no iterations; a wrong seed.
    """

    def __init__(
        self, weight: float = 0.03, drop: float = 0.5, *, iterations: int = 50, seed: int | None = 0
    ) -> None:
        super().__init__(seed=seed)
        self.weight = check_number("weight", weight, 0, open_low=True)
        self.drop = check_number("drop", drop, 0, 1, open_high=True)
        self.iterations = check_count("iterations", iterations, 1)
        self.draws = self.drop > 0

    def _apply(self, x: Tensor) -> Tensor:
        return self._reconstructed(x, self._mask(x))

    def _surrogate(self, x: Tensor) -> Tensor:
        mask = self._mask(x)
        with torch.no_grad():
            optimum = self._reconstructed(x.detach(), mask)
            down, right = _differences(optimum)
            conductance = self.weight / (down.square() + right.square() + _FLAT**2).sqrt()
        solved: Tensor = _Diffused.apply(mask * x, mask, conductance)
        return solved.clamp(0, 1)

    def _mask(self, x: Tensor) -> Tensor:
        """C×H×W, 1 where a pixel is kept."""
        if not self.draws:
            return torch.ones_like(x[0])
        drawn = torch.rand(x.shape[1:], generator=self._generator(), dtype=torch.float32)
        return (drawn >= self.drop).to(x)

    def _reconstructed(self, x: Tensor, mask: Tensor) -> Tensor:
        z = _filled(x, mask)
        ahead, kept = z.clone(), _STEP * mask * x
        inverse = 1 / (1 + _STEP * mask)
        # The dual variables: how much of `weight` each difference has taken up.
        rows, columns = torch.zeros_like(x), torch.zeros_like(x)
        dual_step = 1 / (8 * _STEP)
        for _ in range(self.iterations):
            rows[..., :-1, :].add_(ahead[..., 1:, :] - ahead[..., :-1, :], alpha=dual_step)
            columns[..., :-1].add_(ahead[..., 1:] - ahead[..., :-1], alpha=dual_step)
            # Back into the disc of radius `weight`; the inverse root of 0 is infinite.
            shrink = torch.addcmul(rows * rows, columns, columns).rsqrt_()
            shrink.mul_(self.weight).clamp_(max=1)
            rows.mul_(shrink)
            columns.mul_(shrink)
            moved = torch.add(z, _divergence(rows, columns), alpha=_STEP).add_(kept).mul_(inverse)
            ahead = torch.sub(2 * moved, z)
            z = moved
        return z.clamp(0, 1)


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """The images, a dropped pixel being the weighted mean of those kept around it."""
    mean = blurred(mask * x, 1.0) / blurred(mask, 1.0).clamp(min=1e-6)
    return torch.where(mask > 0, x, mean)


def _differences(z: Tensor) -> tuple[Tensor, Tensor]:
    """The differences to the next row and to the next column, zero at the border."""
    return (
        F.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1)),
        F.pad(z[..., 1:] - z[..., :-1], (0, 1)),
    )


def _divergence(rows: Tensor, columns: Tensor) -> Tensor:
    """Minus the adjoint of :func:`_differences`; the last row and column are zero."""
    sums = rows + columns
    sums[..., 1:, :].sub_(rows[..., :-1, :])
    sums[..., 1:].sub_(columns[..., :-1])
    return sums


class _Diffused(torch.autograd.Function):
    """z with mask · z − div(conductance · ∇z) = b. The operator is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, mask: Tensor, conductance: Tensor) -> Tensor:
        ctx.save_for_backward(mask, conductance)
        return _conjugate_gradients(b, mask, conductance)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        mask, conductance = ctx.saved_tensors
        solved: Tensor = _Diffused.apply(gradients[0], mask, conductance)
        return solved, None, None


def _conjugate_gradients(b: Tensor, mask: Tensor, conductance: Tensor) -> Tensor:
    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum((1, 2, 3), keepdim=True)

    z = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = inner(residual, residual)
    for _ in range(_SURROGATE_ITERATIONS):
        down, right = _differences(direction)
        image = mask * direction - _divergence(conductance * down, conductance * right)
        # Zero only where nothing is left to solve.
        length = squared / inner(direction, image).clamp(min=torch.finfo(b.dtype).tiny)
        z.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, squared = squared, inner(residual, residual)
        direction = residual + squared / before.clamp(min=torch.finfo(b.dtype).tiny) * direction
    return z
