"""A corruption network and its classifier together, and their files."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_robust.models import load_classifier
from captum_robust.nn import (
    CorruptionNetwork,
    LocalizationNetwork,
    SimpleConvNet,
    load_localization_network,
    read_localization_facts,
    save_localization_network,
)
from tests.networks import NAMES, classifier_of, randomize, trunk_of

FACTS = "captum_robust.localization_network"


@pytest.fixture
def network() -> LocalizationNetwork:
    network = LocalizationNetwork(CorruptionNetwork(width=4), classifier_of())
    randomize(network)
    return network.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def segments() -> Tensor:
    """64 squares of 8×8 pixels, alike for the three images."""
    row = torch.arange(64) // 8
    return (8 * row[:, None] + row).expand(3, -1, -1)


# Masks, and images without the object


def test_pooled_probabilities_are_the_means_of_the_superpixels(
    network: LocalizationNetwork, x: Tensor, segments: Tensor
) -> None:
    pixels = network(x)
    torch.testing.assert_close(pixels, torch.sigmoid(network.corruption(x)))
    squares = nn.functional.avg_pool2d(pixels, 8)
    expected = squares.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    torch.testing.assert_close(network(x, segments), expected)


def test_a_drawn_mask_is_zero_or_one_for_each_superpixel(
    network: LocalizationNetwork, x: Tensor, segments: Tensor
) -> None:
    drawn, probabilities = network.sample(x, segments, torch.Generator().manual_seed(0))
    assert torch.equal(probabilities, network(x, segments))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    squares = drawn.reshape(3, 8, 8, 8, 8)
    assert torch.equal(squares, squares[:, :, :1, :, :1].expand_as(squares))
    again, _ = network.sample(x, segments, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_draws_follow_the_probabilities_and_the_printed_formula(
    network: LocalizationNetwork, x: Tensor
) -> None:
    many = x[:1].expand(200, -1, -1, -1)
    p = network(x[:1]).detach()
    generator = torch.Generator().manual_seed(0)
    for literal, expected in ((False, p), (True, torch.sigmoid(2 * p - 1))):
        with torch.no_grad():
            drawn, _ = network.sample(many, generator=generator, literal=literal)
        # 200 × 64 × 64 draws: a standard deviation of their mean is below 6e-4.
        assert abs(float(drawn.mean() - expected.mean())) < 3e-3


def test_the_gradient_of_a_drawn_mask_is_that_of_its_probabilities(
    network: LocalizationNetwork, x: Tensor, segments: Tensor
) -> None:
    drawn, probabilities = network.sample(x, segments)
    weights = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(network.corruption.parameters())
    through = torch.autograd.grad((drawn * weights).sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad((probabilities * weights).sum(), parameters)
    for one, other in zip(through, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_removing_replaces_the_object_by_the_fill(x: Tensor) -> None:
    network = LocalizationNetwork(CorruptionNetwork(width=2), classifier_of(), fill=(0, 0.5, 1))
    mask = torch.zeros(3, 1, 64, 64)
    mask[:, :, 8:16, 24:32] = 1
    removed = network.remove(x, mask)
    inside = removed[:, :, 8:16, 24:32]
    assert torch.equal(inside, torch.tensor([0, 0.5, 1]).view(1, 3, 1, 1).expand_as(inside))
    assert torch.equal(removed[:, :, 16:], x[:, :, 16:])
    torch.testing.assert_close(
        network.remove(x, torch.full_like(mask, 0.25)),
        0.75 * x + 0.25 * torch.tensor([0, 0.5, 1]).view(1, 3, 1, 1),
    )


def test_the_usual_fill_is_zero_behind_the_normalisation(network: LocalizationNetwork) -> None:
    torch.testing.assert_close(network.fill.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    seen: list[Tensor] = []
    network.classifier.module.block1.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, arguments: seen.append(arguments[0])
    )
    network.classifier(network.remove(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)))
    assert not seen[0].any()
    plain = LocalizationNetwork(CorruptionNetwork(width=2), SimpleConvNet(3, 2))
    assert plain.fill.flatten().tolist() == [0.5]


def test_bad_arguments_are_refused(
    network: LocalizationNetwork, x: Tensor, segments: Tensor
) -> None:
    corruption, classifier = network.corruption, network.classifier
    with pytest.raises(TypeError, match=r"corruption: .*CorruptionNetwork, got Classifier"):
        LocalizationNetwork(classifier, classifier)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"classifier: expected a torch\.nn\.Module, got str"):
        LocalizationNetwork(corruption, "resnet18")  # type: ignore[arg-type]
    for fill in (float("nan"), (0.5, float("inf"), 0), "grey", ()):
        with pytest.raises(ValueError, match="fill: expected a finite number"):
            LocalizationNetwork(corruption, classifier, fill=fill)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="n_segments: expected a whole number from 1, or None, got 0"
    ):
        LocalizationNetwork(corruption, classifier, n_segments=0)
    with pytest.raises(ValueError, match=r"mask: .*got \(3, 64, 64\)"):
        network.remove(x, torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"mask: .*got \(2, 1, 64, 64\)"):
        network.remove(x, torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="fill: is for 3 channels, got 1"):
        network.remove(x[:, :1], torch.zeros(3, 1, 64, 64))
    with pytest.raises(ValueError, match="segments: expected 3×64×64, got 2×64×64"):
        network(x, segments[:2])
    with pytest.raises(ValueError, match="segments: expected numbers from 0"):
        network.sample(x, segments - 1)


# The simple classifier


def test_the_simple_classifier_has_four_layers_and_class_activation_maps(x: Tensor) -> None:
    model = load_classifier("simple_convnet", None, class_names=NAMES)
    net = model.module
    assert isinstance(net, SimpleConvNet)
    assert len(net.layers) == 4
    assert all(any(True for _ in layer.parameters()) for layer in net.layers)
    assert model.input_size == (64, 64)
    assert model.cam_layer is net.layers[3]
    # A score is the mean of its class activation map, plus the bias.
    maps: list[Tensor] = []
    handle = model.cam_layer.register_forward_hook(lambda *a: maps.append(a[2]))
    scores = model(x)
    handle.remove()
    assert maps[0].shape[2:] == (8, 8)
    weight, bias = net.classifier.weight, net.classifier.bias
    cams = torch.einsum("kc,nchw->nkhw", weight, maps[0])
    torch.testing.assert_close(scores, cams.mean(dim=(2, 3)) + bias)


def test_the_simple_classifier_has_the_weights_that_its_page_states() -> None:
    net = SimpleConvNet(100)
    convolutions = 64 * 3 * 25 + 9 * (64 * 128 + 128 * 256 + 256 * 256)
    norms = 2 * (64 + 128 + 256 + 256)
    expected = convolutions + norms + 256 * 100 + 100
    assert sum(p.numel() for p in net.parameters()) == expected
    assert round(expected / 1e6, 1) == 1.0


def test_a_simple_classifier_has_no_published_weights() -> None:
    with pytest.raises(ValueError, match="simple_convnet has no published ones"):
        load_classifier("simple_convnet")


# Files


def change_facts(file: Path, change: dict[str, Any], without: Sequence[str] = ()) -> None:
    """Write another metadata beside the same tensors."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        facts = json.loads(opened.metadata()[FACTS]) | change
    save_file(
        tensors, file, {FACTS: json.dumps({k: facts[k] for k in facts.keys() - set(without)})}
    )


