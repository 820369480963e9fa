"""Every temporary change to a model and to what surrounds it; each undoes itself."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._script import RecursiveScriptModule
from torch.utils.checkpoint import CheckpointFunction

from captum_robust._checks import check

AS_WRITTEN = (
    "a scripted, traced or exported model runs without its modules: give the nn.Module that it was "
    "made of"
)
"""What to do where a layer is hidden."""
PRECISIONS = ("float32", "bfloat16")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Inside, a network computes in bfloat16 if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def without_autocast(*tensors: Tensor) -> torch.autocast:
    """Inside, what is computed of such tensors is not brought to half precision."""
    return torch.autocast(tensors[0].device.type, enabled=False)


class _Switched:
    """An attribute of shared objects that is off while any thread wants it: the last puts it back.

    A thread that put back what it had found would do so under the others.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._users: dict[Any, list[int]] = {}
        """Object -> the threads that want it off, each as often as it does."""
        self._before: dict[Any, bool] = {}
        """Object -> what it was before the first of them."""

    @contextmanager
    def off(self, objects: Iterable[Any]) -> Iterator[None]:
        """Inside, the attribute of all is False."""
        thread, found = threading.get_ident(), {}
        with self._lock:
            for it in dict.fromkeys(objects):
                users = self._users.setdefault(it, [])
                is_on = getattr(it, self._name)
                found[it] = self._before[it] if set(users) - {thread} else is_on
                self._before.setdefault(it, is_on)
                users.append(thread)
                if is_on:
                    setattr(it, self._name, False)
        try:
            yield
        finally:
            with self._lock:
                for it, before in found.items():
                    users = self._users[it]
                    users.remove(thread)
                    if not set(users) - {thread} and getattr(it, self._name) != before:
                        setattr(it, self._name, before)
                    if not users:
                        del self._users[it], self._before[it]


_training, _requires_grad = _Switched("training"), _Switched("requires_grad")


noise_added: ContextVar[bool] = ContextVar("noise_added", default=False)
"""Whether the images that a model is given leave the range of pixels on purpose."""
_told: WeakSet[nn.Module] = WeakSet()
"""Models that were already said to be in training mode."""
_RANDOM = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def tell_of_training(forward_func: Any) -> None:
    """Warn, once for each model, that it is in training mode, if its layers do other things there.

    A model whose own flag is off has single layers in that mode on purpose.
    """
    model = getattr(forward_func, "__self__", forward_func)
    if not isinstance(model, nn.Module) or not model.training or model in _told:
        return
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, _RANDOM) and m.training}
    if kinds:
        _told.add(model)
        warnings.warn(
            f"forward_func: the model is in training mode, in which {' and '.join(sorted(kinds))} "
            "layers mix the samples or draw anew in each pass; call model.eval() first",
            stacklevel=2,
        )


@contextmanager
def evaluation(*networks: object) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode is put back. Functions are left alone."""
    models = [n for n in networks if isinstance(n, nn.Module)]
    with _training.off(m for model in models for m in model.modules()):
        yield


def resting(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """None of the parameters asks for a gradient inside."""
    return _requires_grad.off(parameters)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """The networks in evaluation mode, no weight asking for a gradient."""
    with evaluation(*networks), resting(p for n in networks for p in n.parameters()):
        yield


@contextmanager
def without_new_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients that parameters get inside are gone afterwards, where there were none before."""
    bare = [p for p in model.parameters() if p.grad is None]
    try:
        yield
    finally:
        for p in bare:
            p.grad = None


