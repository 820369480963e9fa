"""Classifiers that take RGB in [0, 1]: the normalisation is inside, so ε is in pixel units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_type, valid_unicode
from captum_robust._contexts import noise_added, probing
from captum_robust._scores import check_scores, copies_of, two_classes
from captum_robust.models.layers import find_cam_layer, find_perceptual_layers, layer_of
from captum_robust.nn.scales import channels_of

_LOOKS = 4
"""Passes of a classifier whose images are looked at for a likely mistake."""


class Classifier(nn.Module):
    """A classifier with the facts that attributions, attacks and metrics need.

    Args:
        module: takes normalised N×C×H×W images, returns N×K scores; or one logit an image, which
            :meth:`forward` turns into the scores of two classes.
        mean, std: per channel, on pixels in [0, 1]: numbers, a tensor or an array. They are on the
            device and in the dtype of ``module``. None leaves the pixels as they are.
        input_size: (H, W), or one number for a square.
        class_names: K names, in the order of the scores: of a module with one logit, two.
        cam_layer: the layer for class activation maps, a module of ``module`` or its dotted name
            in it. None: found by :func:`find_cam_layer` when it is first asked for.
        perceptual_layers: layers whose features measure perceptual distance, in the same forms.
            None: found by :func:`find_perceptual_layers` when they are first asked for.
        reshape_transform: turns the output of ``cam_layer`` into N×C×h×w where it is not (the
            tokens of a vision transformer).
        name: what tables and reports call the model; the class of ``module`` by default.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: mean and std of different length, not finite, a std of zero, a size below 1, a
            layer that is not in ``module``, fewer than two class names.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = Classifier(net, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=8)
    >>> model(torch.rand(2, 3, 8, 8)).shape, model.cam_layer is net[1]
    (torch.Size([2, 4]), True)
    """

    mean: Tensor | None
    std: Tensor | None
    _cam_layer: tuple[nn.Module] | None  # in a tuple: nn.Module must not register it twice
    _perceptual_layers: tuple[nn.Module, ...] | None

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float] | Tensor | npt.NDArray[Any] | None = None,
        std: Sequence[float] | Tensor | npt.NDArray[Any] | None = None,
        input_size: int | tuple[int, int] = 224,
        class_names: Sequence[str] | None = None,
        cam_layer: nn.Module | str | None = None,
        perceptual_layers: Sequence[nn.Module | str] | None = None,
        *,
        reshape_transform: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_type("module", module, nn.Module, "a torch.nn.Module")
        like = _first_weight(module)
        dtype = torch.float32 if like is None else like.dtype
        means, stds = _of_channels(mean, dtype), _of_channels(std, dtype)
        fits = (mean is None) == (std is None) == (means is None) == (stds is None)
        fits = fits and (means is None or stds is None or means.shape == stds.shape)
        check(fits, f"mean and std: expected one value a channel each, got {mean!r} and {std!r}")
        are_positive = stds is None or bool((stds > 0).all())
        check(are_positive, f"std: expected positive values, got {std!r}")
        needs_layer = reshape_transform is not None and cam_layer is None
        check(not needs_layer, "reshape_transform: give the cam_layer whose output it turns")
        self.module = module
        self._looks_left = _LOOKS
        self.name = type(module).__name__ if name is None else name
        sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        fits = len(sides) == 2 and min(sides) >= 1
        check(fits, f"input_size: expected a number or (H, W) from 1, got {input_size!r}")
        self.input_size = int(sides[0]), int(sides[1])
        # As valid text, or no table or page of them could be written.
        names = None if class_names is None else [valid_unicode(str(n)) for n in class_names]
        message = "class_names: expected at least two (of one logit, those of class 0 and class 1)"
        check(names is None or len(names) > 1, f"{message}, got {names}")
        self.class_names = names
        self.reshape_transform = reshape_transform
        # Not persistent: the state dict stays that of `module`, under one prefix.
        for buffer, values in (("mean", means), ("std", stds)):
            placed = values if values is None or like is None else values.to(like.device)
            self.register_buffer(buffer, placed, persistent=False)
        self._cam_layer = None if cam_layer is None else (layer_of(module, cam_layer),)
        self.perceptual_layers = perceptual_layers

    def forward(self, x: Tensor) -> Tensor:
        """Scores N×K of images N×C×H×W with pixels in [0, 1].

        A module with one logit z an image has two classes here: -z/2 is the score of class 0, z/2
        that of class 1, whose probability is that of the sigmoid.

        Raises:
            ValueError: there are more or fewer ``class_names`` than scores.
        """
        given = self.module(self.normalised(x))
        if not self.training:  # else of auxiliary heads too, as Inception's
            check_scores("module", given, "a module whose forward returns the scores, as of ")
        scores: Tensor = two_classes(given, len(x), "module")
        names = len(self.class_names or ())
        fits = not names or getattr(scores, "ndim", 0) != 2 or names == scores.shape[1]
        check(fits, f"class_names: expected one for each of {scores.shape[-1]} scores, got {names}")
        return scores

    def normalised(self, x: Tensor) -> Tensor:
        """A copy of images N×C×H×W with pixels in [0, 1], as ``module`` takes them.

        It is in the dtype of the module's weights, where none of them has that of the images.
        """
        if self.mean is None or self.std is None:
            x = copies_of(x)
        else:
            is_real = not (x.is_meta or torch.compiler.is_compiling())
            if self._looks_left and is_real and not noise_added.get():
                self._look(x)
            x = (x - self.mean.to(x.device)) / self.std.to(x.device)
        like = _first_weight(self.module)
        fits = like is None or any(p.dtype == x.dtype for p in self.module.parameters())
        return x if like is None or fits else x.to(like.dtype)

    def _look(self, x: Tensor) -> None:
        """Say once that images are far from [0, 1]: in 0 to 255, or normalised already."""
        self._looks_left -= 1
        low, high = (0.0, 1.0) if x.numel() == 0 else torch.stack(x.detach().aminmax()).tolist()
        if low < -0.5 or high > 1.5:
            self._looks_left = 0
            warnings.warn(
                f"the images reach from {low:.3g} to {high:.3g}, but a Classifier takes pixels in "
                "[0, 1] and normalises them itself: divide images of 0 to 255 by 255, and leave "
                "Normalize out of the transforms",
                stacklevel=4,
            )

    @property
    def cam_layer(self) -> nn.Module:
        """The last layer with spatial output before pooling, after its activation.

        Raises:
            ValueError: none was found; give one to the constructor.
        """
        if self._cam_layer is None:
            self._cam_layer = (find_cam_layer(self, self.input_shape),)
        return self._cam_layer[0]

    @property
    def perceptual_layers(self) -> tuple[nn.Module, ...]:
        """The layers whose features measure perceptual distance.

        Assign modules of ``module``, or their dotted names in it, to choose others; None to find
        them again.

        Raises:
            ValueError: none was found; give some to the constructor. A layer not in ``module``.
        """
        if self._perceptual_layers is None:
            self._perceptual_layers = find_perceptual_layers(self)
        return self._perceptual_layers

    @perceptual_layers.setter
    def perceptual_layers(self, layers: Sequence[nn.Module | str] | None) -> None:
        got = f"got one {type(layers).__name__}"
        is_one = isinstance(layers, (str, nn.Module))
        check(not is_one, f"perceptual_layers: expected a list of layers, {got}", TypeError)
        own = None if layers is None else tuple(layer_of(self.module, x) for x in layers)
        self._perceptual_layers = own

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "perceptual_layers":  # nn.Module would register a lone module, past the setter
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image.

        C is the number of the means; without them, or with one for all channels, it is that of the
        first layer of ``module``.
        """
        means = 0 if self.mean is None else int(self.mean.shape[1])
        channels = means if means > 1 else channels_of(self.module, self.input_size)
        return (channels, *self.input_size)


