"""What a model returns: its scores, the class that a target names, and whether it has a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_robust._captum import (
    TargetType,
    format_tensor_into_tuples,
    run_forward,
    select_targets,
)
from captum_robust._checks import check, check_finite
from captum_robust._contexts import alone, given, hooked, tell_of_training

T = TypeVar("T")


_LAYOUTS = {None: torch.preserve_format, False: torch.contiguous_format, True: torch.channels_last}


def copies_of(values: Any, *, channels_last: bool | None = None) -> Any:
    """Copies of a tensor or of the tensors of a tuple, which keep the graph; all else as it is.

    A model that normalises in place writes to what it is given: it is given these.
    ``channels_last`` is the layout of images, None: their own.
    """
    if isinstance(values, Tensor):
        layout = channels_last if values.ndim == 4 or channels_last is None else False
        return values.clone(memory_format=_LAYOUTS[layout])
    if type(values) is not tuple:
        return values
    return tuple(copies_of(value, channels_last=channels_last) for value in values)


def model_scores(
    forward_func: Callable[..., Tensor],
    inputs: Any,
    arguments: object,
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """What ``forward_func`` returns for copies of its inputs and arguments.

    ``TypeError`` if that is no tensor. For ``channels_last`` see :func:`copies_of`.
    """
    tell_of_training(forward_func)
    copies = copies_of(format_tensor_into_tuples(inputs), channels_last=channels_last)
    try:
        with alone(forward_func):
            scores: Tensor = run_forward(forward_func, copies, None, copies_of(arguments))
    except RuntimeError as error:
        are_bytes = any(getattr(x, "dtype", None) == torch.uint8 for x in copies)
        if not are_bytes:
            raise
        advice = "which the model does not take; convert images, as by x.float() / 255"
        raise TypeError(f"inputs: expected floating point, got torch.uint8, {advice}") from error
    check_scores("forward_func", scores, "a function that picks the scores out, such as lambda x: ")
    return scores


def check_scores(name: str, scores: Any, remedy: str) -> None:
    """``TypeError`` for what is no tensor; ``remedy`` ends before how to pick one out."""
    key: object = 0
    if isinstance(scores, Mapping):
        key = next((k for k, v in scores.items() if isinstance(v, Tensor)), "logits")
    got = f"{type(scores).__name__}; give {remedy}model(x)[{key!r}]"
    is_tensor = isinstance(scores, Tensor)
    check(is_tensor, f"{name}: expected a tensor of scores, got {got}", TypeError)


@contextmanager
def given_copies(attribution: Any, inputs: tuple[Tensor, ...] = ()) -> Iterator[None]:
    """Inside, the model of an attribution is given copies, in the dtypes of its inputs.

    A model may write to them: Captum's attributions make none. The noise of Captum's
    ``NoiseTunnel`` is in float32, whatever the inputs are.
    """
    model = attribution.forward_func

    def prepared(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        copies = list(copies_of(arguments))
        for i, x in enumerate(inputs[: len(copies)]):
            if x.is_floating_point() and isinstance(copies[i], Tensor):
                copies[i] = copies[i].to(x.dtype)
        return tuple(copies)

    # A ScriptModule takes no hook.
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        with given(model, prepared):
            yield
        return
    holders = [p for p in _parts(attribution) if getattr(p, "forward_func", None) is model]
    try:
        for part in holders:
            part.forward_func = lambda *arguments: model(*prepared(arguments))
        yield
    finally:
        for part in holders:
            part.forward_func = model


def _parts(attribution: Any) -> list[Any]:
    """The attribution and those that it is made of."""
    inner = [value for value in vars(attribution).values() if hasattr(value, "attribute")]
    return [attribution, *(part for each in inner for part in _parts(each))]


class FastScores:
    """:func:`model_scores`, of images in the layout channels_last where the model takes it.

    Convolutions are some 10 to 20 % faster on it.
    """

    def __init__(self, forward_func: Callable[..., Tensor], *, channels_last: bool = True) -> None:
        self.forward_func = forward_func
        self.channels_last = channels_last
        """Whether it is wanted and, as far as is known, the model takes it."""

    def __call__(self, inputs: Iterable[Tensor], arguments: object) -> Tensor:
        return self.in_fitting_layout(lambda: self.run(inputs, arguments))

    def run(self, inputs: Iterable[Tensor], arguments: object) -> Tensor:
        """The scores, in the layout that is thought to fit."""
        last = self.channels_last
        return model_scores(self.forward_func, tuple(inputs), arguments, channels_last=last)

    def in_fitting_layout(self, run: Callable[[], T]) -> T:
        """What ``run`` returns, without channels_last where the model does not take that."""
        try:
            return run()
        except RuntimeError:  # a model that calls view() on its features
            if not self.channels_last:
                raise
            self.channels_last = False
            return run()


def one_row_a_sample(scores: Tensor, n: int) -> Tensor:
    """Scores N×…; a single number for a batch of one becomes one row. Otherwise ``ValueError``."""
    if scores.ndim == 0 and n == 1:
        with torch.enable_grad():
            return scores.reshape(1)
    expected, got = f"scores {n}×K for a batch of {n}", tuple(scores.shape)
    check(got and got[0] == n and 0 not in got, f"forward_func: expected {expected}, got {got}")
    return scores


def finite_scores(scores: Tensor, n: int, *, copies: int = 1, first_sample: int = 0) -> Tensor:
    """Scores of n samples, as :func:`one_row_a_sample` has them, or of copies of all, in turn.

    ``ValueError`` for NaN or infinity names the sample, the first of which is ``first_sample``.
    """
    scores = one_row_a_sample(scores, n * copies)
    try:
        for each in torch.split(scores, n):
            check_finite(each, "forward_func, scores", first_sample)
    except ValueError as error:
        if not bool((scores == -torch.inf).any()):
            raise
        hint = "; give classes that are masked by -infinity a low number, such as -1e4"
        raise ValueError(f"{error}{hint}") from None
    return scores


def two_classes(scores: Any, n: int, name: str = "forward_func") -> Any:
    """Scores n×2 where a classifier gives one logit z a sample, n×1 or n; others as they are.

    Class 1 is the one that z speaks for: it is predicted where z is positive, and its probability
    is that of the sigmoid. Its score is z/2, that of class 0 is -z/2: as (0, z), but for a
    constant that softmax and margins do not see, so that the score of each class has a slope.

    An attribution of a plain function explains z itself, as Captum's do; where it needs another
    class to compare with, where a class is predicted or attacked, and in a ``Classifier``, a target
    is 0 or 1.

    Raises:
        ValueError: one whole number a sample, as where a model tells classes.
    """
    if not isinstance(scores, Tensor) or scores.ndim > 2 or scores.numel() != n:
        return scores
    if scores.shape[:1] not in ((n,), ()):
        return scores
    expected = "scores N×K, or one logit a sample, as floating point"
    got = f"{scores.dtype} of shape {tuple(scores.shape)}"
    check(scores.is_floating_point(), f"{name}: expected {expected}, got {got}")
    half = scores.reshape(-1) / 2
    return torch.stack([-half, half], dim=1)


def are_probabilities(scores: Tensor) -> bool:
    """Whether of scores N×K none is below 0, and each sample's are 1 together."""
    precise = at_least_float(scores)
    error = (precise.detach().sum(dim=1) - 1).abs()
    resolution = torch.finfo(scores.dtype).eps if scores.is_floating_point() else 0.0
    is_one = error < max(1e-3, resolution)
    return bool(((precise >= 0).all(dim=1) & is_one).all())


