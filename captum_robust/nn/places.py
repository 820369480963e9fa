"""Which place of the image each number of a network's tensors stands for, followed in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# fmt: off
_MOVING = {
    "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "T",
    "mT", "H", "mH", "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze",
    "expand", "expand_as", "view_as", "reshape_as", "broadcast_to", "repeat", "tile",
    "repeat_interleave", "flip", "fliplr", "flipud", "rot90", "roll", "gather", "index_select",
    "take_along_dim", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk",
    "tensor_split", "getitem", "unfold",
}
_KEEPING = {
    "softmax", "log_softmax", "normalize", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "data", "to", "half", "feature_alpha_dropout", "float", "double",
    "bfloat16", "type", "type_as", "cpu", "cuda", "contiguous", "clone", "detach",
    "requires_grad", "hardswish", "hardsigmoid", "softplus", "softsign", "tanhshrink",
    "softmin", "logsigmoid", "rrelu", "prelu", "celu", "selu", "clamp", "clip", "nan_to_num",
    "masked_fill", "local_response_norm", "where", "rdiv", "rpow", "batch_norm",
    "instance_norm", "group_norm", "cumsum",
}
# fmt: on
_JOINING = {"cat": 0, "concat": 0, "concatenate": 0, "vstack": 0, "row_stack": 0}
_JOINING |= {"hstack": 1, "column_stack": 1, "dstack": 2}
"""With the dimension along which they join where none is given."""
_REDUCING = {"mean", "sum", "amax", "amin", "max", "min", "median", "logsumexp"}
_NORMALISING = {"layer_norm", "rms_norm"}
_OF_ROWS = {"linear", *_NORMALISING}
_MULTIPLYING = {"matmul", "bmm", "rmatmul", *_OF_ROWS}
_ATTENDING = {"multi_head_attention_forward", "scaled_dot_product_attention"}
_OF_WINDOWS = ("conv", "pixel_", "interpolate", "upsample")
_AT_FIRST = (*_OF_WINDOWS, "batch_norm", "instance_norm", "group_norm")
_RANDOM = ("rand", "multinomial", "bernoulli")

NOWHERE = -1.0
"""The coordinate of what stands for no place, as a class token."""
_TOLERANCE = 1e-4
"""Of coordinates, in parts of the image."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the numbers of a tensor come from.

    Its parts are tensors that can be expanded to the tensor's shape: the number of the sample, and
    a coordinate from 0 to 1 along each further dimension of the image. A part has the length 1 in
    each dimension in which it doesn't vary.
    """

    parts: tuple[Tensor, ...] = ()
    in_order: bool = False
    """Whether they are those of an image as it came, of which a convolution is a map in order."""


PLAIN = Places()
"""A map N×C×…, with the places in order."""
LOST = Places()
"""Of what came from the image by an operation that isn't known."""
LOST_ROWS = Places()
"""Such, with the channels in the last dimension."""


