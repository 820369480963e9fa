"""Images without evidence: what stands in for the pixels that a mask takes away."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from captum_robust._checks import as_number, unknown_name
from captum_robust._resize import blur_matrix

SCHEMES = ("blur", "color", "both")


class EvidenceRemoval(nn.Module):
    """Blurred images, or a random colour with noise; drawn afresh for each image and call.

    Dabkowski and Gal, "Real Time Image Saliency for Black Box Classifiers"
    (https://arxiv.org/abs/1705.07857), section 4.2: were what stands in for the removed pixels
    always the same, a mask could use it as evidence. Pixels are in [0, 1]; the numbers by default
    are the authors' code's, which has pixels in [-1, 1].

    Args:
        scheme: ``"both"`` draws one of the two for each image with the same probability;
            ``"blur"`` and ``"color"`` use one only.
        sigma: of the Gaussian, in pixels of an image whose shorter side is 224; other sizes scale
            it. The kernel is symmetric, and the border is mirrored.
        color_range: each channel of the colour is drawn uniformly from [.5 - r, .5 + r].
        noise: standard deviation of the noise on the colour.

    Raises:
        ValueError: an unknown scheme, or a number out of range.

    >>> EvidenceRemoval("color", noise=0)(torch.ones(2, 3, 8, 8)).std(dim=(2, 3)).max() < 1e-6
    tensor(True)
    """

    def __init__(
        self,
        scheme: str = "both",
        *,
        sigma: float = 11.0,
        color_range: float = 0.165,
        noise: float = 0.055,
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise unknown_name("scheme", scheme, SCHEMES)
        if not 0 < as_number(sigma) < math.inf:
            raise ValueError(f"sigma: expected a finite number above 0, got {sigma!r}")
        if not 0 <= as_number(color_range) <= 0.5:
            raise ValueError(f"color_range: expected a number from 0 to .5, got {color_range!r}")
        if not 0 <= as_number(noise) < math.inf:
            raise ValueError(f"noise: expected a finite number from 0, got {noise!r}")
        self.scheme, self.sigma = scheme, float(sigma)
        self.color_range, self.noise = float(color_range), float(noise)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.scheme!r}, sigma={self.sigma:g}, color_range={self.color_range:g}, "
            f"noise={self.noise:g}"
        )

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None, *, shared: bool = False
    ) -> Tensor:
        """Images N×C×H×W that hold nothing of ``x`` but, where blurred, its coarse colours.

        Args:
            x: images N×C×H×W.
            generator: what is drawn comes from it, on its device; None: from torch's global one.
            shared: one draw for all images, so that none depends on the batch it is in.
        """
        if x.ndim != 4:
            raise ValueError(f"x: expected images N×C×H×W, got {tuple(x.shape)}")
        x = x.detach()
        if self.scheme == "blur":
            return self.blurred(x)
        drawn_for = x[:1] if shared else x
        colored = self._colored(drawn_for, generator).expand_as(x)
        if self.scheme == "color":
            return colored
        is_blurred = _uniform((len(drawn_for), 1, 1, 1), x, generator) < 0.5
        return torch.where(is_blurred, self.blurred(x), colored)

    def blurred(self, x: Tensor) -> Tensor:
        """The images behind the Gaussian."""
        height, width = x.shape[2:]
        sigma = self.sigma * min(height, width) / 224
        down = blur_matrix(height, sigma).to(x)
        across = down if width == height else blur_matrix(width, sigma).to(x)
        return down @ x @ across.T

    def _colored(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        color = 0.5 + self.color_range * (2 * _uniform((*x.shape[:2], 1, 1), x, generator) - 1)
        device = x.device if generator is None else generator.device
        drawn = torch.randn(x.shape, generator=generator, device=device).to(x)
        return color + self.noise * drawn


def blend(x: Tensor, mask: Tensor, removed: Tensor) -> Tensor:
    """Φ(x, M) = x·M + A·(1-M): the images N×C×H×W where the mask N×1×H×W is 1, else ``removed``."""
    return removed + mask * (x - removed)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(like)
