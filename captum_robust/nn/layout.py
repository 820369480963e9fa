"""Where the channels and the positions of a layer's output are, known from how it was computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_robust._checks import check
from captum_robust._contexts import hooked

_MOVING = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"}
_RESHAPING = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"}
_JOINING = {"cat", "concat", "concatenate"}
_PICKING = {"flip", "roll", "gather", "index_select", "take_along_dim", "sort"}
_MIXING = {"matmul", "bmm", "einsum", "__matmul__", "__rmatmul__", "t", "__get__"}
_AT_LAST = {"linear", "layer_norm", "rms_norm"}
_AT_FIRST = ("conv", "batch_norm", "instance_norm", "group_norm", "pixel_")


@dataclass(frozen=True)
class Layout:
    """Which dimension of a tensor N×… holds the channels, and which of its tokens the positions.

    It is also the function that turns such a tensor into N×C×….
    """

    channels: int
    grid: tuple[int, int] | None = None
    """(h, w) of the map whose positions became the tokens; None where that is not known."""
    before: int = 0
    """How many tokens, such as the class token, were put before those of the grid."""
    behind: int = 0
    """How many were put behind them."""
    in_order: bool = True
    """False where tokens were picked or joined so that their places are not known."""

    def __call__(self, x: Tensor) -> Tensor:
        """N×h×w×C or tokens N×T×C as N×C×h×w.

        Raises:
            ValueError: tokens whose places are not known.
        """
        if x.ndim != 3 or self.channels == 1:
            return x.movedim(self.channels, 1)
        tokens = x.shape[1]
        before, behind = self.before, self.behind
        if self.grid is None and not before + behind and math.isqrt(tokens) ** 2 != tokens:
            before = 1
        places = tokens - before - behind
        grid = self.grid or (math.isqrt(max(places, 0)),) * 2
        expected = "tokens whose places are known, as those of a square behind a class token"
        got = f"got {tuple(x.shape)}; give a reshape_transform that makes it N×C×h×w"
        fits = self.in_order and places == math.prod(grid) > 0
        check(fits, f"layer: expected N×C×h×w, or {expected}, {got}")
        inside = x[:, before : tokens - behind].transpose(1, 2)
        return inside.reshape(*inside.shape[:2], *grid)


ONE_POSITION = "layer: its output has one position, so that its map says nothing of where"
_WARNED: WeakSet[nn.Module] = WeakSet()


def recognised(
    layer: nn.Module, layout: Layout | None, output: Tensor, image: Tensor
) -> Layout | None:
    """What :func:`fitting` gives; a layer whose output has one position only is warned of once."""
    layout = fitting(layout, output, image)
    maps = output[:1] if layout is None else layout(output[:1])
    is_one = maps.ndim == image.ndim > 2 and maps[0, 0].numel() == 1 < image[0, 0].numel()
    if is_one and layer not in _WARNED:
        _WARNED.add(layer)
        warnings.warn(f"{ONE_POSITION}; take one before the pooling", stacklevel=2)
    return layout


def fitting(layout: Layout | None, output: Tensor, image: Tensor) -> Layout | None:
    """What turns a layer's output for images N×C×H×W into N×C×h×w; None where it is left as it is.

    Raises:
        ValueError: tokens of an image whose places are not known.
    """
    if image.ndim < 4 or output.ndim < 3 or (layout is None and output.ndim > 3):
        return None
    unknown = Layout(output.ndim - 1, in_order=False)
    layout = layout or unknown
    if layout.channels == 1:
        return None
    if output.ndim == 3:
        # Tokens are taken for a square of an image that is one.
        is_square = image.ndim == 4 and image.shape[2] == image.shape[3]
        layout = layout if layout.grid or is_square else unknown
        layout(output[:1])
    return layout


class Layouts(TorchFunctionMode):
    """While it lasts, the layouts of the tensors that a network computes are followed.

    A convolution, a pooling or a batch normalisation says that the channels are dimension 1. A
    linear layer or a normalisation over the last dimension says, of a tensor of which nothing is
    known, that they are the last. Sums, activations and the like keep what is known; moved and
    reshaped dimensions are followed, and tokens that are put before or behind the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()

    def of(self, x: Tensor) -> Layout | None:
        """The layout of a tensor that was computed inside; None where it is not known."""
        return self._known[x] if x in self._known else None  # noqa: SIM401  # get is untyped

    def is_map(self, x: Any) -> bool:
        """Whether it is N×C×h×w, as far as is known."""
        is_of_four = isinstance(x, Tensor) and x.ndim == 4
        return is_of_four and ((layout := self.of(x)) is None or layout.channels == 1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removesuffix("_")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim > 2:
            layout = self._layout(name, func, args, kwargs, result)
            if layout is not None:
                self._known[result] = layout
            elif result in self._known:  # written over
                del self._known[result]
        elif isinstance(result, tuple | list) and first is not None and (own := self.of(first)):
            for part in result:  # a split, or attention and its weights
                is_tensor = isinstance(part, Tensor)
                layout = _kept(own, first.shape, part.shape) if is_tensor else None
                if layout is not None:
                    self._known[part] = layout
        return result

    def _layout(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, result: Tensor
    ) -> Layout | None:
        if name.startswith(_AT_FIRST) or "_pool" in name:
            return Layout(1)
        if name in _JOINING:
            return self._joined(*args, **kwargs)
        tagged = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and self.of(a)]
        if not tagged or name in _MIXING:
            is_last = name in _AT_LAST and not _is_over_several(args, kwargs)
            return Layout(result.ndim - 1) if is_last else None
        # Of a sum, the one of which more is known.
        x = max(tagged, key=lambda a: self._known[a].grid is not None)
        known: Layout = self._known[x]
        if name in _MOVING:
            # The channels are where their own length is in a tensor of different lengths.
            lengths = tuple(range(2, 2 + x.ndim))
            moved = func(torch.empty(lengths, device="meta"), *args[1:], **kwargs)
            return replace(known, channels=moved.shape.index(lengths[known.channels]))
        if name in _RESHAPING:
            return _reshaped(known, x.shape, result.shape)
        if name in _PICKING and x.ndim == 3:
            return replace(known, in_order=False)
        if name == "__getitem__" and x.ndim == 3 == result.ndim:
            return _sliced(known, x.shape, args[1])
        if name == "linear" and known.channels != x.ndim - 1:
            return known  # it mixes positions
        return _kept(known, x.shape, result.shape)

    def _joined(self, tensors: Any, dim: int = 0, **_: Any) -> Layout | None:
        """Of tensors that are put one behind the other, the layout of those that have one."""
        tagged = [i for i, x in enumerate(tensors) if self.of(x)]
        if not tagged:
            return None
        # A single token beside several is a class token, whatever became of it.
        several = [i for i in tagged if tensors[i].shape[1] > 1] or tagged
        i, n = several[0], tensors[0].ndim
        known: Layout = self._known[tensors[i]]
        if dim % n == known.channels or n != 3 or dim % n != 1:
            return known
        return replace(
            known,
            before=known.before + sum(x.shape[1] for x in tensors[:i]),
            behind=known.behind + sum(x.shape[1] for x in tensors[i + 1 :]),
            in_order=known.in_order and len(several) == 1,
        )