@contextmanager
def restored(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The layers' own parameters and buffers may change inside; they are put back bit by bit."""
    held: list[dict[str, Any]] = []
    for layer in layers:
        held += [layer._parameters, layer._buffers]
    before = [dict(h) for h in held]
    values = [(t, t.detach().clone()) for kept in before for t in kept.values() if t is not None]
    try:
        yield
    finally:
        for h, kept in zip(held, before, strict=True):
            h.update(kept)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_changing = threading.RLock()
"""For what all threads share: the locks of the models, and how models run."""
process_wide = threading.RLock()
"""For long changes to what the whole process has, as the global generators, or to the code of a
model; taken before the lock of a model."""


def alone(forward_func: Any) -> AbstractContextManager[Any]:
    """Inside, no other thread runs the model by this package.

    For Captum's attributions, whose hooks would see the passes of others.
    """
    with _changing:
        try:
            return _locks.setdefault(
                getattr(forward_func, "__self__", forward_func), threading.RLock()
            )
        except TypeError:  # something that has no weak reference
            return nullcontext()


def owned(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook (module, …) that passes of other threads do not call, nor copies of its module.

    ``nn.DataParallel`` runs copies with the same hooks, of a small batch also in this thread.
    """
    owner = threading.get_ident()

    def own(module: nn.Module, *args: Any) -> Any:
        is_own = threading.get_ident() == owner and not getattr(module, "_is_replica", False)
        return hook(module, *args) if is_own else None

    return own


class _Registering(threading.local):
    """How hooks are put on modules; the depth is of each thread, the rest of the class."""

    depth = 0
    """How many :func:`private_hooks` the thread is inside of."""
    users = 0
    """How many all threads are inside of."""
    before = ExitStack()
    """What puts back how it was before the first."""


_registering = _Registering()


def _privately(register: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(register)
    def registered(module: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
        return register(module, owned(hook) if _registering.depth else hook, **options)

    return registered


@contextmanager
def private_hooks(model: Any) -> Iterator[None]:
    """Inside, forward hooks that this thread puts on a module are not called by other threads.

    For attributions of Captum, whose own hooks see every pass there is. They know the copies that
    an ``nn.DataParallel`` runs, and are left as they are where there is one.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(m, nn.DataParallel) for m in modules):
        yield
        return
    with _changing:
        _Registering.users += 1
        if _Registering.users == 1:
            for name in ("register_forward_pre_hook", "register_forward_hook"):
                register = getattr(nn.Module, name)
                _Registering.before.callback(setattr, nn.Module, name, register)
                setattr(nn.Module, name, _privately(register))
    _registering.depth += 1
    try:
        yield
    finally:
        _registering.depth -= 1
        with _changing:
            _Registering.users -= 1
            if _Registering.users == 0:
                _Registering.before.close()


class _RunOnce:
    """In the place of ``torch.utils.checkpoint.CheckpointFunction``."""

    users = 0
    """How many want it at the moment, of all threads."""
    eager = ExitStack()
    """What ends the eager mode of compiled models."""

    @staticmethod
    def apply(segment: Callable[..., Any], _: bool, *arguments: Any) -> Any:
        return segment(*arguments)


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, models run as they are written: not compiled, nor in segments without a graph.

    Compiled code does not run the hooks that came after it, or only now and then, and has no second
    derivative. A segment of ``torch.utils.checkpoint`` with ``use_reentrant=True`` has no graph
    until it is computed again, and no gradient by its input: it keeps its memory here.
    """
    # Without torch._dynamo, which takes long to import, nothing is compiled. From torch 2.6 on.
    can_be = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    segments: Any = torch.utils.checkpoint
    with _changing:
        _RunOnce.users += 1
        if _RunOnce.users == 1:
            segments.CheckpointFunction = _RunOnce
            if can_be:
                _RunOnce.eager.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _changing:
            _RunOnce.users -= 1
            if _RunOnce.users == 0:
                segments.CheckpointFunction = CheckpointFunction
                _RunOnce.eager.close()


DID_NOT_RUN = (
    "did not run in the forward pass, in this thread (nn.DataParallel runs copies: give its "
    f"module, model.module; {AS_WRITTEN})"
)
"""What is said of a layer whose hook was not called."""


def check_runs_itself(model: nn.Module) -> None:
    """``ValueError`` for ``nn.DataParallel`` over several devices, which runs copies of itself."""
    parallel = [m for m in model.modules() if isinstance(m, nn.DataParallel)]
    several = any(len(m.device_ids) > 1 for m in parallel)
    message = "model: nn.DataParallel runs copies on several devices; give its module, model.module"
    check(not several, message)


def check_takes_hooks(module: nn.Module) -> None:
    """``ValueError`` for a part of a scripted model."""
    is_script = isinstance(module, RecursiveScriptModule)
    check(not is_script, f"layer: {type(module).__name__} takes no hooks; {AS_WRITTEN}")


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook (module, arguments, output) on each module inside, compiled or not.

    Passes of other threads do not call it.
    """
    with as_written(), ExitStack() as handles:
        for module in modules:
            # Refused inside, as the hooks before it have to go then too.
            check_takes_hooks(module)
            handles.enter_context(module.register_forward_hook(owned(hook)))
        yield


@contextmanager
def given(module: nn.Module, prepared: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, this thread gives the module what ``prepared`` makes of its arguments, a tuple."""
    with module.register_forward_pre_hook(owned(lambda _, arguments: prepared(arguments))):
        yield


@contextmanager
def outputs_of(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Number of a layer -> its last output, of those that run inside."""
    outputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.update({i: output for i, layer in enumerate(layers) if layer is module})

    with hooked(dict.fromkeys(layers), keep):
        yield outputs


@contextmanager
def probing(
    network: nn.Module, record: Callable[..., Any] | None = None
) -> Iterator[Callable[..., Tensor]]:
    """(C, H, W) -> a black image 1×C×H×W for the network, which is frozen inside.

    ``record`` is a forward hook on each part of the network, but not on the network itself.
    """
    like = next(network.parameters(), torch.empty(0))

    def image_of(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)

    is_asked = record is not None
    inside = [m for m in network.modules() if is_asked and m is not network]
    parts = [m for m in inside if not isinstance(m, torch.jit.ScriptModule)]
    with frozen(network), hooked(parts, record or (lambda *_: None)):
        yield image_of


@contextmanager
def seeded(seed: int | None, device: torch.device | None) -> Iterator[None]:
    """Torch's generators of the CPU and of ``device`` seeded, and put back; left alone with None.

    For what draws from them and takes no generator. Another thread that seeds them waits.
    """
    if seed is None:
        yield
        return
    cuda = [device] if device is not None and device.type == "cuda" else []
    with process_wide, torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed: that seeds every device, and only these are put back.
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def seeded_elsewhere(seed: int) -> Iterator[None]:
    """The global generators of Python and NumPy seeded, and put back."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
