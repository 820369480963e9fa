from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from pytorch_grad_cam import ScoreCAM as PeersScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from captum_robust import ClassActivationMap, RobustCAM, ScoreCAM
from captum_robust.attr.class_activation_map import KINDS
from captum_robust.benchmark.passes import count_passes
from captum_robust.catalog.methods import SLOW, build_methods
from tests.networks import Counted, Net, classifier_of

PEERS = {
    "grad_cam": GradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlus,
    "layer_cam": LayerCAM,
    "hires_cam": HiResCAM,
}
TARGETS = [1, 4, 2]


def convolutions() -> nn.Sequential:
    """Four rectified convolutions, the first as large as the image, and a head of positions.

    They have no biases: where the image is black, so is every layer.
    """

    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.ReLU()]

    torch.manual_seed(0)
    trunk = [*block(3, 6, 1), *block(6, 8, 2), *block(8, 8, 1), *block(8, 10, 2)]
    return nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 5)).eval()


@pytest.fixture
def net() -> nn.Sequential:
    net = convolutions()
    with torch.no_grad():
        net[-1].weight.mul_(1e5)  # grad-cam adds 1e-6 to squares of gradients
    return net


@pytest.fixture
def x() -> Tensor:
    x = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    x[..., 8:] = 0
    return x


def peers_map(kind: Any, net: nn.Module, layers: list[nn.Module], x: Tensor) -> Tensor:
    with kind(model=net, target_layers=layers) as cam:
        maps = cam(input_tensor=x.clone(), targets=[ClassifierOutputTarget(t) for t in TARGETS])
    return torch.from_numpy(maps).unsqueeze(1)


