"""All that the rows of a run depend on, as it is kept in run.json."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution

from captum_robust._checks import check, valid_unicode
from captum_robust._files import checksum
from captum_robust._processes import device_of
from captum_robust.attacks import Attack
from captum_robust.attr import (
    RISE,
    AdversarialLocalization,
    BallSettings,
    IterativeMask,
    RealTimeMasking,
)
from captum_robust.attr.real_time_masking import pretrained
from captum_robust.catalog import methods as known
from captum_robust.catalog.box_vote import VOTES
from captum_robust.data.classes import imagenet_names
from captum_robust.data.contents import checksums_of
from captum_robust.data.renumbered import Renumbered
from captum_robust.defenses import default_transforms
from captum_robust.models import Classifier
from captum_robust.models.imported import source_of
from captum_robust.nn import CodeObjective, EvidenceRemoval, PaperObjective

_PACKAGE = __name__.partition(".")[0]
_PACKAGES = ("captum-robust", "captum", "torch", "torchvision", "numpy")
_MASKS = (PaperObjective, CodeObjective, EvidenceRemoval)
_PLAIN = (bool, int, float, str, tuple, type(None), BallSettings, *_MASKS)
"""What shows all that it holds in its ``repr``."""


def describe_run(
    model: Classifier,
    dataset: Any,
    count: int,
    methods: Mapping[str, Any],
    attacks: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of a run over the first ``count`` samples of a data set.

    Raises:
        ValueError: the name of a method or an attack is no valid Unicode, so that no row can hold
            it.
    """
    for name in map(str, (*methods, *attacks)):
        check(name == valid_unicode(name), f"name: expected valid Unicode, got {name!r}")
    described = {k: v if isinstance(v, str) else _describe(v) for k, v in methods.items()}
    return {
        "model": _describe_model(model, described.values()),
        "dataset": _describe_dataset(dataset, count),
        "methods": described,
        "kinds": {name: known.kind_of(value) for name, value in methods.items()},
        "attacks": {name: _describe(attack) for name, attack in attacks.items()},
        "settings": {
            **settings,
            **_describe_named(model, described.values()),
            "device": device_of(model).type,
        },
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _describe_named(model: Classifier, methods: Collection[str]) -> dict[str, str]:
    """What a name does not say of its method: with other settings its rows are another's."""
    facts = {}
    if any(name in methods for name in (*known.PERTURBING, *VOTES)):
        scale, power = known.FINE_CAM_SCALE, known.FINE_CAM_POWER
        cam = f"map of {scale:.4g} times the size to the power {power:g}"
        facts["perturbing_methods"] = f"{known.BALL_SETTINGS}, blur {known.BALL_BLUR:g}, {cam}"
    if any(name in methods for name in known.DEFENDED):
        facts["defended_methods"] = repr(default_transforms())
    if "iterative_mask" in methods:
        facts["iterative_mask"] = _describe(IterativeMask(model))
    if "rise" in methods:
        facts["rise"] = _describe(RISE(model))
    if any(name in methods for name in known.WITH_NETWORK) and model.name in pretrained():
        facts["masking_network"] = _checksum_of(pretrained()[model.name])
    facts |= {name: repr(votes) for name, votes in VOTES.items() if name in methods}
    return facts


def _describe(value: Any) -> str:
    """A function by its name; an object by its class, its plain settings and its attributions."""
    if not hasattr(value, "__dict__") or hasattr(value, "__qualname__"):
        return f"function:{getattr(value, '__qualname__', type(value).__qualname__)}"
    settings = {}
    for name, part in vars(value).items():
        if isinstance(part, _PLAIN):
            settings[name] = repr(part)
        elif isinstance(part, Attribution):
            settings[name] = _describe(part)
        elif isinstance(value, Attack):  # a perturbation that it carries, its loss and transform
            if isinstance(part, torch.Tensor):
                settings[name] = _crc32([part])
            elif callable(part) and name != "forward_func":
                settings[name] = _describe(part)
    if isinstance(value, RealTimeMasking):
        settings["network"] = _crc32(value.network.decoder.state_dict().values())
    if isinstance(value, AdversarialLocalization):
        settings["network"] = _crc32(value.network.state_dict().values())
        settings["n_segments"] = repr(value.network.n_segments)
    listed = ", ".join(f"{name}={text}" for name, text in sorted(settings.items()))
    # A function among a tuple's elements shows its address, another in each process.
    return f"{_class_of(value)}({re.sub(r' at 0x[0-9a-f]+', '', listed)})"


def _crc32(tensors: Iterable[torch.Tensor]) -> str:
    return f"crc32:{checksum(tensors):08x}"


def _class_of(value: Any) -> str:
    """The class by its name; of this package without the file, which may be another tomorrow."""
    module = type(value).__module__
    where = _PACKAGE if module.startswith(f"{_PACKAGE}.") else module
    return f"{where}.{type(value).__qualname__}"


def _describe_model(model: Classifier, methods: Collection[str]) -> dict[str, Any]:
    facts = {
        "name": model.name,
        "cam_layer": _name_of_cam_layer(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_crc32": checksum((*model.parameters(), *model.buffers())),
        "input_size": list(model.input_size),
    }
    if source := source_of(model.name):
        facts["source_crc32"] = source
    if model.class_names is not None and tuple(model.class_names) != imagenet_names():
        facts["classes_crc32"] = zlib.crc32(json.dumps(list(model.class_names)).encode())
    if any(name in methods for name in (*known.WITH_PERCEPTUAL_LAYERS, *VOTES)):
        layers = model.perceptual_layers
        facts["perceptual_layers"] = ", ".join(_name_of(model, layer) for layer in layers)
    return facts


def _name_of_cam_layer(model: Classifier) -> str | None:
    try:
        return _name_of(model, model.cam_layer)
    except ValueError:  # it has none; the methods that need none still run
        return None


def _name_of(model: Classifier, layer: torch.nn.Module) -> str:
    names = (name for name, part in model.module.named_modules() if part is layer)
    return next(names, type(layer).__name__)


def _describe_dataset(dataset: Any, count: int) -> dict[str, Any]:
    if isinstance(dataset, Renumbered):  # by the names of the model, which are described there
        dataset = dataset.samples
    ids = getattr(dataset, "ids", None)
    options = sorted(getattr(dataset, "__dict__", {}).items())
    return {
        "kind": getattr(dataset, "kind", type(dataset).__name__),
        "samples": count,
        "ids_crc32": None if ids is None else zlib.crc32(json.dumps(list(ids[:count])).encode()),
        "options": {
            name.lstrip("_"): _describe_path(value) if isinstance(value, Path) else value
            for name, value in options
            if isinstance(value, (str, bool, int, Path))
        },
        "checksums": checksums_of(dataset, count),
    }


def _describe_path(path: Path) -> str:
    """A path with the checksum of what is in its file, such as a table of boxes."""
    return f"{path.resolve()} {_checksum_of(path)}" if path.is_file() else str(path.resolve())


def _checksum_of(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"
