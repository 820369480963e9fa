"""A box that several maps of one image vote for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import captum.attr
import torch
from torch import Tensor

from captum_robust._resize import blurred, resize_image
from captum_robust.attr._layer_maps import attributed
from captum_robust.catalog.thresholds import Threshold
from captum_robust.models import Classifier
from captum_robust.nn import MaskingNetwork, upsampled

MapOf = Callable[[Tensor, Tensor], Tensor]
Guide = tuple[float, bool, tuple[float, ...]]
"""A scale of the image, whether it is mirrored, and by how many pixels of 224 the map is blurred,
each time for a vote."""


@dataclass(frozen=True)
class Votes:
    """Which maps vote, and at which thresholds: see ``studies/box_votes.py``.

    The thresholds were chosen on half of 400 annotated photographs.
    """

    scales: tuple[float, ...]
    """Of the images that masks are made of, each mirrored too; the first is 1."""
    guides: tuple[Guide, ...]
    """Of the guided maps; the first has scale 1 and is not mirrored."""
    masks: Threshold
    guided: Threshold
    ball: Threshold | None = None
    """None: the perceptual ball does not vote."""


FAST = Votes((1.0,), ((1.0, False, (4.0,)),), Threshold("energy", 0.8), Threshold("energy", 0.95))
BEST = Votes(
    (1.0, 5 / 7, 6 / 7, 8 / 7, 9 / 7, 10 / 7),
    ((1.0, False, (0.0, 4.0, 8.0)), (1.0, True, (0.0,)), (9 / 7, False, (0.0,))),
    Threshold("mean", 2.5),
    Threshold("energy", 0.9),
    Threshold("mean", 1.0),
)


VOTES = {"box_vote": BEST, "box_vote_fast": FAST}
"""By the names of the methods."""


class BoxVote:
    """The mean, corner by corner, of the boxes that masks and guided maps draw.

    A mask covers the object or its most telling part, a guided class activation map its outline:
    they err in different directions. Within a kind of map the boxes are averaged first, then over
    the kinds. No box was seen in training; the thresholds are chosen on annotated photographs.

    Args:
        model: the classifier, which is the encoder of the network too.
        network: gives the masks.
        votes: which maps vote.
        ball: images N×C×H×W and classes N -> maps N×H×W of a perceptual ball, where it votes.
    """

    def __init__(
        self, model: Classifier, network: MaskingNetwork, votes: Votes, ball: MapOf | None = None
    ) -> None:
        self.model, self.network, self.votes, self.ball = model, network, votes, ball
        self.backprop = captum.attr.GuidedBackprop(model)
        self.guided_cam = captum.attr.GuidedGradCam(model, model.cam_layer)

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The features of the images, which :meth:`__call__` takes, and their scores N×K."""
        with torch.no_grad():
            return self.network.encode(images)

    def __call__(
        self, images: Tensor, target: Tensor, features: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps N×H×W, the mean of all kinds, and boxes N×4 in pixels of the images.

        Args:
            images: N×C×H×W with pixels in [0, 1].
            target: N classes.
            features: of the images, if they are known.
        """
        features = self.encode(images)[0] if features is None else features
        masks = [self._mask(features, images, target)]
        for scale in self.votes.scales:
            for mirrored in (True,) if scale == 1 else (False, True):
                other = self.encode(_seen(images, scale, mirrored))[0]
                mask = self._mask(other, images, target)
                masks.append(mask.flip(2) if mirrored else mask)
        guided = []
        for scale, mirrored, blurs in self.votes.guides:
            known = features if scale == 1 and not mirrored else None
            x = _seen(images, scale, mirrored)
            heat = self._guided(x, target, known)
            for blur in blurs:
                soft = blurred(heat, blur * min(x.shape[2:]) / 224) if blur else heat
                soft = upsampled(soft[:, None], (images.shape[2], images.shape[3]))[:, 0]
                guided.append(soft.flip(2) if mirrored else soft)
        kinds = [(masks, self.votes.masks), (guided, self.votes.guided)]
        if self.ball is not None and self.votes.ball is not None:
            kinds.append(([self.ball(images, target)], self.votes.ball))
        boxes = [torch.stack([t.boxes(m) for m in maps]).mean(dim=0) for maps, t in kinds]
        return _mean_of([m for maps, _ in kinds for m in maps]), torch.stack(boxes).mean(dim=0)

    def _mask(self, features: Sequence[Tensor], images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            masks = self.network.decoder(features, target)
        return upsampled(masks, (images.shape[2], images.shape[3]))[:, 0].float()

    def _guided(self, images: Tensor, target: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        """Guided Grad-CAM; of known features that the classes' weights pool, without its pass."""
        decoder, size = self.network.decoder, (images.shape[2], images.shape[3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum's notes on the hooks that it sets
            if decoder.head_weight is None:
                guided = attributed(self.guided_cam, images, target=target)
            else:
                features = self.encode(images)[0] if features is None else features
                weights = decoder.head_weight[target].to(features[-1])
                cam = torch.einsum("nchw,nc->nhw", features[-1], weights)[:, None].clamp(min=0)
                guided = attributed(self.backprop, images, target=target)
                guided = guided * torch.nn.functional.interpolate(cam, size)  # nearest, as Captum
        maps: Tensor = guided.detach().float().abs().sum(dim=1)
        return maps


def _seen(images: Tensor, scale: float, mirrored: bool) -> Tensor:
    """The images at another scale, and from left to right if ``mirrored``."""
    size = (round(scale * images.shape[2]), round(scale * images.shape[3]))
    scaled = images if scale == 1 else resize_image(images, size)
    return scaled.flip(3) if mirrored else scaled


def _mean_of(maps: Sequence[Tensor]) -> Tensor:
    """Of maps N×H×W, each divided by its largest value."""
    largest = [m.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30) for m in maps]
    return torch.stack([m / top for m, top in zip(maps, largest, strict=True)]).mean(dim=0)
