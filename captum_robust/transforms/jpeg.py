"""JPEG coding as an input transform, and a differentiable stand-in for it."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from captum_robust._checks import check, check_count
from captum_robust._threads import begin_thread
from captum_robust.transforms.transform import Transform

# JFIF: red, green and blue to brightness Y and colours Cb and Cr, which are around zero.
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


class JPEG(Transform):
    """The images after JPEG coding, the colours at half resolution (4:2:0).

    A defence of Dziugaite et al., "A study of the effect of JPG compression on adversarial images"
    (https://arxiv.org/abs/1608.00853), and of Guo et al. (https://arxiv.org/abs/1711.00117, quality
    75). The images are rounded to 8 bits and go through libjpeg on the CPU, so that every device
    gets the same.

    The surrogate is the differentiable JPEG of Shin and Song, "JPEG-resistant Adversarial Images"
    (Machine Learning and Computer Security workshop, NIPS 2017): the steps of the standard, with
    round(x) + (x − round(x))³ where coefficients are rounded.

    Args:
        quality: 1 (coarsest) to 100.

    Raises:
        ValueError: another quality; images of other than 1 or 3 channels.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        self.quality = check_count("quality", quality, 1, 100)

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        check(x.shape[1] in (1, 3), f"inputs: expected 1 or 3 channels for JPEG, got {x.shape[1]}")

    def _apply(self, x: Tensor) -> Tensor:
        images = (x * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=begin_thread) as pool:
            coded = torch.stack(list(pool.map(self._coded, images)))
        return coded.view(images.shape).permute(0, 3, 1, 2).to(x).contiguous() / 255

    def _coded(self, image: Tensor) -> Tensor:
        file = io.BytesIO()
        # H×W×1 is no image to Pillow, H×W is a grey one.
        pixels = Image.fromarray(image.squeeze(-1).numpy())
        pixels.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
        with Image.open(file) as coded:
            return torch.from_numpy(np.array(coded))

    def _surrogate(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # The standard's blocks: 8×8 pixels of brightness, 16×16 of colour.
        block = 8 if x.shape[1] == 1 else 16
        below, right = -height % block, -width % block
        pixels = F.pad(x * 255, (0, right, 0, below), mode="replicate")
        channels = pixels if x.shape[1] == 1 else _mixed(pixels, _TO_YCC)
        of_brightness, of_colour = _tables(self.quality)
        coded = _quantised(channels[:, :1] - 128, of_brightness) + 128
        if x.shape[1] == 3:
            colour = F.avg_pool2d(channels[:, 1:], 2)
            colour = _quantised(colour, of_colour)
            # The decoder's "fancy upsampling": 3/4 of the nearer sample, 1/4 of the farther.
            colour = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False)
            coded = _mixed(torch.cat((coded, colour), dim=1), _TO_RGB)
        return (coded[:, :, :height, :width] / 255).clamp(0, 1)


def _tables(quality: int) -> list[Tensor]:
    """What libjpeg divides the 8×8 coefficients of brightness and of colour by, at a quality."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG", quality=quality)
    file.seek(0)
    tables = JpegImageFile(file).quantization.values()
    return [torch.tensor(table).view(8, 8) for table in tables]


def _mixed(x: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Each pixel's channels, multiplied by a matrix."""
    return torch.einsum("dc,nchw->ndhw", torch.tensor(matrix).to(x), x)


def _quantised(x: Tensor, table: Tensor) -> Tensor:
    """Blocks of 8×8, their cosine transform rounded to multiples of the table, and back."""
    n, c, height, width = x.shape
    cosines, table = _cosines().to(x), table.to(x)
    blocks = x.reshape(n, c, height // 8, 8, width // 8, 8).transpose(3, 4)
    multiples = cosines @ blocks @ cosines.T / table
    nearest = multiples.detach().round()
    rounded = nearest + (multiples - nearest) ** 3
    blocks = cosines.T @ (rounded * table) @ cosines
    return blocks.transpose(3, 4).reshape(n, c, height, width)


def _cosines() -> Tensor:
    """The 8×8 orthonormal cosine transform: a row a frequency."""
    frequency, place = torch.arange(8.0).unsqueeze(1), torch.arange(8.0)
    waves = torch.cos(math.pi * (2 * place + 1) * frequency / 16) / 2
    waves[0] /= math.sqrt(2)
    return waves
