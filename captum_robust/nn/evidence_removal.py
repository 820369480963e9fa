"""Images without evidence: what stands in for the pixels that a mask takes away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_robust._checks import check_choice, check_number, check_shape
from captum_robust._draws import Generators, drawn
from captum_robust._resize import blurred

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
        check_choice("scheme", scheme, SCHEMES)
        self.scheme = scheme
        self.sigma = check_number("sigma", sigma, 0, open_low=True)
        self.color_range = check_number("color_range", color_range, 0, 0.5)
        self.noise = check_number("noise", noise, 0)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.scheme!r}, sigma={self.sigma:g}, color_range={self.color_range:g}, "
            f"noise={self.noise:g}"
        )

    def forward(self, x: Tensor, generator: Generators = None, *, shared: bool = False) -> Tensor:
        """Images N×C×H×W that hold nothing of ``x`` but, where blurred, its coarse colours.

        Args:
            x: images N×C×H×W.
            generator: what is drawn comes from it, on its device, or from one for each image; None:
                from torch's global one.
            shared: one draw for all images, so that none depends on the batch it is in.
        """
        check_shape("x", x, "N×C×H×W")
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
        return blurred(x, self.sigma * min(x.shape[2:]) / 224)

    def _colored(self, x: Tensor, generator: Generators) -> Tensor:
        color = 0.5 + self.color_range * (2 * _uniform((*x.shape[:2], 1, 1), x, generator) - 1)
        return color + self.noise * drawn(torch.randn, x.shape, generator, x.device).to(x)


def blend(x: Tensor, mask: Tensor, removed: Tensor) -> Tensor:
    """Φ(x, M) = x·M + A·(1-M): the images N×C×H×W where the mask N×1×H×W is 1, else ``removed``."""
    return removed + mask * (x - removed)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generators) -> Tensor:
    return drawn(torch.rand, shape, generator, like.device).to(like)
