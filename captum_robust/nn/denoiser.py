"""A small network that takes Gaussian noise out of images, in front of a classifier."""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust._checks import check_count, check_shape, printable
from captum_robust._facts import Form, whole
from captum_robust._files import TensorFile, read_facts, write_network
from captum_robust.nn.saved_networks import check_fit

_FACTS = "captum_robust.denoiser"
_WIDTHS = 2, 4096
_FORM: Form = {"width": whole(*_WIDTHS)}
_FOLD = 4
"""Pixels each way that become channels: it works at a quarter of the resolution."""
_SCALES = 2
"""It halves so often below that."""


class Denoiser(nn.Module):
    """Noisy images N×3×H×W -> the images without the noise, of any strength that it was taught.

    The residual of a U-Net (Ronneberger et al., https://arxiv.org/abs/1505.04597) on blocks of 4×4
    pixels as channels (Zhang et al., "FFDNet", https://arxiv.org/abs/1710.04026): as in Zhang et
    al., "Beyond a Gaussian Denoiser" (https://arxiv.org/abs/1608.03981), it predicts the noise. In
    front of a classifier it makes randomized smoothing of an ordinary network possible (Salman et
    al., "Denoised Smoothing", https://arxiv.org/abs/2003.01908). Any size of image; in
    evaluation mode the result is clipped to [0, 1].

    Args:
        width: w, channels at a quarter of the resolution; w·1.5 and w·2 below. Fewer than the 48
            numbers of a block cannot carry its noise through.

    >>> import torch
    >>> Denoiser(8)(torch.zeros(1, 3, 30, 20)).shape
    torch.Size([1, 3, 30, 20])
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        check_count("width", width, *_WIDTHS)
        widths = [width, width * 3 // 2, width * 2]
        channels = 3 * _FOLD**2
        self.width = width
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.before = nn.ModuleList(_Residual(w) for w in widths)
        self.after = nn.ModuleList(_Residual(w) for w in widths[:-1])
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)  # it begins by changing nothing
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The images; ``ValueError`` for what is not N×3×H×W."""
        check_shape("x", x, "N×3×H×W")
        height, width = x.shape[2:]
        block = _FOLD * 2**_SCALES
        padding = (0, -width % block, 0, -height % block)
        padded = F.pad(x, padding, mode="replicate")
        y = self.first(F.pixel_unshuffle(padded, _FOLD))
        kept = []
        for before, down in zip(self.before, self.down, strict=False):
            kept.append(y := before(y))
            y = down(y)
        y = self.before[-1](y)
        for up, after in zip(reversed(self.up), reversed(self.after), strict=True):
            y = after(up(y) + kept.pop())
        noise = F.pixel_shuffle(self.last(y), _FOLD)
        clean = (padded - noise)[..., :height, :width]
        # In training, what is out of the range has to be told by how much.
        return clean if self.training else clean.clamp(0, 1)


class _Residual(nn.Module):
    """x plus two convolutions of it; N×C×h×w -> N×C×h×w."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.two(F.relu(self.one(F.relu(x))))
        return out


def save_denoiser(
    denoiser: Denoiser, path: str | Path, *, half: bool = False, card: str = ""
) -> None:
    """Write a denoiser as a safetensors file.

    Args:
        half: in half precision.
        card: what it was trained on and what it scores, for who loads it.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        OSError: the file cannot be written; one that was there before stays.
    """
    facts = {"width": denoiser.width}
    write_network(path, denoiser.state_dict(), _FACTS, facts, half=half, card=card)


def load_denoiser(path: str | Path | TensorFile | None = None) -> Denoiser:
    """The denoiser of a file that :func:`save_denoiser` wrote, in evaluation mode.

    Args:
        path: None: that of the package, trained in front of EfficientNet-Lite0 on 960 photographs
            of 224 pixels, for noise of a standard deviation from .05 to .5.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or one without a denoiser.
    """
    if path is None:
        path = Path(str(files("captum_robust"))) / "weights" / "denoiser.safetensors"
    where = printable(str(path))
    tensors, facts = read_facts(path, _FACTS, "denoiser", _FORM)
    with torch.device("meta"):
        shape = Denoiser(facts["width"])
    check_fit(f"{where} holds no denoiser that can be used", shape, tensors)
    denoiser = Denoiser(facts["width"])
    denoiser.load_state_dict(tensors)
    return denoiser.eval()
