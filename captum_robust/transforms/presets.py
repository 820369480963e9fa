"""Input transforms with the parameters of publications, and those used where none are named."""

from __future__ import annotations

from collections.abc import Callable

from captum_robust.transforms.denoising import TotalVariation
from captum_robust.transforms.filters import BitDepth, GaussianBlur, GaussianNoise
from captum_robust.transforms.geometry import crop_ensemble
from captum_robust.transforms.jpeg import JPEG
from captum_robust.transforms.quilting import Quilting
from captum_robust.transforms.transform import Transform


def default_transforms() -> tuple[Transform, ...]:
    """JPEG of quality 40 and 20, blur of 1 and 2 pixels, and noise of .1.

    Of some fifty ensembles of JPEG, blur, noise, half-size resizing and mirroring those with low
    qualities of JPEG lost least under attack; `studies/defenses.py choose` prints them.
    """
    return (JPEG(40), JPEG(20), GaussianBlur(1), GaussianBlur(2), GaussianNoise(0.1, seed=0))


PRESETS: dict[str, Callable[..., tuple[Transform, ...]]] = {
    "default": default_transforms,
    "guo2018_jpeg": lambda: (JPEG(75),),
    "guo2018_bit_depth": lambda: (BitDepth(3),),
    "guo2018_tvm": lambda: (TotalVariation(weight=0.03, drop=0.5),),
    "guo2018_quilting": lambda images, patches=1_000_000, **settings: (
        Quilting.fit(images, patches, patch=5, overlap=2, **settings),
    ),
    "guo2018_crop_ensemble": crop_ensemble,
    "guo2018_crop_grid": lambda: crop_ensemble(sliding=True),
}
"""Name -> a function that builds the transforms, an ensemble's in a tuple.

``guo2018_…``: Guo et al., "Countering Adversarial Images using Input Transformations"
(https://arxiv.org/abs/1711.00117), the parameters of the authors' code; where it leaves them to its
user (bits, number and size of the crops), those with which Athalye et al.
(https://arxiv.org/abs/1802.00420) built the defence again. ``guo2018_quilting`` takes the images
that its bank is made of, how many patches, and the other settings of :meth:`Quilting.fit`; Athalye
et al. draw from ten nearest patches, ``neighbors=10``.
"""