def scaled(maps: Tensor) -> Tensor:
    """In [0, 1], as the maps of grad-cam."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-7)


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("layer", [1, 3, 7])
def test_a_map_is_that_of_grad_cam(net: nn.Sequential, x: Tensor, kind: str, layer: int) -> None:
    maps = ClassActivationMap(net, net[layer], kind).attribute(x, torch.tensor(TARGETS))
    # It scales, then enlarges; ours is of the layer's size.
    found = F.interpolate(scaled(maps), x.shape[2:], mode="bilinear")
    expected = peers_map(PEERS[kind], net, [net[layer]], x)
    torch.testing.assert_close(scaled(found), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", PEERS)
def test_a_map_over_several_layers_is_that_of_grad_cam(
    net: nn.Sequential, x: Tensor, kind: str
) -> None:
    layers = [net[7], net[3], net[5]]
    found = ClassActivationMap(net, layers, kind).attribute(x, torch.tensor(TARGETS))
    # Each of the maps is 0 where the image is black; grad-cam would shift others to 0.
    expected = peers_map(PEERS[kind], net, layers, x)
    torch.testing.assert_close(scaled(found), expected, rtol=0, atol=2e-5)


def test_eigen_cam_is_the_first_principal_component(net: nn.Sequential, x: Tensor) -> None:
    maps = ClassActivationMap(net, net[3], "eigen_cam").attribute(x, 1, normalize=None)
    with torch.no_grad():
        features = net[:4](x)
    with EigenCAM(model=net, target_layers=[net[3]]) as cam:
        theirs = cam.get_cam_image(None, None, None, features.numpy(), None, False)
    for own, other, a in zip(maps[:, 0].numpy(), theirs, features.numpy(), strict=True):
        sign = np.sign(np.vdot(own, other))  # theirs is as the decomposition happens to give it
        np.testing.assert_allclose(own, sign * other, rtol=1e-3, atol=1e-5)
        assert np.vdot(own, a.sum(axis=0)) > 0


def test_grad_cam_is_captums_and_robust_cams_of_one_class(net: nn.Sequential, x: Tensor) -> None:
    expected = RobustCAM(net, net[7]).attribute(x, 2, k=1, upsample=True)
    found = ClassActivationMap(net, net[7], "grad_cam").attribute(x, 2, upsample=True)
    torch.testing.assert_close(found, expected)


def test_score_cam_is_that_of_grad_cam_where_nothing_is_enlarged(x: Tensor) -> None:
    # It enlarges with the corners aligned, which the paper's code does not.
    net = convolutions()
    found = ScoreCAM(net, net[1]).attribute(x, torch.tensor(TARGETS))
    expected = peers_map(PeersScoreCAM, net, [net[1]], x)
    torch.testing.assert_close(scaled(found), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_score_cam_weighs_each_channel_by_what_it_shows(x: Tensor) -> None:
    net = convolutions()
    features = net[:6](x)
    features[:, 0] = 0.0  # shows nothing, and is no NaN
    masked = nn.Sequential(nn.Identity(), *net[6:])
    counted = Counted(lambda images: masked[1:](masked[0](zeroed(net[:6](images)))))
    found = ScoreCAM(counted, masked[0]).attribute(x, 1, normalize=None, perturbations_per_eval=3)
    assert counted.calls == [3, *[3, 3, 2] * 3]
    for image, a, own in zip(x, features, found, strict=True):
        scores = []
        for channel in a:
            large = F.interpolate(channel[None, None], (16, 24), mode="bilinear")
            span = large.max() - large.min()
            mask = (large - large.min()) / span if span > 0 else torch.zeros_like(large)
            scores.append(masked[1:](zeroed(net[:6](image[None] * mask)))[0, 1])
        weights = torch.stack(scores).softmax(dim=0)
        torch.testing.assert_close(own[0], (weights[:, None, None] * a).sum(dim=0))


def zeroed(features: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(features[:, :1]), features[:, 1:]], dim=1)


class Head(nn.Module):
    """A score with gradients g of features A that are the image: Σ g A."""

    def __init__(self, g: list[float]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.register_buffer("g", torch.tensor(g).reshape(1, 2, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.g).sum(dim=(1, 2, 3)).unsqueeze(1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # A = [[1, 3], [2, 0]], g = [[0.5, -1], [2, 1]], a row a channel.
        ("grad_cam", [-0.25 * 1 + 1.5 * 2, -0.25 * 3]),
        ("hires_cam", [0.5 * 1 + 2 * 2, -1 * 3]),
        ("layer_cam", [0.5 * 1 + 2 * 2, 0]),
        # ΣA = 4 and 2: weights .5 / (2 + 2) + 0 and 2 / (2 + 4) + 1 / (2 + 2).
        ("grad_cam_plus_plus", [0.125 * 1 + (1 / 3 + 0.25) * 2, 0.125 * 3]),
        # The positions are (1, 2) and (3, 0), ±(1, -1) about their mean; both features sum to 3.
        ("eigen_cam", [-(2**0.5), 2**0.5]),
    ],
)
def test_worked_by_hand(kind: str, expected: list[float]) -> None:
    net, x = Head([0.5, -1, 2, 1]), torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    found = ClassActivationMap(net, net.layer, kind).attribute(x, normalize=None).flatten()
    if kind == "eigen_cam":  # at equal sums neither direction is that of growth
        found = found * (found[1] / found[1].abs())
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [False, True])
def test_it_costs_one_pass_whose_graph_begins_at_the_first_layer(
    net: nn.Sequential, x: Tensor, kind: str, several: bool
) -> None:
    with_graph: list[bool] = []
    backward: list[nn.Module] = []
    for module in net:
        module.register_forward_hook(lambda m, a, out: with_graph.append(out.requires_grad))
        module.register_full_backward_hook(lambda m, *_: backward.append(m))
    layers = [net[3], net[7]] if several else net[7]
    with count_passes(net) as passes:
        ClassActivationMap(net, layers, kind).attribute(x, 1)
    assert passes.forward == len(x)
    assert passes.backward == 0  # none reaches the images
    first = 3 if several else 7
    # These hooks come first: of the layer they see what it gives before the cut.
    assert with_graph == [False] * (first + 1) + [True] * (len(net) - first - 1)
    assert len(backward) == len(set(backward)) <= len(net) - first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [False, True])
def test_it_can_be_differentiated(net: nn.Sequential, x: Tensor, kind: str, several: bool) -> None:
    cam = ClassActivationMap(net, [net[3], net[5]] if several else net[5], kind)
    with_graph = cam.differentiable(x.requires_grad_(), 1, normalize=None)
    torch.testing.assert_close(with_graph.detach(), cam.attribute(x, 1, normalize=None))
    (slope,) = torch.autograd.grad(with_graph.sum(), x)
    assert slope.any()
    assert not cam.attribute(x, 1).requires_grad


def test_a_batch_over_several_layers_gives_what_its_images_give(
    net: nn.Sequential, x: Tensor
) -> None:
    cam = ClassActivationMap(net, [net[1], net[7]])
    single = torch.cat([cam.attribute(x[i : i + 1], 1) for i in range(len(x))])
    torch.testing.assert_close(cam.attribute(x, 1), single)
    assert single.shape == (3, 1, 16, 24)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda n: ClassActivationMap(n, n[1], "layercan"), ValueError, "^kind: .*'layer_cam'"),
        (lambda n: ClassActivationMap(n, []), ValueError, "^layer: expected at least one"),
        (lambda n: ClassActivationMap(n, [n[1], n[1]]), ValueError, "^layer: expected each once"),
        (lambda n: ClassActivationMap(n, ["1", "99"]), ValueError, "^layer: .*got '99'"),
        (lambda n: ClassActivationMap(n, 1), TypeError, "^layer: expected a torch.nn.Module, its"),
        (lambda n: ScoreCAM(n, 1), TypeError, "^layer: expected a torch.nn.Module or"),
    ],
)
def test_wrong_arguments_are_named(
    net: nn.Sequential,
    make: Callable[[nn.Module], object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        make(net)


def test_layers_without_maps_are_refused(x: Tensor) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    for layers in ([net.conv2, net.head], [net.conv2, net.body]):
        with pytest.raises(ValueError, match=r"^layer: "):
            ClassActivationMap(net, layers).attribute(x, 1)
    with pytest.raises(ValueError, match=r"^layer: it did not run"):
        ScoreCAM(net, net.body).attribute(x, 1)
    with pytest.raises(ValueError, match=r"^layer: expected an output N×C×h×w"):
        ScoreCAM(net, net.head).attribute(x, 1)


def test_the_catalogue_has_them() -> None:
    model = classifier_of()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 2])
    names = [*[k for k in KINDS if k != "grad_cam"], "layer_cam_fused", "score_cam", "saliency_max"]
    for method in build_methods(model, names).values():
        maps = method.explain(x, label).maps
        assert maps.shape == (2, 64, 64)
        assert maps.any()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, label[:, None]).sum(), x)
    torch.testing.assert_close(maps, gradient.abs().amax(dim=1))
    assert {"rise", "score_cam"} < set(SLOW)
