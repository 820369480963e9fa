"""The corruption network: any trunk, frozen or not, at the size that it was made for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust.models import load_classifier
from captum_robust.nn import CorruptionNetwork
from tests.networks import classifier_of, randomize, trunk_of


@pytest.fixture
def network() -> CorruptionNetwork:
    network = CorruptionNetwork(width=4)
    randomize(network)
    return network.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_an_untrained_one_is_undecided_everywhere(x: Tensor) -> None:
    assert not CorruptionNetwork(width=4)(x).any()


def test_each_pixel_gets_a_logit_whatever_the_size(network: CorruptionNetwork) -> None:
    for size in ((64, 64), (33, 70), (16, 16)):
        image = torch.rand(2, 3, *size)
        logits = network(image)
        assert logits.shape == (2, 1, *size)
        assert logits.std() > 0


def test_no_image_sees_another(network: CorruptionNetwork, x: Tensor) -> None:
    batch = network(x)
    single = torch.cat([network(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batch, single)


def test_all_of_its_weights_train(network: CorruptionNetwork, x: Tensor) -> None:
    network.train()
    network(x).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


@pytest.mark.parametrize(
    "make",
    [
        trunk_of,
        classifier_of,
        lambda: torchvision.models.resnet18(weights=None),
        lambda: load_classifier("mobilenet_v2", None, input_size=64),
    ],
)
def test_any_network_is_a_trunk(make: Any, x: Tensor) -> None:
    trunk = make().eval()
    state = copy.deepcopy(trunk.state_dict())
    network = CorruptionNetwork(trunk, width=4, input_size=(64, 64)).eval()
    assert len(network.channels) >= 3
    randomize(network.blocks)
    randomize(network.logits)
    logits = network(x)
    assert logits.shape == (3, 1, 64, 64)
    assert logits.std() > 0
    assert all(torch.equal(t, state[n]) for n, t in trunk.state_dict().items())
    assert not any(m._forward_hooks for m in trunk.modules())


def test_a_half_precision_trunk_gives_full_logits(x: Tensor) -> None:
    network = CorruptionNetwork(trunk_of().bfloat16(), width=4).eval()
    assert network(x.bfloat16()).dtype == torch.float32


def test_bfloat16_autocast_gives_nearly_the_same(network: CorruptionNetwork, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, network(x), rtol=0, atol=0.05)


def test_bad_trunks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"trunk: expected a torch\.nn\.Module, got str"):
        CorruptionNetwork("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: expected the trunk"):
        CorruptionNetwork(layers=[nn.Identity()])
    trunk = trunk_of()
    with pytest.raises(ValueError, match="two or more scales, found 1 in SimpleConvNet"):
        CorruptionNetwork(trunk, layers=[trunk.block1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layers: expected layers of the trunk"):
        CorruptionNetwork(trunk, layers=[trunk.block1, nn.Identity()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="width: expected a whole number from 1, got 0"):
        CorruptionNetwork(width=0)
    with pytest.raises(ValueError, match="x: expected N×C×H×W, got 3×8×8"):
        CorruptionNetwork(width=2)(torch.rand(3, 8, 8))


# Trunks that are frozen, wholly or in part


def test_a_frozen_trunk_keeps_the_statistics_of_its_batch_norm(x: Tensor) -> None:
    trunk = trunk_of().train()
    network = CorruptionNetwork(trunk.requires_grad_(False), width=4)
    before = copy.deepcopy(trunk.state_dict())
    network(x)
    assert network.train().training
    assert network.blocks.training
    assert not any(m.training for m in trunk.modules())
    network(x)
    assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items())
    # One that trains moves them, also where a part of it is frozen.
    network = CorruptionNetwork(trunk.requires_grad_(True), width=4)
    trunk.block1.requires_grad_(False)  # type: ignore[union-attr]
    assert all(m.training for m in network.train().modules())
    network(x)
    assert any(not torch.equal(t, before[n]) for n, t in trunk.state_dict().items())
    assert not any(m.training for m in network.eval().modules())


def test_no_graph_is_built_through_a_frozen_trunk(x: Tensor) -> None:
    trunk = trunk_of()
    network = CorruptionNetwork(trunk, width=4).train()

    def of_trunk() -> int:
        passed: list[int] = []
        before = trunk.register_forward_pre_hook(lambda *_: passed.append(len(kept)))
        behind = trunk.register_forward_hook(lambda *_: passed.append(len(kept)))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(x).sum().backward()
        before.remove()
        behind.remove()
        return passed[1] - passed[0]

    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    assert of_trunk() > 0
    trunk.requires_grad_(False).zero_grad()
    assert of_trunk() == 0
    assert all(p.grad is None for p in trunk.parameters())
    assert all(p.grad is not None for p in network.blocks.parameters())


def test_a_gradient_reaches_an_image_through_a_frozen_trunk(x: Tensor) -> None:
    network = CorruptionNetwork(trunk_of().requires_grad_(False), width=4)
    randomize(network.logits)
    network(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (trunk_of, {"classifier.weight", "classifier.bias"}),
        (lambda: torchvision.models.resnet18(weights=None), {"fc.weight", "fc.bias"}),
    ],
)
def test_each_weight_that_asks_for_a_gradient_gets_one(make: Any, head: set[str]) -> None:
    """Several processes wait for it: the head of a trunk, which no feature needs, is frozen."""
    trunk = make()
    first = next(trunk.parameters()).requires_grad_(False)
    network = CorruptionNetwork(trunk, width=2, input_size=(64, 64)).train()
    randomize(network.logits)
    network(torch.rand(2, 3, 64, 64)).sum().backward()
    asking = {n for n, p in trunk.named_parameters() if p.requires_grad}
    assert asking == {n for n, p in trunk.named_parameters() if p is not first} - head
    assert {n for n, p in trunk.named_parameters() if p.grad is not None} == asking


# The size that the trunk sees


def test_the_trunk_sees_images_of_its_size(x: Tensor) -> None:
    trunk = trunk_of()
    seen: list[Tensor] = []
    trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network = CorruptionNetwork(trunk, width=4, trunk_size=96).eval()
    randomize(network)
    logits = network(x)
    assert logits.shape == (3, 1, 64, 64)
    assert logits.std() > 0
    torch.testing.assert_close(seen[-1], F.interpolate(x, (96, 96), mode="bilinear"))
    # The shorter side counts; an image of that size is not resized.
    assert network(torch.rand(1, 3, 48, 64)).shape == (1, 1, 48, 64)
    assert seen[-1].shape == (1, 3, 96, 128)
    own = torch.rand(1, 3, 96, 100)
    network(own)
    assert torch.equal(seen[-1], own)
    network(torch.rand(1, 3, 192, 192))
    assert seen[-1].shape == (1, 3, 96, 96)


def test_a_trunk_of_many_scales_has_them_all_at_its_size() -> None:
    trunk = load_classifier("resnet18", None)
    at_32 = CorruptionNetwork(trunk, width=2, input_size=(32, 32))
    at_128 = CorruptionNetwork(trunk, width=2, input_size=(32, 32), trunk_size=128)
    assert at_32.channels == (64, 64, 128, 256)  # a single position is no map
    assert at_128.channels == (64, 64, 128, 256, 512)
    assert at_128.layer_names is not None
    layers = [trunk.get_submodule(name) for name in at_128.layer_names]
    again = CorruptionNetwork(trunk, layers=layers, width=2, input_size=(32, 32))
    assert again.channels == at_128.channels


def test_a_half_precision_trunk_has_a_size(x: Tensor) -> None:
    network = CorruptionNetwork(trunk_of().bfloat16(), width=4, trunk_size=96).eval()
    randomize(network.logits)
    full = CorruptionNetwork(trunk_of(), width=4, trunk_size=96).eval()
    full.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(x.bfloat16()), full(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [0, 2.5, 10**6, "large"])
def test_a_size_that_cannot_be_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="trunk_size: expected"):
        CorruptionNetwork(width=2, trunk_size=size)
