"""What an input transform is: for the attributions that it defends, and for who attacks those."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_robust._checks import check, check_batch, check_count, check_inputs, check_shape
from captum_robust._scores import at_least_float

Self = TypeVar("Self", bound="Transform")


class Transform(ABC):
    """Images N×C×H×W -> the images N×C×h×w that a classifier is shown in their stead.

    What it draws is the same for every image, and depends on the seed and the size only, so a batch
    gives what its images give one by one.

    Args:
        seed: of what it draws; None: anew in each call, from torch's global generator.
    """

    draws = False
    """Whether it is random."""
    moves_pixels = False
    """Whether pixel (i, j) of the result shows another part of the image. Then :meth:`align` says
    which."""
    bounds: tuple[float, float] | None = (0.0, 1.0)
    """What pixels it takes; None: any."""
    full_precision = True
    """Whether half precision, and what autocast would halve, is computed in float32."""

    def __init__(self, *, seed: int | None = 0) -> None:
        self.seed = check_count("seed", seed, optional=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The transformed images, in the dtype and on the device of ``x``, without a graph.

        Raises:
            ValueError: no images N×C×H×W, an empty batch, NaN, infinity or pixels outside of
                ``bounds``.
            TypeError: images that are not floating point.
        """
        self._check(x)
        with torch.no_grad():
            return self._precisely(self._apply, x.detach())

    def surrogate(self, x: Tensor) -> Tensor:
        """A differentiable stand-in for ``__call__``, of its shape, for an attacker.

        Where the transform is differentiable by itself it is the transform.
        """
        self._check(x)
        with torch.enable_grad():
            return self._precisely(self._surrogate, x)

    def align(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Maps N×c×h×w of the transformed images, of any resolution, on images of ``size`` (H, W).

        Returns:
            The maps N×c×H×W, and how far each pixel was seen (1×1×H×W, in [0, 1]; the maps are
            zero where it is). Or, where all of the image is seen, maps of any resolution and None.
        """
        del size
        return maps, None

    def with_seed(self: Self, seed: int | None) -> Self:
        """The same transform, drawing from another seed."""
        other = copy.copy(self)
        Transform.__init__(other, seed=seed)
        return other

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """Transform checked images; gradients are off, unless :meth:`_surrogate` calls it."""

    def _surrogate(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def _generator(self) -> torch.Generator | None:
        """The CPU's, whatever the device of the images: the draws are the same on each."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def _precisely(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What it computes, in the dtype of ``x``; see ``full_precision``."""
        if not self.full_precision:
            return compute(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return compute(at_least_float(x)).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        check_shape("inputs", x, "N×C×H×W")
        check_batch((x,))
        check_inputs((x,), self.bounds)

    def __repr__(self) -> str:
        # What a class says of itself and an instance says otherwise, as `draws`, is no argument.
        own = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not (name.startswith("_") or hasattr(type(self), name))
            and (self.draws or name != "seed")
        )
        return f"{type(self).__name__}({', '.join(own)})"


class FunctionTransform(Transform):
    """A function of images as a transform; it may not move pixels, nor change the size.

    Raises:
        TypeError: no function, a class, or a function that does not take one argument.
        ValueError: it draws, or changes the size of an image 3×64×64.
    """

    bounds = None
    full_precision = False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(seed=None)
        is_class = isinstance(function, type)
        got = f"the class {function.__name__}" if is_class else type(function).__name__
        is_function = callable(function) and not is_class
        check(is_function, f"transforms: expected a Transform or a function, got {got}", TypeError)
        name = getattr(function, "__name__", repr(function))
        try:
            with suppress(ValueError):  # some functions written in C do not say what they take
                inspect.signature(function).bind(None)
        except TypeError:
            wrong = f"expected a function of images, {name} is not one"
            raise TypeError(f"transforms: {wrong}") from None
        self.function = function
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                first, second = function(image.clone()), function(image.clone())
            except Exception:  # of another size or number of channels it may work
                return
        shape: Any = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        check(
            shape == tuple(image.shape),
            f"transforms: {name} makes {shape} of {tuple(image.shape)} and does not say how maps "
            "get back to the image; write a subclass of captum_robust.defenses.Transform with "
            "align()",
        )
        check(
            torch.equal(first, second),
            f"transforms: {name} gives another result each time; a transform that draws has to "
            "take a seed: write a subclass of captum_robust.defenses.Transform",
        )

    def _apply(self, x: Tensor) -> Tensor:
        return self.function(x.clone())


def as_transforms(transforms: Any) -> tuple[Transform, ...]:
    """One transform, or a sequence of transforms and functions, as a tuple.

    Raises:
        TypeError: something else among them.
        ValueError: none; a function that :class:`FunctionTransform` refuses; a transform that draws
            without a seed, or one that moves pixels without ``align``.
    """
    is_several = isinstance(transforms, Iterable) and not callable(transforms)
    listed = list(transforms) if is_several else [transforms]
    check(listed, "transforms: expected at least one")
    members = tuple(t if isinstance(t, Transform) else FunctionTransform(t) for t in listed)
    for t in members:
        check(
            not t.draws or t.seed is not None,
            f"transforms: {t!r} draws anew in each call, so the same image would get another "
            "answer each time; give it a seed",
        )
        check(
            not t.moves_pixels or type(t).align is not Transform.align,
            f"transforms: {t!r} moves pixels and does not say how maps get back to the image; "
            "give its class a method align()",
        )
    return members


def backward_differentiable(transform: Transform, x: Tensor) -> Tensor:
    """The transformed images with the gradient of the surrogate.

    The backward pass differentiable approximation (BPDA) of Athalye et al., "Obfuscated Gradients
    Give a False Sense of Security" (https://arxiv.org/abs/1802.00420).
    """
    soft = transform.surrogate(x)
    return soft + (transform(x) - soft).detach()
