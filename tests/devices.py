"""A second device that there is on every machine: tensors that say they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
"""Where they say they are: autograd runs its backward passes on the CPU too."""


class Elsewhere(Tensor):
    """A tensor with numbers, of a device that has none."""

    numbers: Tensor
    is_meta = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=ELSEWHERE,
        )
        made.numbers = numbers
        return made

    def tolist(self) -> Any:
        _ASKED.append("tolist")
        return self.detach().numbers.tolist()

    def __getitem__(self, index: Any) -> Any:
        # A list would become a tensor of that device, which is not dispatched.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.numbers})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


_ASKED: list[str] = []
_ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


@contextmanager
def counted_questions() -> Iterator[list[str]]:
    """Inside, the list grows with each number that is asked of the other device.

    Those are numbers, lists and tensors that are brought here, and results whose shape depends on
    numbers: what a GPU has to be waited for.
    """
    _ASKED.clear()
    yield _ASKED


def _asks(name: str, args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor]) -> bool:
    there = [isinstance(t, Elsewhere) for t in tensors]
    if not any(there):
        return False
    if name == "copy_":
        return there == [False, True]
    if name == "_to_copy":
        return kwargs.get("device") is not None and torch.device(kwargs["device"]) != ELSEWHERE
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in _ASKING


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [isinstance(t, Elsewhere) for t in tensors]
    name = func.overloadpacket.__name__
    if _asks(name, args, kwargs, tensors):
        _ASKED.append(name)
    moves = name in ("_to_copy", "copy_")
    # As on a GPU, single numbers may be mixed, and indices of the CPU.
    counted = [e for e, t in zip(there, tensors, strict=True) if t.ndim or e]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        counted = counted[:1]
    if not moves and len(set(counted)) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    is_there = any(there[:1] if name == "copy_" else there)
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = [
        tree_map(lambda t: t.numbers if isinstance(t, Elsewhere) else t, each)
        for each in (args, kwargs)
    ]
    result = func(*plain[0], **plain[1])
    if name.endswith("_") and not name.startswith("__"):
        return args[0]
    if not is_there:
        return result
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, Tensor) else t, result)


@contextmanager
def another_device(monkeypatch: Any) -> Iterator[None]:
    """Inside, ``.to("meta")`` moves to a device that computes; no other can be mixed with it."""
    real = torch.autocast

    def autocast(kind: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if kind == "meta" else real(kind, *args, **options)

    is_on, tensor = torch.is_autocast_enabled, torch.tensor

    def made(values: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        return tensor(values, **options).to(device)  # it is not dispatched with its device

    own_dtype = torch.get_autocast_dtype
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(
        torch, "get_autocast_dtype", lambda kind: own_dtype("cpu" if kind == "meta" else kind)
    )
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_on(kind))
    with _Devices():
        yield


def moved(module: nn.Module) -> nn.Module:
    """The module with its weights and buffers elsewhere."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if not isinstance(p, Elsewhere):
                setattr(part, name, nn.Parameter(Elsewhere(p.detach())))
        for name, b in part.named_buffers(recurse=False):
            if not isinstance(b, Elsewhere):
                setattr(part, name, Elsewhere(b))
    return module