def probabilities_of(scores: Tensor) -> Tensor:
    """The softmax of scores N×K, in floats; of what are probabilities already, these.

    Raises:
        ValueError: scores of another shape.
    """
    check(scores.ndim == 2, f"model: expected scores N×K, got {tuple(scores.shape)}")
    precise = at_least_float(scores)
    return precise if are_probabilities(scores) else precise.softmax(dim=1)


def warn_of_probabilities(scores: Tensor, name: str = "forward_func") -> None:
    """Warn where scores N×2 of clean samples look like probabilities that were read as logits."""
    if scores.ndim != 2 or scores.shape[1] != 2:
        return
    low, high = scores.detach().unbind(dim=1)
    if bool(((low == -high) & (high >= 0) & (high <= 0.5)).all()):
        warnings.warn(
            f"{name}: the one score of each sample is in [0, 1]; it is read as a logit, of class 1 "
            "where it is above 0. If it is a probability, give lambda x: model(x).logit()",
            stacklevel=2,
        )


class ClassScores:
    """Reads N×K class scores out of a model's output, and the class that ``target`` names.

    With scores N×K×…, the first index of a tuple is the class, and the others select one vector of
    class scores from each sample.
    """

    def __init__(self, scores: Tensor, target: TargetType) -> None:
        self.classes: Tensor | None = None
        """N indices, or None without a target."""
        self._rest: list[tuple[slice | int, ...]] | None = None
        target = as_target(target)
        if target is not None:
            # What Captum selects from the scores, it selects from the class indices too.
            index = torch.arange(scores.shape[1] if scores.ndim > 1 else 0, device=scores.device)
            index = index.reshape(1, -1, *[1] * (scores.ndim - 2)).expand(scores.shape)
            target = target.to(scores.device) if isinstance(target, Tensor) else target
            self.classes = select_targets(index, target)
            if scores.ndim > 2:
                tuples = target if isinstance(target, list) else [target] * len(scores)
                self._rest = [
                    (slice(None), *t[1:]) if isinstance(t, tuple) else (slice(None),)
                    for t in tuples
                ]
        are_read = self(scores).ndim == 2 and (self.classes is None or self.classes.ndim == 1)
        message = "Target not provided when necessary, cannot take gradient with respect to"
        check(are_read, f"{message} multiple outputs.", AssertionError)

    def __call__(self, scores: Tensor, rows: list[int] | None = None) -> Tensor:
        """Class scores n×K of the given samples (all, in order, by default)."""
        if self._rest is None:
            return scores
        rests = self._rest if rows is None else [self._rest[row] for row in rows]
        return torch.stack([s[r] for s, r in zip(scores, rests, strict=True)])