def test_a_saved_network_comes_back(
    network: LocalizationNetwork, x: Tensor, segments: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "n.safetensors"
    network.n_segments = 77
    save_localization_network(network, file, card="of a test")
    like = classifier_of()
    before = copy.deepcopy(like.state_dict())
    again = load_localization_network(file, like)
    assert not again.training
    assert again.n_segments == 77
    assert torch.equal(again(x, segments), network(x, segments))
    assert torch.equal(again.classifier(x), network.classifier(x))
    assert torch.equal(again.fill, network.fill)
    # The classifier that was given has other weights, and keeps them.
    assert not torch.equal(like(x), network.classifier(x))
    assert all(torch.equal(t, before[n]) for n, t in like.state_dict().items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["card"] == "of a test"
    facts = read_localization_facts(file)
    assert facts["classifier"] == "simple"
    assert facts["class_names"] == NAMES
    assert facts["input_size"] == (64, 64)
    assert facts["trunk"] is None


def test_half_precision_halves_the_file(
    network: LocalizationNetwork, x: Tensor, tmp_path: Path
) -> None:
    save_localization_network(network, tmp_path / "full.safetensors")
    save_localization_network(network, tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.75 * (
        tmp_path / "full.safetensors"
    ).stat().st_size
    again = load_localization_network(tmp_path / "half.safetensors", classifier_of())
    assert again.corruption.logits.weight.dtype == torch.float32
    torch.testing.assert_close(again(x), network(x), rtol=0, atol=0.02)


@pytest.fixture
def with_trunk() -> LocalizationNetwork:
    trunk = trunk_of()
    layers = [trunk.block1, trunk.block3]
    network = LocalizationNetwork(
        CorruptionNetwork(trunk, layers=layers, width=4, trunk_size=96),  # type: ignore[arg-type]
        classifier_of(),
        fill=0.25,
        n_segments=None,
    )
    randomize(network)
    return network.eval()


def test_a_network_with_a_trunk_comes_back_with_one(
    with_trunk: LocalizationNetwork, x: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(with_trunk, file)
    facts = read_localization_facts(file)
    assert facts["trunk"] == "SimpleConvNet"
    assert facts["trunk_layers"] == ["block1", "block3"]
    assert facts["trunk_class_names"] is None
    assert facts["trunk_size"] == 96
    other = trunk_of()
    before = copy.deepcopy(other.state_dict())
    again = load_localization_network(file, classifier_of(), trunk=other)
    assert again.n_segments is None
    assert torch.equal(again(x), with_trunk(x))
    assert torch.equal(again.fill, with_trunk.fill)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    assert all(p.requires_grad for p in other.parameters())
    layers: Any = [other.block1, other.block3]
    same = load_localization_network(file, classifier_of(), trunk=other, layers=layers)
    assert torch.equal(same(x), with_trunk(x))


def test_a_file_of_another_trunk_is_refused(
    with_trunk: LocalizationNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(with_trunk, file)
    with pytest.raises(ValueError, match="for the trunk SimpleConvNet; got no trunk"):
        load_localization_network(file, classifier_of())
    with pytest.raises(ValueError, match="for the trunk SimpleConvNet; got the trunk simple"):
        load_localization_network(file, classifier_of(), trunk=classifier_of())
    with pytest.raises(ValueError, match=r"does not fit: corruption\.trunk\.block1"):
        load_localization_network(file, classifier_of(), trunk=SimpleConvNet(2, 5))
    trunk = trunk_of()
    layers: Any = [trunk.block1, trunk.block2]
    with pytest.raises(ValueError, match=r"does not fit: corruption\.blocks"):
        load_localization_network(file, classifier_of(), trunk=trunk, layers=layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10**7}, "does not fit: it holds too little|holds no localization network"),
        ({"width": 5}, r"does not fit: corruption\.blocks"),
        ({"trunk_layers": ["block1", "block9"]}, "does not fit: the trunk has no layer block9"),
        ({"trunk_layers": ["block1"]}, "two or more scales"),
        ({"trunk_layers": 3}, "holds no localization network"),
        ({"trunk_class_names": 3}, "holds no localization network"),
        ({"trunk_size": 0}, "holds no localization network"),
        ({"trunk_size": 10**9}, "holds no localization network"),
        ({"trunk_size": "large"}, "holds no localization network"),
    ],
)
def test_what_a_broken_file_tells_of_a_trunk_is_refused(
    with_trunk: LocalizationNetwork, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(with_trunk, file)
    change_facts(file, change)
    with pytest.raises(ValueError, match=message):
        load_localization_network(file, classifier_of(), trunk=trunk_of())


def test_another_classifier_or_trunk_is_refused(
    network: LocalizationNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(network, file)
    with pytest.raises(ValueError, match="for the classifier simple, not resnet18"):
        load_localization_network(file, load_classifier("resnet18", None))
    with pytest.raises(ValueError, match=r"does not fit: classifier\.module\.block1"):
        load_localization_network(file, classifier_of(width=5))
    other = classifier_of()
    other.class_names = ["dog", "elk", "fox"]
    with pytest.raises(ValueError, match="3 other classes"):
        load_localization_network(file, other)
    with pytest.raises(ValueError, match="for no trunk; got the trunk SimpleConvNet"):
        load_localization_network(file, classifier_of(), trunk=trunk_of())
    with pytest.raises(TypeError, match=r"classifier: expected a torch\.nn\.Module"):
        load_localization_network(file, "resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"trunk: expected a torch\.nn\.Module"):
        load_localization_network(file, classifier_of(), trunk="resnet18")  # type: ignore[arg-type]


def test_files_that_hold_no_such_network_are_refused(
    network: LocalizationNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "n.safetensors"
    with pytest.raises(FileNotFoundError, match=r"n\.safetensors: no such file"):
        load_localization_network(file, classifier_of())
    with pytest.raises(ValueError, match="may be a pickle"):
        load_localization_network(tmp_path / "n.pt", classifier_of())
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, got n\.pt"):
        save_localization_network(network, tmp_path / "n.pt")
    save_localization_network(network, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_localization_network(file, classifier_of())
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_localization_facts(file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no localization network"):
        load_localization_network(file, classifier_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10**30}, "does not fit|holds no localization network"),
        ({"width": 10**7}, "does not fit|holds no localization network"),
        ({"width": "many"}, "holds no localization network"),
        ({"width": 5}, "does not fit: corruption"),
        ({"fill": None}, "holds no localization network"),
        ({"fill": [float("nan")]}, "holds no localization network"),
        ({"n_segments": 0}, "holds no localization network"),
        ({"class_names": 7}, "holds no localization network"),
    ],
)
def test_facts_that_cannot_be_are_refused_before_memory_is_taken(
    network: LocalizationNetwork, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "n.safetensors"
    save_localization_network(network, file)
    change_facts(file, change)
    with pytest.raises(ValueError, match=message):
        load_localization_network(file, classifier_of())
