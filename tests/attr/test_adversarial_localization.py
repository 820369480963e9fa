"""AdversarialLocalization: pooled as the paper says, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from captum_robust import AdversarialLocalization
from captum_robust.benchmark.passes import count_passes
from captum_robust.data import superpixels
from captum_robust.models import load_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    SimpleConvNet,
    save_localization_network,
)


def network_of(n_segments: int | None = 20) -> LocalizationNetwork:
    torch.manual_seed(0)
    network = LocalizationNetwork(
        CorruptionNetwork(width=4),
        load_classifier("simple_convnet", None, class_names=["ant", "bee", "cat"], input_size=32),
        n_segments=n_segments,
    )
    with torch.no_grad():
        network.corruption.logits.weight.normal_(generator=torch.Generator().manual_seed(1))
        for module in network.corruption.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the statistics of the one batch
        network.train()(torch.rand(4, 3, 32, 32))
    return network.eval()


@pytest.fixture
def network() -> LocalizationNetwork:
    return network_of()


@pytest.fixture
def x() -> Tensor:
    drawn = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(drawn, (32, 32), mode="bilinear")


def test_each_superpixel_has_the_mean_of_its_pixels(
    network: LocalizationNetwork, x: Tensor
) -> None:
    maps = AdversarialLocalization(network).attribute(x)
    pixels = torch.sigmoid(network.corruption(x)).detach()
    segments = superpixels(x, 20)
    for i in range(2):
        for number in segments[i].unique():
            inside = segments[i] == number
            expected = pixels[i, 0][inside].mean()
            torch.testing.assert_close(maps[i][:, inside], expected.expand(3, int(inside.sum())))
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps.std() > 0.01


def test_without_superpixels_it_is_the_networks_own_map(
    network: LocalizationNetwork, x: Tensor
) -> None:
    pixels = torch.sigmoid(network.corruption(x)).expand(2, 3, 32, 32)
    torch.testing.assert_close(
        AdversarialLocalization(network).attribute(x, superpixels=False), pixels.detach()
    )
    without = AdversarialLocalization(network_of(n_segments=None))
    torch.testing.assert_close(without.attribute(x), pixels.detach())


def test_segments_that_are_given_are_not_computed(
    network: LocalizationNetwork, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribution = AdversarialLocalization(network)
    expected = attribution.attribute(x)
    segments = superpixels(x, 20)

    def none(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("skimage.segmentation.slic", none)
    torch.testing.assert_close(attribution.attribute(x, segments=segments), expected)
    torch.testing.assert_close(
        attribution.attribute((x,), segments=(segments.to(torch.uint8),))[0], expected
    )
    with pytest.raises(AssertionError, match="computed"):
        attribution.attribute(x)


def test_the_class_makes_no_difference(network: LocalizationNetwork, x: Tensor) -> None:
    attribution = AdversarialLocalization(network)
    assert torch.equal(attribution.attribute(x, 0), attribution.attribute(x, torch.tensor([1, 2])))
    with pytest.raises(ValueError, match=r"target: expected a class, .* got a function"):
        attribution.attribute(x, lambda scores: scores[:, 1])


def test_it_costs_one_pass_of_the_classifier(network: LocalizationNetwork, x: Tensor) -> None:
    with count_passes(network.classifier) as passes:
        AdversarialLocalization(network).attribute(x)
    assert (passes.forward, passes.backward) == (2, 0)


def test_pixels_beyond_the_range_are_clamped_for_the_superpixels_alone(
    network: LocalizationNetwork, x: Tensor
) -> None:
    # As NoiseTunnel's are.
    noisy = x * 1.5 - 0.2
    attribution = AdversarialLocalization(network)
    segments = superpixels(noisy.clamp(0, 1), 20)
    expected = attribution.attribute(noisy, segments=segments)
    assert torch.equal(attribution.attribute(noisy), expected)
    assert not torch.equal(attribution.attribute(noisy.clamp(0, 1)), expected)


def test_a_file_is_enough(network: LocalizationNetwork, x: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(network, file)
    again = AdversarialLocalization.from_file(file)
    assert again.network.classifier.class_names == ["ant", "bee", "cat"]
    assert again.network.classifier.input_size == (32, 32)
    expected = AdversarialLocalization(network).attribute(x)
    assert torch.equal(again.attribute(x), expected)
    model = load_classifier("simple_convnet", None, class_names=["ant", "bee", "cat"])
    assert torch.equal(AdversarialLocalization.from_file(file, model=model).attribute(x), expected)
    with pytest.raises(FileNotFoundError, match="no such file"):
        AdversarialLocalization.from_file(tmp_path / "m.safetensors")


def test_a_file_of_a_classifier_without_a_name_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "n.safetensors"
    plain = LocalizationNetwork(CorruptionNetwork(width=2), SimpleConvNet(3, 2))
    save_localization_network(plain, file)
    with pytest.raises(ValueError, match=r"model: .*got 'SimpleConvNet'"):
        AdversarialLocalization.from_file(file)
    AdversarialLocalization.from_file(file, model=SimpleConvNet(3, 2))


def test_a_file_tells_its_trunk_and_holds_its_weights(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "n.safetensors"
    names = ["ant", "bee", "cat"]
    model = load_classifier("simple_convnet", None, class_names=names, input_size=32)
    trunk = load_classifier("small_resnet", None, class_names=["dog", "elk"], input_size=32)
    corruption = CorruptionNetwork(trunk.requires_grad_(False), width=2, trunk_size=64)
    network = LocalizationNetwork(corruption, model, n_segments=20)
    with torch.no_grad():
        corruption.logits.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_localization_network(network.eval(), file)
    expected = AdversarialLocalization(network).attribute(x)
    assert expected.std() > 1e-3
    for given in (None, model):
        again = AdversarialLocalization.from_file(file, model=given)
        assert torch.equal(again.attribute(x), expected)
        assert again.network.corruption.trunk_size == 64
    like = load_classifier("small_resnet", None, class_names=["fox", "gnu"])
    again = AdversarialLocalization.from_file(file, trunk=like)
    assert torch.equal(again.attribute(x), expected)
    other = load_classifier("small_resnet", None, class_names=names)
    with pytest.raises(ValueError, match=r"does not fit: corruption\.trunk\.module\.\S+ is"):
        AdversarialLocalization.from_file(file, trunk=other)


def test_a_file_of_a_trunk_without_a_name_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "n.safetensors"
    model = load_classifier("simple_convnet", None, class_names=["ant", "bee", "cat"])
    corruption = CorruptionNetwork(SimpleConvNet(2, 2), width=2)
    save_localization_network(LocalizationNetwork(corruption, model), file)
    with pytest.raises(ValueError, match=r"n\.safetensors: .* trunk .*'SimpleConvNet'"):
        AdversarialLocalization.from_file(file)
    AdversarialLocalization.from_file(file, trunk=SimpleConvNet(2, 2))


def test_bad_arguments_are_refused(network: LocalizationNetwork, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"network: .*LocalizationNetwork, got Classifier"):
        AdversarialLocalization(network.classifier)  # type: ignore[arg-type]
    attribution = AdversarialLocalization(network)
    segments = superpixels(x, 20)
    with pytest.raises(ValueError, match="segments: expected 2×32×32, got 1×32×32"):
        attribution.attribute(x, segments=segments[:1])
    with pytest.raises(TypeError, match=r"segments: .*integers, got torch\.float32"):
        attribution.attribute(x, segments=segments.float())
    with pytest.raises(ValueError, match="segments: expected one tensor for each of 2 inputs"):
        attribution.attribute((x, x), segments=segments)
    with pytest.raises(ValueError, match="segments: expected numbers from 0"):
        attribution.attribute(x, segments=segments - 1)
    with pytest.raises(ValueError, match=r"8×8 pixels are too few for 20 .*superpixels=False"):
        attribution.attribute(x[:, :, :8, :8])
    attribution.attribute(x[:, :, :8, :8], superpixels=False)
    with pytest.raises(ValueError, match="expected images N×C×H×W"):
        attribution.attribute(x[:, 0])