def rows_of(x: Tensor, rows: list[int], n: int) -> Tensor:
    x = without_inference(x)
    return x if rows == list(range(n)) else x[torch.tensor(rows, device=x.device)]


def as_target(target: Any) -> Any:
    """The target in a form that Captum takes: whole numbers of any other kind as int64 or int.

    Raises:
        TypeError: numbers that are not whole by their type.
    """
    if hasattr(target, "__array__") and not isinstance(target, Tensor):
        target = torch.as_tensor(target)
    if isinstance(target, bool):
        return int(target)
    if isinstance(target, Tensor):
        is_whole = not (target.is_floating_point() or target.is_complex())
        check(is_whole, f"target: expected whole numbers, got {target.dtype}", TypeError)
        return target.long()
    if isinstance(target, (list, tuple)):
        # Of no sequence whose elements are lists, which Captum refuses.
        plain = [t.item() if hasattr(t, "__array__") and t.ndim == 0 else t for t in target]
        return type(target)(int(t) if isinstance(t, bool) else t for t in plain)
    return target


def target_of(target: Any, rows: list[int], n: int) -> Any:
    """The targets of some samples; what holds for all of them stays as it is."""
    target = as_target(target)
    is_tensor = isinstance(target, Tensor) and target.ndim == 1 and len(target) > 1
    if len(rows) == n or not (is_tensor or isinstance(target, list)):
        return target
    message = f"target: expected one a sample, {n}, got {len(target)}"
    check(len(target) == n, message, AssertionError)  # as Captum, where it sees the whole batch
    return rows_of(target, rows, n) if is_tensor else [target[row] for row in rows]


def arguments_of(arguments: Any, rows: list[int], n: int) -> Any:
    """Some samples' rows of each tensor that has N, as Captum expands them; all else as it is."""
    if isinstance(arguments, tuple):
        return tuple(arguments_of(a, rows, n) for a in arguments)
    if not isinstance(arguments, Tensor):
        return arguments
    is_each = arguments.ndim > 0 and len(arguments) == n
    return rows_of(arguments, rows if is_each else list(range(n)), n)


def check_rivals(scores: Tensor) -> None:
    """Raise ``ValueError`` if scores N×K are of the label alone, which can't be lost then."""
    check(scores.shape[1] > 1, "forward_func: expected scores of at least two classes, got one")


def check_target(target: TargetType, scores: Tensor) -> None:
    """``ValueError`` for a class that there is not; other forms are Captum's to judge."""
    target = as_target(target)
    if scores.ndim != 2 or target is None or isinstance(target, tuple):
        return
    values = target if isinstance(target, (list, Tensor)) else [target]
    if isinstance(values, list) and not all(isinstance(v, int) for v in values):
        return
    classes = scores.shape[1]
    numbers = torch.as_tensor(values).reshape(-1)
    outside = (numbers < 0) | (numbers >= classes)
    if outside.any():
        sample = int(outside.nonzero()[0])
        known = f"the model has the classes 0 to {classes - 1}"
        raise ValueError(f"target: class {int(numbers[sample])} of sample {sample}, but {known}")


def at_least_float(x: Tensor) -> Tensor:
    """float32 in place of half precision and of whole numbers."""
    return x.float() if x.dtype.itemsize < 4 or not x.is_floating_point() else x


def depends_on(tensor: Tensor, *inputs: Tensor) -> bool:
    """Whether a gradient can flow from ``tensor`` back to one of the inputs."""
    ends = {torch.autograd.graph.get_gradient_edge(x).node for x in inputs}
    seen: set[Any] = {None}
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if node in ends:
            return True
        seen.add(node)
        waiting.extend(before for before, _ in node.next_functions)
    return False


def where_the_graph_breaks(
    forward_func: Callable[..., Tensor], inputs: tuple[Tensor, ...], arguments: object
) -> str:
    """The layer whose output lost the graph of its input, as the end of a sentence."""
    if not isinstance(forward_func, nn.Module):
        return ""
    broken: list[str] = []
    names = {module: name for name, module in forward_func.named_modules()}

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        came = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if came and isinstance(output, Tensor) and not output.requires_grad and not broken:
            kind = type(module).__name__
            broken.append(f"; layer {names[module]!r} ({kind}) breaks the graph")

    parts = [m for m in forward_func.modules() if m is not forward_func]
    with torch.enable_grad(), hooked(parts, watch):
        asking = tuple(x.detach().requires_grad_() for x in inputs)
        scores = model_scores(forward_func, asking, arguments)
    if broken:
        return broken[0]
    lost = "" if scores.requires_grad else ", between its layers (detach, no_grad, argmax, …)"
    return f"; {type(forward_func).__name__}.forward breaks the graph itself{lost}"


def without_inference(value: Any) -> Any:
    """Tensors from ``inference_mode`` as normal ones, which autograd can save; all else as is."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return tuple(map(without_inference, value)) if type(value) is tuple else value
