"""Classifiers of others: what a user's own function returns, and timm's models."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_robust._checks import check, unknown_name
from captum_robust._contexts import probing
from captum_robust.data.classes import imagenet_names
from captum_robust.models.classifier import Classifier

_TIMM = "timm"
_FACTS = ("mean", "std", "input_size", "class_names", "reshape_transform", "_cam_layer", "name")


def is_imported(name: str) -> bool:
    """Whether it names a user's function or a model of timm: ``"package.module:function"``."""
    return ":" in name


def load_imported(
    name: str, weights: Any, classes: int | None, given: dict[str, Any]
) -> Classifier:
    """What :func:`captum_robust.models.load_classifier` returns, without the weights of a file.

    Args:
        name: ``"package.module:function"`` or ``"timm:NAME"``.
        weights: ``"DEFAULT"`` or None.
        classes: how many the model shall have; None: as many as it has.
        given: what :class:`Classifier` takes, instead of what the model says of itself.
    """
    is_word = weights is None or weights == "DEFAULT"
    check(is_word, f"weights of {name}: expected DEFAULT, none or a file, got {weights!r}")
    source, _, rest = name.partition(":")
    given = {"name": name, **given}
    if source == _TIMM:
        model = Classifier(**(_load_timm(rest, weights is not None, classes) | given))
    else:
        model = _with_facts(_call(source, rest), given)
    named, model.class_names = model.class_names, None  # it runs whatever their number
    count = _count_classes(model, name)
    fits = classes is None or count == classes
    check(fits, f"model: {name} has {count} classes; expected {classes}")
    if named is None:
        numbers = [str(i) for i in range(count)]
        named = list(imagenet_names()) if count == len(imagenet_names()) else numbers
    names = len(named)
    check(names == count, f"class_names: {name} has {count} classes and {names} names")
    model.class_names = named
    return model


def source_of(name: str) -> str | None:
    """The checksum of the file that a user's function is in, which was loaded; else None."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    if not is_imported(name) or name.startswith(f"{_TIMM}:") or file is None:
        return None
    return f"{zlib.crc32(Path(file).read_bytes()):08x}"


def _load_timm(name: str, pretrained: bool, classes: int | None) -> dict[str, Any]:
    try:
        timm: Any = importlib.import_module(_TIMM)  # its functions have no types
    except ImportError:
        raise ImportError(f"{_TIMM}:{name} needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    others = {} if classes is None else {"num_classes": classes}
    try:
        module = timm.create_model(name, pretrained=pretrained, **others)
    except RuntimeError as error:  # an unknown tag, a model without weights
        raise ValueError(f"model {_TIMM}:{name}: {error}; or give --weights none") from None
    except OSError as error:
        first = str(error).splitlines()[0]
        other = "give none for random weights, or a file"
        raise OSError(
            f"weights of {_TIMM}:{name}: the download failed ({first}); {other}"
        ) from None
    own = timm.data.resolve_data_config({}, model=module)
    return {
        "module": module,
        "mean": own["mean"],
        "std": own["std"],
        "input_size": tuple(own["input_size"][1:]),
    }


def _call(module_name: str, function_name: str) -> nn.Module:
    """What the function returns; its module may lie in the current directory."""
    where = f"{module_name}:{function_name}"
    parts = [*module_name.split("."), *function_name.split(".")]
    is_named = all(part.isidentifier() for part in parts)
    example = "expected a name, timm:NAME or package.module:function"
    check(is_named, f"model: {example}, got {where!r}")
    with _importable_from_here():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            outer = f"{error.name}."
            is_own = error.name is None or not f"{module_name}.".startswith(outer)
            if is_own:  # a package that the user's module needs
                raise
            raise ValueError(f"model: there is no module {error.name} for {where}") from None
        except ImportError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise _failed(f"module {module_name}", error) from error
        try:
            function = attrgetter(function_name)(module)
        except AttributeError:
            raise unknown_name(f"function of {module_name}", function_name, _made(module)) from None
        try:
            inspect.signature(function).bind()
        except TypeError:
            expected = "a function that is called without arguments"
            raise TypeError(f"model: expected {expected}, got {where}") from None
        try:
            made = function()
        except ImportError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(where, error) from error
    expected = "a torch.nn.Module or a captum_robust.models.Classifier"
    got = f"{where} returned one of {type(made).__name__}"
    check(isinstance(made, nn.Module), f"model: expected {expected}; {got}", TypeError)
    own: nn.Module = made
    return own


def _failed(what: str, error: BaseException) -> ValueError:
    """The one-line error to raise where the user's own code raised another."""
    said = " ".join(str(error).split())
    return ValueError(f"model: {what} failed: {type(error).__name__}{said and f': {said}'}")


def _made(module: Any) -> list[str]:
    """The names of the functions and classes that are written in the module."""
    own = vars(module).items()
    return [n for n, f in own if callable(f) and getattr(f, "__module__", "") == module.__name__]


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Modules in the current directory can be imported inside, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _with_facts(made: nn.Module, given: dict[str, Any]) -> Classifier:
    """A classifier with facts that were given instead of its own.

    It is the user's object where that is a classifier, which may be of a class with a forward pass
    of its own.
    """
    if not isinstance(made, Classifier):
        return Classifier(made, **given)
    facts = {name: getattr(made, name) for name in _FACTS if name != "_cam_layer"}
    if made._cam_layer is not None and "cam_layer" not in given:
        facts["cam_layer"] = made._cam_layer[0]
    if "cam_layer" in given:
        del facts["reshape_transform"]  # of the other layer
    like = Classifier(made.module, **(facts | given))
    for name in _FACTS:
        setattr(made, name, getattr(like, name))
    return made


def _count_classes(model: Classifier, name: str) -> int:
    """The number of scores of a black image."""
    shape = model.input_shape
    size = "×".join(map(str, shape))
    try:
        with torch.no_grad(), probing(model) as image_of:
            scores = model(image_of(*shape))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        if first.startswith("module: "):  # what it returns is no scores, of an image of any size
            raise type(error)(f"model: {name}: {first.removeprefix('module: ')}") from None
        trouble = f"model: {name} does not run on an image of {size}: {first}"
        raise ValueError(f"{trouble}; give another size (--size)") from None
    is_batch = isinstance(scores, torch.Tensor) and scores.ndim == 2 and scores.shape[1] > 1
    got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    check(is_batch, f"model: {name}: expected scores N×K of two or more classes, got {got}")
    return int(scores.shape[1])