def _first_weight(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _of_channels(values: Any, dtype: torch.dtype) -> Tensor | None:
    """Finite numbers as 1×C×1×1 on the CPU; None: they are no such numbers."""
    try:
        numbers = torch.as_tensor(values, dtype=dtype, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):  # None, a word, rows of several lengths
        return None
    # C×1×1 and 1×C×1×1 are such too.
    if numbers.ndim == 0 or numbers.numel() != max(numbers.shape) or not numbers.isfinite().all():
        return None
    return numbers.reshape(1, -1, 1, 1).clone()


def in_channels_of(model: Classifier, images: Tensor) -> Tensor:
    """RGB images N×3×H×W in the channels that the network takes: as they are, or as N×1×H×W grey.

    Grey is the luminance of ITU-R BT.601, as of Pillow's "L".

    Raises:
        ValueError: it takes another number of channels.
    """
    check_channels(model)
    if model.input_shape[0] == 3:
        return images
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).clamp(0, 1)


def check_channels(model: Classifier) -> None:
    """``ValueError`` for a network that takes neither grey nor RGB images."""
    channels = model.input_shape[0]
    check(channels in (1, 3), f"model: expected one of 1 or 3 channels, got one of {channels}")


def takes_size(model: Classifier, size: tuple[int, int]) -> bool:
    """Whether the network runs on images of another size, found by one black image of it.

    Vision transformers, and heads without global pooling, take their own size only.
    """
    try:
        with torch.no_grad(), probing(model) as image_of:
            model(image_of(model.input_shape[0], *size))
    except (RuntimeError, AssertionError, ValueError):  # as networks say that a size does not fit
        return False
    return True