class Layouts(TorchFunctionMode):
    """While it lasts, the places of the tensors that a network computes are followed.

    A convolution or a pooling of what nothing is known of gives a map N×C×…, in order. A moved,
    reshaped or joined tensor has its coordinates moved likewise, in the same operation. A product
    with weights, a mean and a normalisation have the mean of the places that they are made of. What
    an unknown operation gives is lost, until it is added to what isn't.
    """

    def __init__(self, *images: Tensor) -> None:
        super().__init__()
        self._known: MutableMapping[Tensor, Places] = WeakTensorKeyDictionary()
        self.begin_at(*images)

    def begin_at(self, *images: Tensor) -> None:
        """Follow what is computed of images N×C×…, series N×T×F or N×C×T, or numbers N×T."""
        for x in images:
            self._known[x] = Places(_coordinates(x), in_order=True)

    def of(self, x: Tensor) -> Places | None:
        """The places of a tensor that was computed inside; None where nothing is known."""
        return self._known[x] if x in self._known else None  # noqa: SIM401  # get is untyped

    def is_map(self, x: Any) -> bool:
        """Whether it is N×C×h×w, as far as is known."""
        return isinstance(x, Tensor) and x.ndim == 4 and self.channels(x) == 1

    def channels(self, x: Tensor) -> int:
        """The dimension of the channels: 1, unless the places are known to vary along it."""
        places = self.of(x)
        if places is LOST_ROWS:
            return x.ndim - 1
        varying = {d for part in places.parts[1:] for d in _varying(part)} if places else set()
        return next((d for d in (1, *reversed(range(1, x.ndim))) if d not in varying), 1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name_of(func)
        if name == "setitem":
            self._write(*args)
            return result
        results = result if isinstance(result, tuple | list) else (result,)
        if not any(isinstance(r, Tensor) for r in results):
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places: Iterable[Places | None]
        if any(x in self._known for x in given):
            with torch.no_grad():
                places = self._followed(name, func, args, kwargs, given, results)
        else:
            places = [_of_unknown(name, r) for r in results if isinstance(r, Tensor)]
        tensors = [r for r in results if isinstance(r, Tensor)]
        for r, known in zip(tensors, places, strict=False):
            if known is not None:
                self._known[r] = known
        return result

    def _followed(
        self,
        name: str,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        results: Sequence[Any],
    ) -> list[Places]:
        """The places of each result, of tensors some of which are known."""
        first = next(x for x in results if isinstance(x, Tensor))
        lost = [LOST] * len(results)
        if name in _JOINING or name == "stack":
            tensors = args[0] if args else kwargs["tensors"]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else _JOINING.get(name))
            return [self._joined(func, tensors, None if name == "stack" else dim, args, kwargs)]
        x = given[1] if name == "rmatmul" else given[0]
        places = self.of(x)
        if _is_of_windows(name):
            return lost if places is None else [_of_windows(places, x, first)]
        if name in _MULTIPLYING:
            is_rows = places in (None, LOST, LOST_ROWS) and name in _OF_ROWS
            if is_rows and first.ndim > 2:
                return [LOST_ROWS]
            shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
            if name in _NORMALISING and (len(shape) > 1 or places is PLAIN):
                return [places or LOST]
            return [self._of_means(x, (-1,), keepdim=True)]
        if name in _ATTENDING:
            return [self._of_means(x, (-1,), keepdim=True), *lost[1:]]
        if name in _REDUCING and len(given) == 1:
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keepdim = kwargs.get("keepdim", len(args) > 2 and args[2])
            dims = (dims,) if isinstance(dims, int) else dims
            return lost if dims is None else [self._of_means(x, dims, keepdim), *lost[1:]]
        if name == "embedding" and places and places.parts:
            return [Places(tuple(part.unsqueeze(-1) for part in places.parts))]
        if name in _MOVING or name == "pad" or func is torch.nn.functional.unfold:
            return self._moved(name, func, (x, *args[1:]), kwargs, results)
        if name in _KEEPING or name in _REDUCING or _is_pointwise(name):
            return [_merged([(self.of(t), t) for t in given], first.ndim)] * len(results)
        return lost

    def _of_means(self, x: Tensor, dims: Sequence[int], keepdim: bool) -> Places:
        places = self.of(x)
        if places is None or places in (LOST, LOST_ROWS):
            return LOST
        return Places(tuple(_mean(part, dims, keepdim) for part in _parts(places, x)))

    def _moved(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, results: Sequence[Any]
    ) -> list[Places]:
        """The places after an operation that moves numbers, by the same operation on them."""
        x, places = args[0], self.of(args[0])
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        index = tree_leaves((args[1:], kwargs))
        is_by_data = any(isinstance(i, Tensor) and self.of(i) for i in index)
        if places in (None, LOST, LOST_ROWS) or (is_by_data and not name.endswith("_as")):
            return [LOST_ROWS if places is LOST_ROWS else LOST] * len(results)
        assert places is not None
        if name == "pad" and (places is PLAIN or mode != "constant"):
            return [PLAIN if places is PLAIN else LOST]
        if name == "view" and isinstance(args[1], torch.dtype):
            return [LOST]
        if name in ("view", "view_as"):  # which an expanded part may not have
            func, args, kwargs = torch.reshape, (x, results[0].shape), {}
        moved: list[list[Tensor]] = [[] for _ in results]
        kwargs = {k: v for k, v in kwargs.items() if not (name == "pad" and k == "value")}
        kwargs = {k: v for k, v in kwargs.items() if k not in ("input", "self")}
        args = args[:2] if name == "pad" else args
        for i, part in enumerate(_parts(places, x)):
            # From 1, so that the zeros of a border are nowhere.
            parts = func((part + 1).expand(x.shape), *args[1:], **kwargs)
            for own, each in zip(
                moved, [parts] if isinstance(parts, Tensor) else parts, strict=True
            ):
                own.append(compressed(each - 1, ignore_nowhere=i == 0))
        return [Places(tuple(parts)) for parts in moved]

    def _joined(
        self, func: Callable[..., Any], tensors: Any, dim: int | None, args: Any, kwargs: Any
    ) -> Places:
        """The places of tensors that are put one behind the other; ``dim`` None: of a stack."""
        every = [self.of(x) for x in tensors]
        known = [(p, x) for p, x in zip(every, tensors, strict=True) if p]
        known = [(p, x) for p, x in known if p not in (LOST, LOST_ROWS)]
        if not known:
            return LOST_ROWS if LOST_ROWS in every else LOST
        if dim is not None:
            each = [(_parts(p, x), x) for p, x in known]
            along = [part.shape[dim] for parts, _ in each for part in parts]
            if max(along) == 1 and any(x.shape[dim] > 1 for _, x in known):  # the channels
                merged = _merged(known, known[0][1].ndim)
                if merged is not LOST:
                    return merged
        # A single token beside several is a class token, whatever became of it.
        several = [(p, x) for p, x in known if p is PLAIN or any(map(_varying, p.parts[1:]))]
        own = {id(x): _parts(p, x) for p, x in several or known}
        counts = {len(parts) for parts in own.values()}
        if len(counts) > 1:
            return LOST
        joined = []
        for i in range(counts.pop()):
            nowhere = torch.full((), NOWHERE, device=_device_of(tensors[0]))
            whole = [(own[id(x)][i] if id(x) in own else nowhere).expand(x.shape) for x in tensors]
            rest = {k: v for k, v in kwargs.items() if k != "tensors"}
            joined.append(compressed(func(whole, *args[1:], **rest), ignore_nowhere=i == 0))
        return Places(tuple(joined))

    def _write(self, x: Tensor, index: Any, value: Any) -> None:
        """Follow what is written into a tensor."""
        places, of_value = self.of(x), self.of(value) if isinstance(value, Tensor) else None
        is_placed = of_value is not None and of_value not in (LOST, LOST_ROWS)
        if not isinstance(value, Tensor) or value.ndim == 0 or not (places or is_placed):
            return
        own = () if places in (None, LOST, LOST_ROWS) else _parts(places, x)
        other = _parts(of_value, value) if is_placed and of_value is not None else ()
        by_data = any(isinstance(i, Tensor) and self.of(i) for i in tree_leaves(index))
        if by_data or (own and other and len(own) != len(other)):
            self._known[x] = LOST
            return
        written = []
        nowhere = torch.full((), NOWHERE, device=_device_of(x))
        for i in range(len(own or other)):
            whole = (own[i] if own else nowhere).expand(x.shape).clone()
            whole[index] = (other[i] if other else nowhere).expand(value.shape)
            written.append(compressed(whole, ignore_nowhere=i == 0))
        self._known[x] = Places(tuple(written)) if written else LOST


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of a property
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.strip("_") if name.startswith("__") else name.removesuffix("_")