@contextmanager
def followed_outputs(
    layer: nn.Module, at_input: bool = False
) -> Iterator[list[tuple[Tensor, Layout | None]]]:
    """It is given a list, which gets the tensors of the layer's last call with their layouts."""
    outputs: list[tuple[Tensor, Layout | None]] = []

    def record(_: nn.Module, given: Any, output: Any) -> None:
        value = given if at_input else output
        parts = value if isinstance(value, tuple) else (value,)
        outputs[:] = [(x.detach(), followed.of(x)) for x in parts if isinstance(x, Tensor)]

    with Layouts() as followed, hooked([layer], record):
        yield outputs


def placed(
    result: Any, outputs: list[tuple[Tensor, Layout | None]], reshapes: Sequence[Any]
) -> Any:
    """A result in the shape of a layer's outputs, its dimensions put in their places by these."""
    parts = result if isinstance(result, tuple) else (result,)
    if [getattr(part, "shape", None) for part in parts] != [x.shape for x, _ in outputs]:
        return result
    each = zip(reshapes, parts, strict=True)
    moved = tuple(part if reshape is None else reshape(part) for reshape, part in each)
    return moved if isinstance(result, tuple) else moved[0]


def _is_over_several(args: Any, kwargs: Any) -> bool:
    """Whether a normalisation is over more than the last dimension."""
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else None)
    return isinstance(shape, tuple | list) and len(shape) > 1


def _kept(known: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """The layout after an operation that leaves dimensions where they are; None for another."""
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if i and a != b]
    if len(old) != len(new) or (known.channels in changed and len(changed) > 1):
        return None
    if not changed or changed == [known.channels]:
        return known
    return Layout(known.channels, in_order=len(old) != 3)


def _sliced(known: Layout, shape: Sequence[int], index: Any) -> Layout | None:
    """The layout of tokens N×T×C of which some at the ends are left out."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return replace(known, in_order=False)
    start, stop, _ = index[1].indices(shape[1]) if len(index) > 1 else (0, shape[1], 1)
    if stop <= known.before or start >= shape[1] - known.behind:
        return None  # none of the positions
    before, behind = known.before - start, known.behind - (shape[1] - stop)
    whole = known.in_order and min(before, behind) >= 0
    return replace(known, before=max(before, 0), behind=max(behind, 0), in_order=whole)


def _reshaped(known: Layout, old: Sequence[int], new: Sequence[int]) -> Layout | None:
    """The layout after a reshape, which keeps the channels only as a dimension of their own."""
    if tuple(old) == tuple(new):
        return known
    c = known.channels
    ahead = math.prod(old[:c])
    places = [i for i, s in enumerate(new) if i and s == old[c] and math.prod(new[:i]) == ahead]
    if not places:
        return None
    if len(new) != 3:
        return Layout(places[0])
    if len(old) != 4 or old[0] != new[0]:  # of windows, say
        return Layout(places[0], in_order=False)
    h, w = (s for d, s in enumerate(old) if d not in (0, c))
    return Layout(places[0], (h, w))
