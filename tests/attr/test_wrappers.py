from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    Attribution,
    Deconvolution,
    FeatureAblation,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust.attr import Guided, MultiScale, PerceptualBallPerturbation, RobustCAM, TopClasses
from tests.networks import Called, ChannelMeans, Counted

W = torch.tensor([[1.0, -2.0, 4.0], [0.0, 3.0, -1.0]])
X = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -1.0]])  # predicted: class 0 (3, 2), class 1 (-2, 1)


def linear(x: Tensor) -> Tensor:
    return x @ W.T.to(x)


class Fixed(Attribution):
    """Gives what it is told to."""

    def __init__(self, result: Any) -> None:
        super().__init__(linear)
        self.result = result

    @log_usage()
    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        return self.result


class Cam(nn.Module):
    """Images 4×4, features 2×2, and one linear layer behind their average."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.AvgPool2d(2)
        self.weight = torch.tensor(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(dim=(2, 3)) @ self.weight.T


# Bilinear upsampling of two pixels to four: the outer ones lie outside of the two centres.
UP = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])


@pytest.fixture
def image() -> Tensor:
    """2×2×4×4; in both samples the features of the two channels differ in both directions."""
    return torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(8))


def test_worked_by_hand_the_gradient_guides_and_the_sign_is_kept() -> None:
    guided = Guided(InputXGradient(linear)).attribute(X, 0)
    # x·w = (1, -2, 4) and (2, 0, -4); the guide is |w| / 4 = (1/4, 1/2, 1)
    torch.testing.assert_close(guided, torch.tensor([[0.25, -1.0, 4.0], [0.5, 0.0, -4.0]]))


def test_each_sample_is_scaled_by_its_own_maximum() -> None:
    def square(x: Tensor) -> Tensor:
        return x.square().sum(dim=1)

    x = torch.tensor([[1.0, 2.0], [10.0, -5.0]])
    # x·2x = (2, 8) and (200, 50); the guides are |2x| / 4 and |2x| / 20
    guided = Guided(InputXGradient(square)).attribute(x)
    torch.testing.assert_close(guided, torch.tensor([[1.0, 8.0], [200.0, 25.0]]))


def test_the_gradient_is_that_of_the_attributions_forward_func() -> None:
    ablation = FeatureAblation(linear)
    torch.testing.assert_close(
        Guided(ablation).attribute(X, 1), Guided(ablation, Saliency(linear)).attribute(X, 1)
    )


def test_a_map_counts_with_its_positive_part_upsampled_bilinearly_in_all_channels(
    image: Tensor,
) -> None:
    net = Cam([[1.0, -1.0], [0.0, 1.0]])
    features = nn.functional.avg_pool2d(image, 2)
    cam = features[:, 0] - features[:, 1]
    assert (cam.amin(dim=(1, 2)) < 0).all()
    assert (cam.amax(dim=(1, 2)) > 0).all()
    up = UP @ cam.clamp(min=0) @ UP.T
    expected = image * (up / up.amax(dim=(1, 2), keepdim=True)).unsqueeze(1)
    of_grad_cam = Guided(Fixed(image), LayerGradCam(net, net.layer)).attribute(image, 0)
    torch.testing.assert_close(of_grad_cam, expected)
    robust = Guided(Fixed(image), RobustCAM(net, net.layer))
    torch.testing.assert_close(
        robust.attribute(image, 0, guide_arguments={"k": 1, "normalize": None}), expected
    )
    quiet = NoiseTunnel(LayerGradCam(net, net.layer))
    torch.testing.assert_close(
        Guided(Fixed(image), quiet).attribute(
            image, 0, guide_arguments={"stdevs": 0.0, "nt_samples": 2}
        ),
        expected,
    )


def test_a_layers_map_in_the_shape_of_the_inputs_still_counts_with_its_positive_part() -> None:
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(dim=(2, 3)) @ torch.tensor([[1.0, -1.0]])

    net = Signed()
    x = torch.tensor([[[[1.0, -3.0], [2.0, 0.0]]]])
    guide = RobustCAM(net, net.layer)
    arguments: dict[str, Any] = {"k": 1, "normalize": None}
    by_layer = Guided(Fixed(torch.ones_like(x)), guide).attribute(x, 0, guide_arguments=arguments)
    torch.testing.assert_close(by_layer, torch.tensor([[[[0.5, 0.0], [1.0, 0.0]]]]))
    tunnel = NoiseTunnel(guide)
    arguments |= {"stdevs": 0.0, "nt_samples": 2}
    torch.testing.assert_close(
        Guided(Fixed(torch.ones_like(x)), tunnel).attribute(x, 0, guide_arguments=arguments),
        by_layer,
    )
    scaled = MultiScale(guide, (1,))
    arguments = {"k": 1, "normalize": None}
    torch.testing.assert_close(
        Guided(Fixed(torch.ones_like(x)), scaled).attribute(x, 0, guide_arguments=arguments),
        by_layer,
    )
    by_magnitude = Guided(Fixed(torch.ones_like(x)), Fixed(x)).attribute(x, 0)
    torch.testing.assert_close(by_magnitude, torch.tensor([[[[1 / 3, 1.0], [2 / 3, 0.0]]]]))


def test_a_guide_without_a_positive_value_gives_zeros_and_leaves_the_others_alone(
    image: Tensor,
) -> None:
    def dead_below_zero(x: Tensor) -> Tensor:
        return x.relu()[:, :1]

    x = torch.tensor([[-1.0, 5.0], [2.0, 5.0]])
    guided = Guided(Fixed(torch.ones_like(x)), Saliency(dead_below_zero)).attribute(x, 0)
    assert guided.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    net = Cam([[-1.0, -1.0], [1.0, 1.0]])
    negative = Guided(Fixed(image), LayerGradCam(net, net.layer))
    assert not negative.attribute(image, 0).any()
    assert negative.attribute(image, 1).all()


def test_each_tensor_of_a_tuple_is_guided_by_its_own_gradient() -> None:
    def both(a: Tensor, b: Tensor, scale: float) -> Tensor:
        return a @ W.T + scale * b @ torch.tensor([[10.0, 0.0], [5.0, 0.0]])

    a, b = X, torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    guided = Guided(InputXGradient(both)).attribute((a, b), 0, additional_forward_args=2.0)
    assert isinstance(guided, tuple)
    torch.testing.assert_close(guided[0], torch.tensor([[0.25, -1.0, 4.0], [0.5, 0.0, -4.0]]))
    # b·(20, 10), guide (1, 1/2)
    torch.testing.assert_close(guided[1], torch.tensor([[20.0, 10.0], [-20.0, 15.0]]))
    one = Guided(InputXGradient(linear)).attribute((X,), 0)
    assert isinstance(one, tuple)
    torch.testing.assert_close(one[0], guided[0])


def test_one_map_guides_all_tensors_of_a_tuple(image: Tensor) -> None:
    net = Cam([[1.0, -1.0], [0.0, 1.0]])

    two = Called(lambda a, b: net(a) + b.mean(dim=(1, 2, 3)).unsqueeze(1))
    finer = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    guide = LayerGradCam(two, net.layer)
    results = Guided(Fixed((image, finer)), guide).attribute((image, finer), 0)
    alone = Guided(Fixed(image), LayerGradCam(net, net.layer)).attribute(image, 0)
    torch.testing.assert_close(results[0], alone)
    assert results[1].shape == finer.shape


def test_without_a_target_both_explain_the_class_that_the_attribution_predicts() -> None:
    predicted = torch.tensor([0, 1])
    guided = Guided(InputXGradient(linear))
    torch.testing.assert_close(guided.attribute(X), guided.attribute(X, predicted))

    def reversed_classes(x: Tensor) -> Tensor:
        return linear(x).flip(1)

    other = Guided(InputXGradient(linear), Saliency(reversed_classes))
    torch.testing.assert_close(other.attribute(X), other.attribute(X, predicted))


@pytest.mark.parametrize(
    "scores",
    [lambda x: x.square().sum(dim=1), lambda x: x.square().sum(dim=1, keepdim=True)],
    ids=["N", "N×1"],
)
def test_scores_of_one_class_need_no_target(scores: Any) -> None:
    # x·2x·|2x| / max|2x|
    guided = Guided(InputXGradient(scores)).attribute(X)
    torch.testing.assert_close(guided, torch.tensor([[2.0, 2.0, 2.0], [8.0, 0.0, 1.0]]))


def test_a_single_number_for_a_batch_of_one_needs_no_target() -> None:
    ablation = FeatureAblation(lambda x: x.square().sum())
    guided = Guided(ablation, Fixed(torch.tensor([[1.0, 2.0, 4.0]]))).attribute(X[:1])
    torch.testing.assert_close(guided, torch.tensor([[0.25, 0.5, 1.0]]))


def test_scores_of_more_dimensions_need_a_target_as_in_captum() -> None:
    def grid(x: Tensor) -> Tensor:
        return linear(x).unsqueeze(2).expand(-1, 2, 3)

    with pytest.raises(AssertionError, match="Target not provided when necessary"):
        Guided(InputXGradient(grid)).attribute(X)
    torch.testing.assert_close(
        Guided(InputXGradient(grid)).attribute(X, (0, 1)),
        Guided(InputXGradient(linear)).attribute(X, 0),
    )


def test_no_forward_pass_is_wasted(image: Tensor) -> None:
    counted = Counted(linear)
    Guided(InputXGradient(counted)).attribute(X, 0)
    assert len(counted.calls) == 2
    Guided(InputXGradient(counted)).attribute(X)
    assert len(counted.calls) == 2 + 3
    Guided(Guided(InputXGradient(counted))).attribute(X)  # of three, and one for all of them
    assert len(counted.calls) == 5 + 4

    # These find the predicted class by themselves, or do not ask for any.
    cam = Cam([[1.0], [2.0]])
    counted = Counted(cam)
    grey = image[:, :1]
    robust = RobustCAM(counted, cam.layer)
    Guided(robust, robust).attribute(grey, upsample=True)
    assert len(counted.calls) == 2
    Guided(robust, Guided(robust, robust)).attribute(
        grey, upsample=True, guide_arguments={"upsample": True}
    )
    assert len(counted.calls) == 2 + 3
    neuron = NeuronGradient(counted, cam.layer)
    selector = {"neuron_selector": (0, 0, 0)}
    Guided(neuron, neuron).attribute(grey, **selector, guide_arguments=selector)
    assert len(counted.calls) == 5 + 2


def test_what_comes_with_the_attributions_stays_with_them() -> None:
    gradients = IntegratedGradients(linear)
    guided, delta = Guided(gradients).attribute(X, 0, return_convergence_delta=True, n_steps=7)
    _, expected = gradients.attribute(X, target=0, return_convergence_delta=True, n_steps=7)
    torch.testing.assert_close(guided, Guided(gradients).attribute(X, 0, n_steps=7))
    torch.testing.assert_close(delta, expected)
    (of_tuple,), _ = Guided(gradients).attribute((X,), 0, return_convergence_delta=True, n_steps=7)
    torch.testing.assert_close(of_tuple, guided)

    details = object()
    result = Guided(Fixed((X, details))).attribute(X, 0)
    assert isinstance(result, tuple)
    assert result[1] is details


def test_arguments_go_to_the_one_they_are_meant_for() -> None:
    away = torch.full_like(X, 2.0)
    guided = Guided(IntegratedGradients(linear), Saliency(linear)).attribute(
        X, 0, baselines=away, guide_arguments={"abs": False}
    )
    torch.testing.assert_close(guided, (X - away) * W[0] * W[0].abs() / 4)


def test_it_guides_wrapped_ones_and_wraps_guided_ones() -> None:
    attribution = InputXGradient(linear)
    guide = W[0].abs() / 4
    twice = Guided(Guided(attribution)).attribute(X, 0)
    torch.testing.assert_close(twice, X * W[0] * guide**2)
    by_guided = Guided(attribution, Guided(attribution)).attribute(X, 0)
    inner = (X * W[0] * guide).abs()
    torch.testing.assert_close(by_guided, X * W[0] * inner / inner.amax(dim=1, keepdim=True))

    noisy = NoiseTunnel(attribution)
    torch.manual_seed(0)
    expected = noisy.attribute(X, target=0, stdevs=0.5, nt_samples=3) * guide
    torch.manual_seed(0)
    torch.testing.assert_close(Guided(noisy).attribute(X, 0, stdevs=0.5, nt_samples=3), expected)
    torch.manual_seed(0)  # the guide of a linear model is the same for every noise
    around = NoiseTunnel(Guided(attribution)).attribute(X, target=0, stdevs=0.5, nt_samples=3)
    torch.testing.assert_close(around, expected)


def test_an_attribution_that_takes_no_target_can_guide() -> None:
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
    guide = NeuronGradient(net, net[0])
    guided = Guided(InputXGradient(linear), guide)
    expected = net[0].weight[1].detach().abs()
    torch.testing.assert_close(
        guided.attribute(X, guide_arguments={"neuron_selector": 1}),
        X * W * (expected / expected.max()),  # of the predicted classes, 0 and 1
    )


def test_it_tells_captum_what_the_guided_attribution_tells() -> None:
    for attribution in (Saliency(linear), InputXGradient(linear), FeatureAblation(linear)):
        guided = Guided(attribution)
        assert guided.multiplies_by_inputs == attribution.multiplies_by_inputs
        assert guided.forward_func is attribution.forward_func
        assert not guided.has_convergence_delta()


def test_nobody_can_change_the_inputs_of_the_others() -> None:
    class Vandal(Attribution):
        def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
            with torch.no_grad():
                inputs.zero_()
            return torch.ones_like(inputs)

    def square(x: Tensor) -> Tensor:
        return x.square().sum(dim=1)

    x = X.clone()
    guided = Guided(Vandal(square)).attribute(x)
    assert torch.equal(x, X)
    torch.testing.assert_close(guided, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.5]]))


def test_it_does_not_warn(image: Tensor) -> None:
    net = Cam([[1.0, -1.0], [0.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guided(InputXGradient(linear)).attribute(X)
        Guided(Saliency(net), LayerGradCam(net, net.layer)).attribute(image)


def test_tensors_made_in_inference_mode_are_welcome() -> None:
    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        return linear(x * scale)

    with torch.inference_mode():
        x, scale, target = X.clone(), torch.full((2, 3), 2.0), torch.tensor([0, 0])
        guided = Guided(InputXGradient(scaled)).attribute(x, target, (scale,))
    torch.testing.assert_close(guided, 2 * Guided(InputXGradient(linear)).attribute(X, 0))
    torch.testing.assert_close(Guided(InputXGradient(scaled)).attribute(x, target, scale), guided)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    guided = Guided(InputXGradient(linear)).attribute(X.to(dtype), 0)
    assert guided.dtype == dtype
    assert guided.tolist() == [[0.25, -1.0, 4.0], [0.5, 0.0, -4.0]]


def test_half_precision_rounds_once() -> None:
    a, g = torch.rand(2, 1, 50, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = (a.float() * g.float() / g.float().max()).bfloat16()
    assert torch.equal(Guided(Fixed(a), Fixed(g)).attribute(a, 0), expected)


def test_the_result_is_detached_whatever_is_multiplied() -> None:
    leaf = X.clone().requires_grad_()
    for attribution, guide in ((2 * leaf, X), (X, 2 * leaf)):
        assert not Guided(Fixed(attribution), Fixed(guide)).attribute(X, 0).requires_grad


def test_a_guided_backpropagation_can_be_guided(image: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    inner = GuidedGradCam(net, net[0])
    expected = inner.attribute(image.clone().requires_grad_(), target=1).detach()
    guided = Guided(inner, Fixed(torch.ones(2, 1, 2, 2))).attribute(image, 1)
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize(
    ("attribution", "guide", "message"),
    [
        (linear, "gradient", "attribution: expected an Attribution, got function"),
        (Saliency, "gradient", "attribution: expected an Attribution, got the class Saliency"),
        (Saliency(linear), None, "guide: expected 'gradient' or an Attribution, got NoneType"),
        (Saliency(linear), RobustCAM, "guide: .* got the class RobustCAM"),
    ],
)
def test_what_is_no_attribution_is_refused(attribution: Any, guide: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Guided(attribution, guide)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="guide: expected 'gradient' or an Attribution, got 'cam'"):
        Guided(Saliency(linear), "cam")


def test_a_map_is_not_guided(image: Tensor) -> None:
    net = Cam([[1.0, -1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"attribution: .*\(2, 2, 4, 4\), got \(2, 1, 2, 2\)"):
        Guided(LayerGradCam(net, net.layer)).attribute(image, 0)


@pytest.mark.parametrize(
    "result",
    [
        torch.ones(2, 3, 2, 2),  # channels
        torch.ones(1, 1, 2, 2),  # the batch
        torch.ones(2, 1, 2),
        torch.ones(2, 1),
        (torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)),
        "map",
    ],
    ids=str,
)
def test_a_guide_that_does_not_fit_is_refused(image: Tensor, result: Any) -> None:
    with pytest.raises(ValueError, match=r"guide: .*inputs' shape, \(2, 2, 4, 4\), or a map 2×1×"):
        Guided(Fixed(image), Fixed(result)).attribute(image, 0)


def test_the_features_of_a_layer_are_no_guide(image: Tensor) -> None:
    net = Cam([[1.0, -1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"guide: .* got \(2, 2, 2, 2\)"):
        Guided(Fixed(image), LayerActivation(net, net.layer)).attribute(image, 0)


@pytest.mark.parametrize("place", ["attribution", "guide"])
def test_nan_in_either_names_the_sample(place: str) -> None:
    bad = X.clone()
    bad[1, 2] = float("nan")
    attribution, guide = (bad, X) if place == "attribution" else (X, bad)
    with pytest.raises(ValueError, match=f"{place}: NaN or infinity in sample 1"):
        Guided(Fixed(attribution), Fixed(guide)).attribute(X, 0)


def test_the_guide_is_raised_to_the_power() -> None:
    guide = Fixed(torch.tensor([[4.0, -1.0, 0.0], [0.0, 1.0, 2.0]]))
    result = Guided(Fixed(torch.full((2, 3), 8.0)), guide, power=0.5).attribute(X, 0)
    expected = 8 * torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.5, 1.0]]).sqrt()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("power", [0, -1, float("nan"), float("inf"), "two"])
def test_the_power_is_a_positive_number(power: Any) -> None:
    with pytest.raises(ValueError, match="power"):
        Guided(Fixed(X), power=power)


def test_multi_scale_averages_the_maps_of_each_size_scaled_to_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), ChannelMeans()).eval()
    x = torch.rand(2, 3, 8, 12)
    cam = RobustCAM(net, net[1], base="gradcam")
    result = MultiScale(cam, (1, 1.5)).attribute(x, 1, normalize=None)
    expected = torch.zeros(2, 1, 8, 12)
    for size in ((8, 12), (12, 18)):
        larger = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        heat = cam.attribute(larger, 1, normalize=None)
        heat = F.interpolate(heat, (8, 12), mode="bilinear", align_corners=False, antialias=True)
        expected += heat / heat.abs().amax(dim=(1, 2, 3), keepdim=True) / 2
    torch.testing.assert_close(result, expected)


def test_multi_scale_explains_the_class_of_the_image_as_it_is() -> None:
    # Only at the small size is class 0 ahead: a model of the size of its input.
    def by_size(x: Tensor) -> Tensor:
        scores = x.mean(dim=(2, 3))
        lead = 10.0 if x.shape[2] == 4 else -10.0
        return scores + torch.tensor([lead, 0.0, 0.0])

    x = torch.rand(2, 3, 4, 4)
    result = MultiScale(InputXGradient(by_size), (1, 2)).attribute(x)
    assert result[:, 0].all()
    assert not result[:, 1:].any()


def test_multi_scale_of_one_scale_is_the_map_scaled_to_one() -> None:
    x = torch.rand(2, 3, 4, 4) - 0.5
    plain = InputXGradient(ChannelMeans()).attribute(x, 0)
    result = MultiScale(InputXGradient(ChannelMeans()), (1,)).attribute(x, 0)
    torch.testing.assert_close(result, plain / plain.abs().amax(dim=(1, 2, 3), keepdim=True))


def test_a_map_of_zeros_stays_zeros_at_every_scale() -> None:
    assert (
        not MultiScale(InputXGradient(ChannelMeans())).attribute(torch.zeros(1, 3, 4, 4), 0).any()
    )


def test_multi_scale_guides() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), ChannelMeans()).eval()
    x = torch.rand(2, 3, 8, 8)
    guide = MultiScale(RobustCAM(net, net[1]), (1, 1.5))
    guided = Guided(InputXGradient(net), guide).attribute(x, 1)
    heat = guide.attribute(x, 1)
    heat = heat / heat.amax(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(guided, InputXGradient(net).attribute(x, 1) * heat)


def test_white_stays_white_at_every_scale() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), ChannelMeans(), nn.Linear(2, 3)).eval()
    white = torch.ones(1, 1, 64, 64)
    method = PerceptualBallPerturbation(net, ())
    MultiScale(method, (0.7,)).attribute(white, bounds=(0, 1), max_iterations=1)


@pytest.mark.parametrize(
    "scales", [(), (0,), (1, -1), (float("nan"),), (float("inf"),), 2.0, ["x"]]
)
def test_scales_are_positive_numbers(scales: Any) -> None:
    with pytest.raises(ValueError, match="scales"):
        MultiScale(InputXGradient(ChannelMeans()), scales)


def test_multi_scale_takes_images_only() -> None:
    with pytest.raises(ValueError, match="N×C×H×W"):
        MultiScale(InputXGradient(lambda x: x)).attribute(torch.rand(2, 3), 0)
    with pytest.raises(TypeError, match="attribution"):
        MultiScale(ChannelMeans())  # type: ignore[arg-type]


def test_hooks_of_captums_methods_run_in_a_compiled_model() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    compiled = torch.compile(net, backend="eager")
    x = torch.rand(2, 3, 8, 8)
    compiled(x.clone().requires_grad_())
    for kind in (GuidedBackprop, Deconvolution):
        expected = kind(net).attribute(x.clone().requires_grad_(), 1)
        plain = Saliency(net).attribute(x.clone().requires_grad_(), 1, abs=False)
        found = TopClasses(kind(compiled), weights=[1.0]).attribute(x, 1)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, plain)


def test_a_function_that_writes_to_its_images_is_given_copies() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()

    def writing(x: Tensor) -> Tensor:
        return net(x.mul_(4).sub_(2))

    def plain(x: Tensor) -> Tensor:
        return net(4 * x - 2)

    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    mask = torch.arange(4).repeat_interleave(16).reshape(1, 1, 8, 8)
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (Saliency, {}),
        (IntegratedGradients, {"n_steps": 4}),
        (FeatureAblation, {"feature_mask": mask}),
        (lambda f: NoiseTunnel(Saliency(f)), {"nt_samples": 2, "stdevs": 0.0}),
    ]
    for kind, arguments in kinds:
        for wrap in (lambda a: TopClasses(a, 2), Guided, lambda a: MultiScale(a, (1,))):
            found = wrap(kind(writing))
            wanted = wrap(kind(plain)).attribute(x, 1, **arguments)
            torch.testing.assert_close(found.attribute(x, 1, **arguments), wanted)
            assert torch.equal(x, before)
            assert found.attribution.forward_func is writing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_noise_around_a_model_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).eval()
    half = copy.deepcopy(net).to(dtype)
    x = torch.rand(2, 3, 8, 8)
    noise: dict[str, Any] = {"nt_samples": 2, "stdevs": 0.0}
    for model in (half, lambda images: half(images)):
        for wrap in (Guided, lambda a: MultiScale(a, (1,)), lambda a: TopClasses(a, 2)):
            expected = wrap(Saliency(net)).attribute(x, 1)
            found = wrap(NoiseTunnel(Saliency(model))).attribute(x.to(dtype), 1, **noise)
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
        guided = Guided(Saliency(model), NoiseTunnel(Saliency(model)))
        found = guided.attribute(x.to(dtype), 1, guide_arguments=noise)
        assert found.dtype == dtype
        expected = Guided(Saliency(net)).attribute(x, 1)
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