def _of_unknown(name: str, result: Tensor) -> Places | None:
    """The places of a result of tensors of which nothing is known."""
    if name.startswith(_RANDOM):
        return LOST
    if result.ndim < 3:
        return None
    if _is_of_windows(name) or name.startswith(_AT_FIRST):
        return PLAIN
    return LOST_ROWS if name in _OF_ROWS else None


def _is_of_windows(name: str) -> bool:
    return name.startswith(_OF_WINDOWS) or "_pool" in name


@cache
def _is_pointwise(name: str) -> bool:
    """Whether it is an operation on each number by itself, as PyTorch says of its own."""
    short = name[1:] if name[:1] in ("r", "i") else name  # of __radd__ and __iadd__
    return name in ("truediv", "floordiv", "itruediv", "rtruediv") or any(
        torch.Tag.pointwise in getattr(packet, overload).tags
        for packet in (getattr(torch.ops.aten, n, None) for n in (name, short) if n.isidentifier())
        if packet is not None
        for overload in packet.overloads()
    )


def _coordinates(x: Tensor) -> tuple[Tensor, ...]:
    """The numbers of the samples, and a coordinate for each further dimension."""
    parts = []
    for d, length in enumerate(x.shape):
        steps = torch.arange(length, device=_device_of(x), dtype=torch.float32)
        steps = (steps + 0.5) / length if d else steps
        parts.append(
            steps.reshape(length, *[1] * (x.ndim - 1 - d)).expand(*[1] * d, *[-1] * (x.ndim - d))
        )
    return tuple(parts)


