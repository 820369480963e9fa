"""What an input transform is: for the attributions that it defends, and for who attacks those."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_robust._checks import check_batch, check_inputs

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
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ValueError(f"seed: expected a whole number from 0, or None, got {seed!r}")
        self.seed = seed

    def __call__(self, x: Tensor) -> Tensor:
        """The transformed images, in the dtype and on the device of ``x``, without a graph.

        Raises:
            ValueError: no images N×C×H×W, an empty batch, NaN, infinity or pixels outside of
                ``bounds``.
            TypeError: images that are not floating point.
        """
        self._check(x)
        with torch.no_grad(), self._precision(x):
            return self._apply(self._widened(x.detach())).to(x.dtype)

    def surrogate(self, x: Tensor) -> Tensor:
        """A differentiable stand-in for :meth:`__call__`, of its shape, for an attacker.

        Where the transform is differentiable by itself it is the transform.
        """
        self._check(x)
        with torch.enable_grad(), self._precision(x):
            return self._surrogate(self._widened(x)).to(x.dtype)

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
        made = copy.copy(self)
        Transform.__init__(made, seed=seed)
        return made

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """Of images that are checked; gradients are off, unless :meth:`_surrogate` calls it."""

    def _surrogate(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def _generator(self) -> torch.Generator | None:
        """Of the CPU, whatever the device of the images: the draws are the same on each."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def _widened(self, x: Tensor) -> Tensor:
        return x.float() if self.full_precision and x.dtype.itemsize < 4 else x

    def _precision(self, x: Tensor) -> AbstractContextManager[Any]:
        if not self.full_precision:
            return nullcontext()
        return torch.autocast(x.device.type, enabled=False)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs: expected a tensor N×C×H×W, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"inputs: expected images N×C×H×W, got {tuple(x.shape)}")
        check_batch((x,))
        check_inputs((x,), self.bounds)

    def __repr__(self) -> str:
        # What a class says of itself and an instance says otherwise, as `draws`, is no argument.
        own = {
            k: v
            for k, v in vars(self).items()
            if not k.startswith("_") and not hasattr(type(self), k)
        }
        if not self.draws:
            own.pop("seed", None)
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in own.items())})"


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
        if not callable(function):
            raise TypeError(
                f"transforms: expected a Transform or a function, got {type(function).__name__}"
            )
        if isinstance(function, type):
            raise TypeError(
                f"transforms: expected a Transform or a function, got the class {function.__name__}"
            )
        if not _takes_one(function):
            name = getattr(function, "__name__", repr(function))
            raise TypeError(f"transforms: expected a function of images, {name} is not one")
        self.function = function
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                first, second = function(image.clone()), function(image.clone())
            except Exception:  # of another size or number of channels it may work
                return
        name = getattr(function, "__name__", repr(function))
        if not isinstance(first, Tensor) or first.shape != image.shape:
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"transforms: {name} makes {got} of {tuple(image.shape)} and does not say how maps "
                "get back to the image; write a subclass of captum_robust.defenses.Transform with "
                "align()"
            )
        if not torch.equal(first, second):
            raise ValueError(
                f"transforms: {name} gives another result each time; a transform that draws has to "
                "take a seed: write a subclass of captum_robust.defenses.Transform"
            )

    def _apply(self, x: Tensor) -> Tensor:
        return self.function(x.clone())


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether it can be called with images alone, as far as it says."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not say
        return True
    return True


def as_transforms(transforms: Any) -> tuple[Transform, ...]:
    """One transform, or a sequence of transforms and functions, as a tuple.

    Raises:
        TypeError: something else among them.
        ValueError: none; a function that :class:`FunctionTransform` refuses; a transform that draws
            without a seed, or one that moves pixels without ``align``.
    """
    is_several = isinstance(transforms, Iterable) and not callable(transforms)
    listed = list(transforms) if is_several else [transforms]
    if not listed:
        raise ValueError("transforms: expected at least one")
    found = tuple(t if isinstance(t, Transform) else FunctionTransform(t) for t in listed)
    for t in found:
        if t.draws and t.seed is None:
            raise ValueError(
                f"transforms: {t!r} draws anew in each call, so the same image would get another "
                "answer each time; give it a seed"
            )
        if t.moves_pixels and type(t).align is Transform.align:
            raise ValueError(
                f"transforms: {t!r} moves pixels and does not say how maps get back to the image; "
                "give its class a method align()"
            )
    return found


def backward_differentiable(transform: Transform, x: Tensor) -> Tensor:
    """The transformed images with the gradient of the surrogate.

    The backward pass differentiable approximation (BPDA) of Athalye et al., "Obfuscated Gradients
    Give a False Sense of Security" (https://arxiv.org/abs/1802.00420).
    """
    soft = transform.surrogate(x)
    return soft + (transform(x) - soft).detach()
