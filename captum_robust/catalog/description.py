"""All that the rows of a run depend on, as it is kept in run.json."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution

from captum_robust._files import checksum
from captum_robust._processes import device_of
from captum_robust.attacks import Attack
from captum_robust.attr.adversarial_localization import AdversarialLocalization
from captum_robust.attr.iterative_mask import IterativeMask
from captum_robust.attr.perceptual_ball import BallSettings
from captum_robust.attr.real_time_masking import RealTimeMasking, pretrained
from captum_robust.catalog.methods import (
    BALL_BLUR,
    BALL_SETTINGS,
    DEFENDED,
    FINE_CAM_POWER,
    FINE_CAM_SCALE,
    PERTURBING,
    WITH_PERCEPTUAL_LAYERS,
)
from captum_robust.defenses import default_transforms
from captum_robust.models import Classifier
from captum_robust.nn import CodeObjective, EvidenceRemoval, PaperObjective


def describe_run(
    model: Classifier,
    dataset: Any,
    count: int,
    methods: Any,
    attacks: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of a run over the first ``count`` samples of a data set."""
    described = _describe_methods(methods)
    facts = _describe_model(model)
    if not set(WITH_PERCEPTUAL_LAYERS).isdisjoint(described.values()):
        facts["perceptual_layers"] = _names_of_perceptual_layers(model)
    settings = dict(settings)
    if not set(PERTURBING).isdisjoint(described.values()):
        # A name says nothing of them: with others its rows are not the same method's.
        settings["perturbing_methods"] = (
            f"{BALL_SETTINGS}, blur {BALL_BLUR:g}, map of {FINE_CAM_SCALE:.4g} times the size to "
            f"the power {FINE_CAM_POWER:g}"
        )
    if not set(DEFENDED).isdisjoint(described.values()):
        settings["defended_methods"] = repr(default_transforms())
    if "iterative_mask" in described.values():
        settings["iterative_mask"] = _describe(IterativeMask(model))
    if "real_time_masking" in described.values() and model.name in pretrained():
        settings["masking_network"] = f"{zlib.crc32(pretrained()[model.name].read_bytes()):08x}"
    return {
        "model": facts,
        "dataset": _describe_dataset(dataset, count),
        "methods": described,
        "attacks": {name: _describe(attack) for name, attack in attacks.items()},
        "settings": {**settings, "device": device_of(model).type},
        "versions": _versions(),
    }


def _describe(value: Any) -> str:
    """A function by its name; an object by its class, its plain settings and its attributions."""
    if not hasattr(value, "__dict__") or hasattr(value, "__qualname__"):
        return f"function:{getattr(value, '__qualname__', type(value).__qualname__)}"
    plain = (bool, int, float, str, tuple, type(None), BallSettings)
    masks = (PaperObjective, CodeObjective, EvidenceRemoval)
    settings = {k: repr(v) for k, v in vars(value).items() if isinstance(v, (*plain, *masks))}
    if isinstance(value, RealTimeMasking):
        decoder = value.network.decoder.state_dict()
        settings["network"] = f"crc32:{checksum(decoder.values()):08x}"
    if isinstance(value, AdversarialLocalization):
        weights = value.network.state_dict()
        settings["network"] = f"crc32:{checksum(weights.values()):08x}"
        settings["n_segments"] = repr(value.network.n_segments)
    settings |= {k: _describe(v) for k, v in vars(value).items() if isinstance(v, Attribution)}
    if isinstance(value, Attack):  # its loss and transform, and a perturbation that it carries
        for name, part in vars(value).items():
            if isinstance(part, torch.Tensor):
                settings[name] = f"crc32:{checksum([part]):08x}"
            elif callable(part) and name != "forward_func" and name not in settings:
                settings[name] = _describe(part)
    # A function among a tuple's elements shows its address, another in each process.
    settings = {k: re.sub(r" at 0x[0-9a-f]+", "", v) for k, v in settings.items()}
    listed = ", ".join(f"{k}={v}" for k, v in sorted(settings.items()))
    return f"{type(value).__module__}.{type(value).__qualname__}({listed})"


def _describe_methods(methods: Any) -> dict[str, str]:
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Mapping):
        methods = {str(m): m for m in methods}
    return {k: v if isinstance(v, str) else _describe(v) for k, v in methods.items()}


def _describe_model(model: Classifier) -> dict[str, Any]:
    return {
        "name": model.name,
        "cam_layer": _name_of_cam_layer(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_crc32": checksum((*model.parameters(), *model.buffers())),
        "input_size": list(model.input_size),
    }


def _name_of_cam_layer(model: Classifier) -> str | None:
    try:
        layer = model.cam_layer
    except ValueError:  # it has none; the methods that need none still run
        return None
    names: dict[str, torch.nn.Module] = dict(model.module.named_modules())
    return next(name for name, module in names.items() if module is layer)


def _names_of_perceptual_layers(model: Classifier) -> str:
    names = {module: name for name, module in model.module.named_modules()}
    return ", ".join(names.get(layer, type(layer).__name__) for layer in model.perceptual_layers)


def _describe_dataset(dataset: Any, count: int) -> dict[str, Any]:
    ids = getattr(dataset, "ids", None)
    names = None if ids is None else zlib.crc32(json.dumps(list(ids[:count])).encode())
    kind = getattr(dataset, "kind", type(dataset).__name__)
    return {
        "kind": kind,
        "samples": count,
        "ids_crc32": names,
        "options": {
            name.lstrip("_"): _describe_option(value)
            for name, value in sorted(getattr(dataset, "__dict__", {}).items())
            if isinstance(value, (str, bool, int, Path))
        },
    }


def _describe_option(value: Any) -> Any:
    """A path with the checksum of what is in its file, such as a table of boxes."""
    if not isinstance(value, Path):
        return value
    of_file = 0
    if value.is_file():
        with value.open("rb") as file:
            while block := file.read(1 << 20):
                of_file = zlib.crc32(block, of_file)
    return f"{value.resolve()} {of_file:08x}" if value.is_file() else str(value.resolve())


def _versions() -> dict[str, str]:
    packages = ("captum-robust", "captum", "torch", "torchvision", "numpy")
    return {package: version(package) for package in packages}