def _device_of(x: Tensor) -> torch.device:
    """Where the places of a tensor are: beside it, if it is anywhere."""
    return torch.device("cpu") if x.is_meta else x.device


def _parts(places: Places, x: Tensor) -> tuple[Tensor, ...]:
    if places is not PLAIN:
        return tuple(part.to(_device_of(x)) for part in places.parts)
    sample, channels, *spatial = _coordinates(x)
    return (sample, channels.mean().reshape([1] * x.ndim), *spatial)


def _varying(part: Tensor) -> list[int]:
    return [d for d, length in enumerate(part.shape) if length > 1]


def compressed(part: Tensor, ignore_nowhere: bool) -> Tensor:
    """A part without the dimensions in which it doesn't vary, these with the length 1.

    With ``ignore_nowhere`` what is nowhere does not count.
    """
    for d in sorted(range(part.ndim), key=part.stride):
        if part.shape[d] < 2:
            continue
        first = part.narrow(d, 0, 1)
        if part.stride(d) == 0:
            part = first
            continue
        first = part.amax(d, keepdim=True) if ignore_nowhere else first
        same = (part - first).abs() <= _TOLERANCE / 10
        if (same | (part == NOWHERE) if ignore_nowhere else same).all():
            part = first
    return part


def _mean(part: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """The mean over dimensions of what is somewhere."""
    dims = [d % part.ndim for d in dims]
    if any(part.shape[d] > 1 for d in dims):
        there = part != NOWHERE
        count = there.sum(dims, keepdim=True)
        total = torch.where(there, part, 0).sum(dims, keepdim=True)
        part = compressed(torch.where(count > 0, total / count.clamp(min=1), NOWHERE), False)
    return part if keepdim else part.squeeze(dims)


def _merged(known: Sequence[tuple[Places | None, Tensor]], ndim: int) -> Places:
    """The places that tensors have in common; those that have none, or lost them, do not count."""
    placed = [(p, x) for p, x in known if p is not None and p not in (LOST, LOST_ROWS)]
    if not placed:
        return LOST_ROWS if any(p is LOST_ROWS for p, _ in known) else LOST
    if all(p is PLAIN and x.ndim == ndim for p, x in placed):
        return PLAIN
    first, x = placed[0]
    if all(p is first for p, _ in placed) and x.ndim == ndim:
        return first
    every = [_parts(p, x) for p, x in placed]
    if len({len(parts) for parts in every}) > 1:
        return LOST
    merged = []
    for parts in zip(*every, strict=True):
        aligned = [part.reshape([1] * (ndim - part.ndim) + list(part.shape)) for part in parts]
        best = max(aligned, key=Tensor.numel)
        for part in aligned:
            if part.numel() == 1:
                continue
            if part.shape != best.shape or ((part - best).abs() > _TOLERANCE).any():
                return LOST
        merged.append(best)
    return Places(tuple(merged))


def _of_windows(places: Places, x: Tensor, result: Tensor) -> Places:
    """The places after a convolution, a pooling or a change of size, in order as those before."""
    if places in (LOST, LOST_ROWS) or x.ndim != result.ndim or x.ndim < 3:
        return LOST
    if places is PLAIN or places.in_order:
        return PLAIN
    sample, *axes = _parts(places, x)
    parts = [sample, *(_mean(part, [1], keepdim=True) for part in axes)]
    for d in range(2, x.ndim):
        if x.shape[d] == result.shape[d]:
            continue
        for i, part in enumerate(parts):
            length = part.shape[d]
            if length == 1:
                continue
            start = part.narrow(d, 0, 1)
            step = (part.narrow(d, length - 1, 1) - start) / (length - 1)
            lengthwise = [-1 if e == d else 1 for e in range(x.ndim)]
            old, new = (torch.arange(n, device=part.device) for n in (length, result.shape[d]))
            if i == 0 or ((start + step * old.reshape(lengthwise) - part).abs() > _TOLERANCE).any():
                return LOST
            middles = (new + 0.5) * length / len(new) - 0.5
            parts[i] = compressed(start + step * middles.reshape(lengthwise), False)
    found = Places(tuple(parts))
    plain = _merged([(found, result), (PLAIN, result)], result.ndim)
    varying = [_varying(part) for part in parts]
    return (
        PLAIN
        if plain is not LOST and varying == list(map(_varying, _parts(PLAIN, result)))
        else found
    )
